"""Distances between sets of samples: maximum mean discrepancy and sliced Wasserstein, as functions and as objectives.

Samples may be field tensors: squared distances and projections are summed over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fem_vi.arguments import instance, positive, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.divergence import GivenSamples
from fem_vi.vi.objective import Terms
from fem_vi.vi.posterior.member import distribution_of
from fem_vi.vi.posterior.mixture import MixtureDistribution
from fem_vi.vi.posterior.whitened import RelativeToPrior
from fem_vi.vi.problem import InverseProblem

Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GaussianKernel:
    """k(x, y) = exp(-|x - y|^2 / (2 length^2)).

    Attributes:
        length: In units of the samples.
    """

    length: float = 1.0

    def __post_init__(self) -> None:
        positive("GaussianKernel: length", self.length)

    def __call__(self, squares: Tensor) -> Tensor:
        """The kernel of squared distances."""
        return torch.exp(-squares / (2.0 * self.length**2))


@dataclass(frozen=True)
class EnergyKernel:
    """k(x, y) = -|x - y|: the energy distance, which has no length to choose.

    References:
        Szekely, Rizzo (2013), Energy statistics: a class of statistics based on distances.
    """

    def __call__(self, squares: Tensor) -> Tensor:
        """The kernel of squared distances."""
        positive_squares = squares > 0
        return -torch.where(positive_squares, squares, 1.0).sqrt() * positive_squares


def mmd_squared(x: Tensor, y: Tensor, kernel: GaussianKernel | EnergyKernel, *, all_sum: Sum = lambda t: t) -> Tensor:
    """Squared maximum mean discrepancy between two sets of samples, without bias (a U-statistic, which can be negative).

        E k(x, x') + E k(y, y') - 2 E k(x, y)

    Args:
        x: `(N, n)`, or owned parts, `(N, n_owned)`.
        y: `(M, n)` likewise.
        kernel: `GaussianKernel(length)` or `EnergyKernel()`.
        all_sum: Sum over ranks, `prior.all_sum` for field tensors.

    Returns:
        Scalar, replicated, differentiable.

    Raises:
        InvalidInput: Where a set has fewer than two samples.

    MPI: Collective where `all_sum` is.

    References:
        Gretton, Borgwardt, Rasch, Schoelkopf, Smola (2012), A kernel two-sample test.
    """
    if min(len(x), len(y)) < 2:
        raise InvalidInput(f"mmd_squared: {len(x)} and {len(y)} samples; it takes two at least of each.")
    rows = torch.cat([x, y])
    centred = rows - rows.mean(0).detach()  # the same distances, with fewer digits lost to a common offset
    gram = all_sum(centred @ centred.T)
    length = gram.diagonal()
    k = kernel((length[:, None] + length[None, :] - 2.0 * gram).clamp_min(0.0))
    n, m = len(x), len(y)
    within_x = (k[:n, :n].sum() - k[:n, :n].diagonal().sum()) / (n * (n - 1))
    within_y = (k[n:, n:].sum() - k[n:, n:].diagonal().sum()) / (m * (m - 1))
    return within_x + within_y - 2.0 * k[:n, n:].mean()


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor, *, all_sum: Sum = lambda t: t) -> Tensor:
    """Squared sliced Wasserstein distance of order 2: the mean over directions of that between sorted projections.

    Args:
        x: `(N, n)`, or owned parts, `(N, n_owned)`.
        y: `(M, n)` likewise; where M differs from N, quantiles are interpolated.
        directions: `(P, n)` or owned parts; made unit vectors here.
        all_sum: Sum over ranks, `prior.all_sum` for field tensors.

    Returns:
        Scalar, replicated, differentiable.

    MPI: Collective where `all_sum` is.

    References:
        Bonneel, Rabin, Peyre, Pfister (2015), Sliced and Radon Wasserstein barycenters of measures.
    """
    norms = all_sum(directions.square().sum(1)).sqrt()
    projected = all_sum(torch.cat([x, y]) @ directions.T) / norms
    ours, theirs = projected[: len(x)].sort(0).values, projected[len(x) :].sort(0).values
    if len(ours) != len(theirs):
        levels = (torch.arange(len(ours), dtype=ours.dtype) + 0.5) / len(ours)
        theirs = _quantiles(theirs, levels)
    return (ours - theirs).square().mean()


def _quantiles(rows: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of sorted columns, linear between the middles of the steps of their distribution function."""
    at = (levels * len(rows) - 0.5).clamp(0.0, len(rows) - 1.0)
    low = at.floor().long().clamp(max=max(len(rows) - 2, 0))
    part = (at - low)[:, None]
    return rows[low] * (1.0 - part) + rows[(low + 1).clamp(max=len(rows) - 1)] * part


@dataclass(frozen=True)
class MMD:
    """Maximum mean discrepancy between the family and given samples of the posterior, in whitened coordinates.

    Needs neither densities nor the forward map; the history's ELBO and misfit are not numbers.

    Attributes:
        target: Samples of the posterior, `GivenSamples(m)`.
        samples: Draws for each evaluation.
        kernel: `GaussianKernel(length)`, in prior standard deviations, or `EnergyKernel()`.
    """

    target: GivenSamples
    samples: int = 64
    kernel: GaussianKernel | EnergyKernel = EnergyKernel()

    def __post_init__(self) -> None:
        instance("MMD: target", self.target, GivenSamples)
        whole("MMD: samples", self.samples, least=2)
        instance("MMD: kernel", self.kernel, GaussianKernel, EnergyKernel)

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Terms:
        """Estimate the distance; see `ELBO.__call__`. Collective."""
        prior = problem.prior
        self.target.check(prior)
        xi = _whitened_draws("MMD", problem, posterior, self.samples)
        return _terms(mmd_squared(xi, prior.whiten(self.target.pick()), self.kernel, all_sum=prior.all_sum))


@dataclass(frozen=True)
class SlicedWasserstein:
    """Squared sliced Wasserstein distance between the family and given samples of the posterior, in whitened coordinates.

    Needs neither densities nor the forward map; the history's ELBO and misfit are not numbers.

    Attributes:
        target: Samples of the posterior, `GivenSamples(m)`.
        samples: Draws for each evaluation.
        directions: Random directions for each evaluation.
    """

    target: GivenSamples
    samples: int = 128
    directions: int = 64

    def __post_init__(self) -> None:
        instance("SlicedWasserstein: target", self.target, GivenSamples)
        whole("SlicedWasserstein: samples", self.samples, least=2)
        whole("SlicedWasserstein: directions", self.directions, least=1)

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Terms:
        """Estimate the distance; see `ELBO.__call__`. Collective."""
        prior = problem.prior
        self.target.check(prior)
        xi = _whitened_draws("SlicedWasserstein", problem, posterior, self.samples)
        directions = prior.white_noise(torch.Size([self.directions]))
        return _terms(sliced_wasserstein(xi, prior.whiten(self.target.pick()), directions, all_sum=prior.all_sum))


def _whitened_draws(name: str, problem: InverseProblem, posterior: nn.Module, samples: int) -> Tensor:
    """Draws of xi, `(samples, n_owned)`, differentiable."""
    q = distribution_of(posterior)
    if isinstance(q, MixtureDistribution):
        raise InvalidInput(f"{name}: draws of a Mixture carry no gradient of its weights. Use ForwardKL(GivenSamples(m)).")
    shape = torch.Size([samples])
    if isinstance(q, RelativeToPrior) and q.prior is problem.prior:
        return q.rsample_whitened(shape)
    return problem.prior.whiten(q.rsample(shape))


def _terms(loss: Tensor) -> Terms:
    nothing, unknown = torch.zeros(0, dtype=torch.float64), torch.tensor(math.nan, dtype=torch.float64)
    return Terms(loss, unknown, unknown, nothing, nothing)
