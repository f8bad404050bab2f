"""What a mesh is like: counts, sizes, quality of the cells, tags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import basix
import numpy as np
from numpy.typing import NDArray

from fem_vi.pde import mesh_cells
from fem_vi.pde.mesh_cells import Index
from fem_vi.pde.mesh_check import CheckedMesh, check_content, jacobians
from fem_vi.pde.mesh_content import UNTAGGED
from fem_vi.pde.mesh_file import read_content

DEGREES = (1, 2, 3)


@dataclass(frozen=True)
class Tag:
    """One group of cells or facets.

    Attributes:
        name: Its name, "" where it has none.
        dim: Topological dimension.
        tag: Its number.
        count: Cells or facets that carry it.
    """

    name: str
    dim: int
    tag: int
    count: int


@dataclass(frozen=True)
class MeshSummary:
    """What `fem-vi mesh info` tells.

    Attributes:
        path: The file.
        shape: DOLFINx's name of the cells' shape.
        dim: Topological dimension.
        order: Order of the geometry.
        gdim: Number of coordinates.
        num_cells: Cells of the highest dimension.
        num_vertices: Vertices of these cells.
        num_nodes: Points of the geometry, vertices included.
        box: Smallest and largest coordinates, (2, gdim), in the units of the file.
        dofs: Degree of a scalar Lagrange space -> its number of degrees of freedom.
        edges: Shortest and longest straight edge, in the units of the file.
        measure: What `quality` measures.
        quality: One number for each cell, (num_cells,): 1 is ideal, 0 is flat, below 0 is turned inside out.
        tags: All groups.
        warnings: What was left out of the file.
    """

    path: Path
    shape: str
    dim: int
    order: int
    gdim: int
    num_cells: int
    num_vertices: int
    num_nodes: int
    box: NDArray[np.float64]
    dofs: dict[int, int]
    edges: tuple[float, float]
    measure: str
    quality: NDArray[np.float64]
    tags: tuple[Tag, ...]
    warnings: tuple[str, ...]


def count_entities(mesh: CheckedMesh) -> dict[str, int]:
    """How many entities of each shape the mesh has, for example {"point": 9, "interval": 16, "triangle": 8}."""
    cell = basix.CellType[mesh.shape]
    counts: dict[str, int] = {mesh.shape: len(mesh.cells)}
    for dim in range(mesh.dim):
        rows: dict[str, list[Index]] = {}
        for entity, kind in zip(basix.topology(cell)[dim], basix.cell.subentity_types(cell)[dim], strict=True):
            rows.setdefault(kind.name, []).append(mesh.vertices[:, list(entity)])
        for shape, lists in rows.items():
            counts[shape] = int(mesh_cells.row_keys(np.concatenate(lists), len(mesh.points)).max()) + 1
    return counts


def count_dofs(mesh: CheckedMesh, degree: int) -> int:
    """Degrees of freedom of the scalar continuous Lagrange space: those inside each entity, over all entities."""
    total = 0
    for shape, count in count_entities(mesh).items():
        if shape == "point":
            total += count
            continue
        cell = basix.CellType[shape]
        element = basix.create_element(basix.ElementFamily.P, cell, degree, basix.LagrangeVariant.equispaced)
        total += count * len(element.entity_dofs[mesh_cells.DIMENSION[shape]][0])
    return total


def _radius_ratio(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inscribed over circumscribed radius, times dim, of simplices with vertices x, (num_cells, dim + 1, gdim)."""
    dim = x.shape[1] - 1
    edges = x[:, 1:] - x[:, :1]
    gram = edges @ edges.transpose(0, 2, 1)
    volume = np.sqrt(np.maximum(np.linalg.det(gram), 0.0)) / (1, 1, 2, 6)[dim]
    # The centre of the circumscribed sphere, from the first vertex, is a combination c of the edges: 2 gram c = diag(gram).
    squares = np.einsum("cii->ci", gram)
    centre = np.linalg.solve(2.0 * gram, squares[..., None])[..., 0]
    outer = np.sqrt(np.einsum("ci,cij,cj->c", centre, gram, centre))
    surface = np.zeros(len(x))
    for facet in mesh_cells.facets_of({2: "triangle", 3: "tetrahedron"}[dim]):
        sides = x[:, facet[1:]] - x[:, facet[:1]]
        surface += np.sqrt(np.maximum(np.linalg.det(sides @ sides.transpose(0, 2, 1)), 0.0)) / (1, 1, 2)[dim - 1]
    return np.asarray(dim * (dim * volume / surface) / outer)


def _scaled_jacobian(mesh: CheckedMesh) -> NDArray[np.float64]:
    """Smallest over the corners of det J / product of the lengths of J's columns, straight-sided; |.| of a reversed cell."""
    corners = basix.geometry(basix.CellType[mesh.shape])
    if mesh.shape == "pyramid":
        corners = corners[:4]  # the map degenerates at the tip
    jacobian = jacobians(mesh.shape, 1, mesh.points[mesh.vertices], corners)
    columns = jacobian / np.linalg.norm(jacobian, axis=2, keepdims=True)
    if columns.shape[2] == columns.shape[3]:
        scaled = np.linalg.det(columns)
        return np.asarray((scaled * np.sign(scaled.sum(axis=1, keepdims=True))).min(axis=1))
    normal = np.cross(columns[..., 0], columns[..., 1])
    return np.asarray(
        np.einsum("cqi,ci->cq", normal, normal.mean(axis=1)).min(axis=1) / np.linalg.norm(normal.mean(axis=1), axis=1)
    )


def cell_quality(mesh: CheckedMesh) -> tuple[str, NDArray[np.float64]]:
    """The quality of each cell as if its sides were straight, and what is measured.

    Simplices: the radius ratio, dim r / R with r the inscribed and R the circumscribed radius. Other shapes: the scaled
    Jacobian, the smallest over the corners of det J over the product of the lengths of its columns. 1 is ideal in both.

    Args:
        mesh: The mesh.

    Returns:
        The measure's name, and (num_cells,) numbers.

    MPI: Not collective.

    References:
        Pebay, Baker (2003), Analysis of triangle quality measures. Knupp (2000), Achieving finite element mesh quality via
        optimization of the Jacobian matrix norm and associated quantities.
    """
    if mesh.shape == "interval":
        return "none (intervals)", np.ones(len(mesh.cells))
    if mesh.shape in mesh_cells.AFFINE:
        return "radius ratio", _radius_ratio(mesh.points[mesh.vertices])
    return "scaled Jacobian", _scaled_jacobian(mesh)


def edge_lengths(mesh: CheckedMesh) -> tuple[float, float]:
    """The shortest and the longest straight edge, in the units of the file."""
    lengths = [
        np.linalg.norm(mesh.points[mesh.vertices[:, a]] - mesh.points[mesh.vertices[:, b]], axis=1)
        for a, b in basix.topology(basix.CellType[mesh.shape])[1]
    ]
    return float(np.min(lengths)), float(np.max(lengths))


def _tags(mesh: CheckedMesh) -> tuple[Tag, ...]:
    found = []
    for dim, values in ((mesh.dim, mesh.cell_tags), (mesh.dim - 1, mesh.facet_tags)):
        counts = {int(t): int(n) for t, n in zip(*np.unique(values[values != UNTAGGED], return_counts=True), strict=True)}
        names = {tag: name for name, d, tag in mesh.names if d == dim}
        found += [Tag(names.get(tag, ""), dim, tag, counts.get(tag, 0)) for tag in sorted(counts.keys() | names.keys())]
    return tuple(found)


def summarise(path: Path) -> MeshSummary:
    """Read a mesh file on this rank, and describe the mesh in it.

    Args:
        path: The file.

    Returns:
        The summary.

    Raises:
        MeshError: As `fem_vi.read_mesh` does.

    MPI: Not collective.
    """
    mesh = check_content(read_content(path))
    measure, quality = cell_quality(mesh)
    return MeshSummary(
        path=path,
        shape=mesh.shape,
        dim=mesh.dim,
        order=mesh.order,
        gdim=mesh.points.shape[1],
        num_cells=len(mesh.cells),
        num_vertices=len(np.unique(mesh.vertices)),
        num_nodes=len(mesh.points),
        box=np.array([mesh.points.min(axis=0), mesh.points.max(axis=0)]),
        dofs={degree: count_dofs(mesh, degree) for degree in DEGREES},
        edges=edge_lengths(mesh),
        measure=measure,
        quality=quality,
        tags=_tags(mesh),
        warnings=mesh.warnings,
    )
