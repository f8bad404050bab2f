"""Linear maps of tensors as differentiable functions: the adjoint gives the first derivative, and the map itself all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fem_vi.bridge.tracing import check_not_traced, transforms_are_active

Map = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """A x, where A and its adjoint act on all leading axes alike."""

    @staticmethod
    def forward(ctx: Any, forward: Map, adjoint: Map, x: Tensor) -> Tensor:
        ctx.forward_map, ctx.adjoint_map = forward, adjoint
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        return None, None, _apply(ctx.adjoint_map, ctx.forward_map, grads[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _apply(ctx.forward_map, ctx.adjoint_map, tangents[2])


class _TransformableLinear(_Linear):
    """`_Linear` in the form that torch.func wants, which costs 50 us more in each call."""

    @staticmethod
    def forward(forward: Map, adjoint: Map, x: Tensor) -> Tensor:  # type: ignore[override]
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Map, Map, Tensor], output: Tensor) -> None:
        ctx.forward_map, ctx.adjoint_map, _ = inputs

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], forward: Map, adjoint: Map, x: Tensor) -> tuple[Tensor, int]:
        return _TransformableLinear.apply(forward, adjoint, x.movedim(in_dims[2], 0)), 0


def _apply(forward: Map, adjoint: Map, x: Tensor) -> Tensor:
    return (_TransformableLinear if transforms_are_active() else _Linear).apply(forward, adjoint, x)  # type: ignore[no-any-return]


def apply_linear(forward: Map, adjoint: Map, x: Tensor) -> Tensor:
    """A x, differentiable to any order, in forward mode and under `torch.func.vmap`.

    Args:
        forward: A, for tensors with any leading axes. It returns a tensor of its own, not a view of its argument.
        adjoint: Its adjoint, likewise.
        x: What A is applied to.
    """
    check_not_traced("A map over the ranks of a mesh")
    return _apply(forward, adjoint, x)
