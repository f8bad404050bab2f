"""Point evaluation as a sparse matrix: which owned coefficients, with which weights, make up the value at each point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import basix
import numpy as np
from numpy.typing import NDArray

from fem_vi.errors import InvalidInput
from fem_vi.parallel import all_values
from fem_vi.pde import _compat
from fem_vi.pde.inputs import Array, local_size
from fem_vi.pde.locate import coordinate_element, locate_points


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
    located = locate_points(mesh, points)
    here = np.flatnonzero(located.cells >= 0)
    dofs = [_cell_dofs(space, located.cells[i]) for i in here]
    values = [_basis(space, located.cells[i], located.reference[i : i + 1]) for i in here]
    block = int(space.ufl_element().block_size)
    value_size = block if block > 1 else int(np.prod(space.value_shape, dtype=int))
    rows = [np.repeat(i * value_size + np.arange(value_size), len(d)) for i, d in zip(here, dofs, strict=True)]
    entries = (
        np.concatenate([np.empty(0, dtype=np.int64), *rows]),
        np.concatenate([np.empty(0, dtype=np.int64), *(np.tile(d, value_size) for d in dofs)]),
        np.concatenate([np.empty(0), *(v.ravel() for v in values)]),
    )
    gathered = all_values(mesh.comm, entries)
    row, col, weight = (np.concatenate([part[k] for part in gathered]) for k in range(3))
    first = space.dofmap.index_map.local_range[0] * space.dofmap.index_map_bs
    mine = (col >= first) & (col < first + local_size(space)[0]) & (weight != 0.0)
    return PointEvaluation(row[mine], col[mine] - first, weight[mine], value_size, located.found)


def _cell_dofs(space: Any, cell: int) -> NDArray[np.int64]:
    """Global unrolled dofs of a cell."""
    dofmap = space.dofmap
    local = np.asarray(dofmap.list[cell], dtype=np.int32)
    unrolled = (local[:, None] * dofmap.bs + np.arange(dofmap.bs)).ravel()
    bs = dofmap.index_map_bs
    blocks = dofmap.index_map.local_to_global((unrolled // bs).astype(np.int32))
    return np.asarray(blocks * bs + unrolled % bs, dtype=np.int64)


def _basis(space: Any, cell: int, reference: Array) -> Array:
    """Values of the basis functions of a cell at one point of the reference cell, `(value_size, num_dofs)`."""
    element = space.ufl_element()
    block = int(element.block_size)
    scalar = element.sub_elements[0] if block > 1 else element
    table = scalar.tabulate(0, reference)[0].reshape(1, -1, scalar.dim).transpose(0, 2, 1).copy()
    if space.element.needs_dof_transformations:
        table = _orient(space, cell, table)
    if scalar.basix_element.map_type != basix.MapType.identity:
        table = _push_forward(space.mesh, cell, scalar, table, reference)
    values = table[0].T
    return np.kron(values, np.eye(block)) if block > 1 else values


def _orient(space: Any, cell: int, table: Array) -> Array:
    """Orient the basis functions of a cell, `(1, num_dofs, value_size)`, as its neighbours do."""
    mesh = space.mesh
    mesh.topology.create_entity_permutations()
    oriented = table.ravel().copy()
    space.element.T_apply(oriented, mesh.topology.get_cell_permutation_info()[cell : cell + 1], table.shape[2])
    return oriented.reshape(table.shape)


def _push_forward(mesh: Any, cell: int, element: Any, table: Array, reference: Array) -> Array:
    """Basis functions of the reference cell as those of a cell: a Piola map."""
    nodes = mesh.geometry.x[_compat.geometry_dofmap(mesh)[cell]][:, : mesh.geometry.dim]
    slopes = coordinate_element(mesh).tabulate(1, reference)[1:, 0, :, 0]
    jacobian = (slopes @ nodes).T[None]
    determinant = np.linalg.det(jacobian)
    return np.asarray(element.basix_element.push_forward(table, jacobian, determinant, np.linalg.inv(jacobian)))
