"""The progress bar of a fit: on rank 0, and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fem_vi.vi.run import Row


@contextmanager
def progress_bar(steps: int, *, done: int, show: bool) -> Iterator[Callable[[Row], None]]:
    """A bar with ELBO, KL, misfit, solves per second and time left.

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
    terms = "ELBO {task.fields[elbo]:.5g}  KL {task.fields[kl]:.4g}  misfit {task.fields[misfit]:.5g}"
    speed = "{task.fields[rate]:.3g} solves/s"
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(terms), TextColumn(speed), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    nan = float("nan")
    with bar:
        task = bar.add_task("fit", total=steps, completed=done, elbo=nan, kl=nan, misfit=nan, rate=nan)

        def show_row(row: Row) -> None:
            rate = row.solves / max(row.seconds, 1e-9)
            bar.update(task, completed=row.step, elbo=row.elbo, kl=row.kl, misfit=row.misfit, rate=rate)

        yield show_row
