"""What a fit says while it runs: a bar on a terminal, and words; on rank 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fem_vi.vi.run import Row


@contextmanager
def progress_bar(steps: int, *, done: int, show: bool) -> Iterator[Callable[[Row], None]]:
    """A bar with what the last step knew of `words_of`, solves per second and time left.

    Args:
        steps: Steps of the whole fit.
        done: Steps taken already.
        show: Whether this rank shows it at all.

    Yields:
        What to call after each step.
    """
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda row: None
        return
    speed = "{task.fields[rate]:.3g} solves/s"
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"), TextColumn(speed), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("fit", total=steps, completed=done, words="", rate=math.nan)

        def show_row(row: Row) -> None:
            bar.update(task, completed=row.step, words=words_of(row), rate=row.solves / max(row.seconds, 1e-9))

        yield show_row


def words_of(row: Row) -> str:
    """ELBO, KL and misfit, those that the objective knows; the loss where it knows no ELBO. Not collective."""
    first = ("ELBO", row.elbo) if math.isfinite(row.elbo) else ("loss", row.loss)
    parts = (first, ("KL", row.kl), ("misfit", row.misfit))
    return "  ".join(f"{name} {value:.5g}" for name, value in parts if math.isfinite(value))


def tell(words: str, *, show: bool) -> None:
    """A line on stderr.

    Args:
        words: What to say.
        show: Whether this rank says it.
    """
    if show:
        Console(stderr=True).print(words, markup=False, highlight=False, soft_wrap=True)
