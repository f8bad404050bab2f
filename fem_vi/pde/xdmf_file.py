"""Reading XDMF as DOLFINx writes it: a grid with the mesh, then a grid for each set of tags."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fem_vi.errors import MeshError
from fem_vi.pde.mesh_cells import Index, from_vtk, row_keys, shape_of_meshio
from fem_vi.pde.mesh_content import UNTAGGED, Block, MeshContent, create_block

_SHAPES = {
    "polyvertex": "point", "polyline": "interval", "edge": "interval", "tri": "triangle", "tet": "tetrahedron",
    "hex": "hexahedron", "quadrilateral": "quadrilateral", "tetrahedron": "tetrahedron",
}  # fmt: skip


def _values(folder: Path, item: ET.Element) -> NDArray[np.generic]:
    """The numbers of a DataItem, in its shape."""
    import h5py

    text = (item.text or "").strip()
    shape = [int(n) for n in item.attrib["Dimensions"].split()]
    if item.get("Format") == "XML":
        whole = (
            text.replace("-", "").replace(" ", "").replace("\n", "").isdigit()
        )  # DOLFINx does not say what the numbers of tags are
        return np.array(text.split(), dtype=np.int64 if whole else np.float64).reshape(shape)
    file, _, inside = text.partition(":")
    if not (folder / file).is_file():
        raise MeshError(f"its numbers are in {file}, which is not in the same folder.")
    with h5py.File(folder / file, "r") as heavy:
        return np.asarray(heavy[inside][()]).reshape(shape)


def _topology(folder: Path, grid: ET.Element) -> tuple[str, NDArray[np.generic]] | None:
    """Shape and nodes, in VTK's order, of a grid with cells of one type."""
    topology = grid.find("Topology")
    item = None if topology is None else topology.find("DataItem")
    if topology is None or item is None:
        return None
    kind = (topology.get("TopologyType") or topology.get("Type") or "").lower().split("_")[0]
    shape = _SHAPES.get(kind) or shape_of_meshio(kind)
    return None if shape is None else (shape, _values(folder, item))


def _tags(folder: Path, grid: ET.Element) -> tuple[Index | None, list[str]]:
    """The only cell data of whole numbers, and the names of all such data where there are several."""
    found = {}
    for attribute in grid.findall("Attribute"):
        item = attribute.find("DataItem")
        if item is not None and attribute.get("Center") == "Cell":
            values = _values(folder, item).reshape(-1)
            if values.dtype.kind in "iu":
                found[attribute.get("Name", "")] = values.astype(np.int64)
    return (next(iter(found.values())), []) if len(found) == 1 else (None, sorted(found))


def _merge(cells: Block, tagged: Block) -> Block:
    """The cells, with the tags of those that are listed again in a grid of tags."""
    keys = row_keys(np.concatenate([cells.vertices, tagged.vertices]), int(max(cells.nodes.max(), tagged.nodes.max())) + 1)
    by_key = np.full(int(keys.max()) + 1, UNTAGGED)
    by_key[keys[len(cells.nodes) :]] = tagged.tags
    tags = by_key[keys[: len(cells.nodes)]]
    return Block(cells.shape, cells.nodes, np.where(tags == UNTAGGED, cells.tags, tags))


def read_xdmf(path: Path) -> MeshContent | None:
    """Read an XDMF file in which each grid has cells of one type.

    Args:
        path: The .xdmf file; its .h5 file lies beside it.

    Returns:
        The content, or None where the file is of a kind that meshio should try: mixed cells, or binary data.

    Raises:
        MeshError: Where the .h5 file is missing.

    MPI: Not collective.
    """
    root = ET.parse(path).getroot()
    if root.find("Domain") is None or any(item.get("Format") not in ("XML", "HDF") for item in root.iter("DataItem")):
        return None
    points, cells, others, warnings = None, None, [], []
    for grid in root.findall("Domain/Grid"):
        found = _topology(path.parent, grid)
        if found is None or grid.find("Information") is not None:
            if cells is None:
                return None
            continue  # a function's grid, with no cells of its own
        shape, values = found
        tags, several = _tags(path.parent, grid)
        if several:
            warnings.append(f"cell data {', '.join(several)}: none is taken as tags, since there are several.")
        nodes: Index = values.astype(np.int64).reshape(len(values), -1)
        order = from_vtk(shape, nodes.shape[1])
        block = create_block(shape, nodes, tags, order, shape)
        geometry = grid.find("Geometry/DataItem")
        if cells is None:
            if geometry is None:
                return None
            points, cells = _values(path.parent, geometry).astype(np.float64), block
        elif shape == cells.shape:
            cells = _merge(cells, block)
        else:
            others.append(block)
    if cells is None or points is None:
        return None
    points = np.pad(points, ((0, 0), (0, 3 - points.shape[1])))
    return MeshContent(path, points, (cells, *others), (), tuple(warnings))
