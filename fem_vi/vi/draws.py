"""Draws from a posterior for an objective: what noise they are made of, and what they weigh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from fem_vi.errors import InvalidInput
from fem_vi.parallel import shared_seed
from fem_vi.vi.posterior.member import distribution_of
from fem_vi.vi.posterior.mixture import MixtureDistribution
from fem_vi.vi.posterior.whitened import RelativeToPrior
from fem_vi.vi.prior import FieldPrior

MOST_SOBOL = 21201  # dimensions of torch's direction numbers


@dataclass(frozen=True)
class Independent:
    """Independent draws."""

    def __call__(self, prior: FieldPrior, samples: int) -> Tensor:
        """White noise, `(samples, n_owned)`. Collective."""
        return prior.white_noise(torch.Size([samples]))


@dataclass(frozen=True)
class Antithetic:
    """Pairs eps and -eps: what is odd in the noise cancels, the gradient of a mean under an affine map for one.

    An odd number of samples leaves one without its partner.
    """

    def __call__(self, prior: FieldPrior, samples: int) -> Tensor:
        """White noise, `(samples, n_owned)`. Collective."""
        half = prior.white_noise(torch.Size([(samples + 1) // 2]))
        return torch.cat([half, -half])[:samples]


@dataclass(frozen=True)
class QuasiMonteCarlo:
    """Points of a scrambled Sobol sequence through the normal quantile function, newly scrambled for each evaluation.

    Unbiased; the variance of a smooth integrand falls faster than 1 / samples. For powers of two, and few unknowns: at most
    21,201, which every rank draws in full.

    References:
        Buchholz, Wenzel, Mandt (2018), Quasi-Monte Carlo variational inference.
    """

    def __call__(self, prior: FieldPrior, samples: int) -> Tensor:
        """White noise, `(samples, n_owned)`. Collective."""
        if prior.num_global > MOST_SOBOL:
            raise InvalidInput(
                f"QuasiMonteCarlo: {prior.num_global} unknowns; a Sobol sequence has at most {MOST_SOBOL}. Use Antithetic()."
            )
        seed = shared_seed(prior.comm, int(torch.randint(2**31, ())))
        engine = torch.quasirandom.SobolEngine(prior.num_global, scramble=True, seed=seed)
        uniform = engine.draw(samples, dtype=torch.float64)
        return prior.scatter(torch.special.ndtri(uniform.clamp(2.0**-54, 1.0 - 2.0**-53)))


Noise = Independent | Antithetic | QuasiMonteCarlo


@runtime_checkable
class MadeOfNoise(Protocol):
    """A distribution relative to a prior whose draws are a function of white noise."""

    def push(self, eps: Tensor) -> Tensor:
        """What becomes of white noise, `(*batch, n_owned)`."""


@runtime_checkable
class WeighsWhatItDraws(Protocol):
    """One that has the density of its own draws, and that of given points only at a price."""

    @property
    def weighs_cheaply(self) -> bool:
        """Whether there is no such price."""

    def push_weighed(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """What becomes of white noise, and log q - log p there."""


@runtime_checkable
class FollowsItsPath(Protocol):
    """One that has the path derivative of its draws without the density of given points."""

    @property
    def has_path(self) -> bool:
        """Whether it has."""

    def push_on_path(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """What becomes of white noise, and log q - log p there with q held constant."""


@dataclass(frozen=True)
class Draws:
    """Samples of one evaluation of an objective.

    Attributes:
        m: `(samples, n_owned)`.
        log_ratio: log q(m) - log p(m), `(samples,)`, replicated.
        weights: Of the samples, `(samples,)`, summing to one; differentiable where the shares of strata are.
        path: Whether the density was held constant, so that gradients flow through the samples only.
    """

    m: Tensor
    log_ratio: Tensor
    weights: Tensor
    path: bool

    def mean(self, values: Tensor) -> Tensor:
        """Weighted mean over the samples, scalar."""
        return (self.weights * values).sum()


def frozen(posterior: nn.Module, *given: Tensor) -> Distribution:
    """The distribution of `posterior` with its parameters held constant.

    Args:
        posterior: Module whose `forward()` is a distribution.
        given: What `forward` takes: what an amortised family is conditioned on.

    MPI: Collective.
    """
    constants = {name: value.detach() for name, value in posterior.named_parameters()}
    return torch.func.functional_call(posterior, constants, given)  # type: ignore[attr-defined]


def take(
    posterior: nn.Module,
    prior: FieldPrior,
    samples: int,
    *,
    noise: Noise = Independent(),
    path: bool = False,
    q: Distribution | None = None,
) -> Draws:
    """Samples of a posterior and their log density relative to the prior, for an objective.

    Args:
        posterior: Module whose `forward()` is a distribution.
        prior: Prior of m.
        samples: How many; a mixture shares them out among its components.
        noise: What they are made of.
        path: Hold the density constant. A distribution that has it at a price alone does not.
        q: `posterior()`, where it is known already.

    Raises:
        InvalidInput: Where the distribution cannot be made of such noise, or a mixture has more components than samples.

    MPI: Collective.
    """
    q = distribution_of(posterior) if q is None else q
    equal = torch.full((samples,), 1.0 / samples, dtype=torch.float64)
    if isinstance(q, RelativeToPrior) and q.prior is prior:
        if path and isinstance(q, FollowsItsPath) and q.has_path:
            xi, log_ratio = q.push_on_path(noise(prior, samples))
            return Draws(prior.unwhiten(xi), log_ratio, equal, True)
        if isinstance(q, WeighsWhatItDraws) and not (path and q.weighs_cheaply):
            xi, log_ratio = q.push_weighed(noise(prior, samples))
            return Draws(prior.unwhiten(xi), log_ratio, equal, False)
        weigh = frozen(posterior) if path else q
        assert isinstance(weigh, RelativeToPrior)
        xi, weights = _whitened(q, prior, samples, noise, equal)
        return Draws(prior.unwhiten(xi), weigh.log_ratio(xi), weights, path)
    _check_independent(noise, q)
    weigh = frozen(posterior) if path else q
    m = q.rsample(torch.Size([samples]))
    return Draws(m, weigh.log_prob(m) - prior.log_prob(m), equal, path)


def _whitened(q: RelativeToPrior, prior: FieldPrior, samples: int, noise: Noise, equal: Tensor) -> tuple[Tensor, Tensor]:
    """Draws of xi, and their weights."""
    if isinstance(q, MixtureDistribution):
        share, more = divmod(samples, len(q.components))
        if share == 0:
            count = len(q.components)
            raise InvalidInput(f"samples is {samples}; a mixture of {count} takes at least one for each component.")
        return q.rsample_stratified([noise(prior, share + (k < more)) for k in range(len(q.components))])
    if isinstance(q, MadeOfNoise):
        return q.push(noise(prior, samples)), equal
    _check_independent(noise, q)
    return q.rsample_whitened(torch.Size([samples])), equal


def _check_independent(noise: Noise, q: object) -> None:
    if not isinstance(noise, Independent):
        raise InvalidInput(f"{noise}: {type(q).__name__} does not say how its draws are made of noise (push). Use Independent().")


def draw(q: Distribution, prior: FieldPrior, samples: int, *, weigh: Distribution | None = None) -> tuple[Tensor, Tensor]:
    """Samples from q, each as likely as the next, and their log density relative to the prior.

    Args:
        q: Distribution to draw from.
        prior: Prior of m.
        samples: How many.
        weigh: Distribution to evaluate instead of q.

    Returns:
        m, `(samples, n_owned)`, and log q(m) - log p(m), `(samples,)`, replicated.

    MPI: Collective.
    """
    shape = torch.Size([samples])
    if weigh is None and isinstance(q, WeighsWhatItDraws) and isinstance(q, RelativeToPrior) and q.prior is prior:
        xi, log_ratio = q.push_weighed(prior.white_noise(shape))
        return prior.unwhiten(xi), log_ratio
    weigh = q if weigh is None else weigh
    if isinstance(q, RelativeToPrior) and isinstance(weigh, RelativeToPrior) and q.prior is prior:
        xi = q.rsample_whitened(shape)
        return prior.unwhiten(xi), weigh.log_ratio(xi)
    m = q.rsample(shape)
    return m, weigh.log_prob(m) - prior.log_prob(m)
