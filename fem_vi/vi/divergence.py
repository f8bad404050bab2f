"""Divergences between a posterior family and the posterior, estimated from weighted draws.

With u = log p(y, m) - log q(m) for m ~ q, and r = p(m | y) / q(m) = e^u / p(y), an f-divergence is E_q[f(r)]. Its gradient
through the samples alone, the density held constant, follows from E_q[g(m) dlog q] = E_q[dm/dphi . dg/dm]:

    d/dphi E_q[f(r)] = -E_q[h(r) dm/dphi . du/dm],    h(r) = r^2 f''(r),

with h = 1 for KL(q || p) (f = -log r) and h = r for KL(p || q) (f = r log r). Where q is the posterior, du/dm = 0 and every
sample gives a gradient of zero. The evidence in r is estimated from the same draws: self-normalised importance sampling,
consistent and biased by O(1 / samples).

For the bound log E_q[e^(s u)] / s, s = 1 - alpha, the same step applied to its Monte Carlo estimate, with normalised weights w_i
of e^(s u_i), gives weights alpha w_i + (1 - alpha) w_i^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fem_vi.arguments import instance, is_number, whole
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all
from fem_vi.vi.draws import Draws, Independent, Noise, take
from fem_vi.vi.minibatch import MinibatchProblem
from fem_vi.vi.objective import PathDerivative, Terms, TotalDerivative, check_noise
from fem_vi.vi.posterior.member import distribution_of
from fem_vi.vi.posterior.mixture import MixtureDistribution
from fem_vi.vi.posterior.whitened import RelativeToPrior
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.problem import InverseProblem

Gradient = PathDerivative | TotalDerivative


def check_paired(name: str, gradient: object, noise: object) -> None:
    """Refuse draws that depend on each other for a gradient by double reparameterisation.

    It takes the score of one draw's weight for a derivative with respect to that draw, all others held where they are. A draw's
    partner moves with it.

    Raises:
        InvalidInput: Saying what to take instead.
    """
    if isinstance(gradient, PathDerivative) and not isinstance(noise, Independent):
        raise InvalidInput(
            f"{name}: noise is {noise}, and PathDerivative() of this bound takes independent draws: its gradient would be wrong. "
            "Give gradient=TotalDerivative(), or noise=Independent()."
        )


def check_whole(name: str, problem: InverseProblem) -> None:
    """Refuse estimated likelihoods where their exponentials are averaged: those of unbiased estimates are not unbiased.

    Raises:
        InvalidInput: For a `MinibatchProblem`.
    """
    if isinstance(problem, MinibatchProblem):
        raise InvalidInput(
            f"{name} averages powers of p(y | m), which a MinibatchProblem knows by a noisy logarithm only: it would be fitted "
            "to another posterior, a wider one. Take ELBO(), or problem.whole()."
        )


def check_sampling(name: str, samples: object, gradient: object, noise: object) -> None:
    """Refuse what no objective can be estimated with.

    Raises:
        InvalidInput: Naming it.
    """
    whole(f"{name}: samples", samples, least=1)
    instance(f"{name}: gradient", gradient, PathDerivative, TotalDerivative)
    check_noise(name, noise)


@dataclass(frozen=True)
class GivenSamples:
    """Samples of the posterior, by a sampler or a simulator.

    Attributes:
        m: `(num_samples, n_owned)`.
        batch: How many to take, at random, for each evaluation; all where None.
    """

    m: Tensor
    batch: int | None = None

    def __post_init__(self) -> None:
        instance("GivenSamples: m", self.m, Tensor)
        if self.m.ndim != 2 or len(self.m) == 0:
            raise InvalidInput(f"GivenSamples: m has shape {tuple(self.m.shape)}; it must be (num_samples, n_owned).")
        if self.batch is not None:
            whole("GivenSamples: batch", self.batch, least=1)

    def __repr__(self) -> str:
        return f"GivenSamples({len(self.m)} samples, batch={self.batch})"

    def check(self, prior: FieldPrior) -> None:
        """Refuse samples of other unknowns than a prior's.

        Raises:
            InvalidInput: On every rank.

        MPI: Collective.
        """
        with raise_on_all(prior.comm):
            if self.m.shape[1:] != prior.event_shape:
                raise InvalidInput(
                    f"GivenSamples: m has shape {tuple(self.m.shape)}; the prior has {prior.event_shape[0]} unknowns."
                )

    def pick(self) -> Tensor:
        """Samples for one evaluation, `(batch, n_owned)`, by torch's generator, which the ranks share in `fit`."""
        if self.batch is None or self.batch >= len(self.m):
            return self.m
        return self.m[torch.randperm(len(self.m))[: self.batch]]


@dataclass(frozen=True)
class SelfNormalised:
    """Draws from the family itself, weighted towards the posterior: it must overlap with it.

    Attributes:
        samples: Draws for each evaluation.
        gradient: `PathDerivative()` or `TotalDerivative()`.
        noise: What the draws are made of.
    """

    samples: int = 64
    gradient: Gradient = PathDerivative()  # noqa: RUF009 - frozen
    noise: Noise = Independent()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        check_sampling("SelfNormalised", self.samples, self.gradient, self.noise)


@dataclass(frozen=True)
class ForwardKL:
    """KL(p(m | y) || q), which covers what the posterior covers.

        loss = -E_p[log q(m)]       of given samples, up to a constant,
        loss = E_q[r log r]         of self-normalised draws.

    From given samples no forward map is evaluated, so that the history's ELBO and misfit are not numbers.

    Attributes:
        source: `GivenSamples(m)` or `SelfNormalised(samples=64)`.

    References:
        Naesseth, Lindsten, Blei (2020), Markovian score climbing: variational inference with KL(p||q).
    """

    source: GivenSamples | SelfNormalised = SelfNormalised()

    def __post_init__(self) -> None:
        instance("ForwardKL: source", self.source, GivenSamples, SelfNormalised)

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Terms:
        """Estimate the divergence; see `ELBO.__call__`. Collective."""
        if isinstance(self.source, GivenSamples):
            self.source.check(problem.prior)
            return _fit_to_samples(problem, posterior, self.source.pick())
        source = self.source
        return _f_divergence(problem, posterior, source, lambda r, log_r: r * log_r, torch.clone, lambda r, log_r: -r)


@dataclass(frozen=True)
class JensenShannon:
    """The skew Jensen-Shannon divergence, from KL(p || q) at alpha -> 0 to KL(q || p) at alpha -> 1, up to a factor.

        alpha KL(q || M) + (1 - alpha) KL(p || M),    M = (1 - alpha) q + alpha p

    Bounded where q and p hardly overlap. Estimated from draws of q, with self-normalised weights.

    Attributes:
        alpha: Strictly between 0 and 1.
        samples: Draws for each evaluation.
        gradient: `PathDerivative()` or `TotalDerivative()`.
        noise: What the draws are made of.

    References:
        Goh, Sheriffdeen, Wittmer, Bui-Thanh (2022), Solving Bayesian inverse problems via variational autoencoders.
    """

    alpha: float = 0.5
    samples: int = 64
    gradient: Gradient = PathDerivative()  # noqa: RUF009 - frozen
    noise: Noise = Independent()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if not (is_number(self.alpha) and 0 < self.alpha < 1):
            raise InvalidInput(f"JensenShannon: alpha is {self.alpha!r}; it must lie strictly between 0 and 1.")
        check_sampling("JensenShannon", self.samples, self.gradient, self.noise)

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Terms:
        """Estimate the divergence; see `ELBO.__call__`. Collective."""
        a, b = self.alpha, 1.0 - self.alpha

        def f(r: Tensor, log_r: Tensor) -> Tensor:
            log_mean = (b + a * r).log()
            return -a * log_mean + b * r * (log_r - log_mean)

        def h(r: Tensor) -> Tensor:
            return (a**3 * r.square() + b**3 * r) / (b + a * r).square()

        def tilt(r: Tensor, log_r: Tensor) -> Tensor:  # f - r f'
            mean = b + a * r
            return -a * mean.log() + a**2 * r / mean - b * r * (1.0 - a * r / mean)

        return _f_divergence(problem, posterior, self, f, h, tilt)


@dataclass(frozen=True)
class Renyi:
    """The variational Renyi bound, log E_q[(p(y, m) / q(m))^(1 - alpha)] / (1 - alpha).

    A lower bound of the evidence for alpha > 0, tighter for smaller alpha, an upper one for alpha < 0; alpha -> 1 is the ELBO.
    Its Monte Carlo estimate is biased towards the ELBO.

    Attributes:
        alpha: Any number but 1.
        samples: Draws for each evaluation.
        gradient: `PathDerivative()`, by double reparameterisation, or `TotalDerivative()`.
        noise: What the draws are made of; with `PathDerivative()` they must be `Independent()`.

    References:
        Li, Turner (2016), Renyi divergence variational inference.
        Tucker, Lawson, Gu, Maddison (2019), Doubly reparameterized gradient estimators for Monte Carlo objectives.
    """

    alpha: float = 0.5
    samples: int = 32
    gradient: Gradient = PathDerivative()  # noqa: RUF009 - frozen
    noise: Noise = Independent()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if not is_number(self.alpha) or self.alpha == 1:
            raise InvalidInput(f"Renyi: alpha is {self.alpha!r}; it must be a number other than 1, for which take ELBO().")
        check_sampling("Renyi", self.samples, self.gradient, self.noise)
        check_paired("Renyi", self.gradient, self.noise)

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Terms:
        """Estimate the bound; see `ELBO.__call__`. Collective."""
        return _bound(problem, _draws(problem, posterior, self, self.samples), self.alpha)


@dataclass(frozen=True)
class ImportanceWeighted:
    """The importance-weighted bound, E log mean_k p(y, m_k) / q(m_k) over k draws: tighter than the ELBO for k > 1.

    Attributes:
        k: Draws in each estimate of the evidence.
        batches: Estimates for each evaluation; all k * batches draws are solved as one batch.
        gradient: `PathDerivative()`, by double reparameterisation, or `TotalDerivative()`.
        noise: What the draws are made of; with `PathDerivative()` they must be `Independent()`.

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders.
        Tucker, Lawson, Gu, Maddison (2019), Doubly reparameterized gradient estimators for Monte Carlo objectives.
    """

    k: int = 8
    batches: int = 4
    gradient: Gradient = PathDerivative()  # noqa: RUF009 - frozen
    noise: Noise = Independent()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        whole("ImportanceWeighted: batches", self.batches, least=1)
        whole("ImportanceWeighted: k", self.k, least=1)
        check_sampling("ImportanceWeighted", self.k, self.gradient, self.noise)
        check_paired("ImportanceWeighted", self.gradient, self.noise)

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Terms:
        """Estimate the bound; see `ELBO.__call__`. Collective."""
        if isinstance(distribution_of(posterior), MixtureDistribution):  # strata within each estimate
            each = [_draws(problem, posterior, self, self.k) for _ in range(self.batches)]
            draws = Draws(
                torch.cat([group.m for group in each]),
                torch.cat([group.log_ratio for group in each]),
                torch.cat([group.weights for group in each]) / self.batches,
                False,
            )
        else:
            draws = _draws(problem, posterior, self, self.k * self.batches)
        return _bound(problem, draws, 0.0, groups=self.batches)


Sampled = SelfNormalised | JensenShannon | Renyi | ImportanceWeighted


def _draws(problem: InverseProblem, posterior: nn.Module, choice: Sampled, samples: int, *, strata: bool = False) -> Draws:
    """The draws that an objective asks for; with the density of a mixture, where its strata know no path derivative."""
    check_whole(type(choice).__name__, problem)
    q = distribution_of(posterior)
    path = isinstance(choice.gradient, PathDerivative) and (strata or not isinstance(q, MixtureDistribution))
    return take(posterior, problem.prior, samples, noise=choice.noise, path=path, q=q)


def _f_divergence(
    problem: InverseProblem,
    posterior: nn.Module,
    choice: SelfNormalised | JensenShannon,
    f: Callable[[Tensor, Tensor], Tensor],
    h: Callable[[Tensor], Tensor],
    tilt: Callable[[Tensor, Tensor], Tensor],
) -> Terms:
    """E_q[f(r)] with the gradient that the choice asks for.

    Args:
        problem: Prior, forward map, likelihood, data.
        posterior: Whose divergence it is.
        choice: Samples, gradient, noise.
        f: Of r and log r.
        h: r^2 f''(r).
        tilt: f - r f', the derivative with respect to the weight of a stratum, of r and log r.
    """
    draws = _draws(problem, posterior, choice, choice.samples, strata=True)
    log_likelihood = problem.log_likelihood(draws.m)
    u = log_likelihood - draws.log_ratio
    log_evidence = torch.logsumexp(draws.weights.log() + u, dim=0).detach()
    log_r = u - log_evidence
    if not draws.path:
        return Terms.create(draws.mean(f(log_r.exp(), log_r)), draws, log_likelihood)
    with torch.no_grad():
        r = log_r.exp()
        value = draws.mean(f(r, log_r))
    slope = draws.weights @ tilt(r, log_r.detach()) - draws.weights.detach() @ (h(r) * log_r)
    return Terms.create(value + slope - slope.detach(), draws, log_likelihood)


def _bound(problem: InverseProblem, draws: Draws, alpha: float, *, groups: int = 1) -> Terms:
    """Minus the mean over groups of log E_q[e^((1 - alpha) u)] / (1 - alpha)."""
    log_likelihood = problem.log_likelihood(draws.m)
    s = 1.0 - alpha
    u = (log_likelihood - draws.log_ratio).reshape(groups, -1)
    powers = (groups * draws.weights).log().reshape(groups, -1) + s * u
    bound = (torch.logsumexp(powers, dim=1) / s).mean()
    if not draws.path:
        return Terms.create(-bound, draws, log_likelihood)
    w = torch.softmax(powers.detach(), dim=1)
    slope = ((alpha * w + s * w.square()) * u).sum(1).mean()
    return Terms.create(slope.detach() - slope - bound.detach(), draws, log_likelihood)


def _fit_to_samples(problem: InverseProblem, posterior: nn.Module, m: Tensor) -> Terms:
    """Minus the mean log density of given samples; no forward map."""
    prior, q = problem.prior, distribution_of(posterior)
    if isinstance(q, RelativeToPrior) and q.prior is prior:
        log_ratio = q.log_ratio(prior.whiten(m))
    else:
        log_ratio = q.log_prob(m) - prior.log_prob(m)
    nothing, unknown = torch.zeros(0, dtype=torch.float64), torch.tensor(math.nan, dtype=torch.float64)
    return Terms(-log_ratio.mean(), unknown, unknown, nothing, nothing)
