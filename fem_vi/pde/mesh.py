"""Meshes from files, spread over MPI ranks, with tags and the names of tags."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import basix.ufl
import dolfinx
import numpy as np
import ufl
from dolfinx.mesh import GhostMode, MeshTags
from mpi4py import MPI
from numpy.typing import NDArray

from fem_vi.arguments import instance
from fem_vi.errors import InvalidInput
from fem_vi.parallel import agree_on_error
from fem_vi.pde import _compat, _compat_mesh, mesh_cells
from fem_vi.pde.mesh_check import CheckedMesh, check_content, facet_name
from fem_vi.pde.mesh_content import UNTAGGED
from fem_vi.pde.mesh_file import read_content


@dataclass(frozen=True)
class MeshData:
    """A mesh, its tags, and what the tags are called.

    Attributes:
        mesh: The mesh; each rank holds its cells and one layer of ghost cells across facets.
        cell_tags: Tag of each tagged cell, ghosts included. Empty where the file has none.
        facet_tags: Tag of each tagged facet, of the boundary or inside, ghosts included. Empty where the file has none.
        names: name -> (dimension, tag), replicated. Where cells and facets share a name, that of the facets reads "name (dim d)".

    Example:
        >>> data = read_mesh("meshes/aquifer.msh", MPI.COMM_WORLD)
        >>> ds = ufl.Measure("ds", data.mesh, subdomain_data=data.facet_tags)
        >>> flux = 1.0 * ds(data.facet_tag("inflow"))
        >>> dofs = fem.locate_dofs_topological(V, data.mesh.topology.dim - 1, data.facets("river"))
    """

    mesh: dolfinx.mesh.Mesh
    cell_tags: MeshTags
    facet_tags: MeshTags
    names: Mapping[str, tuple[int, int]]

    def cells(self, name: str) -> NDArray[np.int32]:
        """The cells called `name`.

        Args:
            name: A name of cells, see `names`.

        Returns:
            Local indices, owned and ghosts, sorted; empty where this rank has none.

        Raises:
            InvalidInput: Where no cells have this name; the message lists the names.

        MPI: Not collective.
        """
        return self.cell_tags.find(self.cell_tag(name))

    def facets(self, name: str) -> NDArray[np.int32]:
        """The facets called `name`, as `cells`.

        Args:
            name: A name of facets, see `names`.

        Returns:
            Local indices, owned and ghosts, sorted; empty where this rank has none.

        Raises:
            InvalidInput: Where no facets have this name; the message lists the names.

        MPI: Not collective.
        """
        return self.facet_tags.find(self.facet_tag(name))

    def cell_tag(self, name: str) -> int:
        """The tag of the cells called `name`, for a Measure with `cell_tags`; raises InvalidInput where there are none."""
        return self._tag(name, self.mesh.topology.dim, "cells")

    def facet_tag(self, name: str) -> int:
        """The tag of the facets called `name`, for a Measure with `facet_tags`; raises InvalidInput where there are none."""
        return self._tag(name, self.mesh.topology.dim - 1, "facets")

    def _tag(self, name: str, dim: int, what: str) -> int:
        for candidate in (name, facet_name(name, dim)):
            found = self.names.get(candidate)
            if found is not None and found[0] == dim:
                return found[1]
        known = sorted(n for n, (d, _) in self.names.items() if d == dim)
        raise InvalidInput(f"no {what} are called '{name}'. Named {what} of this mesh: {', '.join(known) if known else 'none'}.")


def read_mesh(path: str | PathLike[str], comm: MPI.Comm, *, ghost_mode: GhostMode = GhostMode.shared_facet) -> MeshData:
    """Read a mesh from a file and spread it over the ranks of `comm`.

    Read are gmsh's .msh (2.2 and 4.1, text and binary) and what meshio reads (.vtu, .vtk, .xdmf, .inp, .med, .stl, ...). The
    mesh consists of the cells of the highest dimension in the file. Cells of one dimension less that carry a tag give the
    facet tags; lower ones are left out. How tags are found in each format: see `fem_vi.pde.mesh_file`. The geometry keeps the
    order of the file's cells. A third coordinate that is the same everywhere is dropped.

    Args:
        path: The file; only rank 0 needs to see it.
        comm: Communicator of the mesh.
        ghost_mode: Which cells of other ranks each rank keeps a copy of. The default makes integrals over interior facets right.

    Returns:
        The mesh, its cell and facet tags, and the names of the tags.

    Raises:
        MeshError: On all ranks, where the file is missing, damaged, or not a mesh that DOLFINx can hold; the message names the
            file and the cause.

    Warns:
        UserWarning: On rank 0, for what had to be left out: nodes that no cell uses, tags of edges and vertices.

    MPI: Collective.
    """
    instance("read_mesh: comm", comm, MPI.Comm, way_out="MPI.COMM_WORLD, for example.")
    checked, error = None, None
    if comm.rank == 0:
        try:
            instance("read_mesh: path", path, str, PathLike)
            checked = check_content(read_content(Path(path)))
        except Exception as caught:
            error = caught
    agree_on_error(comm, error)
    for note in () if checked is None else checked.warnings:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return distribute(checked, comm, ghost_mode=ghost_mode)


@dataclass(frozen=True)
class _Shared:
    """What every rank needs to know of the mesh on rank 0."""

    shape: str
    order: int
    gdim: int
    num_points: int
    cell_tags: NDArray[np.int32]
    facets: NDArray[np.int64]
    facet_tags: NDArray[np.int32]
    names: tuple[tuple[str, int, int], ...]


def _share(checked: CheckedMesh | None, comm: MPI.Comm) -> _Shared:
    shared = None
    if checked is not None:
        shared = _Shared(
            checked.shape,
            checked.order,
            checked.points.shape[1],
            len(checked.points),
            checked.cell_tags.astype(np.int32),
            checked.facets,
            checked.facet_tags.astype(np.int32),
            checked.names,
        )
    values = comm.bcast(None if shared is None else [getattr(shared, f.name) for f in fields(shared)], root=0)
    return _Shared(*values)


def distribute(checked: CheckedMesh | None, comm: MPI.Comm, *, ghost_mode: GhostMode = GhostMode.shared_facet) -> MeshData:
    """Spread a mesh that rank 0 holds over the ranks of `comm`.

    Args:
        checked: The mesh on rank 0, None on all other ranks.
        comm: Communicator of the mesh.
        ghost_mode: Which cells of other ranks each rank keeps a copy of.

    Returns:
        The mesh with its tags.

    MPI: Collective.
    """
    shared = _share(checked, comm)
    element = basix.ufl.element(
        "Lagrange", shared.shape, shared.order, basix.LagrangeVariant.equispaced, shape=(shared.gdim,), dtype=np.float64
    )
    num_nodes = element.basix_element.dim
    mesh = dolfinx.mesh.create_mesh(
        comm,
        cells=np.empty((0, num_nodes), dtype=np.int64) if checked is None else checked.cells,
        x=np.empty((0, shared.gdim)) if checked is None else checked.points,
        e=ufl.Mesh(element),
        partitioner=_compat_mesh.cell_partitioner(ghost_mode),
    )
    tags = _cell_tags(mesh, shared), _facet_tags(mesh, shared)
    return MeshData(mesh, *tags, MappingProxyType({name: (dim, tag) for name, dim, tag in shared.names}))


def _cell_tags(mesh: Any, shared: _Shared) -> MeshTags:
    values = shared.cell_tags[mesh.topology.original_cell_index]
    cells = np.flatnonzero(values != UNTAGGED).astype(np.int32)
    tags = dolfinx.mesh.meshtags(mesh, mesh.topology.dim, cells, values[cells])
    tags.name = "cell_tags"
    return tags


def _facet_tags(mesh: Any, shared: _Shared) -> MeshTags:
    """Tags of local facets, found by the input numbers of their vertices; each rank knows all tagged facets."""
    dim = mesh.topology.dim - 1
    mesh.topology.create_connectivity(dim, mesh.topology.dim)
    found: NDArray[np.int32] = np.empty(0, dtype=np.int32)
    values: NDArray[np.int32] = np.empty(0, dtype=np.int32)
    if len(shared.facets):
        sides = _facet_vertices(mesh, shared)
        keys = mesh_cells.row_keys(np.concatenate([shared.facets, sides]), shared.num_points)
        wanted, mine = keys[: len(shared.facets)], keys[len(shared.facets) :]
        which = np.full(int(keys.max()) + 1, -1)
        which[wanted] = np.arange(len(wanted))
        found = np.flatnonzero(which[mine] >= 0).astype(np.int32)
        values = shared.facet_tags[which[mine[found]]]
    tags = dolfinx.mesh.meshtags(mesh, dim, found, values)
    tags.name = "facet_tags"
    return tags


def _facet_vertices(mesh: Any, shared: _Shared) -> NDArray[np.int64]:
    """Input numbers of the vertices of all local facets, (num_facets, num_vertices)."""
    topology, dim = mesh.topology, mesh.topology.dim - 1
    topology.create_connectivity(topology.dim, dim)
    links = topology.connectivity(topology.dim, dim).array
    corners = np.asarray(mesh_cells.facets_of(shared.shape))  # (facets of a cell, vertices of a facet)
    nodes = mesh.geometry.input_global_indices[_compat.geometry_dofmap(mesh)]
    sides = np.empty((topology.index_map(dim).size_local + topology.index_map(dim).num_ghosts, corners.shape[1]), dtype=np.int64)
    sides[links] = nodes[:, corners].reshape(-1, corners.shape[1])
    return sides
