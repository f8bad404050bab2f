"""Writing mesh files on one rank."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import meshio
import numpy as np

from fem_vi.errors import MeshError
from fem_vi.pde import mesh_cells
from fem_vi.pde.mesh_cells import Index
from fem_vi.pde.mesh_check import CheckedMesh, check_content
from fem_vi.pde.mesh_content import UNTAGGED, Block, MeshContent
from fem_vi.pde.mesh_file import check_extension, quiet, read_content


def _merged(blocks: tuple[Block, ...]) -> list[Block]:
    """One block for each kind of cell: some formats cannot have two."""
    kinds: dict[tuple[str, int], list[Block]] = {}
    for block in blocks:
        kinds.setdefault((block.shape, block.nodes.shape[1]), []).append(block)
    return [
        Block(shape, np.concatenate([b.nodes for b in group]), np.concatenate([b.tags for b in group]))
        for (shape, _), group in kinds.items()
    ]


def _to_meshio(block: Block) -> tuple[str, Index]:
    order = mesh_cells.from_vtk(block.shape, block.nodes.shape[1])
    assert order is not None
    return mesh_cells.meshio_name(block.shape, block.nodes.shape[1]), block.nodes[:, np.argsort(order)]


def _add_families(mesh: Any, blocks: list[Block], names: tuple[tuple[str, int, int], ...]) -> None:
    """MED: a negative number for each tag, of any dimension, and the names that belong to it."""
    known = {(dim, tag): name for name, dim, tag in names}
    mesh.cell_tags, mesh.cell_data["cell_tags"] = {}, [np.zeros(len(block.nodes), dtype=np.int32) for block in blocks]
    for block, families in zip(blocks, mesh.cell_data["cell_tags"], strict=True):
        for tag in np.unique(block.tags[block.tags != UNTAGGED]):
            number = -1 - len(mesh.cell_tags)
            mesh.cell_tags[number] = [known.get((block.dim, int(tag)), f"tag_{tag}")]
            families[block.tags == tag] = number


def _add_sets(mesh: Any, blocks: list[Block], names: tuple[tuple[str, int, int], ...]) -> None:
    """Abaqus: a set of elements for each name."""
    for name, dim, tag in names:
        mesh.cell_sets[name] = [np.flatnonzero((block.tags == tag) & (block.dim == dim)) for block in blocks]


def _meshio_mesh(content: MeshContent, suffix: str) -> Any:
    """The mesh, with tags and names where this format keeps them."""
    blocks = _merged(content.blocks)
    mesh = meshio.Mesh(content.points, [_to_meshio(block) for block in blocks])
    if suffix == ".med":
        _add_families(mesh, blocks, content.names)
    elif suffix == ".inp":
        _add_sets(mesh, blocks, content.names)
    elif any(np.any(block.tags != UNTAGGED) for block in blocks):
        tags = [np.where(block.tags == UNTAGGED, 0, block.tags).astype(np.int32) for block in blocks]
        mesh.cell_data[{".msh": "gmsh:physical", ".mesh": "medit:ref"}.get(suffix, "cell_tags")] = tags
        if suffix == ".msh":
            mesh.cell_data["gmsh:geometrical"] = tags
        mesh.field_data = {name: np.array([tag, dim]) for name, dim, tag in content.names}
    return mesh


_OPTIONS: dict[str, dict[str, Any]] = {
    ".msh": {"file_format": "gmsh22", "binary": False},
    ".xdmf": {"data_format": "XML"},  # one file: a second one would keep the temporary name
}


def _add_names_to_xdmf(path: Path, names: tuple[tuple[str, int, int], ...]) -> None:
    """Names where meshio reads them; it does not write them."""
    tree = ET.parse(path)
    grid = tree.getroot().find("Domain/Grid")
    if grid is not None and names:
        table = ET.Element("main")
        for name, dim, tag in names:
            ET.SubElement(table, "map", key=name, dim=str(dim)).text = str(tag)
        information = ET.SubElement(grid, "Information", Name="Information", Value=str(len(names)))
        information.text = ET.tostring(table, encoding="unicode")
        tree.write(path)


def _groups(mesh: CheckedMesh) -> dict[tuple[int, int], int]:
    """How many cells and facets carry each tag."""
    found = {}
    for dim, values in ((mesh.dim, mesh.cell_tags), (mesh.dim - 1, mesh.facet_tags)):
        for tag, count in zip(*np.unique(values[values != UNTAGGED], return_counts=True), strict=True):
            found[dim, int(tag)] = int(count)
    return found


def _losses(before: CheckedMesh, after: CheckedMesh) -> tuple[str, ...]:
    """What is no longer there; a mesh that is no longer the same is an error."""
    kinds = [(len(m.cells), m.shape, m.order) for m in (before, after)]
    if kinds[0] != kinds[1]:
        texts = [f"{count} cells ({shape}, order {order})" for count, shape, order in kinds]
        raise MeshError(f"this format cannot hold the mesh: of {texts[0]}, {texts[1]} would remain.")
    notes = []
    if sorted(_groups(before).values()) != sorted(_groups(after).values()):
        notes.append("this format does not hold all tags of cells and facets.")
    lost = [f"{name} = {tag}" for name, dim, tag in before.names if name not in {name for name, _, _ in after.names}]
    if lost:
        notes.append(f"this format holds no names; they were {', '.join(lost)}.")
    return tuple(notes)


def convert_mesh(source: Path, target: Path, *, overwrite: bool = False) -> tuple[str, ...]:
    """Write a mesh in another format, with its tags and their names.

    Args:
        source: File to read; it is checked as `fem_vi.read_mesh` does.
        target: File to write; its extension says the format. It appears whole or not at all: what was written under a
            temporary name is read again, compared, and then renamed.
        overwrite: Whether `target` may exist.

    Returns:
        What was left out of `source`, and what the format of `target` does not hold.

    Raises:
        MeshError: Before anything is read where `target` exists or its extension is unknown; where `source` is not a sound
            mesh; where the format of `target` cannot hold it.

    MPI: Not collective.
    """
    check_extension(target)
    if target.exists() and not overwrite:
        raise MeshError(f"{target} exists. Remove it, choose another name, or overwrite it with --force (overwrite=True).")
    if not target.parent.is_dir():
        raise MeshError(f"{target}: there is no folder {target.parent}.")
    content = read_content(source)
    before = check_content(content)
    suffix = target.suffix.lower()
    temporary = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        with quiet():
            meshio.write(temporary, _meshio_mesh(content, suffix), **_OPTIONS.get(suffix, {}))
        if suffix == ".xdmf":
            _add_names_to_xdmf(temporary, before.names)
        notes = _losses(before, check_content(read_content(temporary)))
        temporary.replace(target)
    except Exception as error:
        cause = str(error).replace(str(temporary), "what was written").removeprefix("what was written: ") or type(error).__name__
        raise MeshError(f"{target}: it cannot be written as {suffix}: {cause}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return before.warnings + notes
