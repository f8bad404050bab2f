"""What an argument must be, or an error that names it."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Number, Real
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fem_vi.errors import InvalidInput

_CALLABLE: Any = Callable


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


def instance(name: str, value: object, *kinds: type, way_out: str = "") -> None:
    """Refuse a value that is of none of some types, such as the type itself.

    Args:
        name: How the error calls it.
        value: What the user passed.
        kinds: The types that will do. A class will do for `Callable` only, which it is.
        way_out: What to do about it, a sentence.

    Raises:
        InvalidInput: Naming what was given and what was expected.
    """
    if not isinstance(value, kinds) or (isinstance(value, type) and _CALLABLE not in kinds):
        expected = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
        raise InvalidInput(f"{name} is {described(value)}; it must be of type {expected}.{way_out and ' ' + way_out}")


def described(value: object) -> str:
    """A value in an error message: itself where it is a number, a name or a list of such, else what it is."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = value is None or isinstance(value, str | bytes | Number | list | tuple | dict)
    return f"{' '.join(repr(value).split()):.80}" if plain else f"a {type(value).__name__}"


def indices(name: str, given: Any, *, size: int, owning: str) -> NDArray[np.int64]:
    """Indices as whole numbers from 0 to size - 1.

    Args:
        name: How an error calls them.
        given: What the user passed.
        size: How many there are to choose from.
        owning: How an error says that this rank has them.

    Raises:
        InvalidInput: For anything else. Not collective.
    """
    try:
        chosen = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name} is {given!r:.80}; it must be a list or tensor of whole numbers.") from error
    if chosen.ndim != 1 or not (np.issubdtype(chosen.dtype, np.integer) or chosen.size == 0):
        raise InvalidInput(
            f"{name} has shape {chosen.shape} and type {chosen.dtype}; it must have one axis, of whole numbers. For a mask take "
            "torch.nonzero(mask).ravel()."
        )
    wrong = chosen[(chosen < 0) | (chosen >= size)]
    if wrong.size:
        raise InvalidInput(
            f"{name} contains {wrong[0]}; this rank {owning} 0 to {size - 1}. They are local, of each rank its own."
        )
    return chosen.astype(np.int64)
