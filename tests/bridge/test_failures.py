"""A solve that did not converge says so, with the sample, on all ranks; and the operator works again afterwards."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import basix.ufl
import dolfinx
import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

import fem_vi
from fem_vi.pde import petsc_options
from tests.helpers import CASES, boundary_dofs, everywhere, interpolated, source_and_data, square

COMM = MPI.COMM_WORLD


def diffusion(*, fixed: bool = True, comm: MPI.Comm = COMM) -> tuple[fem_vi.WeakForm, Any]:
    """-div(m grad u) = 1: singular where m = 0, and everywhere without Dirichlet conditions."""
    msh = square(comm)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V, name="m"), ufl.TestFunction(V)
    F = m * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
    bcs = [fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)] if fixed else []
    return fem_vi.WeakForm(F, state=u, inputs=[m], bcs=bcs), V


def cubic(comm: MPI.Comm = COMM) -> tuple[fem_vi.WeakForm, Any]:
    """-div((1 + u^2) grad u) = 10 exp(m)."""
    msh = square(comm)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V, name="m"), ufl.TestFunction(V)
    F = (1 + u**2) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - 10 * ufl.exp(m) * v * ufl.dx
    return fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)]), V


def ones(V: Any, *batch: int) -> Tensor:
    return torch.ones(*batch, V.dofmap.index_map.size_local, dtype=torch.float64)


def value_and_gradient(solve: fem_vi.Solve, m: Tensor) -> tuple[Tensor, Tensor]:
    m = m.clone().requires_grad_()
    u = solve(m)
    (gradient,) = torch.autograd.grad(fem_vi.all_sum(u.square().sum(), COMM), m)
    return u.detach(), gradient


def assert_works(solve: fem_vi.Solve, pde: fem_vi.WeakForm, V: Any) -> None:
    """As an operator that has never failed does."""
    m = interpolated(V, 0.3, 0.1) + 1.0
    for got, expected in zip(value_and_gradient(solve, m), value_and_gradient(fem_vi.Solve(pde), m), strict=True):
        assert torch.allclose(got, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "options", [{}, {"pc_type": "cholesky"}, {"ksp_type": "cg", "pc_type": "jacobi"}], ids=["lu", "cholesky", "cg"]
)
def test_singular_jacobian(options: dict[str, Any]) -> None:
    """Pure Neumann data with a source that has a mean: there is no solution."""
    pde, V = diffusion(fixed=False)
    with pytest.raises(fem_vi.SolveFailed, match=r"Solve: the solve: .*(KSP|residual|PETSc)"):
        fem_vi.Solve(pde, petsc_options=options)(ones(V))


@pytest.mark.mpi
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_right_hand_sides_that_are_not_finite(batch: int) -> None:
    """The logarithm of a negative source, and a cotangent that is not a number, also where samples are solved at once."""
    V = fem.functionspace(square(COMM), ("Lagrange", 1))
    u, f, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - ufl.ln(f) * v * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[f], bcs=[fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)])
    good = 2.0 + torch.stack([interpolated(V, 0.5, float(k)) for k in range(batch)])
    bad = good.clone()
    bad[-1] *= -1.0
    with pytest.raises(fem_vi.SolveFailed, match=f"sample {batch - 1} of {batch}: the right-hand side is not finite"):
        fem_vi.Solve(pde)(bad)
    with pytest.warns(UserWarning, match=rf"1 of {batch} samples failed and are NaN: \[{batch - 1}\]"):
        masked = fem_vi.Solve(pde, failed=fem_vi.MaskFailed())(bad)
    solve = fem_vi.Solve(pde)
    expected = solve(good)
    assert torch.allclose(masked[:-1], expected[:-1], rtol=1e-12, atol=0.0)
    x = good.requires_grad_()
    g = torch.ones_like(expected)
    g[-1] = torch.nan
    with pytest.raises(fem_vi.SolveFailed, match="adjoint: the right-hand side is not finite"):
        torch.autograd.grad(solve(x), x, g)


@pytest.mark.mpi
def test_a_sample_fails_in_the_middle_of_a_batch() -> None:
    pde, V = diffusion()
    solve = fem_vi.Solve(pde)
    m = ones(V, 2, 3)
    m[1, 1] = 0.0
    with pytest.raises(fem_vi.SolveFailed, match="Solve: sample 4 of 6: "):
        solve(m.requires_grad_())
    assert_works(solve, pde, V)


@pytest.mark.mpi
def test_newton_stops_at_its_limit() -> None:
    pde, V = cubic()
    solve = fem_vi.Solve(pde, petsc_options={"snes_max_it": 2})
    with pytest.raises(
        fem_vi.SolveFailed, match=r"Solve: sample 1 of 2: SNES .*DIVERGED_MAX_IT.* 2 iterations, residual norm \d"
    ):
        solve(ones(V, 2) * torch.tensor([[-20.0], [1.0]], dtype=torch.float64))
    mild = fem_vi.Solve(pde)
    m = -9.0 * ones(V)
    for got, expected in zip(value_and_gradient(solve, m), value_and_gradient(mild, m), strict=True):
        assert torch.allclose(got, expected, rtol=1e-7, atol=1e-15)


@pytest.mark.mpi
def test_newton_meets_what_is_not_finite() -> None:
    """exp(m) overflows for m = 800."""
    pde, V = cubic()
    solve = fem_vi.Solve(pde)
    with pytest.raises(fem_vi.SolveFailed, match=r"Solve: the solve: .*(SNES|finite)"):
        solve(800.0 * ones(V))
    assert_works(solve, pde, V)


@pytest.mark.mpi
def test_newton_meets_a_singular_jacobian() -> None:
    """-div(m (1 + u^2) grad u) = 1 with m = 0, then with m = 1: the factorisation that failed must not stay."""
    _, V = cubic()
    u, m, v = fem.Function(V), fem.Function(V, name="m"), ufl.TestFunction(V)
    F = m * (1 + u**2) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)])
    solve = fem_vi.Solve(pde)
    for _ in range(2):
        with pytest.raises(fem_vi.SolveFailed, match="Solve: sample 1 of 2: "):
            solve(torch.stack([ones(V), 0.0 * ones(V)]))
    assert_works(solve, pde, V)


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["linear", "nonlinear"])
def test_krylov_method_stops_at_its_limit(name: str) -> None:
    pde, V = diffusion() if name == "linear" else cubic()
    options = {"ksp_type": "cg", "pc_type": "none", "ksp_max_it": 1, "ksp_rtol": 1e-12}
    words = (
        r"KSP stopped with DIVERGED_\w+ after 1 iter"
        if name == "linear"
        else r"SNES stopped with DIVERGED_LINEAR_SOLVE \(KSP: DIVERGED_"
    )
    solve = fem_vi.Solve(pde, petsc_options=options)
    with pytest.raises(fem_vi.SolveFailed, match=rf"Solve: sample 0 of 2: {words}"):
        solve(ones(V, 2) + interpolated(V, 0.3, 0.1))
    with pytest.raises(fem_vi.SolveFailed, match="sample 1 of 2"):  # a source of zero needs no iteration
        fem_vi.Solve(cubic()[0], petsc_options=options)(torch.stack([-800.0 * ones(V), ones(V)]))


@pytest.mark.mpi
def test_adjoint_fails_where_the_forward_did_not() -> None:
    """GMRES with one iteration solves for the state where the right-hand side is an eigenvector, not for a random one."""
    pde, V = diffusion()
    solve = fem_vi.Solve(pde, petsc_options={"ksp_type": "gmres", "pc_type": "none", "ksp_max_it": 400, "ksp_rtol": 1e-12})
    m = (ones(V) + interpolated(V, 0.3, 0.1)).requires_grad_()
    u = solve(m)
    poisoned = torch.full_like(u, torch.nan)
    with pytest.raises(fem_vi.SolveFailed, match=r"Solve: the solve: adjoint: .*not finite"):
        torch.autograd.grad(u, m, grad_outputs=poisoned)
    assert_works(solve, pde, V)


@pytest.mark.mpi
def test_factors_of_failed_calls_are_not_held() -> None:
    """Neither that of the failed sample nor those before it, which no backward will ask for: they go first."""
    pde, V = diffusion()
    solve = fem_vi.Solve(pde)
    m = ones(V, 3)
    m[2] = 0.0
    for _ in range(4):
        with pytest.raises(fem_vi.SolveFailed, match="sample 2 of 3"):
            solve(m.requires_grad_())
    assert len(solve._equation.factors._factors) <= 3
    assert_works(solve, pde, V)


@pytest.mark.mpi
def test_a_misspelt_option_warns_where_petsc_can_tell() -> None:
    pde, V = diffusion()
    solve = fem_vi.Solve(pde, petsc_options={"ksp_tpye": "cg"})
    if hasattr(PETSc.Options(), "used"):
        with pytest.warns(UserWarning, match="ksp_tpye"):
            solve(ones(V))
    else:
        assert tuple(int(n) for n in dolfinx.__version__.split(".")[:2]) < (0, 11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(ones(V))
        for options in ({"ksp_type": "cg", "pc_type": "gamg", "ksp_rtol": 1e-9}, {"pc_type": "cholesky"}):
            fem_vi.Solve(pde, petsc_options=options)(ones(V))
        fem_vi.Solve(cubic()[0], petsc_options={"snes_rtol": 1e-9, "snes_type": "newtonls", "snes_max_it": 30})(ones(V))


def test_an_option_that_petsc_cannot_read() -> None:
    pde, V = diffusion(comm=MPI.COMM_SELF)
    with pytest.raises((fem_vi.FemViError, PETSc.Error)):
        fem_vi.Solve(pde, petsc_options={"ksp_type": "no_such_method"})(ones(V))


def test_options_of_one_operator_do_not_reach_another() -> None:
    pde, V = cubic(MPI.COMM_SELF)
    limited = fem_vi.Solve(pde, petsc_options={"snes_max_it": 1})
    free = fem_vi.Solve(pde)
    assert np.isfinite(free(ones(V)).numpy()).all()
    with pytest.raises(fem_vi.SolveFailed):
        limited(ones(V))


def test_cholesky_of_a_jacobian_without_symmetry_is_found_out_at_any_solve() -> None:
    """The first right-hand side does not touch the entry that breaks the symmetry; the second does, with the same factor."""
    msh = mesh.create_unit_square(MPI.COMM_SELF, 1, 1)
    W = fem.functionspace(msh, ("DG", 0, (2,)))
    u, f, v = fem.Function(W), fem.Function(W), ufl.TestFunction(W)
    F = ufl.inner(u, v) * ufl.dx + 5 * u[0] * v[1] * ufl.dx - ufl.inner(f, v) * ufl.dx
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[f]), petsc_options={"pc_type": "cholesky"})
    harmless = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    assert torch.allclose(solve(harmless), harmless)
    with pytest.raises(fem_vi.SolveFailed, match="symmetric"):
        solve(torch.ones(4, dtype=torch.float64))


def test_unknown_preconditioner_is_named() -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    with pytest.raises(fem_vi.InvalidInput, match="nonsense"):
        fem_vi.Solve(case.pde, petsc_options={"pc_type": "nonsense"})(*case.values)


def test_moved_mesh_is_noticed_forward_and_backward() -> None:
    case = source_and_data(MPI.COMM_SELF)  # of its own, as it is changed
    solve = fem_vi.Solve(case.pde)
    inputs = [x.clone().requires_grad_() for x in case.values]
    u = solve(*inputs)
    case.pde.space.mesh.geometry.x[:, 0] *= 2.0
    with pytest.raises(fem_vi.InvalidInput, match="moved"):
        solve(*inputs)
    with pytest.raises(fem_vi.InvalidInput, match="moved"):
        u.sum().backward()


def test_threads_take_turns() -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    solve = fem_vi.Solve(case.pde)
    inputs = [case.values[0], 2.0 * case.values[0]]
    right = [solve(m) for m in inputs]
    with ThreadPoolExecutor(2) as pool:
        for k, u in zip([0, 1] * 200, pool.map(lambda k: solve(inputs[k]), [0, 1] * 200), strict=True):
            assert torch.allclose(u, right[k], rtol=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize("options", [{}, {"pc_type": "lu"}, {"pc_type": "cholesky"}], ids=str)
def test_a_singular_jacobian_is_found_where_the_right_hand_side_fits_it(options: dict[str, str]) -> None:
    """Nothing fixes the constant: any of many states solves the system, and each has a small residual."""
    msh = square(COMM)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, v, f = fem.Function(V), ufl.TestFunction(V), fem.Function(V)
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - f * (ufl.SpatialCoordinate(msh)[0] - 0.5) * v * ufl.dx
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[f]), petsc_options=options)
    with pytest.raises(fem_vi.SolveFailed, match="singular"):
        solve(interpolated(V, 0.0, 0.0) + 1.0)


@pytest.mark.mpi
def test_an_enclosed_flow_without_a_pressure_level_is_refused() -> None:
    msh = square(COMM, 3)
    cell = msh.basix_cell()
    parts = [basix.ufl.element("Lagrange", cell, 2, shape=(2,)), basix.ufl.element("Lagrange", cell, 1)]
    W = fem.functionspace(msh, basix.ufl.mixed_element(parts))
    w, (v, q) = fem.Function(W), ufl.TestFunctions(W)
    u, p = ufl.split(w)
    mu = fem.Constant(msh, 1.0)
    F = mu * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - p * ufl.div(v) * ufl.dx - q * ufl.div(u) * ufl.dx
    V, _ = W.sub(0).collapse()
    lid = fem.Function(V)
    lid.interpolate(lambda x: np.stack([x[1] * x[0] * (1 - x[0]), 0 * x[0]]))
    bc = fem.dirichletbc(lid, boundary_dofs(W.sub(0), everywhere, V), W.sub(0))
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=w, inputs=[mu], bcs=[bc]))
    with pytest.raises(fem_vi.SolveFailed):
        solve(torch.tensor(1.0))


def mixed_poisson(*, nonlinear: bool) -> fem_vi.WeakForm:
    """sigma = grad u, -div sigma - u^3 / 10 = m in the lowest Raviart-Thomas element: MUMPS puts off pivots of size zero."""
    msh = mesh.create_unit_square(COMM, 64, 64)
    parts = [basix.ufl.element("RT", "triangle", 1), basix.ufl.element("DG", "triangle", 0)]
    W = fem.functionspace(msh, basix.ufl.mixed_element(parts))
    w, m, (tau, v) = fem.Function(W), fem.Constant(msh, 1.0), ufl.TestFunctions(W)
    sigma, u = ufl.split(w)
    F = (ufl.inner(sigma, tau) + u * ufl.div(tau) + v * ufl.div(sigma) + m * v) * ufl.dx
    if nonlinear:
        F += 0.1 * u**3 * v * ufl.dx
    return fem_vi.WeakForm(F, state=w, inputs=[m])


@pytest.mark.mpi
@pytest.mark.parametrize("nonlinear", [False, True])
def test_mumps_gets_the_workspace_that_it_lacks(nonlinear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pde, one = mixed_poisson(nonlinear=nonlinear), torch.ones((), dtype=torch.float64)
    expected = fem_vi.Solve(pde)(one)
    little = {"mat_mumps_icntl_14": 0, "pc_type": "cholesky"}
    assert torch.allclose(fem_vi.Solve(pde, petsc_options=little)(one), expected, rtol=1e-9, atol=1e-12)
    if COMM.size == 1:  # what MUMPS needs depends on how it shares the work
        monkeypatch.setattr(petsc_options, "MOST_WORKSPACE", 0)
        with pytest.raises(fem_vi.SolveFailed, match="DIVERGED_PCSETUP_FAILED"):
            fem_vi.Solve(pde, petsc_options=little)(one)


@pytest.mark.mpi
def test_a_jacobian_that_becomes_singular_is_found() -> None:
    """-div grad u + c u = f with c = 1 and then c = 0, where f = cos(pi x) fits the singular matrix."""
    msh = square(COMM)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, f, v, c = fem.Function(V), fem.Function(V), ufl.TestFunction(V), fem.Constant(msh, 1.0)
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + c * u * v * ufl.dx - f * v * ufl.dx
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[c, f]))
    f.interpolate(lambda x: np.cos(np.pi * x[0]))
    source = fem_vi.to_tensor(f)
    f.x.array[:] = 0.0
    values = [solve(torch.tensor(number, dtype=torch.float64), source) for number in (1.0, 2.0)]
    with pytest.raises(fem_vi.SolveFailed, match="singular"):
        solve(torch.tensor(0.0, dtype=torch.float64), source)
    assert torch.equal(solve(torch.tensor(1.0, dtype=torch.float64), source), values[0])
