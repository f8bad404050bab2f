"""Mesh coordinates as inputs: exact shape derivatives, and a mesh that stands where it stood afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.helpers import CASES, square
from tests.pde.mesh_files import on_rank_0, write_gmsh

COMM = MPI.COMM_WORLD


def velocity(x: fem.Function, field: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Owned coefficients of a motion of the nodes."""
    V = fem.Function(x.function_space)
    V.interpolate(field)
    return fem_vi.to_tensor(V)


@pytest.mark.mpi
@pytest.mark.parametrize("cell", [mesh.CellType.triangle, mesh.CellType.quadrilateral], ids=lambda cell: cell.name)
def test_hadamard(cell: mesh.CellType) -> None:
    """dJ.V is the integral of f V.n over the boundary, J that of f; the length of the boundary grows with its curvature."""
    msh = square(COMM, 6, cell)
    x = fem_vi.coordinates(msh)
    X, n = ufl.SpatialCoordinate(msh), ufl.FacetNormal(msh)
    area = fem_vi.Functional(fem.Constant(msh, 1.0) * ufl.dx(msh), [x])
    moment = fem_vi.Functional(X[0] * X[1] * ufl.dx, [x])
    perimeter = fem_vi.Functional(fem.Constant(msh, 1.0) * ufl.ds(msh), [x])
    flux = fem_vi.Functional(ufl.inner(X, n) * ufl.ds, [x])
    at = fem_vi.to_tensor(x).requires_grad_()
    stretch = velocity(x, lambda p: np.stack([2 * p[0], 0 * p[1]]))

    def slope(J: fem_vi.Functional) -> float:
        (g,) = torch.autograd.grad(J(at), at)
        return float(fem_vi.all_sum((g * stretch).sum(), COMM))

    assert float(area(at).detach()) == pytest.approx(1.0, rel=1e-13)
    assert slope(area) == pytest.approx(2.0, rel=1e-12), "the side x = 1 moves at speed 2"
    assert slope(moment) == pytest.approx(2 * 1 / 2, rel=1e-12)
    assert slope(perimeter) == pytest.approx(4.0, rel=1e-12), "two sides of length one grow at speed 2"
    assert slope(flux) == pytest.approx(4.0, rel=1e-12), "twice the area"


@pytest.mark.mpi
@pytest.mark.parametrize(("shape", "order"), [("triangle", 2), ("triangle", 3), ("quadrilateral", 2), ("tetrahedron", 2)])
def test_curved_cells(tmp_path: Path, shape: str, order: int) -> None:
    """Volume is homogeneous of degree d in the nodes: dJ.x = d J. The bent unit square and cube have volume one."""
    pytest.importorskip("gmsh")
    on_rank_0(lambda: write_gmsh(tmp_path / "bent.msh", shape, order))
    msh = fem_vi.read_mesh(tmp_path / "bent.msh", COMM).mesh
    x = fem_vi.coordinates(msh)
    J = fem_vi.Functional(fem.Constant(msh, 1.0) * ufl.dx(msh), [x])
    at = fem_vi.to_tensor(x).requires_grad_()
    value = J(at)
    (g,) = torch.autograd.grad(value, at)
    assert float(value.detach()) == pytest.approx(1.0, rel=1e-12)
    assert float(fem_vi.all_sum((g * at.detach()).sum(), COMM)) == pytest.approx(msh.geometry.dim, rel=1e-12)


@pytest.mark.mpi
def test_the_mesh_stands_where_it_stood() -> None:
    case = CASES["moving_mesh"](COMM)
    msh = case.state.function_space.mesh
    before = msh.geometry.x.copy()
    solve = fem_vi.Solve(case.pde)
    inputs = [v.clone().requires_grad_() for v in case.values]
    u = solve(*inputs)
    assert np.array_equal(msh.geometry.x, before)
    fem_vi.all_sum(u.sum(), COMM).backward()
    assert np.array_equal(msh.geometry.x, before)
    mirrored = case.values[0] * torch.tensor([1.0, -1.0]).repeat(case.values[0].numel() // 2)
    with pytest.raises(fem_vi.InvalidInput, match="turned inside out"):
        solve(mirrored, *case.values[1:])
    assert np.array_equal(msh.geometry.x, before)
    assert torch.allclose(solve(*case.values), u.detach(), rtol=1e-12)


@pytest.mark.mpi
def test_a_moved_mesh_is_a_new_mesh() -> None:
    """Solve at moved coordinates is Solve on a mesh that was moved there."""
    msh, other = square(COMM), square(COMM)
    states = []
    for domain, bends in ((msh, True), (other, False)):
        x = fem_vi.coordinates(domain)
        at = fem_vi.to_tensor(x) + velocity(x, lambda p: np.stack([0.1 * p[1] ** 2, 0.2 * p[0] * p[1]]))
        if not bends:
            domain.geometry.x[:, :2] += np.stack(
                [0.1 * domain.geometry.x[:, 1] ** 2, 0.2 * domain.geometry.x[:, 0] * domain.geometry.x[:, 1]], axis=1
            )
        V = fem.functionspace(domain, ("Lagrange", 1))
        u, v = fem.Function(V), ufl.TestFunction(V)
        F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + u * v * ufl.dx - ufl.SpatialCoordinate(domain)[0] * v * ufl.ds
        solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[x] if bends else []))
        states.append(solve(at) if bends else solve())
    assert torch.allclose(*states, rtol=1e-11, atol=1e-13)


def test_bad_use_is_refused() -> None:
    msh = square(MPI.COMM_SELF)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, old, v, x = fem.Function(V), fem.Function(V), ufl.TestFunction(V), fem_vi.coordinates(msh)
    pde = fem_vi.WeakForm((u - old) * v * ufl.dx, state=u, inputs=[x])
    with pytest.raises(fem_vi.InvalidInput, match="coordinates"):
        fem_vi.Evolve(pde, previous=old, num_steps=2)
    with pytest.raises(fem_vi.InvalidInput, match="coordinates"):
        fem_vi.ExpressionObservation(u, [[0.5, 0.5]], inputs=[u, x])
    surface = mesh.create_submesh(mesh.create_unit_cube(MPI.COMM_SELF, 1, 1, 1), 2, np.arange(2, dtype=np.int32))[0]
    with pytest.raises(fem_vi.InvalidInput, match="surfaces"):
        fem_vi.coordinates(surface)


@pytest.mark.parametrize("size", [ufl.Circumradius, ufl.CellDiameter, ufl.MaxCellEdgeLength])
def test_sizes_that_ufl_does_not_differentiate_are_refused(size: Any) -> None:
    """On a triangle UFL's derivative of the circumradius is half of what it should be."""
    msh = square(MPI.COMM_SELF)
    with pytest.raises(fem_vi.UnsupportedForm, match=rf"{size(msh).__class__.__name__}.*CellVolume"):
        fem_vi.Functional(size(msh) ** 2 * ufl.dx(domain=msh), [fem_vi.coordinates(msh)])
    fem_vi.Functional(ufl.CellVolume(msh) * ufl.dx(domain=msh), [fem_vi.coordinates(msh)])
