"""What a variational posterior is fitted to: the evidence lower bound, and its gradient estimators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.posterior.whitened import RelativeToPrior, closed_form_kl
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.problem import InverseProblem


@dataclass(frozen=True)
class Terms:
    """An objective evaluated on one batch of samples; everything is replicated.

    Attributes:
        loss: What to minimise, scalar, differentiable.
        elbo: Estimate of the evidence lower bound, scalar.
        kl: KL(q || prior), scalar; in closed form where there is one, else estimated.
        log_likelihood: log p(y | m) of each sample, `(samples,)`.
        log_ratio: log q(m) - log p(m) of each sample, `(samples,)`.
    """

    loss: Tensor
    elbo: Tensor
    kl: Tensor
    log_likelihood: Tensor
    log_ratio: Tensor

    @property
    def misfit(self) -> Tensor:
        """Minus the expected log-likelihood, scalar."""
        return -self.log_likelihood.mean()


class Objective(Protocol):
    """Something to fit a posterior to."""

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Terms:
        """Draw samples and evaluate; one batched forward solve. Collective."""


@dataclass(frozen=True)
class PathDerivative:
    """ELBO = E[log p(y, m) - log q(m)], differentiated through the samples only.

    The score of q, whose expectation is zero, is left out. Where q is the posterior, every sample gives the log evidence and
    a gradient of zero: neither has any variance.

    References:
        Roeder, Wu, Duvenaud (2017), Sticking the landing: simple, lower-variance gradient estimators for variational inference.
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
        gradient: `PathDerivative()` or `AnalyticKL()`.

    References:
        Kingma, Welling (2014), Auto-encoding variational Bayes.

    Example:
        >>> terms = ELBO(samples=8)(problem, posterior)
        >>> terms.loss.backward()
    """

    samples: int = 8
    gradient: PathDerivative | AnalyticKL = PathDerivative()

    def __post_init__(self) -> None:
        whole("ELBO: samples", self.samples, least=1)
        instance("ELBO: gradient", self.gradient, PathDerivative, AnalyticKL)

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
        q = posterior()
        m, log_ratio = draw(q, problem.prior, self.samples, weigh=frozen(posterior))
        kl = closed_form_kl(q, problem.prior)
        log_likelihood = problem.log_likelihood(m)
        if isinstance(self.gradient, PathDerivative):
            elbo = (log_likelihood - log_ratio).mean()
        elif kl is None:
            raise InvalidInput(
                f"AnalyticKL: no closed form is known for {type(q).__name__}. Use ELBO(gradient=PathDerivative())."
            )
        else:
            elbo = log_likelihood.mean() - kl
        kl = log_ratio.mean() if kl is None else kl
        return Terms(-elbo, elbo.detach(), kl.detach(), log_likelihood.detach(), log_ratio.detach())


def frozen(posterior: nn.Module) -> Distribution:
    """The distribution of `posterior` with its parameters held constant.

    MPI: Collective.
    """
    constants = {name: value.detach() for name, value in posterior.named_parameters()}
    return torch.func.functional_call(posterior, constants, ())  # type: ignore[attr-defined]


def draw(q: Distribution, prior: FieldPrior, samples: int, *, weigh: Distribution | None = None) -> tuple[Tensor, Tensor]:
    """Samples from q and their log density relative to the prior.

    Args:
        q: Distribution to draw from.
        prior: Prior of m.
        samples: How many.
        weigh: Distribution to evaluate instead of q (q with constant parameters, for the path derivative).

    Returns:
        m, `(samples, n_owned)`, and log q(m) - log p(m), `(samples,)`, replicated.

    MPI: Collective.
    """
    weigh = q if weigh is None else weigh
    shape = torch.Size([samples])
    if isinstance(q, RelativeToPrior) and isinstance(weigh, RelativeToPrior) and q.prior is prior:
        xi = q.rsample_whitened(shape)
        return prior.unwhiten(xi), weigh.log_ratio(xi)
    m = q.rsample(shape)
    return m, weigh.log_prob(m) - prior.log_prob(m)
