"""Which cell has a point: maps of cells are inverted, so that curved cells have their own points and no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import basix
import numpy as np
from dolfinx import geometry
from numpy.typing import NDArray

from fem_vi.parallel import min_over_ranks
from fem_vi.pde import _compat
from fem_vi.pde.inputs import Array

TOLERANCE = 1e-10
"""How far outside a cell a point may lie, in the cell's size, besides the rounding of its coordinates."""
SIMPLICES = (basix.CellType.interval, basix.CellType.triangle, basix.CellType.tetrahedron)
NOWHERE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Location:
    """Where points lie.

    Attributes:
        cells: Local cell of each point that falls to this rank, -1 for the others, `(num_points,)`.
        reference: The points in the coordinates of their cells, `(num_points, tdim)`.
        found: Whether any rank has the point, `(num_points,)`, replicated.
    """

    cells: NDArray[np.int32]
    reference: Array
    found: NDArray[np.bool_]


def locate_points(mesh: Any, points: Array) -> Location:
    """One cell for each point, on one rank only.

    Where several cells have a point, on an edge or a corner, it goes to the one that was given first when the mesh was
    made, however the mesh is partitioned: fields that jump there have one value on any number of ranks.

    Args:
        mesh: DOLFINx mesh.
        points: `(num_points, 3)`, replicated.

    MPI: Collective.
    """
    point, cell = _candidates(mesh, points)
    reference, inside = _pull_back(mesh, cell, points[point, : mesh.geometry.dim])
    point, cell, reference = point[inside], cell[inside], reference[inside]
    names = _cell_names(mesh)[cell]
    first = np.full(len(points), NOWHERE)
    np.minimum.at(first, point, names)
    lowest = min_over_ranks(mesh.comm, first)
    mine = names == lowest[point]
    location = Location(np.full(len(points), -1, dtype=np.int32), np.zeros((len(points), mesh.topology.dim)), lowest < NOWHERE)
    location.cells[point[mine]] = cell[mine]
    location.reference[point[mine]] = reference[mine]
    return location


def coordinate_element(mesh: Any) -> Any:
    """The scalar element, of Basix, of the map from the reference cell to a cell."""
    return mesh.ufl_domain().ufl_coordinate_element().sub_elements[0].basix_element


def _candidates(mesh: Any, points: Array) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Pairs of a point and an owned cell whose bounding box has it."""
    x = mesh.geometry.x[_compat.geometry_dofmap(mesh)]
    largest = float(np.ptp(x, axis=1).max(initial=0.0))
    straight = coordinate_element(mesh).degree == 1
    # The box is that of the nodes. Straight cells lie in it; a quadratic edge leaves it by 1/8 of its extent at most.
    padding = (1e-8 if straight else 0.25) * largest + 1e-14 * float(np.abs(x).max(initial=0.0))
    links = geometry.compute_collisions_points(_compat.bounding_box_tree(mesh, padding), points)
    cell = np.asarray(links.array, dtype=np.int32)
    point = np.repeat(np.arange(len(points)), np.diff(links.offsets))
    owned = cell < mesh.topology.index_map(mesh.topology.dim).size_local
    return point[owned], cell[owned]


def _pull_back(mesh: Any, cells: NDArray[np.int32], points: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Invert the maps of cells by Newton's method, all pairs at once (affine maps take one step).

    Args:
        mesh: DOLFINx mesh.
        cells: Local cells, `(num_pairs,)`.
        points: One point for each of them, `(num_pairs, gdim)`.

    Returns:
        Reference coordinates `(num_pairs, tdim)`, and whether the point lies in the cell.
    """
    if len(cells) == 0:  # Basix does not take an empty array
        return np.zeros((0, mesh.topology.dim)), np.zeros(0, dtype=np.bool_)
    element = coordinate_element(mesh)
    nodes = mesh.geometry.x[_compat.geometry_dofmap(mesh)[cells]][:, :, : mesh.geometry.dim]
    rounding = 1e-14 * np.abs(nodes).max(axis=(1, 2))
    origin = nodes[:, :1].copy()
    nodes, targets = nodes - origin, points - origin[:, 0]  # digits are not to be lost where coordinates are large
    size = np.ptp(nodes, axis=1).max(axis=1)
    reference = np.tile(basix.geometry(mesh.basix_cell()).mean(axis=0), (len(cells), 1))
    for _ in range(30):
        table = element.tabulate(1, reference)[..., 0]
        slopes = np.einsum("tpn,pni->pit", table[1:], nodes)
        missing = targets - np.einsum("pn,pni->pi", table[0], nodes)
        step = np.einsum("pti,pi->pt", np.linalg.pinv(slopes), missing)
        reference += np.clip(step, -1.0, 1.0)  # far from its cell a point has no meaning, and need not converge
        if np.abs(step).max() < 1e-15:
            break
    missing = targets - np.einsum("pn,pni->pi", element.tabulate(0, reference)[0, ..., 0], nodes)
    tolerance = TOLERANCE + rounding / size
    inside = _outside_by(mesh, reference) <= tolerance
    return reference, inside & (np.abs(missing).max(axis=1) <= tolerance * size)


def _outside_by(mesh: Any, reference: Array) -> Array:
    """How far reference coordinates leave the reference cell; negative inside."""
    beyond = reference.sum(axis=1) if mesh.basix_cell() in SIMPLICES else reference.max(axis=1)
    return np.maximum((-reference).max(axis=1), beyond - 1.0)


def _cell_names(mesh: Any) -> NDArray[np.int64]:
    """A number for each local cell that does not depend on the partition: its place among those that the mesh was made of."""
    try:
        return np.asarray(mesh.topology.original_cell_index, dtype=np.int64)
    except RuntimeError:  # a submesh was not made of given cells
        cells = mesh.topology.index_map(mesh.topology.dim)
        return np.asarray(cells.local_to_global(np.arange(cells.size_local + cells.num_ghosts, dtype=np.int32)))
