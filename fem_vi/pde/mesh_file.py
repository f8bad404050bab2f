"""Reading mesh files of any format on one rank.

Where tags come from, in formats that have no word for them (everything but gmsh's .msh):

1. Named sets of cells (.inp element sets, .med families): each set is a tag, numbered from 1 in the order of the file. A set
   all of whose cells lie in sets read before it is left out with a warning (sets with all cells of the mesh come last). Sets
   that overlap otherwise are refused: a cell carries one tag.
2. Else the cell data named "gmsh:physical", "medit:ref", "cell_tags", or any "<format>:<name>" with name ref, tag, material,
   group, index or zone_id.
3. Else the only cell data of whole numbers, whatever its name; where there are several, none, with a warning.

A tag of 0 means "no tag" in gmsh, medit and MED files, and is a tag in all others.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import meshio
import numpy as np

from fem_vi.errors import MeshError
from fem_vi.pde import mesh_cells
from fem_vi.pde.gmsh_file import read_gmsh
from fem_vi.pde.mesh_cells import Index
from fem_vi.pde.mesh_content import UNTAGGED, MeshContent, create_block
from fem_vi.pde.xdmf_file import read_xdmf

_TAG_DATA = re.compile(r"gmsh:physical|medit:ref|cell_tags|\w+:(ref|tag|material|group|index|zone_id)")
_NOT_TAGS = re.compile(r"gmsh:geometrical|vtk\w*|.*(partition|rank|global|\bid\b).*", re.IGNORECASE)


def extensions() -> tuple[str, ...]:
    """The file name extensions that can be read, sorted."""
    return tuple(sorted(meshio.extension_to_filetypes))


def check_extension(path: Path) -> None:
    """Refuse a file name whose extension says nothing.

    Raises:
        MeshError: Where the extension is unknown; the message lists the known ones.
    """
    suffix, double = path.suffix.lower(), "".join(path.suffixes[-2:]).lower()
    if suffix not in extensions() and double not in extensions():
        raise MeshError(f"{path}: unknown extension '{path.suffix}'. Known are {', '.join(extensions())}.")


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keep what meshio prints, and turn its exits into exceptions."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("error", message="string or file could not be read")  # numpy, on a truncated text file
        warnings.filterwarnings("ignore", category=UserWarning)
        try:
            yield said
        except SystemExit:
            raise meshio.ReadError(" ".join(said.getvalue().split())) from None


def _sets(mesh: Any) -> dict[str, list[Index]]:
    """Named sets: for each block of cells, the indices of its members."""
    empty = np.empty(0, dtype=np.int64)
    families: dict[int, list[str]] = getattr(mesh, "cell_tags", None) or {}
    found: dict[str, list[Index]] = {}
    for tag, names in families.items():
        for name in names:
            members = found.setdefault(name, [empty for _ in mesh.cells])
            for i, values in enumerate(mesh.cell_data.get("cell_tags", [])):
                members[i] = np.union1d(members[i], np.flatnonzero(np.asarray(values) == tag))
    for name, lists in mesh.cell_sets.items():
        if not name.startswith("gmsh:") and len(lists) == len(mesh.cells):
            found[name] = [empty if ids is None else np.asarray(ids, dtype=np.int64).reshape(-1) for ids in lists]
    return found


def _tags_of_sets(
    sets: dict[str, list[Index]], sizes: list[int], dims: list[int]
) -> tuple[list[Index], list[tuple[str, int, int]], list[str]]:
    """Tags of each block, names, warnings; the rule stands at the top of this module."""
    tags: list[Index] = [np.full(size, UNTAGGED) for size in sizes]
    names: list[tuple[str, int, int]] = []
    notes: list[str] = []

    def covers_all(item: tuple[str, list[Index]]) -> bool:
        return all(len(ids) == size for ids, size, dim in zip(item[1], sizes, dims, strict=True) if dim == max(dims))

    for name, lists in sorted(sets.items(), key=covers_all):
        for dim in sorted({d for ids, d in zip(lists, dims, strict=True) if len(ids)}, reverse=True):
            mine = [(i, ids) for i, (ids, d) in enumerate(zip(lists, dims, strict=True)) if d == dim and len(ids)]
            taken = [tags[i][ids] != UNTAGGED for i, ids in mine]
            if all(t.all() for t in taken):
                notes.append(f"set '{name}' is left out: all its cells are in other sets.")
                continue
            if any(t.any() for t in taken) and not covers_all((name, lists)):
                raise MeshError(
                    f"set '{name}' shares some of its cells with other sets; a cell can carry one tag. Make the sets disjoint."
                )
            value = 1 + max((tag for _, d, tag in names if d == dim), default=0)
            names.append((name, dim, value))
            for i, ids in mine:
                tags[i][ids] = np.where(tags[i][ids] == UNTAGGED, value, tags[i][ids])
    return tags, names, notes


def _tags_of_data(mesh: Any) -> tuple[list[Index] | None, list[str]]:
    """Tags of each block from cell data, and warnings."""
    data = {name: [np.asarray(values) for values in lists] for name, lists in mesh.cell_data.items()}
    known = [name for name in ("gmsh:physical", "medit:ref", "cell_tags") if name in data]
    known += [name for name in sorted(data) if name not in known and _TAG_DATA.fullmatch(name)]
    whole = [name for name, lists in data.items() if all(v.dtype.kind in "iu" and v.ndim == 1 for v in lists)]
    whole = [name for name in whole if not _NOT_TAGS.fullmatch(name)]
    if not known and len(whole) != 1:
        note = f"cell data {', '.join(whole)}: none is taken as tags, since there are several. Name one cell_tags."
        return None, [note] if whole else []
    name = (known or whole)[0]
    if any(v.ndim != 1 or not np.all(v == np.round(v)) for v in data[name]):
        raise MeshError(f"cell data '{name}' are not whole numbers, one for each cell.")
    tags = [v.astype(np.int64) for v in data[name]]
    if name in ("gmsh:physical", "medit:ref") or hasattr(mesh, "cell_tags"):
        tags = [np.where(t == 0, UNTAGGED, t) for t in tags]
    return tags, []


def _from_meshio(path: Path, mesh: Any) -> MeshContent:
    """Blocks in DOLFINx's order from what meshio read."""
    points = np.asarray(mesh.points, dtype=np.float64)
    if points.ndim != 2 or not 1 <= points.shape[1] <= 3:
        raise MeshError(f"its points have shape {points.shape}; (num_points, 1, 2 or 3) is expected.")
    kinds = [
        (block.type, mesh_cells.shape_of_meshio(block.type), np.atleast_2d(block.data)) for block in mesh.cells if len(block.data)
    ]
    for kind, shape, nodes in kinds:
        if shape is None:
            raise MeshError(f"it contains {len(nodes)} cells of type {kind}, which DOLFINx does not have.")
    dims = [mesh_cells.DIMENSION[shape] for _, shape, _ in kinds if shape]
    keep = [i for i, block in enumerate(mesh.cells) if len(block.data)]
    sets = {name: [lists[i] for i in keep] for name, lists in _sets(mesh).items()}
    names: list[tuple[str, int, int]] = []
    tags: list[Index] | None
    if any(len(ids) for lists in sets.values() for ids in lists):
        tags, names, notes = _tags_of_sets(sets, [len(nodes) for _, _, nodes in kinds], dims)
    else:
        tags, notes = _tags_of_data(mesh)
        tags = None if tags is None else [tags[i] for i in keep]
        names = [(name, int(v[1]), int(v[0])) for name, v in mesh.field_data.items() if np.shape(v) == (2,)]
    blocks = []
    for i, (kind, shape, nodes) in enumerate(kinds):
        assert shape is not None
        order = mesh_cells.from_vtk(shape, nodes.shape[1])
        blocks.append(create_block(shape, nodes, None if tags is None else tags[i], order, kind))
    return MeshContent(path, np.pad(points, ((0, 0), (0, 3 - points.shape[1]))), tuple(blocks), tuple(names), tuple(notes))


def _check_file(path: Path) -> None:
    if not path.exists():
        raise MeshError(f"{path}: there is no such file.")
    if path.is_dir():
        raise MeshError(f"{path} is a directory; a mesh file is expected.")
    check_extension(path)
    if path.stat().st_size == 0:
        raise MeshError(f"{path} is empty.")


def read_content(path: Path) -> MeshContent:
    """Read what a file says about a mesh; only what no DOLFINx mesh could have is refused here.

    Args:
        path: The file.

    Raises:
        MeshError: Where it cannot be read; the message names the file and the cause.

    MPI: Not collective.
    """
    _check_file(path)
    try:
        if path.suffix.lower() == ".msh":
            data = path.read_bytes()
            if data.lstrip().startswith((b"$", b"//")):
                return read_gmsh(path, data)
        if path.suffix.lower() in (".xdmf", ".xmf") and (content := read_xdmf(path)) is not None:
            return content
        with quiet():
            return _from_meshio(path, meshio.read(path))
    except MeshError as error:
        raise MeshError(f"{path}: {error}") from error
    except Exception as error:  # meshio lets through whatever its readers stumble on, MemoryError on a damaged count included
        cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise MeshError(f"{path}: it is damaged, truncated, or not a mesh of the kind its extension says ({cause}).") from error
