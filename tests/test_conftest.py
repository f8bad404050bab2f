"""What conftest.py promises for tests on several ranks, shown on small test files run by mpirun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ONE_FAILS = """
from mpi4py import MPI
def test_one_rank_fails():
    assert MPI.COMM_WORLD.rank == 0, "only rank 1 says so"
def test_next():
    assert MPI.COMM_WORLD.allreduce(1) == 2
"""
ONE_LEAVES = """
from mpi4py import MPI
def test_one_rank_leaves_a_collective_call():
    assert MPI.COMM_WORLD.rank == 0, "only rank 1 says so"
    MPI.COMM_WORLD.Barrier()
"""
ONE_HANGS = """
import time
from mpi4py import MPI
def test_one_rank_hangs():
    while MPI.COMM_WORLD.rank == 1:
        time.sleep(0.1)
"""
SHARED = """
from mpi4py import MPI
def test_folder_is_shared(tmp_path):
    (tmp_path / str(MPI.COMM_WORLD.rank)).touch()
    MPI.COMM_WORLD.Barrier()
    assert len(list(tmp_path.iterdir())) == 2
"""


TABLES = """
import pytest
@pytest.mark.mpi
@pytest.mark.parametrize("row", range(9))
def test_table(row):
    pass
@pytest.mark.mpi(every_row=True)
@pytest.mark.parametrize("row", range(7))
def test_of_every_row(row):
    pass
@pytest.mark.mpi
@pytest.mark.parametrize("row", range(5))
def test_of_few_rows(row):
    pass
"""


def run(source: str, folder: Path, *options: str, launch: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    conftest = (HERE / "conftest.py").read_text().replace("PATIENCE = 20.0", "PATIENCE = 1.0")
    (folder / "conftest.py").write_text(conftest)
    shutil.copy(HERE.parent / "pyproject.toml", folder)
    (folder / "test_sample.py").write_text(source)
    return subprocess.run(
        [*launch, sys.executable, "-P", "-m", "pytest", "test_sample.py", "--color=no", *options],
        cwd=folder,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_on_two_ranks(source: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run(source, folder, *options, launch=("mpirun", "-n", "2"))


def test_a_test_that_fails_on_one_rank_fails_and_the_next_runs(tmp_path: Path) -> None:
    done = run_on_two_ranks(ONE_FAILS, tmp_path)
    assert done.returncode != 0
    assert "1 failed, 1 passed" in done.stdout
    assert "on rank 1:" in done.stdout
    assert "only rank 1 says so" in done.stdout
    assert done.stdout.count("test session starts") == 1


def test_a_rank_that_leaves_a_collective_call_ends_all(tmp_path: Path) -> None:
    done = run_on_two_ranks(ONE_LEAVES, tmp_path)
    assert done.returncode != 0
    assert "only rank 1 says so" in done.stderr
    assert "failed on rank 1; the other ranks are stuck" in done.stderr


def test_a_rank_that_hangs_ends_all(tmp_path: Path) -> None:
    done = run_on_two_ranks(ONE_HANGS, tmp_path, "--timeout=4", "-o", "faulthandler_timeout=2")
    assert done.returncode != 0
    assert "Timeout" in done.stdout + done.stderr
    assert "in test_one_rank_hangs" in done.stderr, "rank 1 does not say where it is"


def test_ranks_share_a_folder(tmp_path: Path) -> None:
    done = run_on_two_ranks(SHARED, tmp_path)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_a_third_of_the_rows_of_large_tables(tmp_path: Path) -> None:
    done = run(TABLES, tmp_path, "--sample-rows")
    assert "15 passed, 6 deselected" in done.stdout, done.stdout


@pytest.mark.mpi
def test_this_folder_is_shared(tmp_path: Path) -> None:
    (tmp_path / "note").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
