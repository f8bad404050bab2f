"""The command fem-vi, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fem_vi
from fem_vi import doctor
from fem_vi.cli import app
from fem_vi.doctor import Findings, Part

REPOSITORY = Path(__file__).parent.parent


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False)


def start(*arguments: str, without: tuple[str, ...] = ()) -> str:
    """Python that runs fem-vi, where the modules of `without` cannot be imported."""
    return (
        f"import sys\nfor name in {without!r}:\n    sys.modules[name] = None\n"
        f"sys.argv = ['fem-vi', *{arguments!r}]\nfrom fem_vi.cli import start\nstart()"
    )


def test_doctor_describes_this_machine(tmp_path: Path) -> None:
    done = run_python(start("doctor"), tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("DOLFINx", "PETSc", "MPI", "torch", "BLAS", "gmsh", "cores"):
        assert word in done.stdout


@pytest.mark.parametrize("without", [("dolfinx",), ("dolfinx", "petsc4py", "mpi4py", "torch"), ("numpy", "torch")])
def test_doctor_says_what_is_missing(without: tuple[str, ...], tmp_path: Path) -> None:
    done = run_python(start("doctor", without=without), tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    for name in without:
        assert f"missing: {name} cannot be imported" in done.stdout


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.stdout.strip() == f"fem_vi {fem_vi.__version__}"


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = start("--help").replace(
        "start()", "try:\n    start()\nfinally:\n    print('HEAVY', {'torch', 'dolfinx'} & {*sys.modules})"
    )
    done = run_python(code, tmp_path)
    assert "doctor" in done.stdout
    assert "HEAVY set()" in done.stdout


@pytest.mark.parametrize("arguments", [("doctor",), ("mesh", "info", str(REPOSITORY / "meshes" / "aquifer.msh"))])
def test_is_silent_where_its_reader_has_gone(arguments: tuple[str, ...], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", start(*arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=gone, stderr=subprocess.PIPE, text=True, timeout=100, check=False
        )
    assert done.returncode == -signal.SIGPIPE
    assert done.stderr == ""


def test_only_rank_zero_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"dolfinx": Part("dolfinx", error="ImportError: no")}
    monkeypatch.setattr(doctor, "look", lambda: Findings(python="3", parts=parts, rank=1, ranks=2))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.output == ""
    assert done.exit_code == 1
