"""`PiecewiseConstant`: the right value in each cell, its adjoint, and the same blocks on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from tests.helpers import boundary_dofs, everywhere, interpolated, square

COMM = MPI.COMM_WORLD
F64 = torch.float64


def cell_space(comm: MPI.Comm = COMM, n: int = 6) -> fem.FunctionSpace:
    return fem.functionspace(square(comm, n, mesh.CellType.quadrilateral), ("DG", 0))


def layers(V: fem.FunctionSpace) -> mesh.MeshTags:
    """Tag 7 below y = 0.4, tag 3 above."""
    tdim = V.mesh.topology.dim
    cells = np.arange(V.mesh.topology.index_map(tdim).size_local, dtype=np.int32)
    y = mesh.compute_midpoints(V.mesh, tdim, cells)[:, 1]
    return mesh.meshtags(V.mesh, tdim, cells, np.where(y < 0.4, 7, 3).astype(np.int32))


@pytest.mark.mpi
def test_each_cell_has_the_value_of_its_part() -> None:
    V = cell_space()
    tagged = fem_vi.PiecewiseConstant(V, fem_vi.Tagged(layers(V)))
    assert tagged.labels == (3, 7)
    y = V.tabulate_dof_coordinates()[: V.dofmap.index_map.size_local, 1]
    theta = torch.tensor([[1.0, 2.0], [5.0, -4.0]], dtype=F64)
    expected = np.where(y < 0.4, theta[:, 1:].numpy(), theta[:, :1].numpy())
    assert np.array_equal(tagged(theta).numpy(), expected)
    assert torch.allclose(tagged.volumes, torch.tensor([0.6, 0.4], dtype=F64))
    assert torch.allclose(tagged.average(tagged(theta)), theta, rtol=1e-13)

    blocks = fem_vi.PiecewiseConstant(V, fem_vi.Blocks((3, 2)))
    assert blocks.num_parts == 6
    x, y = V.tabulate_dof_coordinates()[: V.dofmap.index_map.size_local, :2].T
    number = 2 * np.floor(3 * x).astype(int) + np.minimum(np.floor(2 * y + 1e-9), 1).astype(int)
    assert np.array_equal(blocks(torch.arange(6, dtype=F64)).numpy(), number)


@pytest.mark.mpi
def test_gradient_is_complete_on_every_rank() -> None:
    V = cell_space()
    blocks = fem_vi.PiecewiseConstant(V, fem_vi.Blocks((3, 2)))
    theta = torch.linspace(-1.0, 1.0, 6, dtype=F64).requires_grad_()
    weight = interpolated(V, 1.0, 0.3)
    loss = fem_vi.all_sum((weight * blocks(theta).square()).sum(), COMM)
    (gradient,) = torch.autograd.grad(loss, theta)
    alone = fem_vi.PiecewiseConstant(cell_space(MPI.COMM_SELF), fem_vi.Blocks((3, 2)))
    sums = torch.zeros(6, dtype=F64).index_add(0, alone.part, interpolated(alone.V, 1.0, 0.3))
    assert torch.allclose(gradient, 2.0 * theta.detach() * sums, rtol=1e-12)


def test_gradient_through_a_solve() -> None:
    """A conductivity that is constant on blocks: gradcheck of the whole chain."""
    W = cell_space(MPI.COMM_SELF, 4)
    V = fem.functionspace(W.mesh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(W), ufl.TestFunction(V)
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - 10.0 * v * ufl.dx
    bc = fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[bc]))
    blocks = fem_vi.PiecewiseConstant(W, fem_vi.Blocks((2, 2)))
    theta = torch.tensor([[0.3, -0.5, 0.1, 0.7], [0.0, 1.0, -1.0, 0.2]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda theta: solve(blocks(theta)), theta)


@pytest.mark.mpi
def test_what_cannot_be_is_refused() -> None:
    V = cell_space()
    tdim = V.mesh.topology.dim
    none = mesh.meshtags(V.mesh, tdim, np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32))
    facets = mesh.meshtags(V.mesh, tdim - 1, np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32))
    cases = [
        (
            lambda: fem_vi.PiecewiseConstant(fem.functionspace(V.mesh, ("Lagrange", 1)), fem_vi.Blocks((2, 2))),
            "one unknown a cell",
        ),
        (lambda: fem_vi.PiecewiseConstant(V, fem_vi.Tagged(none)), "no tag"),
        (lambda: fem_vi.PiecewiseConstant(V, fem_vi.Tagged(facets)), "dimension 2"),
        (lambda: fem_vi.PiecewiseConstant(V, fem_vi.Blocks((2,))), "1 axes"),
        (lambda: fem_vi.PiecewiseConstant(V, fem_vi.Blocks((50, 50))), "hold no midpoint"),
        (lambda: fem_vi.PiecewiseConstant(V, (2, 2)), "Tagged or Blocks"),
        (lambda: fem_vi.PiecewiseConstant(V, fem_vi.Blocks((2, 2)))(torch.zeros(3, dtype=F64)), "4 entries"),
    ]
    for build, words in cases:
        with pytest.raises(fem_vi.InvalidInput, match=words):
            build()
