"""Words and tables for a person, once and not once a rank."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console


def report(comm: Any, *what: object) -> None:
    """Print on rank 0: text, rich tables, a `Diagnosis`.

    Args:
        comm: Communicator whose rank 0 prints.
        what: Anything that rich can render.

    MPI: Not collective.
    """
    if comm.rank == 0:
        Console().print(*what)


def as_text(what: object) -> str:
    """What rich prints of something, a hundred columns wide: `str` of a report. Not collective."""
    text = StringIO()
    Console(file=text, width=100).print(what)
    return text.getvalue()
