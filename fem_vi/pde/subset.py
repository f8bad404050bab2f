"""Test functions by where they live: those that reach some cells, or those that live in patches around vertices.

Marks of cells and vertices go to their owners and back, so that a patch may lie on several ranks; nothing is gathered. A test
function reaches the marked cells where one of its cells is marked, and lives in them where none of its cells is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from dolfinx import la
from numpy.typing import NDArray

from fem_vi.arguments import indices, whole
from fem_vi.errors import InvalidInput
from fem_vi.parallel import all_values, raise_on_all
from fem_vi.pde.region import cells_of_dofs

Indices = NDArray[np.int64]
Marks = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Cells:
    """The test functions that do not vanish everywhere in some cells, such as the nodes of a triangle.

    Attributes:
        indices: Local cells of this rank, ghosts too: a list, a NumPy array, or a tensor, as `dolfinx.mesh.locate_entities`
            returns. Each rank has its own, perhaps none.

    Example:
        >>> r = residual(u, m, rows=fem_vi.Cells(data.cell_tags.find(7)))
    """

    indices: Sequence[int] | Any


@dataclass(frozen=True, eq=False)
class Patches:
    """The test functions that vanish outside of the patches around some vertices, taken together.

    The patch of a vertex has the cells around it, and with more rings the cells around their vertices, and so on. One ring holds,
    of linear elements, the hat function of the vertex; of quadratic ones that and those of the edges that meet there; of
    discontinuous ones all of its cells.

    Attributes:
        vertices: Local vertices of this rank, ghosts too, numbered as in `mesh.topology`. Each rank has its own, perhaps none.
        rings: Layers of cells, at least 1.

    Example:
        >>> middle = mesh.locate_entities(msh, 0, lambda x: np.hypot(x[0] - 0.5, x[1] - 0.5) < 0.1)
        >>> r = residual(u, m, rows=fem_vi.Patches(middle, rings=2))
    """

    vertices: Sequence[int] | Any
    rings: int = 1


class SubsetFinder:
    """Finds the rows of a subset.

    Args:
        space: Of the test functions.
        prescribed: Owned dofs without a test function, those with a prescribed value.

    MPI: Collective.
    """

    def __init__(self, space: Any, prescribed: NDArray[np.int32]) -> None:
        mesh = space.mesh
        topology, tdim = mesh.topology, mesh.topology.dim
        self._comm = mesh.comm
        self._cells, self._vertices = la.vector(topology.index_map(tdim)), la.vector(topology.index_map(0))
        self._dofs = la.vector(space.dofmap.index_map, space.dofmap.index_map_bs)
        self._num_owned = topology.index_map(tdim).size_local, topology.index_map(0).size_local
        self._size = space.dofmap.index_map.size_local * space.dofmap.index_map_bs
        corners = topology.connectivity(tdim, 0)
        self._corners = corners.array.reshape(corners.num_nodes, -1)
        self._cells_of = cells_of_dofs(space)[:, : self._num_owned[0]]
        self._prescribed = prescribed

    @property
    def num_cells(self) -> int:
        """Cells that this rank owns."""
        return self._num_owned[0]

    @property
    def num_vertices(self) -> int:
        """Vertices that this rank owns."""
        return self._num_owned[1]

    def find(self, subset: Cells | Patches) -> Indices:
        """The owned rows of a subset, ascending, without those of prescribed values.

        Raises:
            InvalidInput: On every rank, where an index or `rings` is wrong, or `rings` differs between ranks.

        MPI: Collective.
        """
        if isinstance(subset, Cells):
            marks = self._spread(self._cells, self._marked("Cells: indices", subset.indices, self._cells))
            found = self._touched(marks)
        else:
            marks = self._patch(subset)
            found = self._touched(marks) & ~self._touched(~marks)
        found[self._prescribed] = False
        return np.flatnonzero(found)

    def _patch(self, subset: Patches) -> Marks:
        """The local cells of patches."""
        with raise_on_all(self._comm):
            rings = whole("Patches: rings", subset.rings, least=1)
        given = all_values(self._comm, rings)
        if given.count(rings) < len(given):
            raise InvalidInput(f"Patches: rings is {given} on ranks 0 to {len(given) - 1}; it must be the same on all ranks.")
        vertices = self._marked("Patches: vertices", subset.vertices, self._vertices)
        for _ in range(rings):
            cells = self._spread(self._vertices, vertices)[self._corners].any(axis=1)
            vertices = np.zeros(len(vertices), dtype=bool)
            vertices[self._corners[cells]] = True
        return cells

    def _marked(self, name: str, given: Any, vector: Any) -> Marks:
        """Marks at given indices. Collective."""
        marks = np.zeros(len(vector.array), dtype=bool)
        with raise_on_all(self._comm):
            marks[indices(name, given, size=len(marks), owning="has the local numbers")] = True
        return marks

    def _spread(self, vector: Any, marks: Marks) -> Marks:
        """What any rank has marked, ghosts included. Collective."""
        vector.array[:] = marks
        vector.scatter_reverse(la.InsertMode.add)
        vector.scatter_forward()
        return np.asarray(vector.array > 0)

    def _touched(self, cells: Marks) -> Marks:
        """The owned dofs of some cells: each cell counts on the rank that owns it. Collective."""
        self._dofs.array[:] = self._cells_of @ cells[: self.num_cells].astype(np.float64)
        self._dofs.scatter_reverse(la.InsertMode.add)
        return np.asarray(self._dofs.array[: self._size] > 0)
