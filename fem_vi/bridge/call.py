"""One call of an operator: the tensors that it takes, checked, and which sample reads which rows of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fem_vi.bridge.layout import as_numpy
from fem_vi.errors import InvalidInput
from fem_vi.pde.inputs import Array

_FIRST_ROW = np.zeros(1, dtype=np.intp)


class Argument(Protocol):
    """What an operator knows of a tensor that it takes: the axes after the batch axes, and why they are what they are."""

    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def is_field(self) -> bool: ...  # noqa: D102
    @property
    def layout(self) -> str: ...  # noqa: D102


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
    if len(inputs) != len(expected):
        raise InvalidInput(
            f"{name} takes {len(expected)} tensors ({', '.join(e.label for e in expected)}); {len(inputs)} were given."
        )
    axes = [_batch_axes(name, x, given) for x, given in zip(inputs, expected, strict=True)]
    if not any(axes):
        return (), (_FIRST_ROW,) * len(axes)
    try:
        batch = tuple(np.broadcast_shapes(*axes))
    except ValueError as error:
        shapes = ", ".join(f"{given.label}: {own}" for own, given in zip(axes, expected, strict=True))
        raise InvalidInput(f"{name}: the batch axes do not broadcast ({shapes}).") from error
    rows = tuple(np.broadcast_to(np.arange(int(np.prod(own))).reshape(own), batch).ravel() for own in axes)
    return batch, rows


def _batch_axes(name: str, x: object, given: Argument) -> tuple[int, ...]:
    """The batch axes of one tensor, after checking the rest of it."""
    if not isinstance(x, Tensor):
        raise InvalidInput(f"{name}: {given.label} is a {type(x).__name__}; it must be a torch tensor.")
    if x.dtype not in (torch.float64, torch.float32):
        raise InvalidInput(f"{name}: {given.label} has dtype {x.dtype}; it must be float64 (or float32, which is cast).")
    if x.shape == given.shape:
        return ()
    event = len(given.shape)
    if x.ndim < event or tuple(x.shape[x.ndim - event :]) != given.shape:
        hint = " Use fem_vi.distribute to slice a replicated vector." if given.is_field else ""
        raise InvalidInput(
            f"{name}: {given.label} has shape {tuple(x.shape)}; its last axes must be {given.shape}, as {given.layout}.{hint}"
        )
    return tuple(x.shape[: x.ndim - event])


def check_finite(name: str, inputs: Sequence[Tensor], expected: Sequence[Argument]) -> None:
    """Refuse tensors with values that are not finite, naming the first. Not collective."""
    for x, given in zip(inputs, expected, strict=True):
        if not is_finite(as_numpy(x)):
            raise InvalidInput(f"{name}: {given.label} contains values that are not finite.")


def is_finite(x: Array) -> bool:
    """Whether all entries are finite. A finite sum of squares says so at once; one that is not may have overflowed."""
    flat = x.ravel()
    return math.isfinite(np.dot(flat, flat)) or bool(np.isfinite(x).all())
