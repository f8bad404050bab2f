"""Importance weights of draws from a posterior: smoothed by Pareto's law, and moments corrected by them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from arviz_stats.base import array_stats
from torch import Tensor, nn

from fem_vi.arguments import instance, whole
from fem_vi.parallel import raise_on_all, shared_seed
from fem_vi.vi.objective import draw
from fem_vi.vi.posterior.member import distribution_of
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.randomness import private_generator

FEWEST_SAMPLES = 100


@dataclass(frozen=True)
class WeightedDraws:
    """Draws of m from a posterior, weighed against the exact one, without m itself, which `moments` draws again.

    Attributes:
        log_weights: log p(y, m) - log q(m), `(samples,)`, replicated.
        log_ratio: log q(m) - log p(m), `(samples,)`, replicated.
        prediction: Predicted data, `(samples, num_predicted)`, replicated.
    """

    log_weights: Tensor
    log_ratio: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class Corrected:
    """Posterior moments by importance sampling from a fitted posterior.

    Attributes:
        mean: `(n_owned,)`.
        variance: `(n_owned,)`.
        mean_error: Monte Carlo standard error of `mean`, `(n_owned,)`.
        khat: Tail index of the weights; below `khat_limit` the moments converge.
        khat_limit: min(1 - 1 / log10(samples), 0.7).
        ess: Effective number of draws.
        log_evidence: log p(y), by the mean weight.
        log_evidence_error: Its standard error; too small where k-hat is large.
    """

    mean: Tensor
    variance: Tensor
    mean_error: Tensor
    khat: float
    khat_limit: float
    ess: float
    log_evidence: float
    log_evidence_error: float


def corrected_moments(
    problem: InverseProblem, posterior: nn.Module, *, samples: int = 2000, seed: int = 0, batch: int = 50
) -> Corrected:
    """Moments of the exact posterior from draws of a fitted one, by Pareto-smoothed importance weights.

        E[f(m) | y] ~ sum_i w_i f(m_i),   w_i ~ p(y, m_i) / q(m_i),   m_i ~ q

    Args:
        problem: Prior, forward map, likelihood, data.
        posterior: Module whose `forward()` is a distribution.
        samples: Draws, each a forward solve; at least 100.
        seed: Of the draws; rank 0's counts. The state of torch's generator is left as it was found.
        batch: Draws solved at a time.

    Returns:
        Mean and variance, with what they are worth: where `khat` is above `khat_limit`, nothing.

    Raises:
        InvalidInput: Where an argument is of the wrong type, or there are fewer than 100 samples.

    MPI: Collective.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.

    Example:
        >>> corrected = fem_vi.corrected_moments(problem, posterior)
        >>> corrected.mean, corrected.variance.sqrt(), corrected.khat
    """
    samples, seed, batch = checked_draws(problem, posterior, samples=samples, seed=seed, batch=batch)
    draws = weighted_draws(problem, posterior, samples=samples, seed=seed, batch=batch)
    khat, smoothed, log_evidence = pareto_smoothed(draws.log_weights)
    mean, variance, mean_error = moments(problem, posterior, smoothed, seed=seed, batch=batch)
    weights = (draws.log_weights - draws.log_weights.max()).exp()
    return Corrected(
        mean=mean,
        variance=variance,
        mean_error=mean_error,
        khat=khat,
        khat_limit=khat_limit(samples),
        ess=effective(smoothed),
        log_evidence=log_evidence,
        log_evidence_error=float(weights.std() / weights.mean()) / math.sqrt(samples),
    )


def checked_draws(problem: InverseProblem, posterior: nn.Module, *, samples: int, seed: int, batch: int) -> tuple[int, int, int]:
    """Arguments that are in range, and rank 0's seed.

    Raises:
        InvalidInput: Where one is not.

    MPI: Collective.
    """
    instance("problem", problem, InverseProblem)
    comm = problem.prior.comm
    with raise_on_all(comm):
        instance("posterior", posterior, nn.Module)
        samples, batch = whole("samples", samples, least=FEWEST_SAMPLES), whole("batch", batch, least=1)
        seed = whole("seed", seed)
    return samples, shared_seed(comm, seed), batch


@torch.no_grad()
def weighted_draws(problem: InverseProblem, posterior: nn.Module, *, samples: int, seed: int, batch: int) -> WeightedDraws:
    """Draw, solve, and weigh. Collective."""
    weights, ratios, predictions = [], [], []
    with private_generator(seed):
        q = distribution_of(posterior)
        for first in range(0, samples, batch):
            m, log_ratio = draw(q, problem.prior, min(batch, samples - first))
            prediction = problem.predict(m)
            weights.append(problem.likelihood.log_prob(problem.y, prediction) - log_ratio)
            ratios.append(log_ratio)
            predictions.append(prediction)
    return WeightedDraws(torch.cat(weights), torch.cat(ratios), torch.cat(predictions))


@torch.no_grad()
def moments(
    problem: InverseProblem, posterior: nn.Module, log_weights: Tensor, *, seed: int, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean, variance, and standard error of the mean, `(n_owned,)` each, of the draws that `weighted_draws` made.

    Drawn again under the same seed, which costs no solve, a batch at a time, so that memory does not grow with the draws.

    Args:
        problem: Prior, forward map, likelihood, data.
        posterior: What was drawn from.
        log_weights: Normalised, `(samples,)`.
        seed: As before.
        batch: As before.

    MPI: Collective.
    """
    weights = log_weights.exp()
    first = None
    plain, squared = (torch.zeros(3, *problem.prior.event_shape, dtype=torch.float64) for _ in range(2))
    with private_generator(seed):
        q = distribution_of(posterior)
        for start in range(0, len(weights), batch):
            m, _ = draw(q, problem.prior, min(batch, len(weights) - start))
            first = m.mean(0) if first is None else first  # near the mean, so that squares lose no digits
            w, delta = weights[start : start + batch], m - first
            powers = torch.stack([torch.ones_like(delta), delta, delta.square()])
            plain += torch.einsum("b,pbn->pn", w, powers)
            squared += torch.einsum("b,pbn->pn", w.square(), powers)
    shift = plain[1]
    variance = (plain[2] - shift.square()).clamp_min(0.0)
    error = (squared[2] - 2.0 * shift * squared[1] + shift.square() * squared[0]).clamp_min(0.0).sqrt()
    return torch.as_tensor(first) + shift, variance, error


def khat_limit(samples: int) -> float:
    """k-hat up to which this many draws are enough."""
    return min(1.0 - 1.0 / math.log10(samples), 0.7)


def effective(log_weights: Tensor) -> float:
    """Effective number of draws of normalised weights."""
    return float(1.0 / log_weights.exp().square().sum())


def pareto_smoothed(log_weights: Tensor) -> tuple[float, Tensor, float]:
    """Tail index and smoothed importance weights.

    Args:
        log_weights: log p(y, m) - log q(m), `(samples,)`.

    Returns:
        k-hat (0 where all weights are equal, infinity where one is not finite); the smoothed log weights, normalised,
        `(samples,)`; and the log of the mean smoothed weight, the estimate of log p(y).
    """
    samples = len(log_weights)
    equal = torch.full_like(log_weights, -math.log(samples))
    if not bool(torch.isfinite(log_weights).all()):
        return math.inf, equal, math.nan
    if float(log_weights.max() - log_weights.min()) < 1e-6:
        return 0.0, equal, float(log_weights.mean())
    # psislw takes log-likelihoods, whose negatives are the log weights of leave-one-out.
    values, khat = array_stats.psislw(-log_weights.numpy())
    smoothed = torch.from_numpy(np.asarray(values, dtype=np.float64))
    # Smoothing changes the largest weights alone: the smallest gives the factor lost in the normalisation.
    smallest = int(log_weights.argmin())
    log_evidence = float(log_weights[smallest] - smoothed[smallest]) - math.log(samples)
    return float(khat), smoothed, log_evidence
