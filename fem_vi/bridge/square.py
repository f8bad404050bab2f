"""Squares of field tensors, summed: what residuals are measured by."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from fem_vi.bridge.layout import all_sum
from fem_vi.bridge.tracing import transforms_are_active


class _Square(torch.autograd.Function):
    """r . r over the last axis. torch's own gradients of it go over r three times, and leave two fields behind."""

    @staticmethod
    def forward(ctx: Any, r: Tensor) -> Tensor:
        ctx.save_for_backward(r)
        ctx.save_for_forward(r)
        return torch.linalg.vecdot(r, r)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        return (2.0 * grads[0]).unsqueeze(-1) * r

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (r,) = ctx.saved_tensors
        return 2.0 * torch.linalg.vecdot(r, tangents[0])


class _TransformableSquare(_Square):
    """`_Square` in the form that torch.func wants, which costs 50 us more in each call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(r: Tensor) -> Tensor:  # type: ignore[override]
        return torch.linalg.vecdot(r, r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


def square_norm(r: Tensor, comm: MPI.Comm) -> Tensor:
    """The sum of squares of each field, over all ranks; differentiable to any order.

    Args:
        r: Field tensor, `(*batch, n_owned)`.
        comm: Communicator of the mesh.

    Returns:
        `(*batch,)`, replicated.

    MPI: Collective forward, not collective backward.
    """
    function = _TransformableSquare if transforms_are_active() else _Square
    return all_sum(function.apply(r), comm)
