"""Words and tables for a person, once and not once a rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

LAUNCHERS = {"mpirun", "mpiexec", "prterun", "prted", "orterun", "orted"}
"""Programs of OpenMPI that start ranks."""
WIDTH = 100


def report(comm: Any, *what: object) -> None:
    """Print on rank 0: text, rich tables, a `Diagnosis`. With colours on a terminal, without in a file or pipe.

    Args:
        comm: Communicator whose rank 0 prints.
        what: Anything that rich can render.

    MPI: Not collective.
    """
    if comm.rank == 0:
        console().print(*what)


def as_text(what: object) -> str:
    """What rich prints of something, a hundred columns wide: `str` of a report. Not collective."""
    text = StringIO()
    Console(file=text, width=WIDTH).print(what)
    return text.getvalue()


def console(*, quiet: bool = False) -> Console:
    """Stdout, a hundred columns wide where it is no terminal; control codes only where one reads them. Not collective.

    OpenMPI gives each rank a terminal of its own for stdout, whatever mpirun itself writes to: there that of mpirun counts.
    """
    plain = _mpirun_writes_elsewhere() and "FORCE_COLOR" not in os.environ
    out = Console(quiet=quiet, force_terminal=False if plain else None)
    return out if out.is_terminal else Console(quiet=quiet, force_terminal=False, width=WIDTH)


def _mpirun_writes_elsewhere() -> bool:
    """Whether OpenMPI started this process, and its output is no terminal, or nobody here can tell."""
    if "OMPI_COMM_WORLD_RANK" not in os.environ:
        return False
    with suppress(OSError, ValueError):  # no /proc, or none of another user's
        for pid in _ancestors():
            if Path(f"/proc/{pid}/comm").read_text().strip() in LAUNCHERS:
                return not str(Path(f"/proc/{pid}/fd/1").readlink()).startswith(("/dev/pts/", "/dev/tty"))
    return True


def _ancestors() -> Iterator[int]:
    """Processes above this one, the nearest first."""
    pid = os.getppid()
    while pid > 1:
        yield pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
