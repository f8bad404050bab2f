"""What a variational posterior is fitted to: the evidence lower bound, and its gradient estimators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.draws import Antithetic, Draws, Independent, Noise, QuasiMonteCarlo, draw, frozen, take
from fem_vi.vi.posterior.member import distribution_of
from fem_vi.vi.posterior.whitened import closed_form_kl
from fem_vi.vi.problem import InverseProblem

__all__ = ["ELBO", "AnalyticKL", "Objective", "PathDerivative", "Terms", "TotalDerivative", "draw", "frozen"]


@dataclass(frozen=True)
class Terms:
    """An objective evaluated on one batch of samples; everything is replicated.

    Attributes:
        loss: What to minimise, scalar, differentiable.
        elbo: Estimate of the evidence lower bound, scalar.
        kl: KL(q || prior), scalar; in closed form where there is one, else estimated.
        log_likelihood: log p(y | m) of each sample, `(samples,)`.
        log_ratio: log q(m) - log p(m) of each sample, `(samples,)`.
        weights: Of the samples in a mean over q, `(samples,)`, summing to one; None for equal ones.
    """

    loss: Tensor
    elbo: Tensor
    kl: Tensor
    log_likelihood: Tensor
    log_ratio: Tensor
    weights: Tensor | None = None

    @property
    def misfit(self) -> Tensor:
        """Minus the expected log-likelihood, scalar."""
        return -(self.log_likelihood.mean() if self.weights is None else self.weights @ self.log_likelihood)

    @staticmethod
    def create(loss: Tensor, draws: Draws, log_likelihood: Tensor, kl: Tensor | None = None) -> Terms:
        """The parts of an objective that was evaluated on some draws.

        Args:
            loss: What to minimise, differentiable.
            draws: The samples.
            log_likelihood: Of each.
            kl: KL(q || prior) in closed form, or None.
        """
        with torch.no_grad():
            divergence = draws.mean(draws.log_ratio) if kl is None else kl.detach()
            elbo = draws.mean(log_likelihood - draws.log_ratio)
            weights = draws.weights.detach()
        return Terms(loss, elbo, divergence, log_likelihood.detach(), draws.log_ratio.detach(), weights)


class Objective(Protocol):
    """Something to fit a posterior to."""

    def __call__(self, problem: Any, posterior: Any) -> Terms:
        """Draw samples and evaluate; for an `InverseProblem` one batched forward solve. Collective."""


@dataclass(frozen=True)
class PathDerivative:
    """ELBO = E[log p(y, m) - log q(m)], differentiated through the samples only.

    The score of q, whose expectation is zero, is left out. Where q is the posterior, every sample gives the log evidence and
    a gradient of zero: neither has any variance. Other objectives have their own weights for the derivative through the samples.
    A `Flow` whose networks map noise to samples has it along that map, where its layers are autoregressive; of others, such as
    `zuko.flows.NICE`, the `TotalDerivative` takes its place.

    References:
        Roeder, Wu, Duvenaud (2017), Sticking the landing: simple, lower-variance gradient estimators for variational inference.
        Vaitl, Nicoli, Nakajima, Kessel (2022), Gradients should stay on path: better estimators of the reverse- and forward KL
        divergence for normalizing flows.
    """


@dataclass(frozen=True)
class TotalDerivative:
    """The score of q is kept: the derivative through the samples and through the density.

    Noisier near the optimum, and the cheaper of the two for a `Flow`.
    """


@dataclass(frozen=True)
class AnalyticKL:
    """ELBO = E[log p(y | m)] - KL(q || p) with the divergence in closed form.

    Far from the optimum it can be the quieter of the two; at the optimum the expected log-likelihood stays noisy.
    """


@dataclass(frozen=True)
class ELBO:
    """The evidence lower bound, by the reparameterised estimator.

        log p(y) >= E_q[log p(y | m)] - KL(q || p)

    Attributes:
        samples: Draws of m for each evaluation, solved as one batch.
        gradient: `PathDerivative()`, `TotalDerivative()` or `AnalyticKL()`.
        noise: What the draws are made of: `Independent()`, `Antithetic()` or `QuasiMonteCarlo()`.

    References:
        Kingma, Welling (2014), Auto-encoding variational Bayes.

    Example:
        >>> terms = ELBO(samples=8)(problem, posterior)
        >>> terms.loss.backward()
    """

    samples: int = 8
    gradient: PathDerivative | TotalDerivative | AnalyticKL = PathDerivative()
    noise: Noise = Independent()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        whole("ELBO: samples", self.samples, least=1)
        instance("ELBO: gradient", self.gradient, PathDerivative, TotalDerivative, AnalyticKL)
        check_noise("ELBO", self.noise)

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Terms:
        """Estimate the bound.

        Args:
            problem: Prior, forward map, likelihood, data.
            posterior: Module whose `forward()` is a distribution with `rsample`.

        Returns:
            The bound, its parts, and the loss, which is minus the bound.

        Raises:
            InvalidInput: Where `AnalyticKL` is asked for and no closed form is known.

        MPI: Collective.
        """
        q = distribution_of(posterior)
        kl = closed_form_kl(q, problem.prior)
        if isinstance(self.gradient, AnalyticKL) and kl is None:
            name = type(q).__name__
            raise InvalidInput(f"AnalyticKL: no closed form is known for {name}. Use ELBO(gradient=PathDerivative()).")
        path = not isinstance(self.gradient, TotalDerivative)
        draws = take(posterior, problem.prior, self.samples, noise=self.noise, path=path, q=q)
        log_likelihood = problem.log_likelihood(draws.m)
        if isinstance(self.gradient, AnalyticKL) and kl is not None:
            elbo = draws.mean(log_likelihood) - kl
            terms = Terms.create(-elbo, draws, log_likelihood, kl)
            return replace(terms, elbo=elbo.detach())
        return Terms.create(-draws.mean(log_likelihood - draws.log_ratio), draws, log_likelihood, kl)


def check_noise(name: str, noise: object) -> None:
    """Refuse what is no kind of noise.

    Raises:
        InvalidInput: Naming it.
    """
    instance(f"{name}: noise", noise, Independent, Antithetic, QuasiMonteCarlo)
