"""What all differentiable operators share: checked inputs, batch axes that broadcast, and saved state for each call.

An operator is a function of tensors. Each call saves what its backward needs on its own graph node; nothing is read
from "the last call".
"""

from __future__ import annotations

import itertools
import math
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor

from fem_vi.bridge.layout import as_numpy
from fem_vi.errors import InvalidInput, UnsupportedDerivative
from fem_vi.parallel import all_values, raise_on_all
from fem_vi.pde.inputs import Array, FrozenMesh

_calls = itertools.count()
_one_at_a_time = threading.RLock()  # PETSc is not safe for threads, and operators write to Functions of their own
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
        saved: What the forward leaves for the backward besides inputs and output, by sample; arrays, no PETSc objects.
    """

    number: int
    batch: tuple[int, ...]
    rows: tuple[NDArray[np.intp], ...]
    keep: bool
    saved: dict[int, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Samples in the flattened batch."""
        return math.prod(self.batch)

    def values(self, flat: Sequence[Array], sample: int) -> list[Array]:
        """The values of each input for one sample."""
        return [array[rows[sample]] for array, rows in zip(flat, self.rows, strict=True)]


class BatchedOperator(ABC):
    """A differentiable function of field tensors and replicated tensors, evaluated sample by sample.

    Args:
        mesh: DOLFINx mesh that it is built on.
        inputs: What the operator takes, in order.
        output_shape: Shape of one sample's output.
    """

    def __init__(self, mesh: Any, inputs: Sequence[Argument], output_shape: tuple[int, ...]) -> None:
        self.comm: MPI.Comm = mesh.comm
        self._mesh = FrozenMesh(mesh)
        self._inputs = tuple(inputs)
        self._output_shape = output_shape

    @abstractmethod
    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        """Outputs of all samples, `(num_samples, n_out)`. Collective."""

    @abstractmethod
    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> None:
        """Add each sample's gradients to `grads[k][call.rows[k][sample]]`. Collective."""

    @abstractmethod
    def _check_state(self) -> None:
        """Refuse to run where what was fixed has changed. Not collective."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Evaluate.

        Args:
            inputs: One tensor for each input: `(*batch, n_owned)` for a Function, `(*batch, *shape)` replicated for a
                Constant. Batch axes broadcast. float32 is cast to float64; a CUDA tensor is copied to the host and the
                result back to its device.

        Returns:
            float64, batch axes first.

        Raises:
            InvalidInput: On every rank, before any work: wrong number, shape or type, values that are not finite, batch
                axes that do not broadcast or differ between ranks.

        MPI: Collective.
        """
        with raise_on_all(self.comm):
            self._mesh.check_unchanged()
            self._check_state()
            batch, rows = _plan(self._name, inputs, self._inputs)
        self._check_ranks(batch, inputs)
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        call = Call(next(_calls), batch, rows, keep)
        if all(x.is_cpu and x.dtype is torch.float64 for x in inputs):
            return _Apply.apply(self, call, *inputs)  # type: ignore[no-any-return]
        out: Tensor = _Apply.apply(self, call, *[x.to(device="cpu", dtype=torch.float64) for x in inputs])
        return out.to(next((x.device for x in inputs if not x.is_cpu), out.device))

    def _pullback(
        self, call: Call, g: Tensor, out: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of all inputs that want one, each in the shape of its input. Collective."""
        with raise_on_all(self.comm):
            self._mesh.check_unchanged()
        flat = self._flat(inputs)
        grads = [np.zeros(x.shape) if want else None for x, want in zip(flat, wanted, strict=True)]
        size = (call.num_samples, math.prod(self._output_shape))
        with _one_at_a_time:
            self._backward(call, flat, as_numpy(out).reshape(size), as_numpy(g).reshape(size), grads)
        return [None if grad is None else torch.from_numpy(grad.reshape(x.shape)) for grad, x in zip(grads, inputs, strict=True)]

    def _flat(self, inputs: Sequence[Tensor]) -> list[Array]:
        """The values of each input, one row for each sample that it has (counted, since a rank may own no entries)."""
        return [
            as_numpy(x).reshape(math.prod(x.shape[: x.ndim - len(given.shape)]), given.size)
            for x, given in zip(inputs, self._inputs, strict=True)
        ]

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_ranks(self, batch: tuple[int, ...], inputs: Sequence[Tensor]) -> None:
        """Refuse batches, or values of Constants, that differ between ranks. Collective."""
        if self.comm.size == 1:
            return
        constants = [as_numpy(x).tobytes() for x, given in zip(inputs, self._inputs, strict=True) if not given.is_field]
        seen = all_values(self.comm, (batch, [zlib.crc32(values) for values in constants]))
        if any(other[0] != seen[0][0] for other in seen):
            raise InvalidInput(f"{self._name}: the batch axes differ between ranks: {[other[0] for other in seen]}.")
        if any(other[1] != seen[0][1] for other in seen):
            raise InvalidInput(
                f"{self._name}: the values of a Constant differ between ranks; they must be replicated. Seed all ranks alike."
            )


def _plan(
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
    if not _is_finite(as_numpy(x)):
        raise InvalidInput(f"{name}: {given.label} contains values that are not finite.")
    if x.shape == given.shape:
        return ()
    event = len(given.shape)
    if x.ndim < event or tuple(x.shape[x.ndim - event :]) != given.shape:
        hint = " Use fem_vi.distribute to slice a replicated vector." if given.is_field else ""
        raise InvalidInput(
            f"{name}: {given.label} has shape {tuple(x.shape)}; its last axes must be {given.shape}, as {given.layout}.{hint}"
        )
    return tuple(x.shape[: x.ndim - event])


def _is_finite(x: Array) -> bool:
    """Whether all entries are finite. A finite sum says so at once; one that is not may have overflowed."""
    with np.errstate(invalid="ignore", over="ignore"):
        return math.isfinite(x.sum()) or bool(np.isfinite(x).all())


class _Apply(torch.autograd.Function):
    """Calls an operator in NumPy."""

    @staticmethod
    def forward(ctx: Any, operator: BatchedOperator, call: Call, *inputs: Tensor) -> Tensor:
        with _one_at_a_time:
            values = operator._forward(call, operator._flat(inputs))
        out = torch.from_numpy(values.reshape((*call.batch, *operator._output_shape)))
        ctx.operator, ctx.call = operator, call
        ctx.save_for_backward(out, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        out, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True: the gradient will be differentiated
            return None, None, *_Pullback.apply(ctx.operator, ctx.call, wanted, g, out, *inputs)
        return None, None, *ctx.operator._pullback(ctx.call, g, out, inputs, wanted)


class _Pullback(torch.autograd.Function):
    """The gradient of an operator. It keeps its place in the graph, so that differentiating it again is refused and not zero."""

    @staticmethod
    def forward(
        ctx: Any, operator: BatchedOperator, call: Call, wanted: Sequence[bool], g: Tensor, out: Tensor, *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.operator = operator
        return tuple(operator._pullback(call, g, out, inputs, wanted))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise UnsupportedDerivative(
            f"{ctx.operator._name} can be differentiated once; a second derivative was asked for. "
            "Do not pass create_graph=True through it, or detach its gradient."
        )
