"""Point evaluation as sparse matrices: which owned coefficients, with which weights, make up values and derivatives at points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import basix
import numpy as np
from numpy.typing import NDArray

from fem_vi.errors import UnsupportedForm
from fem_vi.parallel import all_values, raise_on_all
from fem_vi.pde import _compat
from fem_vi.pde.inputs import Array, local_size
from fem_vi.pde.locate import Location, coordinate_element
from fem_vi.pde.taylor import TaylorPolynomials

# What is done to each axis of a value on the reference cell, and by what power of det J the value is divided then.
# J is (physical, reference), K = J^-1.
_CONTRAVARIANT, _COVARIANT = "pd...i,pxi->pdx...", "pd...i,pix->pdx..."
_MAPS: dict[Any, tuple[str, int, int]] = {
    basix.MapType.L2Piola: ("", 0, 1),
    basix.MapType.contravariantPiola: (_CONTRAVARIANT, 1, 1),
    basix.MapType.covariantPiola: (_COVARIANT, 1, 0),
    basix.MapType.doubleContravariantPiola: (_CONTRAVARIANT, 2, 2),
    basix.MapType.doubleCovariantPiola: (_COVARIANT, 2, 0),
}


@dataclass(frozen=True)
class PointEvaluation:
    """The rows of an observation matrix, restricted to the columns that this rank owns.

    Attributes:
        rows: Row of each entry: point times the size of a value, plus component.
        cols: Owned coefficient of each entry.
        weights: The entries.
        shape: Shape of a value; derivatives add an axis of `gdim` each at the end.
    """

    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    weights: Array
    shape: tuple[int, ...]


def evaluate_points(space: Any, location: Location, orders: Sequence[int] = (0,)) -> list[PointEvaluation]:
    """The matrices of point evaluation on a function space, of values and of derivatives in x.

    Args:
        space: Of any element that Basix tabulates. Values of symmetric tensors have all their components, those of mixed spaces
            follow each other in one axis, as in UFL.
        location: Where the points lie.
        orders: Orders of derivatives; 0 is the value.

    Raises:
        UnsupportedForm: For elements that have values at their own points only, and Piola-mapped ones on surfaces.

    MPI: Collective.
    """
    mesh = space.mesh
    here = np.flatnonzero(location.cells >= 0)
    if space.element.needs_dof_transformations:
        mesh.topology.create_entity_permutations()
    with raise_on_all(mesh.comm):
        cells = _Cells(mesh, location.cells[here], location.reference[here], max(orders))
        dofs, tables = _cell_tables(space, cells)
    first = space.dofmap.index_map.local_range[0] * space.dofmap.index_map_bs
    last = first + local_size(space)[0]
    shape = (tables[0].shape[2],) if space.ufl_element().is_mixed else tuple(int(n) for n in space.value_shape)
    out = []
    for order in orders:
        size = int(np.prod(shape, dtype=int)) * mesh.geometry.dim**order
        weight = tables[order].reshape(*dofs.shape, size)
        point, dof, component = np.nonzero(weight)
        entries = here[point] * size + component, dofs[point, dof], weight[point, dof, component]
        gathered = all_values(mesh.comm, entries)
        row, col, value = (np.concatenate([part[k] for part in gathered]) for k in range(3))
        mine = (col >= first) & (col < last)
        out.append(PointEvaluation(row[mine], col[mine] - first, value[mine], (*shape, *[mesh.geometry.dim] * order)))
    return out


class _Cells:
    """The maps of the cells that have the points, each as Taylor polynomials at its point.

    Attributes:
        order: Highest order of derivatives that is wanted of basis functions.
        slopes: Jacobians J of the maps to order `order`, `(num_terms, num_points, gdim, tdim)`.
        inverse: K with K J = 1, `(num_terms, num_points, tdim, gdim)`.
    """

    def __init__(self, mesh: Any, cells: NDArray[np.int32], reference: Array, order: int) -> None:
        self.mesh, self.cells, self.reference, self.order = mesh, cells, reference, order
        self.algebra = TaylorPolynomials(mesh.topology.dim, order + 1)
        nodes = mesh.geometry.x[_compat.geometry_dofmap(mesh)[cells]][:, :, : mesh.geometry.dim]
        nodes = nodes - nodes[:, :1]  # digits are not to be lost where coordinates are large
        table = self.tabulate(coordinate_element(mesh), order + 1)[..., 0]
        position = np.einsum("tpn,pni->tpi", table, nodes)
        self.slopes = self.algebra.gradient(position)
        square = self.slopes.shape[-1] == self.slopes.shape[-2]
        self.inverse = self.algebra.inverse(self.slopes) if square else self._left_inverse()

    def _left_inverse(self) -> Array:
        """(J^T J)^-1 J^T, for surfaces and curves."""
        metric = self.algebra.product("pik,pil->pkl", self.slopes, self.slopes)
        return self.algebra.product("pkl,pil->pki", self.algebra.inverse(metric), self.slopes)

    def tabulate(self, element: Any, order: int) -> Array:
        """Basis functions of a Basix element as polynomials at the points, `(num_terms, num_points, num_dofs, value_size)`."""
        if len(self.cells) == 0:  # Basix does not take an empty array
            terms = len(element.tabulate(order, np.zeros((1, self.mesh.topology.dim))))
            return np.zeros((terms, 0, element.dim, element.value_size))
        return self.algebra.from_derivatives(element.tabulate(order, self.reference))

    def push_forward(self, element: Any, table: Array) -> Array:
        """Basis functions of the reference cell as those of the cells, `(num_terms, num_points, num_dofs, value_size)`."""
        if element.map_type == basix.MapType.identity:
            return table
        if self.slopes.shape[-1] != self.slopes.shape[-2]:
            raise UnsupportedForm("Piola-mapped elements on curves and surfaces cannot be observed at points.")
        spec, num_axes, power = _MAPS[element.map_type]
        dim = self.mesh.topology.dim
        out = table.reshape(*table.shape[:3], *[dim] * num_axes) if num_axes else table[..., 0]
        for _ in range(num_axes):  # takes the last axis and puts the new one first
            out = self.algebra.product(spec, out, self.slopes if spec == _CONTRAVARIANT else self.inverse)
        if power:
            determinant = self.algebra.determinant(self.slopes)
            reciprocal = self.algebra.inverse(determinant[..., None, None])[..., 0, 0]
            for _ in range(power):
                out = self.algebra.product("pd...,p->pd...", out, reciprocal)
        return out.reshape(*out.shape[:3], dim**num_axes)

    def derivatives(self, values: Array) -> list[Array]:
        """Values and derivatives in x, up to `order`, of functions `(num_terms, num_points, num_dofs, value_size)`.

        Returns:
            For each order, `(num_points, num_dofs, value_size, gdim, ...)`: as many axes of `gdim` as the order.
        """
        out = [values[0]]
        for _ in range(self.order):
            values = self.algebra.product("pd...k,pki->pd...i", self.algebra.gradient(values), self.inverse)
            out.append(values[0])
        return out


def _cell_tables(space: Any, cells: _Cells) -> tuple[NDArray[np.int64], list[Array]]:
    """The dofs of the cells, `(num_points, num_dofs)`, global, and for each order the derivatives of their basis functions.

    Those are `(num_points, num_dofs, value_size, gdim, ...)`.
    """
    element = space.ufl_element()
    if element.is_mixed:
        return _mixed_tables([_cell_tables(space.sub(k), cells) for k in range(space.num_sub_spaces)])
    block = int(element.block_size)
    scalar = _scalar_element(element)
    table = cells.tabulate(scalar, cells.order)
    if space.element.needs_dof_transformations:
        table = _orient(space, cells.cells, table)
    tables = cells.derivatives(cells.push_forward(scalar, table))
    if block > 1:
        components = _components(element, block)
        blocked = [np.einsum("pds...,cb->pdbc...", t, components) for t in tables]
        tables = [t.reshape(len(t), t.shape[1] * block, len(components), *t.shape[4:]) for t in blocked]
    return _cell_dofs(space, cells.cells), tables


def _scalar_element(element: Any) -> Any:
    """The element of Basix that an element, or each of its blocks, is."""
    try:
        return (element.sub_elements[0] if element.block_size > 1 else element).basix_element
    except NotImplementedError as error:
        raise UnsupportedForm(
            f"{element} has values at its own points only; interpolate the Function into another space."
        ) from error


def _mixed_tables(parts: Sequence[tuple[NDArray[np.int64], list[Array]]]) -> tuple[NDArray[np.int64], list[Array]]:
    """Those of a mixed space: the dofs of all parts, and the components of all parts, one after another."""
    sizes = [tables[0].shape[1:3] for _, tables in parts]
    num_dofs, num_components = (sum(size[k] for size in sizes) for k in range(2))
    whole = [np.zeros((len(t), num_dofs, num_components, *t.shape[3:])) for t in parts[0][1]]
    dof = component = 0
    for (_, tables), (d, c) in zip(parts, sizes, strict=True):
        for target, table in zip(whole, tables, strict=True):
            target[:, dof : dof + d, component : component + c] = table
        dof, component = dof + d, component + c
    return np.concatenate([dofs for dofs, _ in parts], axis=1), whole


def _components(element: Any, block: int) -> Array:
    """Which block makes up which component of a blocked element's value, `(value_size, block_size)`.

    The blocks of a symmetric tensor are the rows of its lower triangle.
    """
    if not getattr(element, "is_symmetric", False):
        return np.eye(block)
    n = (math.isqrt(8 * block + 1) - 1) // 2
    pairs = [(max(i, j), min(i, j)) for i in range(n) for j in range(n)]
    return np.eye(block)[[i * (i + 1) // 2 + j for i, j in pairs]]


def _cell_dofs(space: Any, cells: NDArray[np.int32]) -> NDArray[np.int64]:
    """Global unrolled dofs of cells, `(num_cells, num_dofs)`."""
    dofmap = space.dofmap
    local = np.asarray(dofmap.list, dtype=np.int32)[cells]
    unrolled = (local[:, :, None] * dofmap.bs + np.arange(dofmap.bs)).reshape(len(cells), local.shape[1] * dofmap.bs)
    bs = dofmap.index_map_bs
    blocks = dofmap.index_map.local_to_global((unrolled // bs).astype(np.int32).ravel())
    return np.asarray(blocks, dtype=np.int64).reshape(unrolled.shape) * bs + unrolled % bs


def _orient(space: Any, cells: NDArray[np.int32], table: Array) -> Array:
    """Orient the basis functions of cells, `(num_terms, num_points, num_dofs, value_size)`, as their neighbours do."""
    by_point = np.moveaxis(table, 0, -1)
    oriented = by_point.ravel()
    if len(cells) > 0:
        information = space.mesh.topology.get_cell_permutation_info()[cells]
        space.element.T_apply(oriented, information, by_point.shape[2] * by_point.shape[3])
    return np.moveaxis(oriented.reshape(by_point.shape), -1, 0)
