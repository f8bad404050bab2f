"""Sums of squares: the value on any ranks, derivatives by every way that torch has, in both layouts."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from fem_vi.bridge.square import square_norm

COMM, F64 = MPI.COMM_WORLD, torch.float64


def field(transposed: bool) -> Tensor:
    r = torch.linspace(-1.0, 2.0, 12, dtype=F64).sin()
    return r.reshape(4, 3).T if transposed else r.reshape(3, 4)


def alone(r: Tensor) -> Tensor:
    return square_norm(r, MPI.COMM_SELF)


@pytest.mark.mpi
def test_ranks_add_up_and_keep_their_gradients() -> None:
    r = ((COMM.rank + 1.0) * field(False)).requires_grad_()
    value = square_norm(r, COMM)
    factor = sum((rank + 1.0) ** 2 for rank in range(COMM.size))
    torch.testing.assert_close(value, factor * field(False).square().sum(-1))
    (gradient,) = torch.autograd.grad((value * torch.tensor([1.0, 2.0, 3.0], dtype=F64)).sum(), r)
    torch.testing.assert_close(gradient, 2.0 * r.detach() * torch.tensor([[1.0], [2.0], [3.0]], dtype=F64))


@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives(transposed: bool) -> None:
    r = field(transposed).requires_grad_()
    assert torch.autograd.gradcheck(alone, (r,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(alone, (r,))
    (gradient,) = torch.autograd.grad(alone(r).sum(), r)
    assert gradient.stride() == r.stride(), "a gradient lies as its field does"


def test_transforms_of_torch_func() -> None:
    r, dr = field(False), field(False).cos()
    exact = 2.0 * (r * dr).sum(-1)
    value, tangent = torch.func.jvp(alone, (r,), (dr,))
    torch.testing.assert_close((value, tangent), (r.square().sum(-1), exact))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(alone))(r), 2.0 * r)
    torch.testing.assert_close(torch.func.hessian(alone)(r[0]), 2.0 * torch.eye(4, dtype=F64))
