"""Two ways to do the same, in turn, in one process: medians of CPU time and their ratio."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """Medians of CPU seconds of a floor and of a candidate; `ratio` is the median of the pairwise ratios."""

    name: str
    floor: float
    candidate: float
    ratio: float

    def __str__(self) -> str:
        floor, candidate = 1e3 * self.floor, 1e3 * self.candidate
        return f"{self.name:<44} floor {floor:9.3f} ms   fem_vi {candidate:9.3f} ms   ratio {self.ratio:6.3f}"


def seconds(work: Callable[[], object], repeats: int) -> float:
    """CPU seconds of one call, averaged over `repeats` calls."""
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats


def compare(
    name: str, floor: Callable[[], object], candidate: Callable[[], object], *, rounds: int = 15, budget: float = 0.2
) -> Comparison:
    """Time both in turn, a round each, the first round thrown away.

    Args:
        name: Row of the table.
        floor: What sets the bar.
        candidate: What is held against it.
        rounds: Pairs of measurements.
        budget: CPU seconds for one measurement: short calls are repeated.
    """
    floor(), candidate()
    repeats = max(1, round(budget / max(seconds(floor, 1), 1e-6)))
    pairs = []
    for turn in range(rounds):
        if turn % 2:
            first = seconds(floor, repeats)
            pairs.append((first, seconds(candidate, repeats)))
        else:
            first = seconds(candidate, repeats)
            pairs.append((seconds(floor, repeats), first))
    pairs = pairs[1:]
    return Comparison(
        name,
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def variations(x: np.ndarray, count: int = 3) -> Iterator[np.ndarray]:
    """The array and some near it, in turn, without end: no two calls in a row have the same input, whose factor is kept."""
    return itertools.cycle([(1 + 1e-3 * k) * x for k in range(count)])
