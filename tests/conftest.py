"""What every test stands on: one clock, one outcome and one temporary folder for all MPI ranks."""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from mpi4py import MPI

COMM = MPI.COMM_WORLD.Dup()
PATIENCE = 20.0  # seconds that a rank with a failed test waits for the others, which may be stuck in a collective call
_terminal = 2

hypothesis.settings.register_profile("ranks", deadline=None, derandomize=COMM.size > 1, database=None)
hypothesis.settings.load_profile("ranks")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--sample-rows`: of a test with many rows, run a third."""
    parser.addoption("--sample-rows", action="store_true", help="of each test with more than five rows, run a third")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--sample-rows`, leave a third of the rows of each test that has more than five, unless it says `every_row`.

    Three such tests one after the other in a file share the rows of their table out, so that each row meets one of them; where
    rows are pairs of two parameters, each value of either is met.
    """
    if not config.getoption("sample_rows"):
        return
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    sampled: Counter[Path] = Counter()
    left_out: set[pytest.Item] = set()
    for rows in tests.values():
        if len(rows) > 5 and not any("every_row" in mark.kwargs for mark in rows[0].iter_markers("mpi")):
            shift = sampled[rows[0].path]
            left_out.update(row for k, row in enumerate(rows) if (k + k // 3 + shift) % 3 != 0)
            sampled[rows[0].path] += 1
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


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
    if "dolfinx.jit" in sys.modules:
        _look_forms_up_fast()
    gc.collect()
    gc.freeze()  # what is there now stays: a collection after each test need not look at it (0.15 s each time)


def _look_forms_up_fast() -> None:
    """Spare the tests, which build the same small operators over and over, most of the time that warm caches still cost.

    FFCx lists the whole cache folder, of thousands of files, whenever it looks for a compiled form: it does so once for each
    form. In DOLFINx the others wait while rank 0 looks, then rank 0 waits: what is slow there, the form's signature, which UFL
    keeps, is made by all at once. UFL makes a cell anew, with all its facets and edges, whenever an element is asked for it.
    """
    import basix.ufl
    import dolfinx.jit
    import ffcx.codegeneration.jit as ffcx_jit
    import ufl

    found: dict[Any, Any] = {}
    look, compile_form, cell = ffcx_jit.get_cached_module, dolfinx.jit.ffcx_jit, functools.cache(ufl.Cell)

    def look_once(module_name: str, object_names: list[str], cache_dir: Path, timeout: int) -> Any:
        key = (module_name, *object_names, str(cache_dir))
        if key not in found:
            answer = look(module_name, object_names, cache_dir, timeout)
            if answer[0] is None:
                return answer  # it is to be compiled now
            found[key] = answer
        return found[key]

    def sign_and_compile(comm: MPI.Comm, ufl_object: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(ufl_object, ufl.Form):
            ufl_object.signature()
        return compile_form(comm, ufl_object, *args, **kwargs)

    ffcx_jit.get_cached_module, dolfinx.jit.ffcx_jit = look_once, sign_and_compile
    basix.ufl._ElementBase.cell = property(lambda element: cell(element._cellname))


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
