"""What an amortised posterior is fitted to: the average over data sets of a divergence, either way round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.data_sets import Fresh, Recorded, Source, Stored
from fem_vi.vi.objective import Objective, PathDerivative, Terms, TotalDerivative
from fem_vi.vi.posterior.amortised import Amortised, AmortisedDistribution
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.sensors import Sensors


@dataclass(frozen=True)
class ExpectedELBO:
    """The evidence lower bound on average over data sets, the solver in the loop.

        loss = -E_{p(y)} E_{q(m | y)} [log p(y, m) - log q(m | y)]

    All samples of all data sets are solved as one batch, forward and backward.

    Attributes:
        data: `Fresh(batch)`, `Stored(simulations, batch)` or `Recorded(y, batch)`.
        samples: Draws for each data set.
        gradient: `PathDerivative()`, without variance where every q is the posterior, or `TotalDerivative()`.

    References:
        Kingma, Welling (2014), Auto-encoding variational Bayes.

    Example:
        >>> fem_vi.fit(model.problem, model, ExpectedELBO(Fresh(16), samples=4), steps=1000)
    """

    data: Fresh | Stored | Recorded = Fresh()  # noqa: RUF009 - frozen
    samples: int = 4
    gradient: PathDerivative | TotalDerivative = PathDerivative()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        instance("ExpectedELBO: data", self.data, Fresh, Stored, Recorded)
        instance("ExpectedELBO: gradient", self.gradient, PathDerivative, TotalDerivative)
        whole("ExpectedELBO: samples", self.samples, least=1)

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Terms:
        """Estimate the average bound; see `ELBO.__call__`. Collective."""
        family, sensors = prepared("ExpectedELBO", problem, posterior, self.data)
        y = sensors.observe(self.data.draw(problem).y)
        q = family(y)
        xi = q.rsample_whitened(torch.Size([self.samples]))
        weigh = _held_constant(family, y) if isinstance(self.gradient, PathDerivative) else q
        log_ratio = weigh.log_ratio(xi)
        log_likelihood = sensors.log_likelihood(problem, y, problem.predict(problem.prior.unwhiten(xi)))
        loss = -(log_likelihood - log_ratio).mean()
        kl, elbo = log_ratio.detach().mean(), -loss.detach()
        return Terms(loss, elbo, kl, log_likelihood.detach().flatten(), log_ratio.detach().flatten())


@dataclass(frozen=True)
class ExpectedForwardKL:
    """The average over data sets of KL(p(m | y) || q(m | y)), from simulated pairs; no adjoint is needed.

        loss = -E_{p(m, y)} log q(m | y),   up to a constant

    The history's `kl` is E[log q(m | y) - log p(m)], a lower bound of what the data tell about m on average, in nats; its ELBO
    and misfit are not numbers.

    Attributes:
        data: `Stored(simulations, batch)` or `Fresh(batch)`.

    References:
        Papamakarios, Murray (2016), Fast epsilon-free inference of simulation models with Bayesian conditional density
        estimation.
        Barber, Agakov (2003), The IM algorithm: a variational approach to information maximization.

    Example:
        >>> simulations = fem_vi.simulate(model.problem, 10_000, path="runs/simulations")
        >>> fem_vi.fit(model.problem, model, ExpectedForwardKL(Stored(simulations)), steps=2000)
    """

    data: Fresh | Stored

    def __post_init__(self) -> None:
        instance("ExpectedForwardKL: data", self.data, Fresh, Stored)

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Terms:
        """Estimate the average divergence; see `ELBO.__call__`. Collective."""
        family, sensors = prepared("ExpectedForwardKL", problem, posterior, self.data)
        drawn = self.data.draw(problem)
        assert drawn.xi is not None
        log_ratio = family(sensors.observe(drawn.y)).log_ratio(drawn.xi)
        nothing, unknown = torch.zeros(0, dtype=torch.float64), torch.tensor(math.nan, dtype=torch.float64)
        return Terms(-log_ratio.mean(), unknown, log_ratio.detach().mean(), nothing, nothing)


@dataclass(frozen=True)
class InTurn:
    """One of several objectives in each step, at random: on average the gradient of their mean.

    At random, and not one after another, so that a fit that is resumed goes on as if it had not been interrupted. For one stage
    after another call `fit` twice.

    Attributes:
        objectives: `ExpectedForwardKL(...)` and `ExpectedELBO(...)`, for example.
        shares: How often each comes; equally often where None.
    """

    objectives: tuple[Objective, ...]
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        shares = self.weights
        if not self.objectives or len(shares) != len(self.objectives) or not all(share > 0 for share in shares):
            raise InvalidInput(
                f"InTurn: {len(self.objectives)} objectives with shares {self.shares}; give one positive share for each."
            )

    @property
    def weights(self) -> tuple[float, ...]:
        """How often each comes, up to a factor."""
        return (1.0,) * len(self.objectives) if self.shares is None else self.shares

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Terms:
        """Evaluate one of them, by torch's generator, which the ranks share in `fit`. Collective."""
        chosen = int(torch.multinomial(torch.tensor(self.weights, dtype=torch.float64), 1))
        return self.objectives[chosen](problem, posterior)


def prepared(name: str, problem: InverseProblem, posterior: nn.Module, data: Source) -> tuple[Amortised, Sensors]:
    """An amortised family with its scales set, and its sensors.

    Raises:
        InvalidInput: For another family.

    MPI: Collective.
    """
    if not isinstance(posterior, Amortised):
        raise InvalidInput(
            f"{name}: {type(posterior).__name__} is the posterior of one data set; this objective fits an Amortised one."
        )
    sensors = posterior.sensors
    if not bool(posterior.encoder.is_scaled):
        with torch.no_grad():
            posterior.encoder.scale_by(sensors.observe(data.typical(problem)))
    return posterior, sensors


def _held_constant(family: Amortised, y: Any) -> AmortisedDistribution:
    """The posterior of y with the parameters held constant."""
    constants: dict[str, Tensor] = {name: value.detach() for name, value in family.named_parameters()}
    return torch.func.functional_call(family, constants, (y,))  # type: ignore[attr-defined]
