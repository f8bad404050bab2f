"""A field at points: exact in every element on every cell, each point counted once, and the adjoint is the transpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import basix.ufl
import numpy as np
import pytest
import torch
from dolfinx import fem, geometry, mesh
from mpi4py import MPI

import fem_vi
from tests.helpers import owned, square

COMM = MPI.COMM_WORLD
TRIANGLE, QUADRILATERAL = mesh.CellType.triangle, mesh.CellType.quadrilateral
TETRAHEDRON, HEXAHEDRON = mesh.CellType.tetrahedron, mesh.CellType.hexahedron


def domain(comm: MPI.Comm, cell: mesh.CellType, *, distorted: bool = False) -> mesh.Mesh:
    """The unit square or cube; distorted, the maps of quadrilaterals and hexahedra are not affine, and faces are not flat."""
    flat = cell in (TRIANGLE, QUADRILATERAL)
    msh = mesh.create_unit_square(comm, 3, 2, cell) if flat else mesh.create_unit_cube(comm, 2, 2, 1, cell)
    if distorted:
        x = msh.geometry.x
        x[:, 0] += 0.1 * np.sin(np.pi * x[:, 0]) * np.sin(np.pi * x[:, 1]) * (1 + x[:, 2])
    return msh


def points_of(msh: mesh.Mesh) -> np.ndarray:
    """Inner points, a vertex, points on edges and faces, corners and points on the boundary."""
    inner = np.random.default_rng(0).uniform(0.05, 0.95, (12, 3))
    special = [
        (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.0, 0.5), (1.0, 0.25, 0.25), (0.5, 0.5, 0.5), (1 / 3, 0.5, 1.0),
        (2 / 3, 0.5, 0.0), (0.25, 0.5, 0.75), (1 / 3, 0.8, 0.5), (0.0, 0.3, 1.0), (0.5, 0.25, 0.5), (0.6, 1.0, 0.2),
    ]  # fmt: skip
    return np.concatenate([inner, np.array(special)])[:, : msh.geometry.dim]


def polynomial(degree: int, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """A polynomial of total degree `degree` in each of `size` components."""

    def values(x: np.ndarray) -> np.ndarray:
        rows = [(0.7 + k + (1 + k) * x[0] - 0.6 * x[1] + 0.4 * x[2]) ** degree for k in range(size)]
        return np.stack(rows) if size > 1 else rows[0]

    return values


def linear(factor: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The vector field factor (1, x, y, z), in the first rows' dimension."""
    return lambda x: factor @ np.concatenate([np.ones((1, x.shape[1])), x])


def at_points(points: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(function(np.pad(points, ((0, 0), (0, 3 - points.shape[1]))).T).T.copy())


def observed(V: Any, points: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> torch.Tensor:
    u = fem.Function(V)
    u.interpolate(function)
    u.x.scatter_forward()
    return fem_vi.PointObservation(V, points)(owned(u))


every_cell = pytest.mark.parametrize("cell", [TRIANGLE, QUADRILATERAL, TETRAHEDRON, HEXAHEDRON], ids=lambda c: c.name)


@every_cell
@pytest.mark.parametrize("family", ["Lagrange", "DG"])
@pytest.mark.parametrize("degree", [1, 2, pytest.param(3, marks=pytest.mark.mpi)])
def test_polynomials_are_exact(cell: mesh.CellType, family: str, degree: int) -> None:
    msh = domain(COMM, cell, distorted=True)
    points, function = points_of(msh), polynomial(degree, 1)
    y = observed(fem.functionspace(msh, (family, degree)), points, function)
    assert y.shape == (len(points),)
    assert torch.allclose(y, at_points(points, function), rtol=1e-12, atol=1e-12)


@pytest.mark.mpi
@every_cell
def test_vector_fields_are_exact(cell: mesh.CellType) -> None:
    msh = domain(COMM, cell, distorted=True)
    points, function = points_of(msh), polynomial(2, 3)
    y = observed(fem.functionspace(msh, ("Lagrange", 2, (3,))), points, function)
    assert y.shape == (len(points), 3)
    assert torch.allclose(y, at_points(points, function), rtol=1e-12, atol=1e-12)


PIOLA = [
    (TRIANGLE, "N1curl", 2), (TRIANGLE, "N2curl", 1), (TRIANGLE, "RT", 2), (TRIANGLE, "BDM", 1),
    (QUADRILATERAL, "RTCF", 2), (QUADRILATERAL, "RTCE", 2),
    (TETRAHEDRON, "N1curl", 2), (TETRAHEDRON, "RT", 2), (HEXAHEDRON, "NCF", 2), (HEXAHEDRON, "NCE", 2),
]  # fmt: skip


@pytest.mark.parametrize("discontinuous", [pytest.param(False, marks=pytest.mark.mpi), True], ids=["conforming", "discontinuous"])
@pytest.mark.parametrize(("cell", "family", "degree"), PIOLA, ids=lambda p: getattr(p, "name", str(p)))
def test_fields_of_piola_mapped_elements_are_exact(cell: mesh.CellType, family: str, degree: int, discontinuous: bool) -> None:
    """Each of these spaces contains the linear fields."""
    msh = domain(COMM, cell)
    element = basix.ufl.element(family, msh.basix_cell(), degree, discontinuous=discontinuous)
    d = msh.geometry.dim
    function = linear(np.array([[0.3, 1.0, -2.0, 0.5], [0.7, 0.4, 1.5, -1.0], [-0.2, 0.8, 0.6, 1.2]])[:d])
    points = points_of(msh)
    y = observed(fem.functionspace(msh, element), points, function)
    assert torch.allclose(y, at_points(points, function), rtol=1e-11, atol=1e-11)


@pytest.mark.mpi
def test_lowest_order_fields_are_continuous_where_they_must_be() -> None:
    """RT0 and its dofs, whose signs depend on neighbours: compared with DOLFINx's own evaluation."""
    msh = domain(COMM, TETRAHEDRON)
    points = points_of(msh)[:12]
    for family in ("RT", "N1curl"):
        V = fem.functionspace(msh, (family, 1))
        u = fem.Function(V)
        u.interpolate(lambda x: np.stack([np.sin(3 * x[1]), np.cos(2 * x[0]) * x[2], x[0] * x[1]]))
        u.x.scatter_forward()
        y = fem_vi.PointObservation(V, points)(owned(u)).numpy()
        candidates = geometry.compute_collisions_points(geometry.bb_tree(msh, 3), points)
        cells = geometry.compute_colliding_cells(msh, candidates, points)
        num_cells = msh.topology.index_map(3).size_local
        for i, point in enumerate(points):
            links = [c for c in cells.links(i) if c < num_cells]
            if links:
                assert np.allclose(y[i], u.eval(point, np.array(links[:1], dtype=np.int32)), rtol=1e-12, atol=1e-13)


@pytest.mark.mpi
def test_parts_of_a_mixed_space() -> None:
    msh = domain(COMM, TRIANGLE)
    cell = msh.basix_cell()
    parts = [
        basix.ufl.element("Lagrange", cell, 2, shape=(2,)), basix.ufl.element("Lagrange", cell, 1),
        basix.ufl.element("RT", cell, 2),
    ]  # fmt: skip
    W = fem.functionspace(msh, basix.ufl.mixed_element(parts))
    points = points_of(msh)
    w = fem.Function(W)
    functions = [polynomial(2, 2), polynomial(1, 1), linear(np.array([[0.3, 1.0, -2.0, 0.0], [0.7, 0.4, 1.5, 0.0]]))]
    for part, function in enumerate(functions):
        w.sub(part).interpolate(function)
    w.x.scatter_forward()
    for part, function in enumerate(functions):
        y = fem_vi.PointObservation(W.sub(part), points)(owned(w))
        assert torch.allclose(y, at_points(points, function), rtol=1e-11, atol=1e-11), part
    y = fem_vi.PointObservation(W.sub(0).sub(1), points)(owned(w))
    assert torch.allclose(y, at_points(points, polynomial(2, 2))[:, 1], rtol=1e-11)


def ring(comm: MPI.Comm) -> mesh.Mesh:
    """A quarter of a ring, radii 1 and 2, in four quadrilaterals of degree 2, which leave the hull of their vertices."""
    r, t = np.meshgrid(np.linspace(1, 2, 5), np.linspace(0, np.pi / 2, 5), indexing="ij")
    number = np.arange(25).reshape(5, 5)
    order = [(0, 0), (2, 0), (0, 2), (2, 2), (1, 0), (0, 1), (2, 1), (1, 2), (1, 1)]
    cells = np.array([[number[2 * i + a, 2 * j + b] for a, b in order] for i in range(2) for j in range(2)])
    x = np.stack([r * np.cos(t), r * np.sin(t)], axis=-1).reshape(-1, 2)
    mine = slice(None) if comm.rank == 0 else slice(0)
    element = basix.ufl.element("Lagrange", "quadrilateral", 2, shape=(2,))
    return mesh.create_mesh(comm, **{"cells": cells[mine], "x": x[mine], "e": element})


@pytest.mark.mpi
def test_curved_cells_find_their_own_points() -> None:
    """A field that is another constant in each cell shows which cell a point was found in: x |-> reference is inverted."""
    msh = ring(COMM)
    V = fem.functionspace(msh, ("DG", 0))
    u = fem.Function(V)
    u.interpolate(lambda x: 10 * (np.hypot(x[0], x[1]) > 1.5) + (x[1] > x[0]))
    u.x.scatter_forward()
    radii, angles = np.array([1.01, 1.49, 1.51, 1.99]), np.linspace(0.01, np.pi / 2 - 0.01, 24)
    r, t = (a.ravel() for a in np.meshgrid(radii, angles))
    points = np.stack([r * np.cos(t), r * np.sin(t)], axis=1)
    expected = torch.from_numpy(10.0 * (r > 1.5) + (t > np.pi / 4))
    assert torch.equal(fem_vi.PointObservation(V, points)(owned(u)), expected)


@pytest.mark.mpi
def test_fields_on_curved_cells_are_exact() -> None:
    """Of degree one in x; of higher degree they are not in the space."""
    msh = ring(COMM)
    r, t = (a.ravel() for a in np.meshgrid(np.linspace(1.02, 1.98, 7), np.linspace(0.01, np.pi / 2 - 0.01, 7)))
    points = np.stack([r * np.cos(t), r * np.sin(t)], axis=1)
    y = observed(fem.functionspace(msh, ("Lagrange", 2, (2,))), points, polynomial(1, 2))
    assert torch.allclose(y, at_points(points, polynomial(1, 2)), rtol=1e-12)


@pytest.mark.mpi
def test_discontinuous_fields_have_one_value_on_an_edge_on_any_number_of_ranks() -> None:
    points = np.array([(i / 12, j / 10) for i in range(13) for j in range(11)])
    results = []
    for comm in (COMM, MPI.COMM_SELF):
        V = fem.functionspace(square(comm, 6), ("DG", 1))
        u = fem.Function(V)
        u.interpolate(lambda x: x[0])
        dofs, middle = V.dofmap.list, fem.Function(fem.functionspace(V.mesh, ("DG", 0)))
        middle.interpolate(lambda x: np.sin(30 * x[0] + 70 * x[1]))
        u.x.array[dofs] += middle.x.array[middle.function_space.dofmap.list]
        results.append(fem_vi.PointObservation(V, points)(owned(u)))
    assert torch.allclose(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.mpi
def test_points_far_from_the_origin_are_found() -> None:
    """National map coordinates, metres: rounding is 1e-9 there, and points lie on edges and on the boundary."""
    msh = square(COMM, 6)
    msh.geometry.x[:, 0] += 692_345.3
    msh.geometry.x[:, 1] += 5_337_123.7
    points = np.array([(i / 12, j / 10) for i in range(13) for j in range(11)]) + np.array([692_345.3, 5_337_123.7])
    function = lambda x: 2.0 + (x[0] - 692_345.3) - 3 * (x[1] - 5_337_123.7)  # noqa: E731
    y = observed(fem.functionspace(msh, ("Lagrange", 1)), points, function)
    assert torch.allclose(y, at_points(points, function), rtol=0, atol=1e-7)


@pytest.mark.mpi
def test_rows_sum_to_one_and_each_point_has_one_cell() -> None:
    """A partition of unity: a point on cell edges or rank boundaries that were counted twice would give 2."""
    msh = square(COMM, 6)
    V = fem.functionspace(msh, ("Lagrange", 1))
    points = np.array([(i / 12, j / 10) for i in range(13) for j in range(11)])
    observe = fem_vi.PointObservation(V, points)
    ones = torch.ones(V.dofmap.index_map.size_local, dtype=torch.float64)
    assert torch.allclose(observe(ones), torch.ones(len(points), dtype=torch.float64), rtol=1e-12)
    per_row = torch.bincount(observe.matrix.indices()[0], minlength=len(points))
    assert int(fem_vi.all_sum(per_row.double(), COMM).max()) <= 3


@pytest.mark.mpi
def test_matrix_is_the_operator_and_its_transpose_the_adjoint() -> None:
    msh = domain(COMM, TRIANGLE)
    V = fem.functionspace(msh, ("Lagrange", 2, (2,)))
    points = points_of(msh)
    observe = fem_vi.PointObservation(V, points)
    u = torch.randn(3, V.dofmap.index_map.size_local * 2, dtype=torch.float64).requires_grad_()
    y = observe(u)
    matrix = observe.matrix.to_dense()
    assert torch.allclose(y.reshape(3, -1), fem_vi.all_sum(u @ matrix.T, COMM), rtol=1e-13)
    g = torch.linspace(-1.0, 1.0, y.numel(), dtype=torch.float64).reshape(y.shape)
    (gradient,) = torch.autograd.grad(y, u, grad_outputs=g)
    assert torch.allclose(gradient, g.reshape(3, -1) @ matrix, rtol=1e-13)


@pytest.mark.mpi
def test_any_number_of_ranks_observes_the_same() -> None:
    results = []
    for comm in (COMM, MPI.COMM_SELF):
        V = fem.functionspace(domain(comm, TETRAHEDRON), ("N1curl", 1))
        points = np.random.default_rng(1).uniform(0.05, 0.95, (10, 3))
        results.append(observed(V, points, lambda x: np.stack([np.sin(3 * x[1]), np.cos(2 * x[0]) * x[2], x[0] * x[1]])))
    assert torch.allclose(*results, rtol=1e-12, atol=1e-13)


def test_gradcheck_to_second_order_and_batches() -> None:
    V = fem.functionspace(square(MPI.COMM_SELF, 2), ("Lagrange", 1))
    observe = fem_vi.PointObservation(V, [[0.3, 0.4], [0.5, 0.5], [1.0, 1.0]])
    u = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(observe, u)
    assert torch.autograd.gradgradcheck(lambda x: observe(x).exp(), u)
    assert observe(u).shape == (2, 3, 3)
    assert torch.equal(observe(u)[1, 2], observe(u[1, 2]))
    assert observe(u[:0]).shape == (0, 3, 3)


def test_single_precision_is_cast_and_gets_its_gradient_back() -> None:
    V = fem.functionspace(square(MPI.COMM_SELF, 2), ("Lagrange", 1))
    observe = fem_vi.PointObservation(V, [[0.3, 0.4]])
    u = torch.linspace(0, 1, 6).requires_grad_()
    y = observe(u)
    y.sum().backward()
    assert y.dtype == torch.float64
    assert u.grad is not None
    assert u.grad.dtype == torch.float32


@pytest.mark.mpi
@pytest.mark.parametrize("shape", [(), (2,)], ids=["scalar", "vector"])
def test_points_outside_are_masked_and_leave_the_gradient_of_the_others(shape: tuple[int, ...]) -> None:
    V = fem.functionspace(square(COMM), ("Lagrange", 1, shape))
    inside, points = [0.3, 0.4], [[0.3, 0.4], [1.2, 0.5], [0.5, -1e-3]]
    observe = fem_vi.PointObservation(V, points, outside=fem_vi.MaskOutside())
    assert observe.found.tolist() == [True, False, False]
    u = torch.ones(V.dofmap.index_map.size_local * V.dofmap.index_map_bs, dtype=torch.float64).requires_grad_()
    y = observe(u)
    assert torch.isnan(y[1:]).all()
    assert torch.allclose(y[0], torch.ones(shape, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(y[observe.found].square().sum(), u)
    alone = fem_vi.PointObservation(V, [inside])
    (expected,) = torch.autograd.grad(alone(u).square().sum(), u)
    assert torch.allclose(gradient, expected, rtol=1e-13)
    (through_nan,) = torch.autograd.grad(torch.nansum(observe(u)), u)
    (expected,) = torch.autograd.grad(alone(u).sum(), u)
    assert torch.allclose(through_nan, expected, rtol=1e-13)


@pytest.mark.mpi
def test_a_line_in_one_dimension() -> None:
    V = fem.functionspace(mesh.create_interval(COMM, 5, (-1.0, 1.0)), ("Lagrange", 3))
    points = np.array([[-1.0], [-0.6], [0.0], [0.123], [1.0]])
    y = observed(V, points, polynomial(3, 1))
    assert torch.allclose(y, at_points(points, polynomial(3, 1)), rtol=1e-12)
