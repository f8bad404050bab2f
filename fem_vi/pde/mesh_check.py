"""From what a file says to one mesh that DOLFINx can take, or an error that says why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import basix
import numpy as np
from numpy.typing import NDArray

from fem_vi.errors import MeshError
from fem_vi.pde import mesh_cells
from fem_vi.pde.mesh_cells import Index
from fem_vi.pde.mesh_content import UNTAGGED, Block, MeshContent

FLAT = 1e-12  # a cell is flat when its volume is this small relative to that of a cube of its size


@dataclass(frozen=True)
class CheckedMesh:
    """One sound mesh, on the rank that read it.

    Attributes:
        points: Coordinates, (num_points, gdim); every point belongs to a cell.
        shape: DOLFINx's name of the cells' shape.
        order: Order of the geometry.
        cells: Rows of `points` in DOLFINx's order, (num_cells, num_nodes).
        cell_tags: (num_cells,), UNTAGGED where a cell has none.
        facets: Vertices of the tagged facets, rows of `points`, (num_facets, num_vertices).
        facet_tags: (num_facets,).
        names: (name, dimension, tag) of cells and facets.
        warnings: What was left out or looks doubtful.
    """

    points: NDArray[np.float64]
    shape: str
    order: int
    cells: Index
    cell_tags: Index
    facets: Index
    facet_tags: Index
    names: tuple[tuple[str, int, int], ...]
    warnings: tuple[str, ...]

    @property
    def dim(self) -> int:
        """Topological dimension."""
        return mesh_cells.DIMENSION[self.shape]

    @property
    def vertices(self) -> Index:
        """The nodes of each cell that are vertices, (num_cells, num_vertices)."""
        return self.cells[:, : mesh_cells.NUM_VERTICES[self.shape]]


def _some(numbers: NDArray[np.integer]) -> str:
    return ", ".join(str(int(n)) for n in numbers[:5]) + (", ..." if len(numbers) > 5 else "")


def _top_block(content: MeshContent) -> Block:
    """All cells of the highest dimension, which must be of one kind."""
    blocks = [block for block in content.blocks if len(block.nodes) and block.dim > 0]
    if not blocks:
        raise MeshError("it contains no cells.")
    top = [block for block in blocks if block.dim == max(b.dim for b in blocks)]
    kinds: dict[str, int] = {}
    for block in top:
        order = mesh_cells.order_of(block.shape, block.nodes.shape[1])
        kind = block.shape + ("" if order == 1 else f" of order {order}")
        kinds[kind] = kinds.get(kind, 0) + len(block.nodes)
    if len(kinds) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise MeshError(f"it mixes cells of dimension {top[0].dim}: {counts}. DOLFINx needs cells of one type and order.")
    return Block(top[0].shape, np.concatenate([b.nodes for b in top]), np.concatenate([b.tags for b in top]))


def _check_nodes(block: Block, points: NDArray[np.float64]) -> None:
    """Every cell names nodes that exist, none twice."""
    outside = np.flatnonzero(((block.nodes < 0) | (block.nodes >= len(points))).any(axis=1))
    if len(outside):
        raise MeshError(
            f"{len(outside)} {block.shape} cells refer to nodes beyond the {len(points)} that are there: cells {_some(outside)}."
        )
    ranked = np.sort(block.nodes, axis=1)
    twice = np.flatnonzero((ranked[:, 1:] == ranked[:, :-1]).any(axis=1))
    if len(twice):
        raise MeshError(f"{len(twice)} {block.shape} cells name the same node twice (cells {_some(twice)}): they have collapsed.")


def _check_finite(block: Block, points: NDArray[np.float64]) -> None:
    bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
    bad = bad[np.isin(bad, block.nodes)]
    if len(bad):
        raise MeshError(f"{len(bad)} nodes have coordinates that are not finite (nodes {_some(bad)}).")


def _merge_repeated(keys: Index, tags: Index, what: str, names: dict[int, str]) -> Index:
    """Indices of one entity for each key; entities that are listed again must carry the same tag."""
    order = np.lexsort((tags, keys))
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    different = again[tags[order][again] != tags[order][again + 1]]
    if len(different):
        i, j = (int(tags[order][different[0] + k]) for k in (0, 1))
        first, second = (f"'{names[t]}' ({t})" if t in names else "none" if t == UNTAGGED else str(t) for t in (i, j))
        raise MeshError(f"{len(different)} {what} carry two tags, such as {first} and {second}; DOLFINx holds one tag each. "
                        "Make the groups disjoint.")  # fmt: skip
    return np.unique(keys, return_index=True)[1]


def _unique_cells(block: Block, bound: int, names: dict[int, str]) -> Block:
    """The cells; the same cell twice is an error, which also says when the cause is two overlapping groups."""
    keys = mesh_cells.row_keys(block.vertices, bound)
    keep = _merge_repeated(keys, block.tags, "cells", names)
    if len(keep) < len(keys):
        again = np.setdiff1d(np.arange(len(keys)), keep)
        raise MeshError(f"{len(again)} cells are there twice (cells {_some(again)}).")
    return block


def _tagged_facets(content: MeshContent, cells: Block, names: dict[int, str]) -> tuple[Index, Index]:
    """Vertices and tags of the facets that carry a tag; all must be facets of cells."""
    shape, num_points = cells.shape, len(content.points)
    sides = np.concatenate([cells.nodes[:, list(facet)] for facet in mesh_cells.facets_of(shape)])
    width = sides.shape[1]
    blocks = [b for b in content.blocks if b.dim == cells.dim - 1 and np.any(b.tags != UNTAGGED)]
    if any(b.vertices.shape[1] != width for b in blocks):
        raise MeshError(f"its tagged facets are {', '.join(b.shape for b in blocks)}; no such facet belongs to a {shape}.")
    facets = np.concatenate([np.empty((0, width), dtype=np.int64), *(b.vertices[b.tags != UNTAGGED] for b in blocks)])
    tags = np.concatenate([np.empty(0, dtype=np.int64), *(b.tags[b.tags != UNTAGGED] for b in blocks)])
    if facets.size and (facets.min() < 0 or facets.max() >= num_points):
        raise MeshError("tagged facets refer to nodes that are not there.")
    keys = mesh_cells.row_keys(np.concatenate([sides, facets]), num_points)
    links = np.bincount(keys[: len(sides)], minlength=int(keys.max()) + 1)
    if links.max() > 2:
        raise MeshError(
            f"{int(np.sum(links > 2))} facets join more than two cells: cells overlap, or the mesh branches. Neither can be read."
        )
    keys = keys[len(sides) :]
    loose = np.flatnonzero(links[keys] == 0)
    if len(loose):
        raise MeshError(
            f"{len(loose)} of {len(facets)} tagged facets (dimension {cells.dim - 1}) are the side of no cell: "
            "the tags belong to another mesh, or a tagged line or surface is not embedded in the mesh."
        )
    keep = _merge_repeated(keys, tags, "facets", names)
    return facets[keep], tags[keep]


def _flat_dimension(points: NDArray[np.float64], dim: int) -> int:
    """The geometric dimension: coordinates after the last one that varies are dropped, down to `dim`."""
    spread = np.ptp(points, axis=0)
    gdim = 3
    while gdim > dim and spread[gdim - 1] <= 1e-14 * max(spread.max(), np.abs(points).max()):
        gdim -= 1
    return gdim


def jacobians(shape: str, order: int, x: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """The derivative of the map from the reference cell, at some reference points.

    Args:
        shape: Shape of the cells.
        order: Order of the geometry.
        x: Nodes of each cell, (num_cells, num_nodes, gdim).
        reference: (num_points, dim).

    Returns:
        (num_cells, num_points, gdim, dim).
    """
    element = basix.create_element(basix.ElementFamily.P, basix.CellType[shape], order, basix.LagrangeVariant.equispaced)
    gradients = element.tabulate(1, reference)[1:, :, :, 0]  # (dim, num_points, num_nodes)
    return np.einsum("cng,dqn->cqgd", x, gradients, optimize=True)


def signed_volumes(jacobian: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much the map stretches volume, (num_cells, num_points); on surfaces, signed relative to the first point."""
    gdim, dim = jacobian.shape[2:]
    if gdim == dim:
        return np.linalg.det(jacobian)
    normal = jacobian[..., 0] if dim == 1 else np.cross(jacobian[..., 0], jacobian[..., 1])
    sign = np.sign(np.einsum("cqi,ci->cq", normal, normal[:, 0]))
    return np.asarray(sign * np.linalg.norm(normal, axis=-1), dtype=np.float64)


def sample_points(shape: str, order: int) -> NDArray[np.float64]:
    """Where a cell's Jacobian is looked at: once where it is constant, else on a lattice with the cell's middle in front."""
    cell = basix.CellType[shape]
    middle = basix.geometry(cell).mean(axis=0, keepdims=True)
    if order == 1 and shape in (*mesh_cells.AFFINE, "pyramid"):  # a pyramid's map degenerates at its tip
        return middle
    lattice = basix.create_lattice(
        cell, 1 if order == 1 and shape != "hexahedron" else 2 * order, basix.LatticeType.equispaced, True
    )
    return np.concatenate([middle, lattice])


def _chunks(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))


def _check_volumes(shape: str, order: int, cells: Index, points: NDArray[np.float64]) -> None:
    """No cell may be flat, and none folded. Which way round a cell is listed does not matter: DOLFINx integrates with |det|."""
    reference = sample_points(shape, order)
    dim = mesh_cells.DIMENSION[shape]
    flat, folded = [], []
    for chunk in _chunks(len(cells), max(1, 2_000_000 // (len(reference) * cells.shape[1]))):
        x = points[cells[chunk]]
        size = np.ptp(x, axis=1).max(axis=1)
        noise = 16 * np.finfo(np.float64).eps * np.abs(x).max(axis=(1, 2))
        with np.errstate(over="ignore", invalid="ignore"):
            volumes = signed_volumes(jacobians(shape, order, x, reference))
            least = np.maximum(FLAT * size, noise) * size ** (dim - 1)
        turns = (volumes.max(axis=1) > least) & (volumes.min(axis=1) < -least)
        folded.append(np.flatnonzero(turns) + chunk.start)
        # In the middle, not anywhere: a straight angle in a corner of a quadrilateral does no harm.
        flat.append(np.flatnonzero(~turns & ~(np.abs(volumes[:, 0]) > least)) + chunk.start)
    for found, what in (
        (np.concatenate(flat), "have no volume"),
        (np.concatenate(folded), "are folded (their Jacobian changes sign)"),
    ):
        if len(found):
            place = points[cells[found[0]]].mean(axis=0)
            at = ", ".join(f"{value:.6g}" for value in place)
            raise MeshError(f"{len(found)} of {len(cells)} {shape} cells {what}: cells {_some(found)}, the first around ({at}).")


def _names(content: MeshContent, dim: int, warnings: list[str]) -> tuple[tuple[str, int, int], ...]:
    """Names of cells and facets, each once; where both dimensions use one name, the facets' gets its dimension added."""
    cells = {name for name, d, _ in content.names if d == dim}
    found: dict[str, tuple[str, int, int]] = {}
    for name, d, tag in sorted(content.names, key=lambda entry: -entry[1]):
        if d not in (dim, dim - 1):
            warnings.append(f"group '{name}' of dimension {d} is left out: only cells and facets carry tags.")
            continue
        unique = facet_name(name, d) if d < dim and name in cells else name
        if unique != name:
            warnings.append(f"cells and facets both have a group '{name}'; that of the facets is called '{unique}'.")
        if unique in found and found[unique][2] != tag:
            raise MeshError(f"two groups of dimension {d} are called '{name}' (tags {found[unique][2]} and {tag}).")
        found[unique] = (unique, d, tag)
    return tuple(found.values())


def facet_name(name: str, dim: int) -> str:
    """What a group of facets is called where a group of cells has the same name."""
    return f"{name} (dim {dim})"


def check_content(content: MeshContent) -> CheckedMesh:
    """Check everything that would make DOLFINx fail, or go wrong without failing.

    Args:
        content: What a file says.

    Raises:
        MeshError: The message names the file and the cause.

    MPI: Not collective.
    """
    try:
        return _check(content)
    except MeshError as error:
        raise MeshError(f"{content.path}: {error}") from error


def _check(content: MeshContent) -> CheckedMesh:
    notes = list(content.warnings)
    cells = _top_block(content)
    order = mesh_cells.order_of(cells.shape, cells.nodes.shape[1])
    assert order is not None
    _check_nodes(cells, content.points)
    _check_finite(cells, content.points)
    names = _names(content, cells.dim, notes)
    by_dim = {d: {tag: name for name, e, tag in names if e == d} for d in (cells.dim, cells.dim - 1)}
    cells = _unique_cells(cells, len(content.points), by_dim[cells.dim])
    facets: Index
    facet_tags: Index
    if cells.shape in ("prism", "pyramid"):
        facets, facet_tags = np.empty((0, 3), dtype=np.int64), np.empty(0, dtype=np.int64)
        if any(b.dim == 2 and np.any(b.tags != UNTAGGED) for b in content.blocks):
            notes.append(f"facet tags are left out: DOLFINx cannot tag the facets of a {cells.shape}.")
    else:
        facets, facet_tags = _tagged_facets(content, cells, by_dim[cells.dim - 1])
    if any(0 < b.dim < cells.dim - 1 and np.any(b.tags != UNTAGGED) for b in content.blocks):
        notes.append(f"tags of entities of dimension below {cells.dim - 1} are left out: only cells and facets carry tags.")
    used = np.unique(cells.nodes)
    if len(used) < len(content.points):
        unused = np.setdiff1d(np.arange(len(content.points)), used)
        notes.append(f"{len(unused)} of {len(content.points)} nodes belong to no cell and are dropped (nodes {_some(unused)}).")
    renumber = np.full(len(content.points), -1)
    renumber[used] = np.arange(len(used))
    points = content.points[used]
    points = np.ascontiguousarray(points[:, : _flat_dimension(points, cells.dim)])
    nodes = renumber[cells.nodes]
    _check_volumes(cells.shape, order, nodes, points)
    return CheckedMesh(points, cells.shape, order, nodes, cells.tags, renumber[facets], facet_tags, names, tuple(notes))
