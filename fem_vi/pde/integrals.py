"""Where the integrals of a form are taken: cells and facets of this rank, quadrature points, and which way they run.

A *variant* is one way in which the quadrature points of a facet lie in its cell: a local facet, and the permutation that lets
both cells of an interior facet see the points in the same order. Cells have one variant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import basix
import numpy as np
from dolfinx import fem, mesh
from numpy.typing import NDArray

from fem_vi.errors import UnsupportedForm
from fem_vi.parallel import raise_on_all
from fem_vi.pde import _compat
from fem_vi.pde.inputs import Array

Numbers = NDArray[np.int64]

KINDS = {
    "cell": fem.IntegralType.cell,
    "exterior_facet": fem.IntegralType.exterior_facet,
    "interior_facet": fem.IntegralType.interior_facet,
}
CELLS = ("interval", "triangle", "quadrilateral", "tetrahedron", "hexahedron")


@dataclass(frozen=True)
class Entities:
    """Cells or facets that this rank integrates over; interior facets have two sides, the others one.

    Attributes:
        cells: Local cells, `(num_sides, num_entities)`.
        facets: Local numbers of the facets in their cells, likewise; zeros for cells.
        variants: The variant that each side is, likewise.
    """

    cells: Numbers
    facets: Numbers
    variants: Numbers


def integration_entities(msh: Any, kind: str, data: Any, ids: Sequence[Any]) -> Entities:
    """What this rank integrates over, as DOLFINx would.

    Args:
        msh: DOLFINx mesh.
        kind: Key of `KINDS`.
        data: Subdomain data of the measure: MeshTags, pairs of a number and entities, or None.
        ids: Subdomain numbers; "otherwise" and "everywhere" stand for all.

    Raises:
        UnsupportedForm: On every rank, where interior facets between two ranks are not known to both.

    MPI: Collective.
    """
    topology = msh.topology
    tdim = topology.dim
    if kind != "cell":
        topology.create_entities(tdim - 1)
        topology.create_connectivity(tdim - 1, tdim)
        topology.create_connectivity(tdim, tdim - 1)
    if kind == "interior_facet":
        with raise_on_all(msh.comm):
            _check_shared_facets(topology)
    parts = [_entities(msh, kind, data, number) for number in ids]
    flat = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    if kind == "cell":
        cells = flat.astype(np.int64)[None]
        return Entities(cells, np.zeros_like(cells), np.zeros_like(cells))
    sides = flat.reshape(-1, 2 if kind == "interior_facet" else 1, 2).astype(np.int64)
    cells, facets = (np.ascontiguousarray(sides[..., k].T) for k in range(2))
    variants = facets
    if kind == "interior_facet" and tdim > 1:
        topology.create_entity_permutations()
        num_facets = _num_facets(topology.cell_name())
        permutations = topology.get_facet_permutations().astype(np.int64)
        variants = permutations[cells * num_facets + facets] * num_facets + facets
    return Entities(cells, facets, variants)


def _facets_of_one_cell(topology: Any) -> NDArray[np.intp]:
    return np.flatnonzero(np.diff(topology.connectivity(topology.dim - 1, topology.dim).offsets) == 1)


def _check_shared_facets(topology: Any) -> None:
    if np.intersect1d(_facets_of_one_cell(topology), topology.interprocess_facets()).size:
        raise UnsupportedForm(
            "The form has integrals over interior facets, and some facets between two ranks are known to one cell only. "
            "Make the mesh with ghost_mode=dolfinx.mesh.GhostMode.shared_facet."
        )


def _entities(msh: Any, kind: str, data: Any, number: Any) -> NDArray[np.int32]:
    """Entities of one subdomain as DOLFINx packs them, flat."""
    topology = msh.topology
    tdim = topology.dim
    if number not in ("otherwise", "everywhere", -1):
        if isinstance(data, list | tuple):
            return np.concatenate([np.empty(0, dtype=np.int32), *[np.ravel(part) for own, part in data if own == number]])
        chosen = data.find(number)
    elif kind == "cell":
        return np.arange(topology.index_map(tdim).size_local, dtype=np.int32)
    elif kind == "exterior_facet":
        chosen = mesh.exterior_facet_indices(topology)
    else:
        chosen = np.arange(topology.index_map(tdim - 1).size_local, dtype=np.int32)
    if kind == "cell":
        return np.asarray(chosen[chosen < topology.index_map(tdim).size_local])
    if kind == "exterior_facet":
        chosen = np.intersect1d(chosen, mesh.exterior_facet_indices(topology)).astype(np.int32)
    else:
        chosen = np.setdiff1d(chosen, _facets_of_one_cell(topology)).astype(np.int32)
    return np.asarray(_compat.integration_domains(KINDS[kind], topology, chosen)).ravel()


def quadrature(kind: str, cell: str, metadata: Mapping[str, Any], elements: Sequence[Any]) -> tuple[Array, Array]:
    """Points on the reference cell, or facet, and weights, as the form compiler chooses them.

    Args:
        kind: Key of `KINDS`.
        cell: Name of the cell's shape.
        metadata: Of the integral, its degree pinned.
        elements: basix elements that occur in the integral.

    Returns:
        Points `(num_points, dim)` and weights `(num_points,)`.

    Raises:
        UnsupportedForm: Where two quadrature elements have different points.
    """
    own = [element.custom_quadrature() for element in elements if element.has_custom_quadrature]
    if own:
        if any(points.shape != own[0][0].shape or not np.allclose(points, own[0][0]) for points, _ in own):
            raise UnsupportedForm("Two quadrature elements in one integral have different points; give them the same degree.")
        return np.asarray(own[0][0]), np.asarray(own[0][1])
    rule = metadata.get("quadrature_rule", "default")
    if rule == "custom":
        return np.asarray(metadata["quadrature_points"]), np.asarray(metadata["quadrature_weights"])
    shape = basix.CellType[cell]
    if kind != "cell":
        if shape == basix.CellType.interval:
            return np.zeros((1, 0)), np.ones(1)
        shape = basix.cell.subentity_types(shape)[-2][0]
    if rule == "vertex":
        points = np.asarray(basix.geometry(shape))
        return points, np.full(len(points), basix.cell.volume(shape) / len(points))
    polyset = basix.PolysetType.standard
    for element in elements:
        polyset = basix.polyset_superset(shape, polyset, element.polyset_type)
    scheme = basix.quadrature.string_to_type(rule)
    points, weights = basix.make_quadrature(shape, metadata["quadrature_degree"], rule=scheme, polyset_type=polyset)
    return np.asarray(points), np.asarray(weights)


def variant_points(kind: str, cell: str, points: Array) -> Array:
    """Where quadrature points lie in the reference cell, `(num_variants, num_points, tdim)`."""
    if kind == "cell":
        return points[None]
    ways = [points] if kind == "exterior_facet" else _permuted(cell, points)
    return np.stack([_on_facet(cell, facet, way) for way in ways for facet in range(_num_facets(cell))])


def _num_facets(cell: str) -> int:
    return len(basix.topology(basix.CellType[cell])[-2])


def _on_facet(cell: str, facet: int, points: Array) -> Array:
    shape = basix.CellType[cell]
    corners = np.asarray(basix.geometry(shape))[basix.topology(shape)[-2][facet]]
    return corners[0] + points @ (corners[1 : 1 + points.shape[1]] - corners[0])


def _permuted(cell: str, points: Array) -> list[Array]:
    """The points of a facet for each permutation number of DOLFINx: rotations, and each with a reflection after it."""
    if cell == "interval":
        return [points]
    if cell in ("triangle", "quadrilateral"):
        return [points, 1.0 - points]
    turns = 3 if cell == "tetrahedron" else 4
    ways = []
    turned = points
    for _ in range(turns):
        ways += [turned, turned[:, ::-1]]
        x, y = turned.T
        turned = np.stack([y, 1.0 - x - y] if cell == "tetrahedron" else [y, 1.0 - x], axis=1)
    return ways
