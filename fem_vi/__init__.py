"""Variational inference for PDEs on meshes: FEniCSx solvers and weak forms as differentiable PyTorch functions.

The public names stand in `__init__.pyi`. Each is imported when it is first used, so that `fem-vi --help` is quick, and
`fem-vi doctor` runs where FEniCSx is missing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
