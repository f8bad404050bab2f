"""Normal distributions as affine maps of white noise, u = mu + L eps: of torch's own families, and of this package's.

Whoever has the map can choose the noise, and knows the density of what it draws without going back from u to eps: where L is
square, log q(mu + L eps) = -|eps|^2 / 2 - log |det L| up to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from fem_vi.vi.posterior.low_rank_precision import LowRankPrecision


@dataclass(frozen=True)
class AffineNoise:
    """A batch of normal distributions as the law of mu + L eps.

    Attributes:
        size: Entries of eps; more than those of u where L is not square.
        push: eps, `(*sample, *batch, size)` or what broadcasts with it, to u, `(*sample, *batch, n)`.
        held: Makes the same distribution without gradients.
        logdet: log |det L|, `(*batch,)`; None where L is not square.
        draw: Noise for one u each, `(*batch, size)`, by torch's generator, laid out in memory as push wants it.
    """

    size: int
    push: Callable[[Tensor], Tensor]
    held: Callable[[], Distribution]
    logdet: Callable[[], Tensor] | None
    draw: Callable[[], Tensor]

    def log_prob(self, q: Distribution, eps: Tensor, u: Tensor) -> Tensor:
        """log q(u) of u = push(eps), `(*sample, *batch)`; its gradient is the total derivative, through u and through q."""
        if self.logdet is None:
            return q.log_prob(u)  # type: ignore[no-untyped-call, no-any-return]
        constant = 0.5 * self.size * math.log(2.0 * math.pi)
        return -0.5 * torch.linalg.vecdot(eps, eps) - self.logdet() - constant


@singledispatch
def affine_noise(q: Distribution) -> AffineNoise | None:
    """The map of a normal distribution over vectors; None for any other."""
    return None


@affine_noise.register(Independent)
def _(q: Any) -> AffineNoise | None:  # Independent takes a type argument in new torch, and none in old
    base = q.base_dist
    if not isinstance(base, Normal) or q.reinterpreted_batch_ndims != 1:
        return None
    mu, sigma = base.loc, base.scale

    def held() -> Distribution:
        return Independent(Normal(mu.detach(), sigma.detach(), validate_args=False), 1, validate_args=False)

    return AffineNoise(
        size=mu.shape[-1],
        push=lambda eps: torch.addcmul(mu, sigma, eps),
        held=held,
        logdet=lambda: sigma.log().sum(-1),
        draw=lambda: _white_as(mu),
    )


@affine_noise.register
def _(q: MultivariateNormal) -> AffineNoise:
    mu, L = q.loc, q.scale_tril
    return AffineNoise(
        size=mu.shape[-1],
        push=lambda eps: mu + _times(L, eps),
        held=lambda: MultivariateNormal(mu.detach(), scale_tril=L.detach(), validate_args=False),
        logdet=lambda: L.diagonal(dim1=-2, dim2=-1).log().sum(-1),
        draw=lambda: _white(q, mu.shape[-1]),
    )


@affine_noise.register
def _(q: LowRankMultivariateNormal) -> AffineNoise:
    mu, W, D = q.loc, q.cov_factor, q.cov_diag
    n = mu.shape[-1]
    return AffineNoise(
        size=n + W.shape[-1],
        push=lambda eps: mu + D.sqrt() * eps[..., :n] + _times(W, eps[..., n:]),
        held=lambda: LowRankMultivariateNormal(mu.detach(), W.detach(), D.detach(), validate_args=False),
        logdet=None,
        draw=lambda: _white(q, n + W.shape[-1]),
    )


@affine_noise.register
def _(q: LowRankPrecision) -> AffineNoise:
    return AffineNoise(
        size=q.mu.shape[-1],
        push=q.push,
        held=lambda: LowRankPrecision(q.mu.detach(), q.log_precision.detach(), q.U.detach()),
        logdet=q.logdet,
        draw=lambda: _white(q, q.mu.shape[-1]),
    )


def _times(matrix: Tensor, eps: Tensor) -> Tensor:
    return (matrix @ eps[..., None])[..., 0]


def _white_as(mu: Tensor) -> Tensor:
    """Noise in the shape of mu, and as it lies in memory."""
    if mu.ndim == 2 and mu.T.is_contiguous():
        return torch.randn(mu.T.shape, dtype=torch.float64).T
    return torch.randn(mu.shape, dtype=torch.float64)


def _white(q: Distribution, size: int) -> Tensor:
    return torch.randn((*q.batch_shape, size), dtype=torch.float64)
