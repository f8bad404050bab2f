"""Some rows of a residual, and weighted sums of all rows, against the whole residual."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, la, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from fem_vi.pde import _compat
from fem_vi.pde.region import find_entities
from tests.bridge.test_operators import fields_of, leaves
from tests.helpers import CASES, Case, boundary_dofs, left, paired, square

COMM = MPI.COMM_WORLD
KERNELS = (fem_vi.CompiledKernel(), fem_vi.AssembledKernel())
ON_RANKS = {"reaction", "discontinuous", "mixed_poisson"}
every_case_some_on_ranks = pytest.mark.parametrize(
    "build", [pytest.param(build, id=name, marks=[pytest.mark.mpi] if name in ON_RANKS else []) for name, build in CASES.items()]
)


def some_rows(case: Case) -> Tensor:
    """Every third of this rank's rows, backwards, one of them twice."""
    rows = torch.arange(0, case.weights[-1].numel(), 3).flip(0)
    return torch.cat([rows, rows[:1]])


def state_of(case: Case) -> Tensor:
    return (0.3 * case.weights[-1]).clone().requires_grad_()


@every_case_some_on_ranks
def test_rows_are_rows_of_the_residual(build: Callable[[MPI.Comm], Case]) -> None:
    """Values and both first derivatives, in every kind of integral."""
    case = build(COMM)
    residual, rows = fem_vi.Residual(case.pde), some_rows(case)
    at = [state_of(case), *leaves(case)]
    part, full = residual(*at, rows=rows), residual(*at)[..., rows]
    assert part.shape == (len(rows),)
    assert torch.allclose(part, full, rtol=1e-12, atol=1e-13)
    g = torch.linspace(0.5, 1.5, len(rows), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(part, at, g), torch.autograd.grad(full, at, g), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)
    along = tuple([case.weights[-1], *case.weights[:-1]])
    values = tuple(x.detach() for x in at)
    _, moved = torch.func.jvp(lambda *x: residual(*x, rows=rows), values, along)
    _, expected = torch.func.jvp(lambda *x: residual(*x)[..., rows], values, along)
    assert torch.allclose(moved, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["reaction", "discontinuous", "mixed_poisson", "moving_mesh"])
def test_rows_to_second_order(name: str) -> None:
    case = CASES[name](MPI.COMM_SELF)
    residual, rows = fem_vi.Residual(case.pde), some_rows(case)
    at = [state_of(case), *leaves(case)]
    assert torch.autograd.gradgradcheck(lambda *x: residual(*x, rows=rows), at, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.mpi
def test_batches_of_rows_and_rows_of_one_rank_only() -> None:
    case = CASES["log_diffusion"](COMM)
    residual = fem_vi.Residual(case.pde)
    rows = some_rows(case) if COMM.rank == COMM.size - 1 else []
    scales = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).reshape(2, 3, 1)
    u = (scales * state_of(case)).requires_grad_()
    (m,) = leaves(case)
    part, full = residual(u, m, rows=rows), residual(u, m)[..., list(rows)]
    assert part.shape == (2, 3, len(rows))
    assert torch.allclose(part, full, rtol=1e-12, atol=1e-13)
    for a, b in zip(
        torch.autograd.grad(part.square().sum(), [u, m]), torch.autograd.grad(full.square().sum(), [u, m]), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_other_rows_between_forward_and_backward() -> None:
    """The backward visits the cells of its own call."""
    case = CASES["reaction"](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde)
    at = [state_of(case), *leaves(case)]
    first = residual(*at, rows=[0, 1])
    second = residual(*at, rows=[9, 3])
    expected = torch.autograd.grad(residual(*at)[:2].sum(), at)
    for a, b in zip(torch.autograd.grad(first.sum(), at), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)
    assert torch.isfinite(torch.autograd.grad(second.sum(), at)[0]).all()


def test_only_the_cells_in_reach_are_visited() -> None:
    """A vertex of a mesh of 2 x 9 x 8 triangles touches at most six."""
    msh = square(MPI.COMM_SELF, 9)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, v = fem.Function(V), ufl.TestFunction(V)
    residual = fem_vi.Residual(fem_vi.WeakForm(u * v * ufl.dx + u * v * ufl.ds, state=u, inputs=[]))
    operator = residual._chooser.at([40])
    sizes = {kind.name: sum(len(entities) for _, entities in tags) for kind, tags in operator._reach.entities.items()}
    assert 1 <= sizes["cell"] <= 6 < 2 * 9 * 8
    assert sizes["exterior_facet"] < 2 * (2 * 9 + 2 * 8)


def tagged_form(comm: MPI.Comm) -> tuple[fem_vi.WeakForm, int]:
    """Tags, several of them in one integral, everything else, and two degrees of quadrature."""
    msh = square(comm, 5)
    tdim = msh.topology.dim
    cells = np.arange(msh.topology.index_map(tdim).size_local, dtype=np.int32)
    middles = mesh.compute_midpoints(msh, tdim, cells)
    marked = mesh.meshtags(msh, tdim, cells, (1 + (middles[:, 0] > 0.3) + (middles[:, 0] > 0.6)).astype(np.int32))
    facets = mesh.locate_entities_boundary(msh, tdim - 1, lambda x: x[0] < 0.99)
    sides = mesh.meshtags(msh, tdim - 1, facets, np.full(len(facets), 7, dtype=np.int32))
    dx = ufl.Measure("dx", domain=msh, subdomain_data=marked)
    ds = ufl.Measure("ds", domain=msh, subdomain_data=sides)
    V = fem.functionspace(msh, ("Lagrange", 1, (2,)))
    u, v = fem.Function(V), ufl.TestFunction(V)
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * dx + 2.0 * ufl.inner(u, v) * dx((1, 3)) + ufl.inner(u, u) * v[0] * dx(2)
    F += ufl.inner(u, v) * dx(2, metadata={"quadrature_degree": 5}) + u[1] ** 2 * v[1] * ds(7) + 0.5 * ufl.inner(u, v) * ds
    return fem_vi.WeakForm(F, state=u, inputs=[]), 2 * V.dofmap.index_map.size_local


@pytest.mark.mpi
def test_rows_of_tagged_integrals() -> None:
    pde, size = tagged_form(COMM)
    residual = fem_vi.Residual(pde)
    u = torch.linspace(-1.0, 2.0, size, dtype=torch.float64).requires_grad_()
    rows = torch.arange(0, size, 5)
    part, full = residual(u, rows=rows), residual(u)[rows]
    assert torch.allclose(part, full, rtol=1e-12, atol=1e-14)
    (a,), (b,) = (torch.autograd.grad(r.square().sum(), u) for r in (part, full))
    assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


def test_other_integrals_are_refused() -> None:
    V = fem.functionspace(square(MPI.COMM_SELF), ("Lagrange", 1))
    with pytest.raises(fem_vi.UnsupportedForm, match=r"kind vertex.*cells"):
        find_entities(fem.Function(V) * ufl.TestFunction(V) * ufl.dP)


def test_nothing_is_compiled_for_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["reaction"](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde)
    at = [state_of(case), *leaves(case)]
    torch.autograd.grad(residual(*at, rows=[0]).sum(), at)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("built in a call")

    for name in ("form", "Function"):
        monkeypatch.setattr(fem, name, refuse)
    torch.autograd.grad(residual(*at, rows=[2, 5]).sum(), at)


def test_rows_are_the_same_with_any_kernel() -> None:
    case = CASES["reaction"](MPI.COMM_SELF)
    at, rows = [state_of(case), *leaves(case)], some_rows(case)
    compiled, assembled = (fem_vi.Residual(case.pde, kernel=k)(*at, rows=rows) for k in KERNELS)
    assert torch.equal(compiled, assembled)


@pytest.mark.mpi
@pytest.mark.parametrize("rows", [[-1], [10**6], [0.5], [[0]], "first"])
def test_wrong_rows_are_refused_on_every_rank(rows: Any) -> None:
    case = CASES["log_diffusion"](COMM)
    with pytest.raises(fem_vi.InvalidInput, match="rows"):
        fem_vi.Residual(case.pde)(state_of(case), *case.values, rows=rows if COMM.rank == 0 else [])


@pytest.mark.mpi
def test_sampled_rows_estimate_the_whole_sum() -> None:
    """N / k times the sum over k drawn rows, averaged over draws; every free row is drawn as often as any other."""
    case = CASES["log_diffusion"](COMM)
    residual = fem_vi.Residual(case.pde)
    torch.manual_seed(1 + COMM.rank)
    owned = case.weights[-1].numel()
    hits = torch.zeros(owned, dtype=torch.float64)
    draws, count = 300, 3
    for _ in range(draws):
        rows = residual.sample_rows(count)
        assert COMM.allreduce(len(rows), op=MPI.SUM) == count
        assert len(set(rows.tolist())) == len(rows)
        hits[rows] += 1.0
    free = torch.ones(owned, dtype=torch.bool)
    free[torch.from_numpy(case.pde.boundary.owned.astype(np.int64))] = False
    assert float(hits[~free].sum()) == 0.0
    num_free = COMM.allreduce(int(free.sum()), op=MPI.SUM)
    chance = count / num_free
    spread = (draws * chance * (1 - chance)) ** 0.5
    assert all(abs(float(h) - draws * chance) < 5 * spread for h in hits[free])
    with pytest.raises(fem_vi.InvalidInput, match="rows without"):
        residual.sample_rows(num_free + 1)


@every_case_some_on_ranks
def test_weighted_is_a_product_with_the_residual(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(COMM)
    residual = fem_vi.Residual(case.pde)
    w = torch.stack([case.weights[-1], case.weights[-1].square()]).requires_grad_()
    at = [w, state_of(case), *leaves(case)]
    value = residual.weighted(*at)
    expected = fem_vi.all_sum((w * residual(*at[1:])).sum(-1), COMM)
    assert value.shape == (2,)
    assert torch.allclose(value, expected, rtol=1e-11, atol=1e-12)
    g = torch.tensor([0.7, -1.3], dtype=torch.float64)
    got, wanted = (torch.autograd.grad(v, at, g) for v in (value, expected))
    is_field = [True, True, *fields_of(case)]
    for a, b, field in zip(got, wanted, is_field, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11), field
    assert all(np.isfinite(paired(COMM, list(got)[1:], [case.weights[-1], *case.weights[:-1]], is_field[1:])))


@pytest.mark.parametrize("name", ["reaction", "mixed_poisson", "elasticity"])
def test_weighted_to_second_order(name: str) -> None:
    case = CASES[name](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde)
    at = [case.weights[-1].clone().requires_grad_(), state_of(case), *leaves(case)]
    assert torch.autograd.gradgradcheck(residual.weighted, at, fast_mode=True, check_fwd_over_rev=True)


def test_weighted_checks_inputs_that_occur_on_the_boundary_only() -> None:
    case = CASES["source_and_data"](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde)
    f, flux, h = case.values
    with pytest.raises(fem_vi.InvalidInput, match="h"):
        residual.weighted(case.weights[-1], state_of(case), f, flux, h[:-1])
    with pytest.raises(fem_vi.InvalidInput, match="tensors"):
        residual.weighted(case.weights[-1], state_of(case), f, flux)


def positive_form(comm: MPI.Comm, family: str, degree: int) -> tuple[fem_vi.WeakForm, Any, Any]:
    """At u = 0 the residual of phi_i is an integral of chi exp(x + 2y) phi_i, zero only where chi is zero in all cells of phi_i.

    The weight is for basis functions whose mean over a cell is zero. Values are prescribed on the left.
    """
    msh = square(comm, 7)
    V, cells = fem.functionspace(msh, (family, degree)), fem.functionspace(msh, ("DG", 0))
    u, chi, v = fem.Function(V), fem.Function(cells), ufl.TestFunction(V)
    x = ufl.SpatialCoordinate(msh)
    F = (u - chi * ufl.exp(x[0] + 2 * x[1])) * v * ufl.dx(degree=6)
    bcs = [fem.dirichletbc(0.0, boundary_dofs(V, left), V)] if family == "Lagrange" else []
    return fem_vi.WeakForm(F, state=u, inputs=[chi], bcs=bcs), V, cells


def reached(pde: fem_vi.WeakForm, V: Any, chi: Any) -> Tensor:
    """The rows where chi reaches some cell of the test function: a mask over this rank's."""
    return fem_vi.Residual(pde)(fem_vi.to_tensor(fem.Function(V)), fem_vi.to_tensor(chi)).abs() > 1e-9


def indicator(cells: Any, indices: Any) -> Any:
    """One in some local cells, here or on the rank that owns them, zero elsewhere."""
    chi = fem.Function(cells)
    chi.x.array[indices] = 1.0
    chi.x.scatter_reverse(la.InsertMode.add)
    chi.x.array[:] = chi.x.array > 0
    chi.x.scatter_forward()
    return chi


SPACES = pytest.mark.parametrize(("family", "degree"), [("Lagrange", 1), ("Lagrange", 2), ("DG", 1)])


@pytest.mark.mpi
@SPACES
def test_rows_of_cells_are_those_that_do_not_vanish_there(family: str, degree: int) -> None:
    pde, V, cells = positive_form(COMM, family, degree)
    tdim = V.mesh.topology.dim
    some = mesh.locate_entities(V.mesh, tdim, lambda x: (x[0] > 0.4) & (x[1] < 0.7))
    assert COMM.allreduce(len(some), op=MPI.SUM) > 0
    residual = fem_vi.Residual(pde)
    rows = residual.find_rows(fem_vi.Cells(some))
    assert rows.tolist() == torch.nonzero(reached(pde, V, indicator(cells, some))).ravel().tolist()


@pytest.mark.mpi
@SPACES
@pytest.mark.parametrize("rings", [1, 2])
def test_rows_of_patches_are_those_that_vanish_outside(family: str, degree: int, rings: int) -> None:
    """Around the vertices at x = 3/7, y > 1/2: a band of cells, on several ranks where there are several."""
    pde, V, cells = positive_form(COMM, family, degree)
    tdim, width = V.mesh.topology.dim, 1 / 7

    def around(x: np.ndarray) -> Any:
        return np.isclose(x[0], 3 * width) & (x[1] > 0.45) & (x[1] < 0.9)

    near = mesh.locate_entities(V.mesh, 0, around)
    rows = fem_vi.Residual(pde).find_rows(fem_vi.Patches(near, rings))
    size = COMM.allreduce(len(rows), op=MPI.SUM)
    assert 0 < size < COMM.allreduce(pde.unknown.size, op=MPI.SUM)
    inside = patch_by_hand(around, rings)
    middles = mesh.compute_midpoints(V.mesh, tdim, np.arange(len(cells.dofmap.list), dtype=np.int32))
    mine = [k for k, x in enumerate(middles) if tuple(np.round(x, 6)) in inside]
    outside = np.setdiff1d(np.arange(len(middles)), mine)
    free = torch.ones(pde.unknown.size, dtype=torch.bool)
    free[torch.from_numpy(pde.boundary.owned.astype(np.int64))] = False
    expected = free & ~reached(pde, V, indicator(cells, outside))
    assert rows.tolist() == torch.nonzero(expected).ravel().tolist()


def patch_by_hand(near: Callable[[np.ndarray], np.ndarray], rings: int) -> set[tuple[float, ...]]:
    """Middles of the cells of patches, from the coordinates of the cells' corners on a mesh of one rank."""
    whole = square(MPI.COMM_SELF, 7)
    points = whole.geometry.x[_compat.geometry_dofmap(whole)]  # (cells, 3, 3)
    marked = near(points.reshape(-1, 3).T).reshape(points.shape[:2])
    for _ in range(rings):
        cells = marked.any(axis=1)
        corners = {tuple(np.round(x, 6)) for x in points[cells].reshape(-1, 3)}
        marked = np.array([[tuple(np.round(x, 6)) in corners for x in cell] for cell in points])
    return {tuple(np.round(x, 6)) for x in points[cells].mean(axis=1)}


@pytest.mark.mpi
@pytest.mark.parametrize("subset", ["cells", "patches"])
def test_residual_of_a_subset(subset: str) -> None:
    """Values and gradients, where only the last rank names anything, in a form with boundary integrals."""
    case = CASES["reaction"](COMM)
    residual = fem_vi.Residual(case.pde)
    named = [0, 2] if COMM.rank == COMM.size - 1 else []
    rows = fem_vi.Cells(named) if subset == "cells" else fem_vi.Patches(torch.tensor(named, dtype=torch.int64), rings=2)
    at = [state_of(case), *leaves(case)]
    found = residual.find_rows(rows)
    part, full = residual(*at, rows=rows), residual(*at)[..., found]
    assert COMM.allreduce(len(found), op=MPI.SUM) > 0
    assert torch.allclose(part, full, rtol=1e-12, atol=1e-13)
    for a, b in zip(torch.autograd.grad(part.square().sum(), at), torch.autograd.grad(full.square().sum(), at), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_only_the_cells_around_a_cell_are_visited() -> None:
    """The three vertices of an inner triangle touch thirteen triangles together."""
    V = fem.functionspace(square(MPI.COMM_SELF, 9), ("Lagrange", 1))
    u, v = fem.Function(V), ufl.TestFunction(V)
    residual = fem_vi.Residual(fem_vi.WeakForm(u * v * ufl.dx, state=u, inputs=[]))
    inner = mesh.locate_entities(V.mesh, 2, lambda x: (abs(x[0] - 0.5) < 0.2) & (abs(x[1] - 0.5) < 0.2))[:1]
    operator = residual._chooser.at(fem_vi.Cells(inner))
    ((_, entities),) = next(iter(operator._reach.entities.values()))
    assert len(entities) == 13


@pytest.mark.mpi
def test_sampled_cells_and_patches() -> None:
    """As many as were asked for, over all ranks, none twice."""
    case = CASES["log_diffusion"](COMM)
    residual = fem_vi.Residual(case.pde)
    torch.manual_seed(3 + COMM.rank)
    topology = case.pde.space.mesh.topology
    for sampled, owned in (
        (residual.sample_cells(5).indices, topology.index_map(topology.dim).size_local),
        (residual.sample_patches(5, rings=2).vertices, topology.index_map(0).size_local),
    ):
        assert len(set(sampled.tolist())) == len(sampled)
        assert all(0 <= k < owned for k in sampled.tolist())
        assert COMM.allreduce(len(sampled), op=MPI.SUM) == 5
    at = [state_of(case), *leaves(case)]
    assert COMM.allreduce(residual(*at, rows=residual.sample_patches(5, rings=2)).numel(), op=MPI.SUM) > 0
    with pytest.raises(fem_vi.InvalidInput, match="cells"):
        residual.sample_cells(10**6)
    with pytest.raises(fem_vi.InvalidInput, match="vertices"):
        residual.sample_patches(10**6)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "subset",
    [
        fem_vi.Cells([-1]),
        fem_vi.Cells([10**6]),
        fem_vi.Cells("all"),
        fem_vi.Patches([0.5]),
        fem_vi.Patches([0], rings=0),
    ],
)
def test_wrong_subsets_are_refused_on_every_rank(subset: Any) -> None:
    """Where those of one rank are wrong."""
    case = CASES["log_diffusion"](COMM)
    others = type(subset)([])
    with pytest.raises(fem_vi.InvalidInput, match=r"Cells|Patches"):
        fem_vi.Residual(case.pde)(state_of(case), *case.values, rows=subset if COMM.rank == 0 else others)


@pytest.mark.mpi
@pytest.mark.parametrize("subset", [fem_vi.Patches([], rings=2), fem_vi.Cells([]), []])
def test_subsets_that_differ_between_ranks_are_refused(subset: Any) -> None:
    """And not waited for; on one rank there is nothing to differ from."""
    case = CASES["log_diffusion"](COMM)
    given = subset if COMM.rank == 0 else fem_vi.Patches([])
    with nullcontext() if COMM.size == 1 else pytest.raises(fem_vi.InvalidInput, match=r"ranks 0 to"):
        fem_vi.Residual(case.pde)(state_of(case), *case.values, rows=given)
