"""One call of an operator: the tensors that it takes, checked, and which sample reads which rows of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fem_vi.bridge.batch import Argument, batch_axes
from fem_vi.bridge.layout import as_numpy
from fem_vi.errors import InvalidInput
from fem_vi.pde.inputs import Array

_FIRST_ROW = np.zeros(1, dtype=np.intp)


@dataclass(frozen=True)
class Call:
    """One call of an operator: how its samples read the rows of its inputs.

    Attributes:
        number: Counts the calls of this process; equal on all ranks.
        batch: Broadcast batch axes.
        rows: For each input, the row of its flattened values that each sample reads.
        keep: Whether a backward may follow.
        saved: What the forward leaves for the backward besides inputs and output; arrays, no PETSc objects.
    """

    number: int
    batch: tuple[int, ...]
    rows: tuple[NDArray[np.intp], ...]
    keep: bool
    saved: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Samples in the flattened batch."""
        return math.prod(self.batch)

    def flat(self, tensors: Sequence[Tensor], expected: Sequence[Argument]) -> list[Array]:
        """The values of each input, or of its tangent, `(num_rows, size)`."""
        if not self.batch:
            return [as_numpy(x).reshape(1, given.size) for x, given in zip(tensors, expected, strict=True)]
        return [  # rows are counted, since a rank may own no entries
            as_numpy(x).reshape(math.prod(x.shape[: x.ndim - len(given.shape)]), given.size)
            for x, given in zip(tensors, expected, strict=True)
        ]

    def values(self, flat: Sequence[Array], sample: int) -> list[Array]:
        """The values of each input for one sample."""
        return [array[rows[sample]] for array, rows in zip(flat, self.rows, strict=True)]


def plan(
    name: str, inputs: Sequence[object], expected: Sequence[Argument]
) -> tuple[tuple[int, ...], tuple[NDArray[np.intp], ...]]:
    """Check the tensors of a call and work out who reads what. Not collective."""
    axes, batch = batch_axes(name, inputs, expected)
    if not any(axes):
        return (), (_FIRST_ROW,) * len(axes)
    return batch, _rows(tuple(axes), batch)


@lru_cache(maxsize=64)
def _rows(axes: tuple[tuple[int, ...], ...], batch: tuple[int, ...]) -> tuple[NDArray[np.intp], ...]:
    """The row of each input that each sample reads. Training asks for the same again and again."""
    rows = tuple(np.broadcast_to(np.arange(math.prod(own)).reshape(own), batch).ravel() for own in axes)
    for own in rows:
        own.flags.writeable = False
    return rows


def check_finite(name: str, inputs: Sequence[Tensor], expected: Sequence[Argument]) -> None:
    """Refuse tensors with values that are not finite, naming the first. Not collective."""
    for x, given in zip(inputs, expected, strict=True):
        check_values(name, as_numpy(x), given)


def check_values(name: str, x: Array, given: Argument) -> None:
    """Refuse values of an input that are not finite. Not collective."""
    if not is_finite(x):
        raise InvalidInput(f"{name}: {given.label} contains values that are not finite.")


def is_finite(x: Array) -> bool:
    """Whether all entries are finite. A finite sum of squares says so at once; one that is not may have overflowed."""
    flat = x.ravel(order="K")
    return math.isfinite(np.dot(flat, flat)) or bool(np.isfinite(x).all())
