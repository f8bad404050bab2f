"""Variational inference for PDEs on meshes: FEniCSx solvers and weak forms as differentiable PyTorch functions."""
