"""What an argument must be, or an error that names it."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from fem_vi.errors import InvalidInput


def is_number(value: object) -> bool:
    """Whether a value is one finite real number, Python's or numpy's, and not a truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def whole(name: str, value: Any, *, least: int | None = None) -> int:
    """A whole number.

    Args:
        name: How the error calls it.
        value: What the user passed.
        least: The smallest that will do, or None.

    Raises:
        InvalidInput: For anything but an integer, Python's or numpy's, and for one that is too small.
    """
    fits = isinstance(value, Integral) and not isinstance(value, bool) and (least is None or int(value) >= least)
    if not fits:
        raise InvalidInput(f"{name} is {value!r:.80}; it must be a whole number{'' if least is None else f', at least {least}'}.")
    return int(value)


def positive(name: str, value: Any) -> float:
    """A positive, finite number; a tensor or array of no axes counts as one.

    Args:
        name: How the error calls it.
        value: What the user passed.

    Raises:
        InvalidInput: For anything else.
    """
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if not (is_number(number) and number > 0):
        raise InvalidInput(f"{name} is {value!r:.80}; it must be a number, positive and finite.")
    return float(number)


def instance(name: str, value: object, *kinds: type) -> None:
    """Refuse a value that is of none of some types, such as the type itself.

    Args:
        name: How the error calls it.
        value: What the user passed.
        kinds: The types that will do.

    Raises:
        InvalidInput: Naming them.
    """
    if not isinstance(value, kinds):
        raise InvalidInput(f"{name} is {value!r:.80}; it must be of type {' or '.join(kind.__name__ for kind in kinds)}.")
