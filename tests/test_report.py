"""Reports: in plain text where no terminal reads them, also under mpirun, which gives ranks terminals of their own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from mpi4py import MPI
from rich.table import Table
import fem_vi
table = Table("quantity")
table.add_row("[red]value[/red]")
fem_vi.report(MPI.COMM_WORLD, table, "x" * 90)
"""
ESCAPE = b"\x1b["


def printed(launch: list[str], *, terminal: bool, **variables: str) -> bytes:
    """What the script writes to stdout, a terminal or a pipe."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "TERM": "xterm", **variables}
    above, below = pty.openpty() if terminal else os.pipe()
    command = [*launch, sys.executable, "-c", SCRIPT]
    try:
        with subprocess.Popen(command, stdout=below, stdin=subprocess.DEVNULL, env=environment, bufsize=0) as process:
            assert process.wait(100) == 0
        return os.read(above, 100_000)
    finally:
        os.close(above)
        os.close(below)


@pytest.mark.parametrize("launch", [[], ["mpirun", "-n", "2"]], ids=["alone", "mpirun"])
def test_control_codes_go_to_terminals_only(launch: list[str]) -> None:
    piped = printed(launch, terminal=False)
    assert ESCAPE not in piped
    assert piped.count(b"value") == 1
    assert b"x" * 90 in piped  # no line is broken at eighty columns, or at those of a terminal that nobody sees
    assert ESCAPE in printed(launch, terminal=True)


def test_colours_may_be_asked_for() -> None:
    assert ESCAPE in printed(["mpirun", "-n", "2"], terminal=False, FORCE_COLOR="1")
