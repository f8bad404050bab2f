"""`Solve` without petsc_options: whatever solver it gets, state and gradient are those of LU."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from fem_vi.pde import solver_choice
from tests.helpers import CASES, Case, boundary_dofs, everywhere, interpolated, left, make_case, square

COMM = MPI.COMM_WORLD


def helmholtz(comm: MPI.Comm) -> Case:
    """Sound in a closed box, with a wave number that it meets as an input: indefinite from pi on."""
    V = fem.functionspace(square(comm, 16), ("Lagrange", 1))
    u, f, v = fem.Function(V), fem.Function(V, name="f"), ufl.TestFunction(V)
    k = fem.Constant(V.mesh, 0.0)
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - k**2 * u * v * ufl.dx - f * v * ufl.dx
    return make_case(F, u, [k, f], [fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)], [14.0, 1.0])


def block(comm: MPI.Comm) -> Case:
    """Linear elasticity with a stiffness field, clamped at x = 0."""
    msh = mesh.create_unit_cube(comm, 4, 3, 3)
    V, Q = fem.functionspace(msh, ("Lagrange", 1, (3,))), fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(Q, name="m"), ufl.TestFunction(V)
    strain = ufl.sym(ufl.grad(u))
    F = ufl.exp(m) * ufl.inner(2 * strain + ufl.tr(strain) * ufl.Identity(3), ufl.grad(v)) * ufl.dx - v[2] * ufl.dx
    return make_case(F, u, [m], [fem.dirichletbc(np.zeros(3), boundary_dofs(V, left), V)], [1.0])


def state_and_gradients(case: Case, **options: Any) -> list[Tensor]:
    """For two samples of the first input."""
    first, *rest = (x.clone().requires_grad_() for x in case.values)
    inputs = [torch.stack([first, 0.9 * first]), *rest]
    u = fem_vi.Solve(case.pde, **options)(*inputs)
    loss = fem_vi.all_sum((u * case.weights[-1] + u**2).sum(), COMM)
    return [u.detach(), *torch.autograd.grad(loss, [first, *rest])]


@pytest.mark.mpi
@pytest.mark.parametrize("build", [*CASES.values(), helmholtz, block], ids=lambda build: build.__name__)
@pytest.mark.parametrize("large", [False, True])
def test_any_default_gives_what_lu_gives(build: Any, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(solver_choice, "DIRECT_LIMIT", {1: 0, 2: 0, 3: 0})
    case = build(COMM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # about options that PETSc did not read
        try:
            got = state_and_gradients(case)
        except fem_vi.SolveFailed as error:
            assert large and build is helmholtz
            assert 'petsc_options={"pc_type": "lu"}' in str(error)
            return
    for a, b in zip(got, state_and_gradients(case, petsc_options={"pc_type": "lu"}), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-8 * float(b.abs().max() if b.numel() else 0.0))


@pytest.mark.mpi
def test_large_elasticity_is_solved_by_multigrid_with_rigid_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in SNES, whose matrix is another one."""
    monkeypatch.setattr(solver_choice, "DIRECT_LIMIT", {3: 0})
    solve = fem_vi.Solve(block(COMM).pde)
    factor = solve._equation.factors._vacant()
    assert (factor.ksp.getType(), factor.ksp.getPC().getType()) == ("cg", "gamg")
    assert len(factor.matrix.getNearNullSpace().getVecs()) == 6


@pytest.mark.mpi
@pytest.mark.parametrize("options", [{"ksp_type": "cg", "pc_type": "jacobi", "ksp_max_it": 1}, {"pc_type": "cholesky"}])
def test_an_error_names_the_way_out(options: dict[str, Any]) -> None:
    """A singular Jacobian: not even LU helps, but the error cannot know."""
    msh = square(COMM, 6)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, f, v = fem.Function(V), fem.Function(V, name="f"), ufl.TestFunction(V)
    pde = fem_vi.WeakForm(ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - f * v * ufl.dx, state=u, inputs=[f])
    with pytest.raises(fem_vi.SolveFailed, match=r'petsc_options=\{"pc_type": "lu"\}'):
        fem_vi.Solve(pde, petsc_options=options)(1.0 + interpolated(V, 0.1, 0.2))
