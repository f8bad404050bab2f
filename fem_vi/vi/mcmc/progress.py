"""The progress bar of a sampler: on rank 0, and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def sampling_bar(total: float, *, show: bool) -> Iterator[Callable[[float], None]]:
    """A bar with the part that is done, and time left.

    Args:
        total: Steps to take, or 1 for a temperature.
        show: Whether this rank shows it at all.

    Yields:
        What to call with the amount done since the last call.
    """
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda amount: None
        return
    with Progress(BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("sample", total=total)
        yield lambda amount: bar.advance(task, amount)
