"""Signals that end a fit: noted when they come, acted upon between two steps, on all ranks."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

ABRUPT = (signal.SIGINT, signal.SIGTERM)
"""What a person or a scheduler sends to end a process."""
POLITE = signal.SIGUSR1 if hasattr(signal, "SIGUSR1") else None
"""What schedulers send ahead of a time limit, and what launchers pass on without a deadline; Windows has none."""


class noted_signals:  # lower case: it is called like a function
    """Note SIGINT, SIGTERM and SIGUSR1 for a block, in place of what they do otherwise.

    A second SIGINT or SIGTERM does what it would have done without this block: whoever cannot wait for the end of a step asks
    twice. SIGUSR1 is left alone where the caller has a handler of their own. Off the main thread, where Python takes no signals,
    nothing is noted.

    Args:
        active: Whether to note at all.
        says: Whether to say on stderr, at once, that the end of the step is awaited.

    Attributes:
        name: Name of the signal that came first, or None.
    """

    def __init__(self, *, active: bool, says: bool = False) -> None:
        self.name: str | None = None
        self._active = active and threading.current_thread() is threading.main_thread()
        self._says = says
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> noted_signals:
        """Begin to note."""
        if self._active:
            noted = [each for each in ABRUPT if signal.getsignal(each) is not None]
            if POLITE is not None and signal.getsignal(POLITE) is signal.SIG_DFL:
                noted.append(POLITE)
            self._before = {each: signal.signal(each, self._note) for each in noted}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let signals do what they did before."""
        for each in list(self._before):
            self._restore(each)

    def _note(self, number: int, frame: FrameType | None) -> None:
        came = signal.Signals(number)
        if self.name is None and self._says:
            # Not by sys.stderr, which the signal may have found in the middle of a line of its own.
            os.write(2, f"\n{came.name} came: the fit ends after this step, with a checkpoint.\n".encode())
        self.name = self.name or came.name
        if came != POLITE:
            for each in ABRUPT:
                self._restore(each)

    def _restore(self, each: signal.Signals) -> None:
        if each in self._before:
            signal.signal(each, self._before.pop(each))
