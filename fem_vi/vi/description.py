"""Descriptions that tell one problem or choice from another, in words and a few numbers that JSON holds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fem_vi.arguments import is_number

# How far vectors of two descriptions of one problem may be apart, as a fraction of their norms.
AGREEMENT = {"data": 1e-8, "noise": 1e-8, "forward": 1e-5}


def name_of(choice: object) -> str:
    """A value of a run in words that do not change between sessions: functions by name, the rest by `repr` without addresses."""
    if isinstance(choice, FunctionType):
        return f"{choice.__module__}.{choice.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(choice))


def sketch(x: Tensor) -> list[float]:
    """Norm and two projections of a vector: few numbers that tell it from others, in another order too."""
    k = torch.arange(1, len(x) + 1, dtype=torch.float64)
    x = x.detach().to(torch.float64)
    return [float(f"{float(value):.12g}") for value in (x.norm(), x @ torch.cos(k * k), x @ torch.cos(math.pi * k.sqrt()))]


def differing(stored: object, present: Mapping[str, Any]) -> str | None:
    """The first part in which two descriptions of problems differ, in words; None where they agree.

    The first was read from a file, and may be anything. Vectors need only agree to rounding: those made by a simulation
    differ in their last digits between numbers of ranks.
    """
    words = {"data": "the data y", "noise": "the noise's numbers", "forward": "the forward map"}
    there = stored if isinstance(stored, dict) else {}
    for name, value in present.items():
        other: Any = there.get(name)
        if name not in words:
            if other != value:
                return f"{name} ({other} there, {value} here)"
        elif isinstance(value, list) and _is_sketch(other):
            if any(abs(a - b) > AGREEMENT[name] * (abs(other[0]) + abs(value[0])) for a, b in zip(other, value, strict=True)):
                return f"{words[name]} (norm {other[0]:.6g} there, {value[0]:.6g} here)"
        elif other != value:
            return words[name]
    return None


def _is_sketch(value: Any) -> bool:
    """Whether a value read from a file can be what `sketch` wrote."""
    return isinstance(value, list) and len(value) == 3 and all(is_number(each) for each in value)
