"""Refuses ways of torch to run an operator that it cannot follow.

A trace that records torch operations would take the result of a solve for a constant; torch's first vmap, which
`is_grads_batched` still takes, knows nothing of what is not made of torch operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fem_vi.errors import UnsupportedDerivative

_is_of_first_vmap: Callable[[Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", lambda x: False
)
transforms_are_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_TRACER = "torch.fx.experimental.proxy_tensor"


def check_not_traced(name: str) -> None:
    """Refuse `torch.func.linearize`, `make_fx` and whatever else records operations now. Not collective.

    Raises:
        UnsupportedDerivative: Naming what cannot be traced.
    """
    tracer = sys.modules.get(_TRACER)
    if tracer is not None and tracer.get_proxy_mode() is not None:
        raise UnsupportedDerivative(
            f"{name} cannot be traced (torch.func.linearize, make_fx): the trace would hold its result as a constant. "
            "Use torch.func.jvp or vjp."
        )


def check_one_by_one(name: str, g: Tensor) -> None:
    """Refuse cotangents of `torch.autograd.grad(is_grads_batched=True)`. Not collective.

    Raises:
        UnsupportedDerivative: Naming what takes several at once.
    """
    if _is_of_first_vmap(g):
        raise UnsupportedDerivative(
            f"{name} cannot take batched cotangents from torch.autograd (is_grads_batched=True, jacobian(vectorize=True)). Use "
            "torch.func.jacrev, or torch.func.vmap over the function that torch.func.vjp returns."
        )
