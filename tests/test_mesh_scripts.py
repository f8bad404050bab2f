"""The scripts that make meshes/*.msh."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gmsh")
MESHES = Path(__file__).parent.parent / "meshes"
NAMES = ["aquifer", "l_bracket", "plate_with_hole"]


def run(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of a script beside a file of the mesh's name: what it overwrites is not the repository's."""
    for file in MESHES.glob("*.py"):
        shutil.copy(file, folder)
    (folder / f"{name}.msh").write_text("precious")
    command = [sys.executable, str(folder / f"{name}.py"), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", [("--size", "0.3"), ("--order", "2")], ids=["size", "order"])
def test_another_mesh_needs_another_file(tmp_path: Path, name: str, option: tuple[str, str]) -> None:
    done = run(name, tmp_path, *option)
    assert done.returncode == 2
    assert "needs --out" in done.stderr
    assert (tmp_path / f"{name}.msh").read_text() == "precious"


@pytest.mark.parametrize(("options", "file"), [((), "plate_with_hole.msh"), (("--size", "0.3", "--out", "x.msh"), "x.msh")])
def test_each_mesh_goes_where_it_should(tmp_path: Path, options: tuple[str, ...], file: str) -> None:
    done = run("plate_with_hole", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in tmp_path.glob("*.msh") if path.read_text().startswith("$MeshFormat")}
    assert written == {file}
