"""What a mesh file says, before anything is checked: points, blocks of cells with tags, names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fem_vi.errors import MeshError
from fem_vi.pde import mesh_cells
from fem_vi.pde.mesh_cells import Index

UNTAGGED = int(np.iinfo(np.int32).min)  # not a tag: files do use 0 and negative numbers


@dataclass(frozen=True)
class Block:
    """Cells of one kind.

    Attributes:
        shape: DOLFINx's name of the shape, "point" for vertices.
        nodes: Rows of `points`, (num_cells, num_nodes), in DOLFINx's order.
        tags: (num_cells,), UNTAGGED where a cell carries none.
    """

    shape: str
    nodes: Index
    tags: Index

    @property
    def dim(self) -> int:
        """Topological dimension."""
        return mesh_cells.DIMENSION[self.shape]

    @property
    def vertices(self) -> Index:
        """The nodes that are vertices, (num_cells, num_vertices)."""
        return self.nodes[:, : mesh_cells.NUM_VERTICES[self.shape]]


@dataclass(frozen=True)
class MeshContent:
    """What one file says. Replicated nowhere: it exists on the rank that reads.

    Attributes:
        path: The file.
        points: Coordinates, (num_points, 3), zeros where the file has fewer.
        blocks: Cells of all dimensions.
        names: (name, dimension, tag) of each named group.
        warnings: What the reader had to leave out.
    """

    path: Path
    points: NDArray[np.float64]
    blocks: tuple[Block, ...]
    names: tuple[tuple[str, int, int], ...] = ()
    warnings: tuple[str, ...] = field(default=())


def create_block(shape: str, nodes: Index, tags: Index | None, order: Index | None, kind: str) -> Block:
    """A block from a file's own node order, or an error that says which cell it is that DOLFINx does not have.

    Args:
        shape: DOLFINx's name of the shape.
        nodes: As the file lists them, (num_cells, num_nodes).
        tags: (num_cells,), or None.
        order: Permutation of the columns of `nodes` into DOLFINx's order, or None where there is none.
        kind: What the file calls such cells, for the message.

    Raises:
        MeshError: For serendipity cells and orders that DOLFINx does not have; for tags beyond 32 bits.
    """
    if len(nodes) and (order is None or mesh_cells.order_of(shape, nodes.shape[1]) is None):
        raise MeshError(
            f"it contains {len(nodes)} cells of type {kind} ({shape} with {nodes.shape[1]} nodes), which DOLFINx does not have. "
            "Complete Lagrange cells work (triangle6, quad9, tetra10, hexahedron27, ...); "
            "in gmsh, set Mesh.SecondOrderIncomplete = 0."
        )
    tags = np.full(len(nodes), UNTAGGED) if tags is None else np.asarray(tags, dtype=np.int64)
    if tags.shape != (len(nodes),):
        raise MeshError(f"{len(nodes)} cells of type {kind} come with tags of shape {tags.shape}; one tag a cell is expected.")
    if len(tags) and (tags.max() > np.iinfo(np.int32).max or tags.min() < UNTAGGED):
        raise MeshError(f"a tag of the cells of type {kind} does not fit in 32 bits.")
    nodes = np.asarray(nodes, dtype=np.int64)
    return Block(shape, nodes if order is None else np.ascontiguousarray(nodes[:, order]), tags)
