"""SIGTERM and SIGINT while a fit runs: noted when they come, acted upon between two steps, on all ranks."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class noted_signals:  # lower case: it is called like a function
    """Note SIGINT and SIGTERM for a block, in place of what they do otherwise.

    A second one does what it would have done without this block: whoever cannot wait for the end of a step asks twice. Off the
    main thread, where Python takes no signals, nothing is noted.

    Args:
        active: Whether to note at all.

    Attributes:
        name: Name of the signal that came, or None.
    """

    def __init__(self, *, active: bool) -> None:
        self.name: str | None = None
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> noted_signals:
        """Begin to note."""
        if self._active:
            self._before = {each: signal.signal(each, self._note) for each in SIGNALS if signal.getsignal(each) is not None}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let signals do what they did before."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}
