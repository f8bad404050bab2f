"""A normal posterior whose whitened coordinates are independent."""

from __future__ import annotations

import torch
from torch import nn

from fem_vi.vi.posterior.scale import DiagonalScale
from fem_vi.vi.posterior.whitened import WhitenedNormal
from fem_vi.vi.posterior.whitened_family import WhitenedFamily
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.start import Linearisation


class MeanFieldNormal(WhitenedFamily):
    """q(m): m = unwhiten(xi), xi ~ N(mu, diag(exp(log_scale))^2), independent in the whitened coordinates of the prior.

    Starts as the prior. For an affine map and Gaussian noise the optimal variances are one over the diagonal of the
    whitened posterior precision, and the mean is exact.

    Args:
        prior: Prior of m.

    Attributes:
        mu: Whitened mean, `(n_owned,)`.
        log_scale: Logarithm of the whitened standard deviations, `(n_owned,)`.
        fields: Names of the parameters that are field tensors.

    MPI: Collective.

    References:
        Blei, Kucukelbir, McAuliffe (2017), Variational inference: a review for statisticians.

    Example:
        >>> q = MeanFieldNormal(prior)()
        >>> m = q.rsample((8,))
    """

    fields = ("mu", "log_scale")

    def __init__(self, prior: FieldPrior) -> None:
        super().__init__(prior)
        self.log_scale = nn.Parameter(torch.zeros(prior.event_shape, dtype=torch.float64))

    def forward(self) -> WhitenedNormal:
        """The distribution at the present parameters."""
        return WhitenedNormal(self.prior, self.mu, DiagonalScale(self.prior, self.log_scale))

    @torch.no_grad()
    def start_at(self, linearisation: Linearisation) -> None:
        """Take the mean of a linearised posterior and the inverse of the diagonal of its precision."""
        self.mu.copy_(linearisation.mu)
        self.log_scale.copy_(-0.5 * linearisation.jacobian.square().sum(0).log1p())
