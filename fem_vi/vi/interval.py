"""How far a fit goes from one checkpoint to the next."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fem_vi.arguments import positive, whole


@dataclass(frozen=True)
class Seconds:
    """A checkpoint after the first step that ends so long after the last checkpoint, by rank 0's clock.

    For steps whose length is not known: an interruption then costs so much time at most, and a step.

    Attributes:
        seconds: Wall time.
    """

    seconds: float = 60.0

    def __post_init__(self) -> None:
        positive("Seconds: seconds", self.seconds)


def checked_interval(value: object) -> int | Seconds:
    """A number of steps, one at least, or `Seconds`.

    Raises:
        InvalidInput: For anything else.
    """
    return value if isinstance(value, Seconds) else whole("checkpoint_every", value, least=1)


class Clock:
    """Says when the next checkpoint is due.

    Args:
        every: Steps, or `Seconds`.
    """

    def __init__(self, every: int | Seconds) -> None:
        self._every = every
        self._last = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after a step; with `Seconds`, one answer for each rank. Not collective."""
        if isinstance(self._every, Seconds):
            return time.monotonic() - self._last >= self._every.seconds
        return step % self._every == 0

    def reset(self) -> None:
        """A checkpoint has been written."""
        self._last = time.monotonic()
