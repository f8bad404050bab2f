"""Cell shapes, and the order in which file formats list the nodes of a cell."""

from __future__ import annotations

from functools import cache

import basix
import numpy as np
from dolfinx.cpp.io import perm_gmsh, perm_vtk
from dolfinx.mesh import to_type
from numpy.typing import NDArray

Index = NDArray[np.int64]

DIMENSION = {
    "point": 0, "interval": 1, "triangle": 2, "quadrilateral": 2, "tetrahedron": 3, "hexahedron": 3, "prism": 3, "pyramid": 3,
}  # fmt: skip
NUM_VERTICES = {
    "point": 1, "interval": 2, "triangle": 3, "quadrilateral": 4, "tetrahedron": 4, "hexahedron": 8, "prism": 6, "pyramid": 5,
}  # fmt: skip
AFFINE = ("interval", "triangle", "tetrahedron")  # a cell of order 1 of these shapes has a constant Jacobian

# meshio's name of a cell, without its number of nodes -> shape
_MESHIO = {
    "vertex": "point", "line": "interval", "triangle": "triangle", "quad": "quadrilateral", "tetra": "tetrahedron",
    "hexahedron": "hexahedron", "wedge": "prism", "pyramid": "pyramid",
    "VTK_LAGRANGE_CURVE": "interval", "VTK_LAGRANGE_TRIANGLE": "triangle", "VTK_LAGRANGE_QUADRILATERAL": "quadrilateral",
    "VTK_LAGRANGE_TETRAHEDRON": "tetrahedron", "VTK_LAGRANGE_HEXAHEDRON": "hexahedron",
}  # fmt: skip
_TO_MESHIO = {shape: name for name, shape in reversed(_MESHIO.items()) if not name.startswith("VTK")}

# gmsh's number of an element -> shape, number of nodes
GMSH = {
    15: ("point", 1), 1: ("interval", 2), 8: ("interval", 3), 26: ("interval", 4), 27: ("interval", 5),
    2: ("triangle", 3), 9: ("triangle", 6), 21: ("triangle", 10), 23: ("triangle", 15), 20: ("triangle", 9),
    3: ("quadrilateral", 4), 10: ("quadrilateral", 9), 36: ("quadrilateral", 16), 37: ("quadrilateral", 25),
    16: ("quadrilateral", 8),
    4: ("tetrahedron", 4), 11: ("tetrahedron", 10), 29: ("tetrahedron", 20), 30: ("tetrahedron", 35),
    5: ("hexahedron", 8), 12: ("hexahedron", 27), 92: ("hexahedron", 64), 17: ("hexahedron", 20),
    6: ("prism", 6), 13: ("prism", 18), 18: ("prism", 15), 7: ("pyramid", 5), 14: ("pyramid", 14), 19: ("pyramid", 13),
}  # fmt: skip


def shape_of_meshio(name: str) -> str | None:
    """The DOLFINx shape of a meshio cell type such as "triangle6", or None where there is none."""
    return _MESHIO.get(name) or _MESHIO.get(name.rstrip("0123456789"))


def meshio_name(shape: str, num_nodes: int) -> str:
    """The meshio cell type of a shape with so many nodes."""
    return _TO_MESHIO[shape] + ("" if num_nodes == NUM_VERTICES[shape] else str(num_nodes))


@cache
def order_of(shape: str, num_nodes: int) -> int | None:
    """The order of the Lagrange cell with so many nodes, or None where there is none (serendipity cells)."""
    if shape == "point":
        return 1 if num_nodes == 1 else None
    for order in range(1, 5):
        if (
            basix.create_element(basix.ElementFamily.P, basix.CellType[shape], order, basix.LagrangeVariant.equispaced).dim
            == num_nodes
        ):
            return order
    return None


def _permutation(table: object, shape: str, num_nodes: int) -> Index | None:
    if shape == "point":
        return np.zeros(1, dtype=np.int64)
    try:
        return np.asarray(table(to_type(shape), num_nodes), dtype=np.int64)  # type: ignore[operator]
    except RuntimeError:
        return None


@cache
def from_vtk(shape: str, num_nodes: int) -> Index | None:
    """The columns that turn VTK's (and meshio's) order of nodes into DOLFINx's; None where DOLFINx knows no order."""
    return _permutation(perm_vtk, shape, num_nodes)


@cache
def from_gmsh(shape: str, num_nodes: int) -> Index | None:
    """The columns that turn gmsh's order of nodes into DOLFINx's; None where DOLFINx knows no order."""
    if shape == "triangle" and num_nodes == 15:  # unlike gmsh's, DOLFINx's table ends at order 3; VTK's order is the same
        return from_vtk(shape, num_nodes)
    return _permutation(perm_gmsh, shape, num_nodes)


def row_keys(rows: Index, bound: int) -> Index:
    """One integer for each row, equal for rows with the same entries in any order.

    Args:
        rows: Node numbers, (num_rows, width), each in [0, bound).
        bound: Number of nodes.

    Returns:
        Keys, (num_rows,). They compare only with keys from the same call.

    MPI: Not collective.
    """
    columns = np.sort(rows, axis=1).T
    keys = columns[0]
    for column in columns[1:]:
        _, keys = np.unique(keys, return_inverse=True)
        keys = keys.reshape(-1) * np.int64(bound) + column
    return np.asarray(np.unique(keys, return_inverse=True)[1]).reshape(-1)


@cache
def facets_of(shape: str) -> tuple[tuple[int, ...], ...]:
    """The vertices of each facet of the reference cell."""
    cell = basix.CellType[shape]
    return tuple(tuple(facet) for facet in basix.topology(cell)[DIMENSION[shape] - 1])
