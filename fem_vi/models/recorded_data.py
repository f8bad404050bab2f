"""The second stage of a PDDLVM as `fit` sees it: recorded data, and the bound on their density."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.models.virtual_data import draw_coordinates
from fem_vi.vi.draws import frozen
from fem_vi.vi.objective import PathDerivative, Terms, TotalDerivative
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.problem import Cost


@dataclass
class RecordedData:
    """What `fit` needs to know of recorded data.

    Attributes:
        prior: p(z).
        cost: Samples solved so far.
        y: `(num_sets, num_data)`, replicated.
        about: What tells the stage from others, for config.json.
    """

    prior: FieldPrior
    cost: Cost
    y: Tensor
    about: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """What tells this problem from others."""
        sketch = [float(f"{float(value):.12g}") for value in (self.y.norm(), self.y.sum(), self.y.abs().max())]
        return {**self.about, "data_sets": list(self.y.shape), "data_moments": sketch}


@dataclass(frozen=True)
class RecordedELBO:
    """The bound on log p(y) of a `DataStage`, on average over recorded data sets.

    Attributes:
        samples: Draws of (z, u) for each data set.
        batch: Data sets in each evaluation, drawn anew without replacement; None for all.
        gradient: `PathDerivative()` or `TotalDerivative()`.
    """

    samples: int = 4
    batch: int | None = None
    gradient: PathDerivative | TotalDerivative = PathDerivative()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        whole("RecordedELBO: samples", self.samples, least=1)
        if self.batch is not None:
            whole("RecordedELBO: batch", self.batch, least=1)
        instance("RecordedELBO: gradient", self.gradient, PathDerivative, TotalDerivative)

    def __call__(self, problem: RecordedData, stage: Any) -> Terms:
        """Estimate the bound.

        Args:
            problem: `stage.problem`.
            stage: A `DataStage`.

        Returns:
            The bound, its parts, and the loss, which is minus the bound.

        Raises:
            InvalidInput: Where the stage is none, or the problem that of another, or there are fewer data sets.

        MPI: Collective.
        """
        if not isinstance(problem, RecordedData) or getattr(stage, "problem", None) is not problem:
            raise InvalidInput("RecordedELBO is fitted to a stage's own data: fit(stage.problem, stage, RecordedELBO()).")
        y = self._drawn(problem.y)
        path, model, prior = isinstance(self.gradient, PathDerivative), stage.model, problem.prior
        q = stage.encoder(y)
        xi = q.rsample(torch.Size([self.samples]))
        log_q_z = (frozen(stage.encoder, y) if path else q).log_prob(xi)
        log_p_z = torch.distributions.Normal(0.0, 1.0).log_prob(xi).sum(-1)
        inputs = model.inputs(prior.unwhiten(prior.scatter(xi)))
        c, log_q_u = _draw_state(stage, xi, path=path)
        u = model.state.lift(c, *inputs)
        log_likelihood = stage.likelihood.log_prob(y, stage.predict(u))
        log_ratio = log_q_z - log_p_z - stage.log_ratio_of_states(c, log_q_u, u, inputs)
        bound = (log_likelihood - log_ratio).mean()
        log_likelihood, log_ratio = log_likelihood.detach().flatten(), log_ratio.detach().flatten()
        return Terms(-bound, bound.detach(), log_ratio.mean(), log_likelihood, log_ratio)

    def _drawn(self, y: Tensor) -> Tensor:
        if self.batch is None:
            return y
        if self.batch > len(y):
            raise InvalidInput(f"RecordedELBO: batch is {self.batch}; there are {len(y)} data sets.")
        return y[torch.randperm(len(y))[: self.batch]]


def _draw_state(stage: Any, xi: Tensor, *, path: bool) -> tuple[Tensor, Tensor]:
    """Coordinates of u and log q(u | z); by a network that is held constant where it is the model of u."""
    if stage.learns_states:
        return draw_coordinates(stage.model, xi, path=path)
    q = frozen(stage.model.forward_network, xi)
    c = q.rsample()
    return c, q.log_prob(c).detach()
