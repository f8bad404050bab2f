"""Normal distributions relative to a prior, and the interface the objective uses for any such family."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, kl_divergence, register_kl

from fem_vi.vi.posterior.scale import LowRankScale, Scale, TriangularScale
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.randomness import private_generator

EXACT_SIZE = 512
BATCH = 256
VARIANCE_SAMPLES = 256


@runtime_checkable
class RelativeToPrior(Protocol):
    """A distribution q of m = unwhiten(xi) that works in the whitened coordinates xi of its prior.

    Drawing and weighing need one `unwhiten` a sample; going through `log_prob(m)` would add two `whiten`, each a PDE solve.
    """

    @property
    def prior(self) -> FieldPrior:
        """The prior it is relative to."""

    def rsample_whitened(self, sample_shape: torch.Size) -> Tensor:
        """Draws of xi, `(*sample_shape, n_owned)`. Collective."""

    def log_ratio(self, xi: Tensor) -> Tensor:
        """Log q(m) - log p(m) at m = unwhiten(xi), `(*batch,)`, replicated. Collective."""


class WhitenedNormal(Distribution):
    """The law of m = mean_p + C0^(1/2) xi with xi ~ N(mu, S S'), relative to the prior N(mean_p, C0).

        KL(q || p) = (tr S S' + |mu|^2 - n) / 2 - log det S

    which stays finite under mesh refinement where S S' tends to the identity.

    Args:
        prior: The prior it is relative to.
        mu: Mean of xi, `(n_owned,)`.
        scale: Square root of the covariance of xi.

    MPI: Every method is collective. Samples are field tensors, densities and divergences replicated.
    """

    arg_constraints = {}  # noqa: RUF012 - torch reads the attribute of the class
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, prior: FieldPrior, mu: Tensor, scale: Scale) -> None:
        self.prior = prior
        self.mu = mu
        self.scale = scale
        super().__init__(event_shape=mu.shape, validate_args=False)

    def __repr__(self) -> str:
        return f"WhitenedNormal({type(self.scale).__name__}, n={self.num_global})"

    @property
    def num_global(self) -> int:
        """Number of unknowns on all ranks together."""
        return self.prior.num_global

    @property
    def mean(self) -> Tensor:
        """Mean of m, `(n_owned,)`."""
        return self.prior.unwhiten(self.mu)

    @property
    def variance(self) -> Tensor:
        """Pointwise variance of m, `(n_owned,)`: the diagonal of C0^(1/2) S S' C0^(1/2)'.

        Exact for at most 512 unknowns and for a dense scale (one whitening solve each), and for a low-rank family with D = I,
        where it is the prior's variance less `rank` squared fields. Otherwise estimated from 256 draws under a fixed key, with
        the same draws from the prior, whose variance is known, as control variate: the relative standard error is sqrt(2/256)
        = 9 % (4.4 % of the standard deviation) where q has nothing in common with the prior, and 0 where they agree.
        """
        if isinstance(self.scale, TriangularScale):
            parts = self.scale.columns().split(BATCH)
            return torch.stack([self._root(columns).square().sum(0) for columns in parts]).sum(0)
        if self.num_global <= EXACT_SIZE:
            basis = self.prior.scatter(torch.eye(self.num_global, dtype=self.mu.dtype))
            return self._root(self.scale.apply(basis)).square().sum(0)
        if isinstance(self.scale, LowRankScale) and self.scale.log_precision is None:
            removed = self._root(self.scale.removed()).square().sum(0)
            return (self.prior.variance - removed).clamp_min(0.0)  # prior.variance may be sampled
        return self._sampled_variance()

    def _root(self, xi: Tensor) -> Tensor:
        """C0^(1/2) xi."""
        return self.prior.unwhiten(xi) - self.prior.mean

    def _sampled_variance(self) -> Tensor:
        with private_generator(0):
            eps = self.prior.white_noise(torch.Size([VARIANCE_SAMPLES]))
        ours = self._root(self.scale.apply(eps)).square()
        theirs = self._root(eps).square()
        centred = theirs - theirs.mean(0)
        slope = ((ours * centred).sum(0) / centred.square().sum(0)).clamp(0.0, 1.0).detach()
        plain = ours.mean(0)
        return torch.maximum(plain - slope * (theirs.mean(0) - self.prior.variance), 0.5 * plain)

    def push(self, eps: Tensor) -> Tensor:
        """What becomes of white noise: xi = mu + S eps, `(*batch, n_owned)`."""
        return self.mu + self.scale.apply(eps)

    def rsample_whitened(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Draws of xi, `(*sample_shape, n_owned)`."""
        return self.push(self.prior.white_noise(sample_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # type: ignore[override] # noqa: B008
        """Draws of m, `(*sample_shape, n_owned)`."""
        return self.prior.unwhiten(self.rsample_whitened(sample_shape))

    def log_prob_whitened(self, xi: Tensor) -> Tensor:
        """Log N(xi; mu, S S'), `(*batch,)`, replicated."""
        constant = 0.5 * self.num_global * math.log(2.0 * math.pi)
        return -0.5 * self.scale.quadratic(xi - self.mu) - constant - self.scale.logdet()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q(m), `(*batch,)`, replicated."""
        return self.log_prob_whitened(self.prior.whiten(value)) - self.prior.whitening_logdet

    def log_ratio(self, xi: Tensor) -> Tensor:
        """Log q(m) - log p(m) at m = unwhiten(xi), `(*batch,)`, replicated."""
        prior_quadratic = self.prior.all_sum(xi.square().sum(-1))
        return 0.5 * (prior_quadratic - self.scale.quadratic(xi - self.mu)) - self.scale.logdet()

    def kl_to_prior(self) -> Tensor:
        """KL(q || p), scalar, replicated."""
        mean_term = self.prior.all_sum(self.mu.square().sum())
        return 0.5 * (self.scale.trace() + mean_term - self.num_global) - self.scale.logdet()

    def entropy(self) -> Tensor:
        """Differential entropy of m, scalar, replicated."""
        constant = 0.5 * self.num_global * (1.0 + math.log(2.0 * math.pi))
        return constant + self.scale.logdet() + self.prior.whitening_logdet


@register_kl(WhitenedNormal, Distribution)  # type: ignore[untyped-decorator]
def _kl_whitened_normal(q: WhitenedNormal, p: Distribution) -> Tensor:
    if id(p) != id(q.prior):
        raise NotImplementedError("the divergence of a WhitenedNormal is known in closed form only from its own prior.")
    return q.kl_to_prior()


def closed_form_kl(q: Distribution, prior: FieldPrior) -> Tensor | None:
    """KL(q || prior) where a closed form is registered, scalar, replicated; None otherwise.

    MPI: Collective.
    """
    try:
        return kl_divergence(q, prior)  # type: ignore[arg-type]
    except NotImplementedError:
        return None
