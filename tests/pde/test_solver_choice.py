"""The solver that a weak form gets where the user names none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import unwrap
from typing import Any

import numpy as np
import pytest
import ufl
from dolfinx import fem, mesh
from dolfinx.fem import petsc as fem_petsc
from mpi4py import MPI
from petsc4py import PETSc

import fem_vi
from fem_vi.pde import solver_choice
from fem_vi.pde.generic_jacobian import SYMMETRY_BOUND, GenericJacobian, relative_asymmetry
from fem_vi.pde.petsc_options import Options
from fem_vi.pde.rigid_modes import rigid_modes
from fem_vi.pde.solver_choice import SolverChoice, choose_solver
from tests.helpers import CASES, Case, boundary_dofs, everywhere, left, square

COMM = MPI.COMM_WORLD
LDLT = {"ksp_type": "preonly", "pc_type": "cholesky", "pc_factor_mat_solver_type": "mumps"}
LU = {**LDLT, "pc_type": "lu"}
GMRES = {"ksp_type": "gmres", "pc_type": "hypre", "ksp_rtol": 1e-10}
WITHOUT_SYMMETRY = ("reaction", "navier_stokes", "moving_mesh")
SYMMETRIC = {name: name not in WITHOUT_SYMMETRY for name in CASES}


def dense_jacobian(case: Case) -> np.ndarray:
    """At the table's inputs and a small state that is not zero, with Dirichlet rows and columns of the identity."""
    pde = case.pde
    for given, value in zip((pde.unknown, *pde.inputs), (0.05 * case.weights[-1], *case.values), strict=True):
        given.load(value.numpy().ravel())
    matrix = fem_petsc.assemble_matrix(fem.form(pde.jacobian), bcs=pde.boundary.bcs)
    matrix.assemble()
    return matrix.convert("dense").getDenseArray().copy()


def scalar(
    F: Callable[[Any, Any, Any], ufl.Form], comm: MPI.Comm = COMM, *, n: int = 8, clamped: bool = False
) -> fem_vi.WeakForm:
    """A weak form F(u, m, v) of Lagrange fields of degree one on the unit square."""
    V = fem.functionspace(square(comm, n), ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V, name="m"), ufl.TestFunction(V)
    bcs = [fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)] if clamped else []
    return fem_vi.WeakForm(F(u, m, v), state=u, inputs=[m], bcs=bcs)


def diffusion(u: Any, m: Any, v: Any) -> ufl.Form:
    """-div(exp(m) grad u) = 1."""
    return ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx


def cube(comm: MPI.Comm = COMM, *, n: int = 6) -> fem_vi.WeakForm:
    """Linear elasticity with a stiffness field, clamped at x = 0."""
    msh = mesh.create_unit_cube(comm, n, n, n)
    V, Q = fem.functionspace(msh, ("Lagrange", 1, (3,))), fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(Q, name="m"), ufl.TestFunction(V)
    strain = ufl.sym(ufl.grad(u))
    F = ufl.exp(m) * ufl.inner(2 * strain + ufl.tr(strain) * ufl.Identity(3), ufl.grad(v)) * ufl.dx - v[2] * ufl.dx
    return fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(np.zeros(3), boundary_dofs(V, left), V)])


@pytest.fixture
def always_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every problem count as too large for a factorisation."""
    monkeypatch.setattr(solver_choice, "DIRECT_LIMIT", {1: 0, 2: 0, 3: 0})


@pytest.mark.mpi
@pytest.mark.parametrize("name", CASES)
def test_table_of_weak_forms(name: str) -> None:
    """The expectation is that of the dense matrix, on any number of ranks."""
    alone = unwrap(CASES[name])(MPI.COMM_SELF)  # a case of its own: its mesh, and what is in the form, stay moved
    J = dense_jacobian(alone)
    assert (np.abs(J - J.T).max() < 1e-12 * np.abs(J).max()) == SYMMETRIC[name]
    assert choose_solver(CASES[name](COMM).pde, {}).options == (LDLT if SYMMETRIC[name] else LU)


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["reaction", "stokes", "elasticity"])
def test_private_functions_keep_their_values(name: str) -> None:
    case = CASES[name](COMM)
    symbols = [given.symbol for given in (case.pde.unknown, *case.pde.inputs)]
    before = [np.array(s.x.array if hasattr(s, "x") else s.value) for s in symbols]
    choose_solver(case.pde, {})
    for symbol, old in zip(symbols, before, strict=True):
        assert np.array_equal(symbol.x.array if hasattr(symbol, "x") else symbol.value, old)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("F", "symmetric"),
    [
        (lambda u, m, v: ufl.sqrt(m) * u * v * ufl.dx, True),
        (lambda u, m, v: ufl.sqrt(-1 - m**2) * u * v * ufl.dx, False),
        (lambda u, m, v: ufl.sqrt(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + m * u.dx(0) * v * ufl.dx, False),
        (lambda u, m, v: u * v * ufl.dx + ufl.conditional(ufl.lt(m, 0), u.dx(0) * v, u * v) * ufl.dx, False),
        (lambda u, m, v: ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + u**3 * v * ufl.dx - m * v * ufl.dx, True),
        (lambda u, m, v: (1 + u**2) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - m * v * ufl.dx, False),
        (lambda u, m, v: ufl.ln(1 + u.dx(0)) * v.dx(0) * ufl.dx + u * v * ufl.dx - m * v * ufl.dx, True),
        (lambda u, m, v: ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + 1e-6 * m * u.dx(1) * v * ufl.ds, False),
    ],
    ids=["root", "never-finite", "convection", "branch", "cubic", "quasilinear", "moderate-gradients", "small-on-boundary"],
)
def test_symmetry_is_that_of_the_form(F: Callable[[Any, Any, Any], ufl.Form], symmetric: bool) -> None:
    assert GenericJacobian(scalar(F)).is_symmetric == symmetric


@pytest.mark.mpi
def test_units_do_not_hide_a_coupling_without_symmetry() -> None:
    """Poroelasticity in pascals and metres: the stiffest entries are 1e12 times those of the coupling."""
    msh = square(COMM, 5)
    W = fem.functionspace(msh, ("Lagrange", 1, (3,)))
    w, v = fem.Function(W), ufl.TestFunction(W)
    for sign, symmetric in ((1.0, True), (-1.0, False)):
        F = 1e10 * (ufl.inner(ufl.grad(w[0]), ufl.grad(v[0])) + ufl.inner(ufl.grad(w[1]), ufl.grad(v[1]))) * ufl.dx
        F += 1e10 * (w[0] * v[0] + w[1] * v[1]) * ufl.dx - w[2] * v[0].dx(0) * ufl.dx - sign * v[2] * w[0].dx(0) * ufl.dx
        F -= 1e-10 * (w[2] * v[2] + ufl.inner(ufl.grad(w[2]), ufl.grad(v[2]))) * ufl.dx
        assert GenericJacobian(fem_vi.WeakForm(F, state=w, inputs=[])).is_symmetric == symmetric


@pytest.mark.mpi
def test_one_entry_is_seen() -> None:
    pde = scalar(diffusion, n=40)
    matrix = GenericJacobian(pde).matrix
    assert relative_asymmetry(matrix) < 0.01 * SYMMETRY_BOUND
    first = matrix.getOwnershipRange()[0]
    columns, _ = matrix.getRow(first)
    if COMM.rank == COMM.size - 1:
        matrix.setValue(first, next(j for j in columns if j != first), 1e-8, addv=PETSc.InsertMode.ADD)
    matrix.assemble()
    assert relative_asymmetry(matrix) > SYMMETRY_BOUND


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ksp_rtol": 1e-6, "snes_rtol": 1e-8}, {**LDLT, "ksp_rtol": 1e-6, "snes_rtol": 1e-8}),
        ({"pc_type": "lu"}, LU),
        ({"pc_factor_mat_solver_type": "petsc"}, {**LU, "pc_factor_mat_solver_type": "petsc"}),
        ({"ksp_type": "cg"}, {**LU, "ksp_type": "cg", "ksp_rtol": 1e-10}),
        ({"ksp_type": "cg", "pc_type": "jacobi"}, {"ksp_type": "cg", "pc_type": "jacobi", "ksp_rtol": 1e-10}),
    ],
)
@pytest.mark.usefixtures("always_large")
def test_what_the_user_gives_wins(given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    pde = CASES["discontinuous"](COMM).pde
    assert choose_solver(pde, given).options == expected


@pytest.mark.mpi
def test_large_scalar_problem_gets_multigrid(monkeypatch: pytest.MonkeyPatch) -> None:
    pde = scalar(diffusion, clamped=True)
    unknowns = pde.space.dofmap.index_map.size_global
    for limit, options in ((unknowns, LDLT), (unknowns - 1, {"ksp_type": "cg", "pc_type": "hypre", "ksp_rtol": 1e-10})):
        monkeypatch.setattr(solver_choice, "DIRECT_LIMIT", {2: limit})
        assert choose_solver(pde, {}) == SolverChoice(options, is_symmetric=True)
    assert choose_solver(pde, {"ksp_rtol": 1e-7}).options == {**options, "ksp_rtol": 1e-7}


@pytest.mark.mpi
def test_a_factorisation_that_serves_every_call_pays_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    for F, method in ((lambda u, m, v: diffusion(u, 0 * m, v) - m * v * ufl.dx, "cholesky"), (diffusion, "hypre")):
        pde = scalar(F, clamped=True)
        monkeypatch.setattr(solver_choice, "DIRECT_LIMIT", {2: pde.space.dofmap.index_map.size_global / 2})
        assert choose_solver(pde, {}).options["pc_type"] == method


@pytest.mark.mpi
@pytest.mark.usefixtures("always_large")
@pytest.mark.parametrize("frequency", [1.0, 400.0])
def test_cg_is_not_for_waves_even_where_it_gets_through(frequency: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a preconditioner that is nearly a factorisation CG converges; which partitions bring that about is chance."""
    monkeypatch.setattr(solver_choice, "_solves_one", lambda choice, matrix: True)
    assert choose_solver(scalar(lambda u, m, v: diffusion(u, m, v) - frequency * u * v * ufl.dx), {}).options == LDLT


@pytest.mark.mpi
@pytest.mark.usefixtures("always_large")
@pytest.mark.parametrize(
    ("F", "options", "clamped"),
    [
        (lambda u, m, v: diffusion(u, m, v) - 400 * u * v * ufl.dx, LDLT, False),
        (lambda u, m, v: diffusion(u, m, v) - u * v * ufl.ds, LDLT, False),
        (lambda u, m, v: diffusion(u, m, v) + u * u.dx(0) * v * ufl.dx, GMRES, True),
        (lambda u, m, v: 1e-8 * diffusion(u, m, v) + u.dx(0) * v * ufl.dx, LU, True),
    ],
    ids=["helmholtz", "one-negative-eigenvalue", "convection", "transport"],
)
def test_multigrid_is_tried_before_it_is_trusted(
    F: Callable[[Any, Any, Any], ufl.Form], options: Mapping[str, Any], clamped: bool
) -> None:
    """The diagonals are positive, also of the two that are indefinite."""
    assert choose_solver(scalar(F, n=16, clamped=clamped), {}).options == options


@pytest.mark.mpi
@pytest.mark.usefixtures("always_large")
@pytest.mark.parametrize("name", ["stokes", "mixed_poisson", "discontinuous"])
def test_multigrid_is_for_lagrange_spaces(name: str) -> None:
    assert choose_solver(CASES[name](COMM).pde, {}).options == LDLT


@pytest.mark.mpi
@pytest.mark.usefixtures("always_large")
def test_multigrid_of_elasticity_knows_the_rigid_modes() -> None:
    """CG then needs fewer iterations, and the same number on a finer mesh up to a few."""
    iterations = {}
    for n in (4, 8):
        pde = cube(n=n)
        choice = choose_solver(pde, {})
        assert choice.options == {"ksp_type": "cg", "pc_type": "gamg", "ksp_rtol": 1e-10}
        for told in (choice, SolverChoice(choice.options)):
            iterations[n, told is choice] = num_iterations(pde, told)
    assert iterations[8, True] < 0.8 * iterations[8, False]
    assert iterations[8, True] < iterations[4, True] + 8
    assert np.array_equal(choose_solver(pde, {"pc_type": "gamg"}).near_nullspace, choice.near_nullspace)


def num_iterations(pde: fem_vi.WeakForm, choice: SolverChoice) -> int:
    """Iterations for a smooth load, with the Jacobian at the inputs as they are."""
    matrix = fem_petsc.assemble_matrix(fem.form(pde.jacobian), bcs=pde.boundary.bcs)
    matrix.assemble()
    choice.prepare(matrix)
    options = Options(choice.options)
    ksp = PETSc.KSP().create(matrix.comm)
    ksp.setOptionsPrefix(options.prefix)
    ksp.setFromOptions()
    ksp.setOperators(matrix)
    x, b = matrix.createVecs()
    b.set(1.0)
    ksp.solve(b, x)
    assert ksp.getConvergedReason() > 0
    return int(ksp.getIterationNumber())


@pytest.mark.mpi
@pytest.mark.parametrize("dim", [2, 3])
def test_rigid_modes_cost_no_energy(dim: int) -> None:
    msh = square(COMM) if dim == 2 else mesh.create_unit_cube(COMM, 3, 2, 2)
    V = fem.functionspace(msh, ("Lagrange", 2, (dim,)))
    u, v = ufl.TrialFunction(V), ufl.TestFunction(V)
    K = fem_petsc.assemble_matrix(fem.form(ufl.inner(ufl.sym(ufl.grad(u)), ufl.sym(ufl.grad(v))) * ufl.dx))
    K.assemble()
    modes = rigid_modes(V)
    assert np.allclose(COMM.allreduce(modes @ modes.T), np.eye(3 if dim == 2 else 6), atol=1e-14)
    x, y = K.createVecs()
    for mode in modes:
        x.array_w[:] = mode
        K.mult(x, y)
        assert y.norm() < 1e-14 * K.norm()


@pytest.mark.parametrize(("name", "method"), [("log_diffusion", "cholesky"), ("stokes", "lu"), ("reaction", "lu")])
def test_without_mumps_cholesky_is_for_positive_diagonals(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PETSc's own does not pivot."""
    monkeypatch.setattr(solver_choice, "_has", lambda package: False)
    assert choose_solver(CASES[name](MPI.COMM_SELF).pde, {}).options["pc_type"] == method


def test_values_that_the_caller_has_set_are_looked_at() -> None:
    """Above a temperature that no random value reaches, an advection that is not symmetric sets in."""
    V = fem.functionspace(square(MPI.COMM_SELF), ("Lagrange", 1))
    u, T, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = (ufl.inner(ufl.grad(u), ufl.grad(v)) + u * v + ufl.conditional(ufl.gt(T, 273.0), 50.0, 0.0) * u.dx(0) * v - v) * ufl.dx
    methods = []
    for kelvin in (0.0, 300.0):
        T.x.array[:] = kelvin
        methods.append(choose_solver(fem_vi.WeakForm(F, state=u, inputs=[T]), {}).options["pc_type"])
    assert methods == ["cholesky", "lu"]
