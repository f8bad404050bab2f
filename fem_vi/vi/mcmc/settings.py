"""Checks that the kernels' settings share."""

from __future__ import annotations

import math

from fem_vi.arguments import positive
from fem_vi.errors import InvalidInput


def check_kernel(name: str, step_size: float | None, acceptance: float) -> None:
    """Refuse settings out of range.

    Raises:
        InvalidInput: Naming the kernel and the setting.
    """
    if step_size is not None and positive(f"{name}: step_size", step_size) > 0.5 * math.pi:
        raise InvalidInput(f"{name}: step_size is {step_size}; it is an angle in radians, at most pi / 2.")
    if positive(f"{name}: acceptance", acceptance) >= 1.0:
        raise InvalidInput(f"{name}: acceptance is {acceptance}; it is a probability, below 1.")
