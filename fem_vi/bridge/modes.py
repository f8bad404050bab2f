"""Fields as sums of modes, in the layout that batch kernels want."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(c: Tensor, modes: Tensor, rest: Tensor | None) -> Tensor:
    """rest + sum_k c_k mode_k, of each row of coefficients; differentiable.

    Where there is one batch axis, the result is the transpose of what lies in memory: the samples of each entry follow each
    other, and `CompiledKernel` reads them to its lanes as they are. That changes no number, and costs nothing here.

    Args:
        c: `(*batch, num_modes)`.
        modes: `(num_modes, n)`.
        rest: `(n,)` or `(*batch, n)`; None for zero.

    Returns:
        `(*batch, n)`.
    """
    if c.ndim != 2:
        return c @ modes if rest is None else c @ modes + rest
    if rest is None:
        return (modes.T @ c.T).T
    return torch.addmm(rest.unsqueeze(-1) if rest.ndim == 1 else rest.T, modes.T, c.T).T
