"""What all differentiable operators share: checked inputs, batch axes that broadcast, and saved state for each call.

An operator is a function of tensors. Each call saves what its backward needs on its own graph node; nothing is read
from "the last call".

Second derivatives. For y = f(x), which may be given implicitly, let P(g, y, x) = g . df/dx with y taken for an independent
variable, S(dx) = df/dx . dx, and lam what P makes of g (g itself for an explicit function, the adjoint state for an implicit
one). Then

    dP . t   in g: S(t) = dy,      in (y, x): the curvature, the gradient of the second-order form of lam, dy and t,

so a Hessian-vector product by double backward costs one tangent solve here, and one adjoint solve where what P leaves at y has
come together with the rest of the cotangent of y.
"""

from __future__ import annotations

import itertools
import math
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from fem_vi.bridge.layout import as_numpy
from fem_vi.errors import InvalidInput, NotFinite, UnsupportedDerivative
from fem_vi.parallel import all_values, any_rank, any_rank_each, raise_on_all
from fem_vi.pde.coordinates import CoordinateInput
from fem_vi.pde.inputs import Array, FrozenMesh

_calls = itertools.count()
_one_at_a_time = threading.RLock()  # PETSc is not safe for threads, and operators write to Functions of their own
_transforms_are_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
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

    def values(self, flat: Sequence[Array], sample: int) -> list[Array]:
        """The values of each input for one sample."""
        return [array[rows[sample]] for array, rows in zip(flat, self.rows, strict=True)]


@dataclass(frozen=True)
class Bend:
    """What a curvature is taken of, each `(num_samples, n_out)`, and the tangents of the inputs, row by row as the inputs."""

    lam: Array
    out: Array
    out_dot: Array
    tangents: list[Array]


class BatchedOperator(ABC):
    """A differentiable function y = f(x) of field tensors and replicated tensors, evaluated sample by sample.

    A subclass gives f and three maps that torch composes to every first and second derivative:

        pullback      g -> g . df/dx
        pushforward   dx -> df/dx . dx
        curvature     lam, dx -> d/dx (lam . df/dx . dx)

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
        self._output_size = math.prod(output_shape)
        self._moving = [(k, given) for k, given in enumerate(self._inputs) if isinstance(given, CoordinateInput)]

    @abstractmethod
    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        """Outputs of all samples, `(num_samples, n_out)`. Collective."""

    @abstractmethod
    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> Array:
        """The pullback: add each sample's gradients to `grads[k][call.rows[k][sample]]`. Collective.

        Returns:
            lam, `(num_samples, n_out)`: what `_curvature` is to be given in place of g.
        """

    def _pushforward(self, call: Call, flat: Sequence[Array], out: Array, tangents: Sequence[Array]) -> Array:
        """Tangents of the outputs, `(num_samples, n_out)`, for tangents of the inputs, row by row as the inputs. Collective."""
        raise self._refusal("first derivatives in reverse mode only")

    def _curvature(self, call: Call, flat: Sequence[Array], bend: Bend, at_out: Array, grads: Sequence[Array]) -> None:
        """Add the derivatives of lam . df/dx . dx: for the inputs to `grads`, for the output to `at_out`.

        An implicit function takes its output for an independent variable here; an explicit one has nothing to add to
        `at_out`. Collective.
        """
        raise self._refusal("first derivatives in reverse mode only")

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
        keep = torch.is_grad_enabled() and any(_is_differentiated(x) for x in inputs)
        function = _TransformableApply if _transforms_are_active() else _Apply
        if all(not isinstance(x, Tensor) or (x.is_cpu and x.dtype is not torch.float32) for x in inputs):
            return function.apply(self, keep, *inputs)  # type: ignore[no-any-return]
        device = next((x.device for x in inputs if isinstance(x, Tensor) and not x.is_cpu), torch.device("cpu"))
        out: Tensor = function.apply(self, keep, *[_on_host(x) for x in inputs])
        return out.to(device)

    def _evaluate(self, keep: bool, inputs: Sequence[Tensor]) -> tuple[Call, Tensor]:
        """Check the inputs and evaluate f. Collective."""
        with raise_on_all(self.comm):
            self._mesh.check_unchanged()
            self._check_state()
            batch, rows = _plan(self._name, inputs, self._inputs)
            _check_finite(self._name, inputs, self._inputs)
        self._check_ranks(batch, inputs)
        call = Call(next(_calls), batch, rows, keep)
        flat = self._flat(inputs)
        if self._moving:
            self._exclusively(self._check_cells, flat)
        values = self._exclusively(self._forward, call, flat)
        return call, torch.from_numpy(values.reshape((*batch, *self._output_shape)))

    def _pull_back(
        self, call: Call, g: Tensor, out: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Array, list[Tensor | None]]:
        """lam, `(num_samples, n_out)`, and the gradients of the inputs that want one, each in its shape. Collective."""
        self._check_mesh()
        flat = self._flat(inputs)
        grads = [np.zeros(x.shape) if want else None for x, want in zip(flat, wanted, strict=True)]
        lam = self._exclusively(self._backward, call, flat, self._rows(out), self._rows(g), grads)
        return lam, [
            None if row is None else torch.from_numpy(row.reshape(x.shape)) for row, x in zip(grads, inputs, strict=True)
        ]

    def _push_forward(self, call: Call, out: Tensor, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
        """The tangent of the output. Collective."""
        self._check_mesh()
        values = self._exclusively(self._pushforward, call, self._flat(inputs), self._rows(out), self._flat(tangents))
        return torch.from_numpy(values.reshape(out.shape))

    def _bend(
        self, call: Call, lam: Tensor, out: Tensor, out_dot: Tensor, inputs: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The curvature: for the output, and for all inputs. Collective."""
        self._check_mesh()
        flat = self._flat(inputs)
        grads = [np.zeros(x.shape) for x in flat]
        bend = Bend(self._rows(lam), self._rows(out), self._rows(out_dot), self._flat(tangents))
        at_out = np.zeros_like(bend.out)
        self._exclusively(self._curvature, call, flat, bend, at_out, grads)
        return (
            torch.from_numpy(at_out.reshape(out.shape)),
            [torch.from_numpy(row.reshape(x.shape)) for row, x in zip(grads, inputs, strict=True)],
        )

    def _exclusively(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run what writes to Functions of its own, one thread at a time; a mesh that it moves is moved back."""
        with _one_at_a_time:
            try:
                return work(*args)
            finally:
                for _, given in self._moving:
                    given.restore()

    def _check_cells(self, flat: Sequence[Array]) -> None:
        """Refuse coordinates that turn cells inside out. Collective."""
        for position, given in self._moving:
            for values in flat[position]:
                given.load(values)
                with raise_on_all(self.comm):
                    given.check_cells()

    def _call(self, inputs: Sequence[Tensor]) -> Call:
        """The plan of a call whose inputs have been checked; its samples may be differentiated."""
        return Call(next(_calls), *_plan(self._name, inputs, self._inputs), keep=True)

    def _check_finite(self, out: Array) -> None:
        """Refuse outputs, `(num_samples, n_out)`, that are not finite. Collective."""
        if any_rank(self.comm, not _is_finite(out)):
            wrong = np.flatnonzero(any_rank_each(self.comm, np.any(~np.isfinite(out), axis=1)))
            raise NotFinite(f"{self._name}: the form has no finite value for samples {wrong[:10].tolist()} of {len(out)}.")

    def _check_mesh(self) -> None:
        with raise_on_all(self.comm):
            self._mesh.check_unchanged()

    def _flat(self, inputs: Sequence[Tensor]) -> list[Array]:
        """The values of each input, one row for each sample that it has (counted, since a rank may own no entries)."""
        return [
            as_numpy(x).reshape(math.prod(x.shape[: x.ndim - len(given.shape)]), given.size)
            for x, given in zip(inputs, self._inputs, strict=True)
        ]

    def _rows(self, out: Tensor) -> Array:
        """The values of a tensor in the shape of the output, one row for each sample."""
        return as_numpy(out).reshape(math.prod(out.shape[: out.ndim - len(self._output_shape)]), self._output_size)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _refusal(self, what: str) -> UnsupportedDerivative:
        return UnsupportedDerivative(
            f"{self._name} has {what}; another derivative was asked for. "
            "Do not pass create_graph=True through it, or detach its gradient."
        )

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
    if x.shape == given.shape:
        return ()
    event = len(given.shape)
    if x.ndim < event or tuple(x.shape[x.ndim - event :]) != given.shape:
        hint = " Use fem_vi.distribute to slice a replicated vector." if given.is_field else ""
        raise InvalidInput(
            f"{name}: {given.label} has shape {tuple(x.shape)}; its last axes must be {given.shape}, as {given.layout}.{hint}"
        )
    return tuple(x.shape[: x.ndim - event])


def _check_finite(name: str, inputs: Sequence[Tensor], expected: Sequence[Argument]) -> None:
    for x, given in zip(inputs, expected, strict=True):
        if not _is_finite(as_numpy(x)):
            raise InvalidInput(f"{name}: {given.label} contains values that are not finite.")


def _is_finite(x: Array) -> bool:
    """Whether all entries are finite. A finite sum of squares says so at once; one that is not may have overflowed."""
    flat = x.ravel()
    return math.isfinite(np.dot(flat, flat)) or bool(np.isfinite(x).all())


def _is_differentiated(x: object) -> bool:
    return isinstance(x, Tensor) and (x.requires_grad or forward_ad.unpack_dual(x).tangent is not None)


def _on_host(x: Tensor) -> Tensor:
    """A float tensor in double precision on the host; anything else as it is, to be refused."""
    return x.to(device="cpu", dtype=torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x


class _Apply(torch.autograd.Function):
    """y = f(x)."""

    @staticmethod
    def forward(ctx: Any, operator: BatchedOperator, keep: bool, *inputs: Tensor) -> Tensor:
        ctx.call, out = operator._evaluate(keep, inputs)
        ctx.operator = operator
        ctx.save_for_backward(out, *inputs)
        ctx.save_for_forward(out, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        out, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True: the gradient will be differentiated
            return None, None, *_Pullback.apply(ctx.operator, ctx.call, wanted, g, out, *inputs)[1:]
        return None, None, *ctx.operator._pull_back(ctx.call, g, out, inputs, wanted)[1]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        out, *inputs = ctx.saved_tensors
        return _Pushforward.apply(ctx.operator, ctx.call, out, *inputs, *_complete(tangents[2:], inputs))  # type: ignore[no-any-return]


class _TransformableApply(_Apply):
    """`_Apply` in the form that torch.func wants, which costs 20 us more in each call."""

    @staticmethod
    def forward(operator: BatchedOperator, keep: bool, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return operator._evaluate(keep, inputs)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operator, _, *given = inputs
        ctx.call = ctx.operator._call(given)
        ctx.save_for_backward(output, *given)
        ctx.save_for_forward(output, *given)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], operator: BatchedOperator, keep: bool, *inputs: Tensor) -> Any:
        lanes = _Lanes(operator, info.batch_size, inputs, in_dims[2:])
        return _TransformableApply.apply(operator, keep, *lanes.inputs(inputs, in_dims[2:], expand=False)), 0


class _Pullback(torch.autograd.Function):
    """g -> (lam, g . df/dx): the output y is an argument of its own, so that second derivatives may flow through it."""

    @staticmethod
    def forward(
        operator: BatchedOperator, call: Call, wanted: Sequence[bool], g: Tensor, out: Tensor, *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        lam, grads = operator._pull_back(call, g, out, inputs, wanted)
        return torch.from_numpy(lam.reshape(out.shape)), *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.operator, ctx.call, ctx.wanted, _, *tensors = inputs
        lam = output[0]
        ctx.mark_non_differentiable(lam)
        ctx.save_for_backward(lam, *tensors)
        ctx.save_for_forward(lam, *tensors)

    @staticmethod
    def backward(ctx: Any, _: Tensor, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        lam, out, *inputs = ctx.saved_tensors
        dx = _complete(tangents, inputs)
        out_dot = _Pushforward.apply(ctx.operator, ctx.call, out, *inputs, *dx)
        return None, None, None, out_dot, *_Curvature.apply(ctx.operator, ctx.call, lam, out, out_dot, *inputs, *dx)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        lam, out, *inputs = ctx.saved_tensors
        g_dot, out_dot, *dx = _complete(tangents[3:], [out, out, *inputs])
        at_out, *at_inputs = _Curvature.apply(ctx.operator, ctx.call, lam, out, out_dot, *inputs, *dx)
        _, *moved = _Pullback.apply(ctx.operator, ctx.call, ctx.wanted, g_dot + at_out, out, *inputs)
        return None, *(None if x is None else x + bent for x, bent in zip(moved, at_inputs, strict=True))

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        operator: BatchedOperator,
        call: Call,
        wanted: Sequence[bool],
        g: Tensor,
        out: Tensor,
        *inputs: Tensor,
    ) -> Any:
        lanes = _Lanes(operator, info.batch_size, inputs, in_dims[5:])
        given = lanes.inputs(inputs, in_dims[5:])
        outer = lanes.outputs((g, out), in_dims[3:5])
        lam, *grads = _Pullback.apply(operator, operator._call(given), wanted, *outer, *given)
        return (lam, *lanes.restore(grads)), (0, *(None if grad is None else 0 for grad in grads))


class _Pushforward(torch.autograd.Function):
    """dx -> df/dx . dx."""

    @staticmethod
    def forward(operator: BatchedOperator, call: Call, out: Tensor, *tensors: Tensor) -> Tensor:
        return operator._push_forward(call, out, *_halves(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operator, ctx.call, *tensors = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        out_dot, out, *tensors = ctx.saved_tensors
        inputs, dx = _halves(tensors)
        lam, *at_tangents = _Pullback.apply(ctx.operator, ctx.call, [True] * len(inputs), h, out, *inputs)
        return None, None, *_Curvature.apply(ctx.operator, ctx.call, lam, out, out_dot, *inputs, *dx), *at_tangents

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise ctx.operator._refusal("second derivatives of reverse mode over either mode, and of forward over reverse")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], operator: BatchedOperator, call: Call, out: Tensor, *tensors: Tensor) -> Any:
        (inputs, dx), (dims, dx_dims) = _halves(tensors), _halves(in_dims[3:])
        lanes = _Lanes(operator, info.batch_size, inputs, dims)
        given, moved = lanes.inputs(inputs, dims), lanes.inputs(dx, dx_dims)
        (outer,) = lanes.outputs((out,), in_dims[2:3])
        return _Pushforward.apply(operator, operator._call(given), outer, *given, *moved), 0


class _Curvature(torch.autograd.Function):
    """lam, dy, dx -> d/d(y, x) (lam . df/dx . dx).

    It keeps its place in the graph, so that a third derivative is refused and not zero.
    """

    @staticmethod
    def forward(
        operator: BatchedOperator, call: Call, lam: Tensor, out: Tensor, out_dot: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        at_out, grads = operator._bend(call, lam, out, out_dot, *_halves(tensors))
        return at_out, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise ctx.operator._refusal("derivatives up to the second")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        raise ctx.operator._refusal("derivatives up to the second")

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        operator: BatchedOperator,
        call: Call,
        lam: Tensor,
        out: Tensor,
        out_dot: Tensor,
        *tensors: Tensor,
    ) -> Any:
        (inputs, dx), (dims, dx_dims) = _halves(tensors), _halves(in_dims[5:])
        lanes = _Lanes(operator, info.batch_size, inputs, dims)
        given, moved = lanes.inputs(inputs, dims), lanes.inputs(dx, dx_dims)
        outer = lanes.outputs((lam, out, out_dot), in_dims[2:5])
        at_out, *grads = _Curvature.apply(operator, operator._call(given), *outer, *given, *moved)
        return (at_out, *lanes.restore(grads)), (0,) * (1 + len(grads))


class _Lanes:
    """A batch axis that torch.func.vmap adds: brought to the front of every tensor, before the batch axes that the call sees."""

    def __init__(self, operator: BatchedOperator, size: int, inputs: Sequence[Tensor], in_dims: Sequence[int | None]) -> None:
        self._size = size
        self._events = [len(given.shape) for given in operator._inputs]
        self._shapes = [
            tuple(n for axis, n in enumerate(x.shape) if dim is None or axis != dim % x.ndim)
            for x, dim in zip(inputs, in_dims, strict=True)
        ]
        self._rank = max((len(own) - event for own, event in zip(self._shapes, self._events, strict=True)), default=0)

    def inputs(self, tensors: Sequence[Tensor], in_dims: Sequence[int | None], *, expand: bool = True) -> list[Tensor]:
        """Tensors in the shapes of the inputs; those without the axis broadcast, unless each lane is to have its own."""
        return [
            self._aligned(x, dim, own, event, expand)
            for x, dim, own, event in zip(tensors, in_dims, self._shapes, self._events, strict=True)
        ]

    def outputs(self, tensors: Sequence[Tensor], in_dims: Sequence[int | None]) -> list[Tensor]:
        """Tensors in the shape of the output."""
        return [
            x.expand(self._size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=True)
        ]

    def restore(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs, without the axes that were put in to align them."""
        return [None if grad is None else grad.reshape(self._size, *own) for grad, own in zip(grads, self._shapes, strict=True)]

    def _aligned(self, x: Tensor, dim: int | None, own: tuple[int, ...], event: int, expand: bool) -> Tensor:
        if dim is None and not expand:
            return x
        padded = (1,) * (self._rank - len(own) + event)
        first = x.expand(self._size, *own) if dim is None else x.movedim(dim, 0)
        return first.reshape(self._size, *padded, *own)


def _halves(items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Inputs, and their tangents."""
    return items[: len(items) // 2], items[len(items) // 2 :]


def _complete(tangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where there is no tangent."""
    return [torch.zeros_like(x) if tangent is None else tangent for tangent, x in zip(tangents, like, strict=True)]
