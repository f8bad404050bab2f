"""Mesh files that the mesh tests read: gmsh writes them, so that nothing of fem_vi is tested against itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import meshio
import numpy as np
import pytest
from mpi4py import MPI

COMM = MPI.COMM_WORLD

# tag and name of each group of the unit interval, square or cube
FACETS = {1: "low", 2: "high", 3: "rest"}
CELL = (7, "body")
BEND = 0.2

# What a file holds -> extension, gmsh's options
GMSH_FORMATS = {
    "msh 2.2 text": (".msh", {"Mesh.MshFileVersion": 2.2, "Mesh.Binary": 0}),
    "msh 2.2 binary": (".msh", {"Mesh.MshFileVersion": 2.2, "Mesh.Binary": 1}),
    "msh 4.1 text": (".msh", {"Mesh.MshFileVersion": 4.1, "Mesh.Binary": 0}),
    "msh 4.1 binary": (".msh", {"Mesh.MshFileVersion": 4.1, "Mesh.Binary": 1}),
}


def on_rank_0(work: Callable[[], object]) -> None:
    """Do something on rank 0 while the others wait; if it fails, all fail."""
    error = None
    if COMM.rank == 0:
        try:
            work()
        except Exception as caught:
            error = caught
    failed = COMM.bcast(repr(error) if error else None, root=0)
    if failed:
        pytest.fail(f"rank 0 could not make the file: {failed}")


def bend(x: np.ndarray, order: int) -> np.ndarray:
    """A map of degree `order` with determinant 1: cells of that order follow it exactly."""
    bent = x.copy()
    bent[..., 0] += BEND * x[..., -1] ** order if x.shape[-1] > 1 else 0.0
    return bent


def write_gmsh(path: Path, shape: str, order: int, format_: str = "msh 4.1 text", *, n: int = 2, save_all: bool = False) -> None:
    """The unit interval, square or cube, bent if order > 1, with tagged ends low (axis 0 = 0), high (= 1) and rest.

    Args:
        path: File to write.
        shape: DOLFINx's name of the cells' shape.
        order: Order of the geometry.
        format_: A key of GMSH_FORMATS.
        n: Cells along a side.
        save_all: Write cells that have no tag, too (then only "low" is tagged).
    """
    import gmsh

    gmsh.initialize(readConfigFiles=False, interruptible=False)
    try:
        gmsh.option.setNumber("General.Terminal", 0)
        for key, value in GMSH_FORMATS[format_][1].items():
            gmsh.option.setNumber(key, value)
        dim = {"interval": 1, "triangle": 2, "quadrilateral": 2}.get(shape, 3)
        blocks = shape in ("quadrilateral", "hexahedron", "prism")
        grown = (0, gmsh.model.geo.addPoint(0, 0, 0))
        for axis in range(dim):
            shift = [float(i == axis) for i in range(3)]
            recombine = blocks and (shape != "prism" or axis == 2)
            made = gmsh.model.geo.extrude([grown], *shift, numElements=[n], recombine=recombine)
            grown = next(entity for entity in made if entity[0] == axis + 1)
        gmsh.model.geo.synchronize()
        tag_groups(gmsh, dim, only_low=save_all)
        gmsh.option.setNumber("Mesh.SaveAll", int(save_all))
        gmsh.model.mesh.generate(dim)
        gmsh.model.mesh.setOrder(order)
        if order > 1 and dim > 1:
            tags, x, _ = gmsh.model.mesh.getNodes()
            x = np.asarray(x).reshape(-1, 3)
            x[:, :dim] = bend(x[:, :dim], order)
            for tag, place in zip(tags, x, strict=True):
                gmsh.model.mesh.setNode(tag, place, [])
        gmsh.write(str(path))
    finally:
        gmsh.finalize()


def tag_groups(gmsh: object, dim: int, *, only_low: bool = False) -> None:
    """The groups of FACETS and CELL, found by where the sides lie."""
    sides: dict[int, list[int]] = {1: [], 2: [], 3: []}
    for d, entity in gmsh.model.getEntities(dim - 1):  # type: ignore[attr-defined]
        box = np.array(gmsh.model.getBoundingBox(d, entity)).reshape(2, 3)  # type: ignore[attr-defined]
        if np.allclose(box[:, 0], 0.0, atol=1e-6):
            sides[1].append(entity)
        elif np.allclose(box[:, 0], 1.0, atol=1e-6):
            sides[2].append(entity)
        else:
            sides[3].append(entity)
    for tag, entities in sides.items():
        if entities and not (only_low and tag > 1):
            gmsh.model.addPhysicalGroup(dim - 1, entities, tag, FACETS[tag])  # type: ignore[attr-defined]
    if not only_low:
        bodies = [entity for _, entity in gmsh.model.getEntities(dim)]  # type: ignore[attr-defined]
        gmsh.model.addPhysicalGroup(dim, bodies, *CELL)  # type: ignore[attr-defined]


def write_meshio(path: Path, shape: str, order: int) -> None:
    """The same mesh in the format of the extension, by way of meshio's own reader of gmsh's files."""
    source = path.with_name("source.msh")
    write_gmsh(source, shape, order, "msh 2.2 text")
    mesh = meshio.read(source)
    kinds: dict[str, list[int]] = {}
    for i, block in enumerate(mesh.cells):
        kinds.setdefault(block.type, []).append(i)
    cells = [(kind, np.concatenate([mesh.cells[i].data for i in which])) for kind, which in kinds.items()]
    tags = [np.concatenate([mesh.cell_data["gmsh:physical"][i] for i in which]) for which in kinds.values()]
    known = {".mesh": "medit:ref", ".med": "cell_tags"}
    out = meshio.Mesh(mesh.points, cells)
    if path.suffix == ".inp":
        for name, (tag, dim) in mesh.field_data.items():
            out.cell_sets[name] = [
                np.flatnonzero((t == tag) & (_dim(kind) == dim)) for (kind, _), t in zip(cells, tags, strict=True)
            ]
    elif path.suffix == ".med":  # one number for each family: facets' tags 1, 2, 3 and the cells' 7 are distinct
        out.cell_data["cell_tags"] = [-t for t in tags]
        out.cell_tags = {-int(tag): [name] for name, (tag, _) in mesh.field_data.items()}
    else:
        out.cell_data[known.get(path.suffix, "marker")] = [t.astype(np.int32) for t in tags]
    meshio.write(path, out)


def _dim(kind: str) -> int:
    return {"vertex": 0, "line": 1, "triangle": 2, "quad": 2}.get(kind.rstrip("0123456789"), 3)
