"""The commands fem-vi mesh info and fem-vi mesh convert, and the numbers they show."""

from __future__ import annotations

from pathlib import Path

import meshio
import numpy as np
import pytest
from dolfinx import fem
from mpi4py import MPI
from typer.testing import CliRunner, Result

from fem_vi.cli_mesh import app
from fem_vi.errors import MeshError
from fem_vi.pde.mesh import read_mesh
from fem_vi.pde.mesh_quality import summarise
from fem_vi.pde.mesh_write import convert_mesh

MESHES = Path(__file__).parents[1] / "meshes"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write(path: Path, kind: str, points: list[tuple[float, ...]], cells: list[list[int]]) -> Path:
    meshio.write(path, meshio.Mesh(np.array(points, dtype=float), [(kind, np.array(cells))]))
    return path


def test_info_says_what_is_in_a_file() -> None:
    result = run("info", MESHES / "aquifer.msh")
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    for text in (
        "3550 (triangle, 2D)",
        "vertices 1840",
        "dofs of degree 2 7230",
        "radius ratio",
        "river facets 1 1 28",
        "aquifer cells 2 1 3550",
    ):
        assert text in words


@pytest.mark.parametrize("name", ["aquifer", "l_bracket", "plate_with_hole"])
def test_dofs_are_those_of_dolfinx(name: str) -> None:
    mesh = read_mesh(MESHES / f"{name}.msh", MPI.COMM_SELF).mesh
    expected = {degree: fem.functionspace(mesh, ("Lagrange", degree)).dofmap.index_map.size_global for degree in (1, 2, 3)}
    assert summarise(MESHES / f"{name}.msh").dofs == expected


def test_dofs_of_a_hexahedron_and_a_prism(tmp_path: Path) -> None:
    square = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    cube = write(tmp_path / "cube.vtu", "hexahedron", [(*p, z) for z in (0.0, 1.0) for p in square], [list(range(8))])
    assert summarise(cube).dofs == {1: 8, 2: 27, 3: 64}
    wedge = write(tmp_path / "wedge.vtu", "wedge", [(*p, z) for z in (0.0, 1.0) for p in square[:3]], [list(range(6))])
    assert summarise(wedge).dofs == {1: 6, 2: 18, 3: 40}


H = 3**0.5 / 2
# kind, points, quality: regular cells have 1, and the right-angled triangle 2 r / R = 2 (2 - sqrt 2) / 2 / (sqrt 2 / 2)
QUALITIES = [
    ("triangle", [(0, 0, 0), (1, 0, 0), (0.5, H, 0)], 1.0),
    ("triangle", [(0, 0, 0), (1, 0, 0), (0, 1, 0)], 2 * (2 - 2**0.5) / 2**0.5),
    ("triangle", [(0, 0, 0), (0, 1, 0), (1, 0, 0)], 2 * (2 - 2**0.5) / 2**0.5),
    ("triangle", [(0, 0, 0), (1, 0, 0), (0, 0.6, 0.8)], 2 * (2 - 2**0.5) / 2**0.5),
    ("tetra", [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)], 1.0),
    ("tetra", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)], 3 * (1 / (3 + 3**0.5)) / (3**0.5 / 2)),
    ("quad", [(0, 0, 0), (2, 0, 0), (2, 1, 0), (0, 1, 0)], 1.0),
    ("quad", [(0, 0, 0), (1, 0, 0), (2, 1, 0), (1, 1, 0)], 2**-0.5),
    ("quad", [(0, 0, 0), (1, 1, 0), (2, 1, 0), (1, 0, 0)], 2**-0.5),
    ("quad", [(0, 0, 0), (1, 0, 0), (1, 0.6, 0.8), (0, 0.6, 0.8)], 1.0),
    ("hexahedron", [(x + z, y, z) for z in (0, 1) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))], 2**-0.5),
]


@pytest.mark.parametrize(("kind", "points", "quality"), QUALITIES)
def test_quality_of_cells_that_are_known(tmp_path: Path, kind: str, points: list[tuple[float, ...]], quality: float) -> None:
    summary = summarise(write(tmp_path / "cell.vtu", kind, points, [list(range(len(points)))]))
    assert summary.quality == pytest.approx([quality])


def test_info_on_curved_and_untagged_meshes(tmp_path: Path) -> None:
    points = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0.5, -0.1, 0), (0.6, 0.6, 0), (0, 0.5, 0), (7, 7, 7)]
    result = run("info", write(tmp_path / "curved.vtu", "triangle6", points, [[0, 1, 2, 3, 4, 5]]))
    for text in ("geometry of order 2", "no tags", "warning: 1 of 7 nodes belong to no cell"):
        assert text in result.output


def test_bad_input_ends_with_status_1_and_one_line(tmp_path: Path) -> None:
    result = run("info", tmp_path / "none.msh")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "none.msh: there is no such file" in result.stderr


def groups(path: Path) -> set[tuple[str, int, int]]:
    return {(tag.name, tag.dim, tag.count) for tag in summarise(path).tags}


@pytest.mark.parametrize("suffix", [".msh", ".xdmf", ".inp", ".med", ".vtu", ".vtk", ".mesh"])
@pytest.mark.parametrize("name", ["aquifer", "l_bracket", "plate_with_hole"])
def test_convert_keeps_tags_and_names(tmp_path: Path, name: str, suffix: str) -> None:
    source, target = MESHES / f"{name}.msh", tmp_path / f"{name}{suffix}"
    result = run("convert", source, target)
    assert result.exit_code == 0, result.stderr
    before, after = summarise(source), summarise(target)
    assert (after.num_cells, after.num_vertices, after.dofs) == (before.num_cells, before.num_vertices, before.dofs)
    assert after.quality.min() == pytest.approx(before.quality.min())
    named = suffix in (".msh", ".xdmf", ".inp", ".med")
    assert (
        groups(target) == groups(source) if named else sorted(t.count for t in after.tags) == sorted(t.count for t in before.tags)
    )
    assert ("this format holds no names; they were" in result.output) != named
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("mesh.docx", "unknown extension '.docx'"),
        ("there.vtu", "there.vtu exists.*--force"),
        ("no/folder.vtu", "there is no folder"),
    ],
)
def test_convert_refuses_before_it_reads(tmp_path: Path, target: str, words: str) -> None:
    (tmp_path / "there.vtu").write_text("precious")
    with pytest.raises(MeshError, match=words):
        convert_mesh(tmp_path / "none.msh", tmp_path / target)
    assert run("convert", tmp_path / "none.msh", tmp_path / target).exit_code == 1
    assert (tmp_path / "there.vtu").read_text() == "precious"


def test_convert_with_force_overwrites_and_failures_do_not(tmp_path: Path) -> None:
    target = tmp_path / "there.vtu"
    target.write_text("precious")
    (tmp_path / "bad.msh").write_text("$Nodes")
    assert run("convert", "--force", tmp_path / "bad.msh", target).exit_code == 1
    assert target.read_text() == "precious"
    assert run("convert", "--force", MESHES / "aquifer.msh", target).exit_code == 0
    assert summarise(target).num_cells == 3550


@pytest.mark.parametrize(("name", "suffix"), [("l_bracket", ".stl"), ("plate_with_hole", ".stl"), ("l_bracket", ".off")])
def test_a_format_that_cannot_hold_the_mesh_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    with pytest.raises(MeshError, match=f"it cannot be written as {suffix}"):
        convert_mesh(MESHES / f"{name}.msh", tmp_path / f"x{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_convert_keeps_curved_cells(tmp_path: Path) -> None:
    points = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0.5, -0.1, 0), (1, 0.5, 0), (0.5, 1, 0), (0, 0.5, 0), (0.5, 0.45, 0)]
    source = write(tmp_path / "q9.vtu", "quad9", points, [list(range(9))])
    convert_mesh(source, tmp_path / "q9.msh")
    assert np.allclose(meshio.read(tmp_path / "q9.msh").points[meshio.read(tmp_path / "q9.msh").cells[0].data[0]], points)
