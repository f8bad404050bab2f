"""Tables of basis functions at quadrature points, the cells' dofs, and how elements turn with the cells' orientation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import basix
import numpy as np
from numpy.typing import NDArray

from fem_vi.errors import UnsupportedForm
from fem_vi.pde import _compat
from fem_vi.pde.dof_transformations import transformation_matrix
from fem_vi.pde.inputs import Array

_ROUNDING = 1e-13


@dataclass(frozen=True)
class Table:
    """Values of some basis functions of an element, or of their derivatives, on the reference cell.

    Attributes:
        values: `(num_variants, num_points, num_functions)`; one variant, or one point, where it is the same for all.
        dofs: The functions' numbers in the element, blocks unrolled, `(num_functions,)`.
    """

    values: Array
    dofs: NDArray[np.int64]

    @property
    def varies_over_points(self) -> bool:
        """Whether the values differ from point to point."""
        return self.values.shape[1] > 1

    def is_zero(self) -> bool:
        """Whether all values vanish."""
        return not self.values.any()


def tabulate(element: Any, component: int, directions: Sequence[int], points: Array) -> Table:
    """One reference component of an element, differentiated in the directions, at points `(num_variants, num_points, tdim)`.

    Raises:
        UnsupportedForm: Where the element has no such table.
    """
    part, offset, stride = element.get_component_element(component)
    counts = [list(directions).count(axis) for axis in range(points.shape[2])]
    try:
        tables = [np.asarray(part.tabulate(len(directions), at))[basix.index(*counts)] for at in points]
    except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
        raise UnsupportedForm(
            f"{element} has no table of derivatives of order {len(directions)}: {error}. AssembledKernel() may take the form."
        ) from error
    values = np.stack(tables)
    return Table(_simplified(values), int(offset) + int(stride) * np.arange(values.shape[2], dtype=np.int64))


def _simplified(values: Array) -> Array:
    """Without rounding noise, and without axes along which nothing changes."""
    size = max(1.0, float(np.abs(values).max(initial=0.0)))
    values = np.where(np.abs(values) < _ROUNDING * size, 0.0, values)
    for axis in (0, 1):
        first = values.take([0], axis=axis)
        if np.abs(values - first).max(initial=0.0) < _ROUNDING * size:
            values = first
    return values


def cell_dofs(V: Any, cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """Local unrolled dofs of cells, `(num_dofs, num_cells)`."""
    return _unrolled(np.asarray(V.dofmap.list, dtype=np.int64)[cells], V.dofmap.bs)


def geometry_nodes(msh: Any, cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """Unrolled numbers of the coordinates of cells in `mesh.geometry.x[:, :gdim]`, in the order of the coordinate element."""
    return _unrolled(_compat.geometry_dofmap(msh)[cells].astype(np.int64), msh.geometry.dim)


def _unrolled(blocks: NDArray[np.int64], bs: int) -> NDArray[np.int64]:
    dofs = blocks[:, :, None] * bs + np.arange(bs)
    return np.ascontiguousarray(dofs.reshape(len(blocks), blocks.shape[1] * bs).T)


@dataclass(frozen=True)
class Orientation:
    """How the basis functions of a cell follow from those of the reference cell: phi = T phi_ref.

    Attributes:
        matrices: The different T, `(num_matrices, num_dofs, num_dofs)`.
        numbers: Which of them each cell has, `(num_cells,)`.
    """

    matrices: Array
    numbers: NDArray[np.int64]

    @property
    def is_diagonal(self) -> bool:
        """Whether every T only changes signs."""
        return not np.any(self.matrices * (1.0 - np.eye(self.matrices.shape[1])))


def orientation(V: Any, cells: NDArray[np.int64]) -> Orientation | None:
    """The transformations of the cells' basis functions; None where the element has none, or all are the identity. Collective."""
    element = V.ufl_element()
    if transformation_matrix(element, 0) is None:
        return None
    topology = V.mesh.topology
    topology.create_entity_permutations()
    if len(cells) == 0:
        return None
    info = np.asarray(topology.get_cell_permutation_info(), dtype=np.uint32)[cells]
    different, numbers = np.unique(info, return_inverse=True)
    matrices = np.stack([np.asarray(transformation_matrix(element, int(code))) for code in different])
    if np.array_equal(matrices, np.broadcast_to(np.eye(matrices.shape[1]), matrices.shape)):
        return None
    return Orientation(matrices, numbers.astype(np.int64))
