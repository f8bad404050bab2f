"""Distributions in coordinates that move with the data: xi = loc + L z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    constraints,
)

from fem_vi.vi.posterior.flow_head import ConditionalFlow
from fem_vi.vi.posterior.low_rank_precision import LowRankPrecision

NORMAL = (Independent, LowRankMultivariateNormal, MultivariateNormal, LowRankPrecision)


@dataclass(frozen=True)
class Frame:
    """An affine map for each data set, xi = loc + L z.

    Attributes:
        loc: `(*batch, n)`.
        tril: L, lower triangular with a positive diagonal, `(*batch, n, n)`, or `(n, n)` where it is the same for all.
    """

    loc: Tensor
    tril: Tensor

    def of(self, q: Distribution) -> Distribution:
        """The law of xi where z has the law q: a `MultivariateNormal` of a normal one, else a `Framed`."""
        if isinstance(q, NORMAL):
            loc = self.loc + (self.tril @ q.mean[..., None])[..., 0]
            return MultivariateNormal(loc, scale_tril=self.tril @ scale_tril(q), validate_args=False)
        return Framed(self, q)


class Framed(Distribution):
    """The law of loc + L z for z of any law. Its mean is exact where that of z is; it has no closed variance.

    Args:
        frame: The map.
        q: The law of z.

    MPI: Not collective.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch reads the attribute of the class
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, frame: Frame, q: Distribution) -> None:
        self.frame, self.q = frame, q
        super().__init__(q.batch_shape, q.event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean, `(*batch, n)`."""
        return self._apply(self.q.mean)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # type: ignore[override] # noqa: B008
        """Draws, `(*sample_shape, *batch, n)`."""
        return self._apply(self.q.rsample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, `(*sample_shape, *batch)`."""
        shifted = (value - self.frame.loc)[..., None]
        tril = self.frame.tril.expand(*shifted.shape[:-2], -1, -1)
        z = torch.linalg.solve_triangular(tril, shifted, upper=False)[..., 0]
        return self.q.log_prob(z) - self.frame.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _apply(self, z: Tensor) -> Tensor:
        return self.frame.loc + (self.frame.tril @ z[..., None])[..., 0]


def scale_tril(q: Distribution) -> Tensor:
    """A lower triangular square root of a normal distribution's covariance, `(*batch, n, n)`."""
    root: Tensor | None = getattr(q, "scale_tril", None)
    return torch.diag_embed(q.stddev) if root is None else root


def of_other_noise(q: Distribution, shift: Tensor, log_scale: Tensor) -> Distribution:
    """What the map behind a head's distribution makes of eps ~ N(shift, diag(exp(log_scale))^2) in place of N(0, I)."""
    if isinstance(q, ConditionalFlow):
        return q.with_base(shift, log_scale)
    if isinstance(q, Independent):
        return Independent(Normal(q.mean + q.stddev * shift, q.stddev * log_scale.exp(), validate_args=False), 1)
    root = scale_tril(q)
    return MultivariateNormal(q.mean + (root @ shift[..., None])[..., 0], scale_tril=root * log_scale.exp(), validate_args=False)
