"""Batch axes: what an operator expects of the tensors that it takes, and how their leading axes broadcast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fem_vi.errors import InvalidInput


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


def batch_axes(
    name: str, inputs: Sequence[object], expected: Sequence[Argument]
) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Check the tensors of a call: the batch axes of each, and of all together.

    Raises:
        InvalidInput: Wrong number, kind, type or shape, or batch axes that do not broadcast.

    MPI: Not collective.
    """
    if len(inputs) != len(expected):
        raise InvalidInput(
            f"{name} takes {len(expected)} tensors ({', '.join(e.label for e in expected)}); {len(inputs)} were given."
        )
    axes = [_batch_axes(name, x, given) for x, given in zip(inputs, expected, strict=True)]
    if not any(axes):
        return axes, ()
    try:
        return axes, tuple(torch.broadcast_shapes(*axes))
    except RuntimeError as error:
        shapes = ", ".join(f"{given.label}: {own}" for own, given in zip(axes, expected, strict=True))
        raise InvalidInput(f"{name}: the batch axes do not broadcast ({shapes}).") from error


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
        ways = "fem_vi.distribute slices a whole vector; prior.field of a KarhunenLoeveField makes a field of a few numbers."
        hint = f" {ways}" if given.is_field else ""
        raise InvalidInput(
            f"{name}: {given.label} has shape {tuple(x.shape)}; its last axes must be {given.shape}, as {given.layout}.{hint}"
        )
    return tuple(x.shape[: x.ndim - event])
