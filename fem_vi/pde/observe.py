"""Point evaluation as a sparse matrix: which owned coefficients, with which weights, make up the value at each point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from dolfinx import geometry
from mpi4py import MPI
from numpy.typing import NDArray

from fem_vi.errors import InvalidInput
from fem_vi.pde import _compat
from fem_vi.pde.inputs import Array, local_size


@dataclass(frozen=True)
class PointEvaluation:
    """The rows of the observation matrix, restricted to the columns that this rank owns.

    Attributes:
        rows: Row of each entry: point times value size, plus component.
        cols: Owned coefficient of each entry.
        weights: The entries.
        value_size: Components of a value.
        found: Which points lie in a cell of any rank, `(num_points,)`, replicated.
    """

    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    weights: Array
    value_size: int
    found: NDArray[np.bool_]


def find_cells(mesh: Any, points: Array) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """A cell for each point, on one rank only.

    Args:
        mesh: DOLFINx mesh.
        points: `(num_points, 3)`, replicated.

    Returns:
        Local cell of each point that falls to this rank (the lowest of those that have it), -1 for the others; and
        whether any rank has the point.

    MPI: Collective.
    """
    extent = float(np.ptp(mesh.geometry.x, axis=0).max()) if mesh.geometry.x.size else 0.0
    tree = _compat.bounding_box_tree(mesh, 1e-12 * extent)
    candidates = geometry.compute_collisions_points(tree, points)
    colliding = geometry.compute_colliding_cells(mesh, candidates, points)
    cells = np.array([links[0] if len(links := colliding.links(i)) else -1 for i in range(len(points))], dtype=np.int32)
    rank, size = mesh.comm.rank, mesh.comm.size
    lowest = np.empty(len(points), dtype=np.int32)
    mesh.comm.Allreduce(np.where(cells >= 0, rank, size).astype(np.int32), lowest, op=MPI.MIN)
    return np.where(lowest == rank, cells, -1).astype(np.int32), lowest < size


def evaluate_points(space: Any, points: Array) -> PointEvaluation:
    """The matrix of point evaluation on a function space.

    Args:
        space: Scalar or vector space, of any element, or such a subspace of a mixed one.
        points: `(num_points, 3)`, replicated.

    Raises:
        InvalidInput: For a mixed space.

    MPI: Collective.
    """
    if space.element.num_sub_elements > 0 and space.ufl_element().is_mixed:
        raise InvalidInput("The space is mixed; observe one of its parts, V.sub(i).")
    mesh = space.mesh
    cells, found = find_cells(mesh, points)
    here = np.flatnonzero(cells >= 0)
    dofs = [_cell_dofs(space, cells[i]) for i in here]
    values = [_basis(space, cells[i], points[i]) for i in here]
    block = int(space.ufl_element().block_size)
    value_size = block if block > 1 else int(np.prod(space.value_shape, dtype=int))
    rows = [np.repeat(i * value_size + np.arange(value_size), len(d)) for i, d in zip(here, dofs, strict=True)]
    entries = (
        np.concatenate([np.empty(0, dtype=np.int64), *rows]),
        np.concatenate([np.empty(0, dtype=np.int64), *(np.tile(d, value_size) for d in dofs)]),
        np.concatenate([np.empty(0), *(v.ravel() for v in values)]),
    )
    gathered = mesh.comm.allgather(entries)
    row, col, weight = (np.concatenate([part[k] for part in gathered]) for k in range(3))
    first = space.dofmap.index_map.local_range[0] * space.dofmap.index_map_bs
    mine = (col >= first) & (col < first + local_size(space)[0]) & (weight != 0.0)
    return PointEvaluation(row[mine], col[mine] - first, weight[mine], value_size, found)


def _cell_dofs(space: Any, cell: int) -> NDArray[np.int64]:
    """Global unrolled dofs of a cell."""
    dofmap = space.dofmap
    local = np.asarray(dofmap.list[cell], dtype=np.int32)
    unrolled = (local[:, None] * dofmap.bs + np.arange(dofmap.bs)).ravel()
    bs = dofmap.index_map_bs
    blocks = dofmap.index_map.local_to_global((unrolled // bs).astype(np.int32))
    return np.asarray(blocks * bs + unrolled % bs, dtype=np.int64)


def _basis(space: Any, cell: int, point: Array) -> Array:
    """Values of the basis functions of a cell at a point, `(value_size, num_dofs)`."""
    mesh = space.mesh
    nodes = mesh.geometry.x[_compat.geometry_dofmap(mesh)[cell]][:, : mesh.geometry.dim]
    reference = _compat.coordinate_element(mesh).pull_back(point[None, : mesh.geometry.dim].copy(), nodes.copy())
    element = space.ufl_element()
    block = int(element.block_size)
    scalar = element.sub_elements[0] if block > 1 else element
    table = scalar.tabulate(0, reference)[0].reshape(1, -1, scalar.dim).transpose(0, 2, 1).copy()
    if space.element.needs_dof_transformations:
        table = _transform(space, cell, scalar, table, nodes, reference)
    values = table[0].T
    return np.kron(values, np.eye(block)) if block > 1 else values


def _transform(space: Any, cell: int, element: Any, table: Array, nodes: Array, reference: Array) -> Array:
    """Orient the basis functions of a cell, `(1, num_dofs, value_size)`, and push them forward to it."""
    mesh = space.mesh
    mesh.topology.create_entity_permutations()
    oriented = table.ravel().copy()
    space.element.T_apply(oriented, mesh.topology.get_cell_permutation_info()[cell : cell + 1], table.shape[2])
    geometry_table = mesh.ufl_domain().ufl_coordinate_element().sub_elements[0].tabulate(1, reference)
    slopes = geometry_table[1:, 0, :]
    jacobian = (slopes @ nodes).T[None]
    determinant = np.linalg.det(jacobian)
    return np.asarray(element.basix_element.push_forward(oriented.reshape(table.shape), jacobian, determinant, np.linalg.inv(jacobian)))
