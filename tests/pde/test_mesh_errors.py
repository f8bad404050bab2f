"""Every way a mesh file can be bad: one row each, and the same error on all ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import meshio
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fem_vi.errors import MeshError
from fem_vi.pde.mesh import read_mesh
from fem_vi.pde.mesh_check import CheckedMesh, check_content
from fem_vi.pde.mesh_file import read_content
from tests.pde.mesh_files import COMM, on_rank_0, write_gmsh, write_meshio

needs_gmsh = pytest.mark.skipif(importlib.util.find_spec("gmsh") is None, reason="gmsh writes the files")

SQUARE = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
TWO = [("triangle", [[0, 1, 2], [0, 2, 3]])]
Write = Callable[[Path], object]


def vtu(cells: list[tuple[str, list[list[int]]]], points: list[list[float]] = SQUARE, **data: object) -> Write:
    def write(path: Path) -> None:
        mesh = meshio.Mesh(np.array(points, dtype=float), [(k, np.array(v)) for k, v in cells], **data)  # type: ignore[arg-type]
        meshio.write(path, mesh)

    return write


def msh(
    elements: list[str], nodes: list[str] | None = None, names: tuple[str, ...] = (), replace: tuple[str, str] = ("", "")
) -> Write:
    """MSH 2.2 by hand; `replace` damages it."""
    nodes = ["1 0 0 0", "2 1 0 0", "3 1 1 0", "4 0 1 0"] if nodes is None else nodes
    sections = [
        "$MeshFormat\n2.2 0 8\n$EndMeshFormat",
        *([f"$PhysicalNames\n{len(names)}\n" + "\n".join(names) + "\n$EndPhysicalNames"] if names else []),
        f"$Nodes\n{len(nodes)}\n" + "\n".join(nodes) + "\n$EndNodes",
        f"$Elements\n{len(elements)}\n" + "\n".join(f"{i + 1} {e}" for i, e in enumerate(elements)) + "\n$EndElements",
    ]
    text = "\n".join(sections) + "\n"
    return lambda path: path.write_text(text.replace(*replace) if replace[0] else text)


GOOD = ["2 2 1 1 1 2 3", "2 2 1 1 1 3 4"]
CENTRE = [0.5, 0.5, 0.0]
Q2_FOLDED = [*SQUARE, [2.5, 0.0, 0.0], [1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.5, 0.0], CENTRE]
CUBE = [[x, y, z] for z in (0.0, 1.0) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))]
TWISTED = [0, 1, 2, 3, 6, 7, 4, 5]

# name of the row -> file name, what writes it, words of the error besides the file's name
BAD: dict[str, tuple[str, Write, str]] = {
    "missing": ("none.msh", lambda path: None, "no such file"),
    "directory": ("folder.msh", lambda path: path.mkdir(), "is a directory"),
    "empty": ("empty.msh", lambda path: path.touch(), "is empty"),
    "blank": ("blank.msh", lambda path: path.write_text("\n\n \n"), "not a mesh|damaged|header"),
    "unknown extension": ("mesh.docx", lambda path: path.write_text("x"), "unknown extension '.docx'. Known are .*.msh.*.vtu"),
    "no extension": ("mesh", lambda path: path.write_text("x"), "unknown extension ''"),
    "prose in .msh": ("prose.msh", lambda path: path.write_text("It was a dark and stormy night."), "not a mesh"),
    "prose in .vtu": ("prose.vtu", lambda path: path.write_text("It was a dark and stormy night."), "not a mesh"),
    "prose in .vtk": ("prose.vtk", lambda path: path.write_text("It was a dark and stormy night."), "not a mesh|version"),
    "prose in .xdmf": ("prose.xdmf", lambda path: path.write_text("It was a dark night."), "not a mesh"),
    "prose in .inp": ("prose.inp", lambda path: path.write_text("It was a dark night."), "shape|no cells|not a mesh"),
    "prose in .stl": ("prose.stl", lambda path: path.write_text("It was a dark and stormy night."), "not a mesh|shape|no cells"),
    "noise in .med": ("noise.med", lambda path: path.write_bytes(bytes(range(256))), "not a mesh"),
    "XML of another kind": ("page.xdmf", lambda path: path.write_text("<html><body/></html>"), "not a mesh|Expected|root"),
    "geometry, not mesh": ("shape.msh", lambda path: path.write_text("Point(1) = {0, 0, 0};"), "not a mesh"),
    "MSH of the future": ("new.msh", msh(GOOD, replace=("2.2 0 8", "9.0 0 8")), "header is not that of MSH 2.2 or 4.1"),
    "no nodes section": ("no.msh", msh(GOOD, replace=("$Nodes\n4", "$Knots\n4")), r"\$Knots has no \$EndKnots|no nodes"),
    "unfinished section": ("end.msh", msh(GOOD, replace=("$EndElements\n", "")), "has no .EndElements: the file is truncated"),
    "fewer nodes than announced": ("few.msh", msh(GOOD, replace=("$Nodes\n4", "$Nodes\n5")), "Nodes ends too early"),
    "more nodes than announced": ("more.msh", msh(GOOD, replace=("$Nodes\n4", "$Nodes\n3")), "holds more than it announces"),
    "fewer elements than announced": ("e.msh", msh(GOOD, replace=("$Elements\n2", "$Elements\n3")), "1 elements are missing"),
    "word among numbers": ("word.msh", msh(GOOD, replace=("1 0 0 0", "1 0 zero 0")), "not a number"),
    "damaged names": ("names.msh", msh(GOOD, names=("2 1 sand",)), "PhysicalNames is damaged"),
    "nodes defined twice": (
        "twice.msh",
        msh(GOOD, nodes=["1 0 0 0", "2 1 0 0", "3 1 1 0", "3 0 1 0"]),
        "node 3 is defined twice",
    ),
    "unknown node": ("node.msh", msh([*GOOD, "2 2 1 1 1 3 77"]), "1 elements refer to nodes that are not there, such as 77"),
    "unknown element": ("kind.msh", msh(["140 2 1 1 1 2 3 4"]), "gmsh's type 140"),
    "node out of range": (
        "range.vtu",
        vtu([("triangle", [[0, 1, 2], [0, 2, 9]])]),
        "1 triangle cells refer to nodes beyond the 4",
    ),
    "negative node": ("minus.vtu", vtu([("triangle", [[0, 1, 2], [0, 2, -1]])]), "1 triangle cells refer to nodes beyond the 4"),
    "only points": ("points.vtu", vtu([("vertex", [[0], [1]])]), "contains no cells"),
    "no cells": ("none.msh", msh([]), "no nodes or no elements"),
    "mixed cells": (
        "mixed.vtu",
        vtu([("triangle", [[0, 1, 2]]), ("quad", [[0, 1, 2, 3]])]),
        "mixes cells .* 1 triangle, 1 quadrilateral",
    ),
    "mixed orders": (
        "orders.vtu",
        vtu([("triangle", [[0, 1, 2]]), ("triangle6", [[0, 2, 3, 4, 5, 6]])], [*SQUARE, CENTRE, [0.4, 1, 0], [0, 0.5, 0]]),
        "mixes cells .* 1 triangle, 1 triangle of order 2",
    ),
    "serendipity": ("q8.vtu", vtu([("quad8", [list(range(8))])], Q2_FOLDED[:8]), "quad8.*which DOLFINx does not have"),
    "polygons": ("poly.vtu", vtu([("polygon", [[0, 1, 2, 3, 4]])], [*SQUARE, CENTRE]), "type polygon"),
    "flat triangle": (
        "flat.vtu",
        vtu([("triangle", [[0, 1, 2], [0, 4, 2]])], [*SQUARE, CENTRE]),
        "1 of 2 triangle cells have no volume: cells 1",
    ),
    "flat tetrahedron": ("flat4.vtu", vtu([("tetra", [[0, 1, 2, 3]])]), "1 of 1 tetrahedron cells have no volume"),
    "interval of no length": ("dot.vtu", vtu([("line", [[0, 1]])], [[1, 1, 0], [1, 1, 0]]), "interval cells have no volume"),
    "all nodes in one place": ("dots.vtu", vtu(TWO, [[1.0, 1.0, 1.0]] * 4), "2 of 2 triangle cells have no volume"),
    "folded quadrilateral": ("bow.vtu", vtu([("quad", [[0, 1, 3, 2]])]), "1 of 1 quadrilateral cells are folded"),
    "non-convex quadrilateral": (
        "dart.vtu",
        vtu([("quad", [[0, 1, 4, 3]])], [*SQUARE, [0.2, 0.2, 0]]),
        "quadrilateral cells are folded",
    ),
    "twisted hexahedron": ("twist.vtu", vtu([("hexahedron", [TWISTED])], CUBE), "1 of 1 hexahedron cells have no volume"),
    "folded curved cell": ("curl.vtu", vtu([("quad9", [list(range(9))])], Q2_FOLDED), "1 of 1 quadrilateral cells are folded"),
    "folded surface": ("bow3.vtu", vtu([("quad", [[0, 1, 3, 2]])], [[0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0]]), "are folded"),
    "collapsed cell": ("same.vtu", vtu([("quad", [[0, 1, 2, 2]])]), "1 quadrilateral cells name the same node twice"),
    "cell listed twice": ("again.vtu", vtu([("triangle", [[0, 1, 2], [0, 2, 3], [2, 0, 1]])]), "1 cells are there twice"),
    "NaN": (
        "nan.vtu",
        vtu(TWO, [*SQUARE[:3], [0.0, float("nan"), 0.0]]),
        "1 nodes have coordinates that are not finite .nodes 3",
    ),
    "infinity": ("inf.vtu", vtu(TWO, [*SQUARE[:3], [0.0, float("inf"), 0.0]]), "not finite"),
    "NaN in text": ("nan.msh", msh(GOOD, nodes=["1 0 0 0", "2 1 0 0", "3 1 nan 0", "4 0 1 0"]), "not finite"),
    "overlapping cells": (
        "three.vtu",
        vtu([("triangle", [[0, 1, 2], [0, 1, 3], [0, 1, 4]])], [*SQUARE, CENTRE]),
        "1 facets join more than two cells",
    ),
    "tags on a line beside the mesh": (
        "beside.msh",
        msh([*GOOD, "1 2 5 1 2 4"]),
        r"1 of 1 tagged facets \(dimension 1\) are the side of no cell",
    ),
    "facets of another shape": (
        "wrong.vtu",
        vtu(
            [("tetra", [[0, 1, 2, 4]]), ("quad", [[0, 1, 2, 3]])],
            [*SQUARE, [0.3, 0.2, 1]],
            cell_data={"cell_tags": [np.array([1]), np.array([2])]},
        ),
        "no such facet belongs to a tetrahedron",
    ),
    "facet with two tags": (
        "two.msh",
        msh([*GOOD, "1 2 5 1 1 2", "1 2 6 1 1 2"], names=('1 5 "a"', '1 6 "b"')),
        "1 facets carry two tags, such as 'a' .5. and 'b' .6.",
    ),
    "cell with two tags": ("two2.msh", msh([*GOOD, "2 2 8 1 1 2 3"]), "1 cells carry two tags, such as 1 and 8"),
    "one name, two tags": ("name.msh", msh(GOOD, names=('2 1 "a"', '2 2 "a"')), "two groups of dimension 2 are called 'a'"),
    "overlapping sets": (
        "sets.inp",
        vtu(
            [("triangle", [[0, 1, 4], [1, 2, 4], [2, 3, 4]])],
            [*SQUARE, CENTRE],
            cell_sets={"a": [np.array([0, 1])], "b": [np.array([1, 2])]},
        ),
        "set 'b' shares some of its cells",
    ),
    "tags that are no integers": (
        "real.vtu",
        vtu(TWO, cell_data={"cell_tags": [np.array([0.5, 1.0])]}),
        "'cell_tags' are not whole numbers",
    ),
    "tags beyond 32 bits": ("long.vtu", vtu(TWO, cell_data={"cell_tags": [np.array([1, 2**40])]}), "does not fit in 32 bits"),
    "tags of the wrong length": (
        "short.xdmf",
        lambda path: (vtu(TWO, cell_data={"cell_tags": [np.array([1, 2])]})(path.with_name("whole.xdmf")), lose_a_tag(path)),
        "short.xdmf",
    ),
    "XDMF without its .h5": (
        "alone.xdmf",
        lambda path: (vtu(TWO)(path), path.with_suffix(".h5").unlink()),
        "its numbers are in alone.h5, which is not in the same folder",
    ),
}


def lose_a_tag(path: Path) -> None:
    """An XDMF file whose tags are one too few for its cells."""
    mesh = meshio.read(path.with_name("whole.xdmf"))
    meshio.xdmf.write(path, mesh, data_format="XML")
    text = path.read_text()
    start = text.index("<Attribute")
    path.write_text(text[:start] + text[start:].replace('Dimensions="2"', 'Dimensions="1"').replace("\n1\n2\n", "\n1\n"))


@pytest.mark.mpi
@pytest.mark.parametrize("row", BAD)
def test_bad_file_is_refused_on_all_ranks(tmp_path: Path, row: str, capfd: pytest.CaptureFixture[str]) -> None:
    name, write, words = BAD[row]
    on_rank_0(lambda: write(tmp_path / name))
    capfd.readouterr()
    with pytest.raises(MeshError, match=f"(?s){name}.*({words})" if not words.startswith(name) else words):
        read_mesh(tmp_path / name, COMM)
    assert capfd.readouterr() == ("", "")  # what gmsh or meshio had to say is in the error


@needs_gmsh
@pytest.mark.mpi
def test_only_rank_0_needs_to_see_the_file(tmp_path: Path) -> None:
    path = tmp_path / "unit.msh"
    on_rank_0(lambda: write_gmsh(path, "triangle", 1))
    seen = path if COMM.rank == 0 else Path("/nowhere/unit.msh")
    assert read_mesh(seen, COMM).mesh.topology.index_map(2).size_global == 8


def read_or_refuse(path: Path) -> CheckedMesh | None:
    """A sound mesh, or None for a MeshError; anything else is a bug."""
    try:
        return check_content(read_content(path))
    except MeshError as error:
        assert str(path) in str(error)
        return None


FILES = [
    ("msh 2.2 text", ".msh"), ("msh 2.2 binary", ".msh"), ("msh 4.1 text", ".msh"), ("msh 4.1 binary", ".msh"),
    ("", ".vtu"), ("", ".vtk"), ("", ".xdmf"), ("", ".inp"), ("", ".med"), ("", ".mesh"),
]  # fmt: skip


@pytest.fixture(scope="module", params=FILES, ids=[(format_ or suffix).replace(" ", "-") for format_, suffix in FILES])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A sound file, and its content."""
    pytest.importorskip("gmsh")
    format_, suffix = request.param
    path = tmp_path_factory.mktemp("good") / f"unit{suffix}"
    if format_:
        write_gmsh(path, "triangle", 1, format_)
    else:
        write_meshio(path, "triangle", 1)
    assert read_or_refuse(path) is not None
    return path, path.read_bytes()


SETTINGS = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@SETTINGS
@given(data=st.data())
def test_truncated_file_is_refused_or_still_a_mesh(good: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = good
    cut = data.draw(st.integers(0, len(whole) - 2))
    bad = path.with_name(f"cut{path.suffix}")
    bad.write_bytes(whole[:cut])
    mesh = read_or_refuse(bad)
    assert path.suffix != ".msh" or mesh is None  # gmsh's files say where they end


@SETTINGS
@given(data=st.data())
def test_damaged_file_is_refused_or_still_a_mesh(good: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = good
    if path.suffix == ".med":
        pytest.skip("HDF5 may wait for ever on a damaged file")
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    bad = path.with_name(f"bad{path.suffix}")
    bad.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
    mesh = read_or_refuse(bad)
    assert mesh is None or np.all(np.isfinite(mesh.points))
