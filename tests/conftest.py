"""What every test stands on: one clock, one outcome and one temporary folder for all MPI ranks."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from mpi4py import MPI

COMM = MPI.COMM_WORLD.Dup()
PATIENCE = 20.0  # seconds that a rank with a failed test waits for the others, which may be stuck in a collective call
_terminal = 2

hypothesis.settings.register_profile("ranks", deadline=None, derandomize=COMM.size > 1, database=None)
hypothesis.settings.load_profile("ranks")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Under MPI, let only the collective call between tests collect garbage, and let a timeout end all ranks."""
    if COMM.size == 1:
        return
    global _terminal
    _terminal = os.dup(2)  # before pytest captures it
    gc.disable()
    config.option.timeout_method = "thread"  # it ends this process, and mpirun then the others


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Only rank 0 writes to the terminal."""
    if COMM.rank > 0:
        session.config.get_terminal_writer()._file = open(os.devnull, "w")  # noqa: SIM115


def pytest_collection_finish(session: pytest.Session) -> None:
    """Ranks that would run different tests would wait for each other for ever."""
    mine = [item.nodeid for item in session.items]
    if COMM.size > 1 and any(theirs != mine for theirs in COMM.allgather(mine)):
        pytest.exit(f"rank {COMM.rank} of {COMM.size} collected other tests than the others", returncode=1)
    gc.collect()
    gc.freeze()  # what is there now stays: a collection after each test need not look at it (0.15 s each time)


def _any_failed(failed: bool, report: str) -> bool:
    """Whether the test failed on any rank; ends all ranks where one failed and the others do not arrive."""
    mine, most = np.array([failed], dtype=np.int32), np.zeros(1, dtype=np.int32)
    request = COMM.Iallreduce(mine, most, op=MPI.MAX)
    began = time.monotonic()
    while not request.Test():
        waited = time.monotonic() - began
        if failed and waited > PATIENCE:
            text = f"\n{report}\nfailed on rank {COMM.rank}; the other ranks are stuck, so all of them are ended.\n"
            os.write(_terminal, text.encode())
            MPI.COMM_WORLD.Abort(1)
        time.sleep(min(0.005, waited / 10))
    return bool(most[0])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails on one rank fails on all; rank 0 shows what the failing rank said."""
    report = yield
    if COMM.size == 1:
        return report
    if _any_failed(report.failed, report.longreprtext):
        said = COMM.allgather(report.longreprtext if report.failed else None)
        if not report.failed:
            report.outcome = "failed"
            report.longrepr = "\n".join(f"on rank {rank}:\n{text}" for rank, text in enumerate(said) if text is not None)
    return report


def pytest_runtest_logfinish() -> None:
    """Destroy what the test left, on all ranks at once: destroying a PETSc object is a collective act."""
    if COMM.size > 1:
        COMM.barrier()
        gc.collect()
        if "petsc4py.PETSc" in sys.modules:
            sys.modules["petsc4py.PETSc"].garbage_cleanup(MPI.COMM_WORLD)


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A temporary folder that all ranks share."""
    path = None
    if COMM.rank == 0:
        name = "".join(c if c.isalnum() else "_" for c in request.node.name)[:30]
        path = tmp_path_factory.mktemp(name)
    path = COMM.bcast(path, root=0)
    yield path
    COMM.barrier()
