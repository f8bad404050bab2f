"""The maps of an operator as torch functions, which compose to every first and second derivative.

For y = f(x), which may be given implicitly, let P(g, y, x) = g . df/dx with y taken for an independent
variable, S(dx) = df/dx . dx, and lam what P makes of g (g itself for an explicit function, the adjoint state for an implicit
one). Then

    dP . t   in g: S(t) = dy,      in (y, x): the curvature, the gradient of the second-order form of lam, dy and t,

so a Hessian-vector product by double backward costs one tangent solve here, and one adjoint solve where what P leaves at y has
come together with the rest of the cotangent of y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fem_vi.bridge.call import Call
from fem_vi.bridge.lanes import Lanes
from fem_vi.bridge.tracing import check_not_traced, check_one_by_one, transforms_are_active

if TYPE_CHECKING:
    from fem_vi.bridge.operator import BatchedOperator


def apply(operator: BatchedOperator, keep: bool, inputs: Sequence[Tensor]) -> Tensor:
    """y = f(x), differentiable.

    Args:
        operator: f.
        keep: Whether a derivative may follow.
        inputs: x, double precision, on the host.

    MPI: Collective.
    """
    check_not_traced(operator._name)
    function = _TransformableApply if transforms_are_active() else _Apply
    return function.apply(operator, keep, *inputs)  # type: ignore[no-any-return]


class _Apply(torch.autograd.Function):
    """y = f(x)."""

    @staticmethod
    def forward(ctx: Any, operator: BatchedOperator, keep: bool, *inputs: Tensor) -> Tensor:
        ctx.call, out = operator.evaluate(keep, inputs)
        ctx.operator = operator
        ctx.save_for_backward(out, *inputs)
        ctx.save_for_forward(out, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        out, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        check_one_by_one(type(ctx.operator).__name__, g)
        if torch.is_grad_enabled():  # create_graph=True: the gradient will be differentiated
            return None, None, *_Pullback.apply(ctx.operator, ctx.call, wanted, g, out, *inputs)[1:]
        return None, None, *ctx.operator.pull_back(ctx.call, g, out, inputs, wanted)[1]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        out, *inputs = ctx.saved_tensors
        return _Pushforward.apply(ctx.operator, ctx.call, out, *inputs, *_complete(tangents[2:], inputs))  # type: ignore[no-any-return]


class _TransformableApply(_Apply):
    """`_Apply` in the form that torch.func wants, which costs 20 us more in each call."""

    @staticmethod
    def forward(operator: BatchedOperator, keep: bool, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return operator.evaluate(keep, inputs)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operator, _, *given = inputs
        ctx.call = ctx.operator.call(given)
        ctx.save_for_backward(output, *given)
        ctx.save_for_forward(output, *given)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], operator: BatchedOperator, keep: bool, *inputs: Tensor) -> Any:
        lanes = Lanes(operator.inputs, info.batch_size, inputs, in_dims[2:])
        return _TransformableApply.apply(operator, keep, *lanes.inputs(inputs, in_dims[2:], expand=False)), 0


class _Pullback(torch.autograd.Function):
    """g -> (lam, g . df/dx): the output y is an argument of its own, so that second derivatives may flow through it."""

    @staticmethod
    def forward(
        operator: BatchedOperator, call: Call, wanted: Sequence[bool], g: Tensor, out: Tensor, *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        lam, grads = operator.pull_back(call, g, out, inputs, wanted)
        return torch.from_numpy(lam.reshape(out.shape)).clone(), *grads  # lam may be g itself

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
        if not any(ctx.needs_input_grad[4:]):  # a product with the Jacobian by two pullbacks: linear in g
            return None, None, None, out_dot, None, *(None for _ in inputs)
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
        lanes = Lanes(operator.inputs, info.batch_size, inputs, in_dims[5:])
        given = lanes.inputs(inputs, in_dims[5:])
        outer = lanes.outputs((g, out), in_dims[3:5])
        lam, *grads = _Pullback.apply(operator, operator.call(given), wanted, *outer, *given)
        return (lam, *lanes.restore(grads)), (0, *(None if grad is None else 0 for grad in grads))


class _Pushforward(torch.autograd.Function):
    """dx -> df/dx . dx."""

    @staticmethod
    def forward(operator: BatchedOperator, call: Call, out: Tensor, *tensors: Tensor) -> Tensor:
        return operator.push_forward(call, out, *_halves(tensors))

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
        raise ctx.operator.refusal(
            "second derivatives of reverse mode over either mode, and of forward over reverse (products with Hessians are "
            "gradients of gradients: torch.autograd.functional.vhp, torch.func.hessian)"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], operator: BatchedOperator, call: Call, out: Tensor, *tensors: Tensor) -> Any:
        (inputs, dx), (dims, dx_dims) = _halves(tensors), _halves(in_dims[3:])
        lanes = Lanes(operator.inputs, info.batch_size, inputs, dims)
        given, moved = lanes.inputs(inputs, dims), lanes.inputs(dx, dx_dims)
        (outer,) = lanes.outputs((out,), in_dims[2:3])
        return _Pushforward.apply(operator, operator.call(given), outer, *given, *moved), 0


class _Curvature(torch.autograd.Function):
    """lam, dy, dx -> d/d(y, x) (lam . df/dx . dx).

    It keeps its place in the graph, so that a third derivative is refused and not zero.
    """

    @staticmethod
    def forward(
        operator: BatchedOperator, call: Call, lam: Tensor, out: Tensor, out_dot: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        at_out, grads = operator.bend(call, lam, out, out_dot, *_halves(tensors))
        return at_out, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise ctx.operator.refusal("derivatives up to the second")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        raise ctx.operator.refusal("derivatives up to the second")

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
        lanes = Lanes(operator.inputs, info.batch_size, inputs, dims)
        given, moved = lanes.inputs(inputs, dims), lanes.inputs(dx, dx_dims)
        outer = lanes.outputs((lam, out, out_dot), in_dims[2:5])
        at_out, *grads = _Curvature.apply(operator, operator.call(given), *outer, *given, *moved)
        return (at_out, *lanes.restore(grads)), (0,) * (1 + len(grads))


def _halves(items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Inputs, and their tangents."""
    return items[: len(items) // 2], items[len(items) // 2 :]


def _complete(tangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where there is no tangent."""
    return [torch.zeros_like(x) if tangent is None else tangent for tangent, x in zip(tangents, like, strict=True)]
