"""Where the data sets come from that an amortised posterior is fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.simulations import Simulations, simulate

SCALE_SETS = 256


@dataclass(frozen=True)
class Drawn:
    """Data sets for one evaluation of an objective.

    Attributes:
        y: What all sensors measured, `(batch, num_data)`, replicated.
        xi: The whitened unknowns behind them, `(batch, n_owned)`; None where they are not known.
    """

    y: Tensor
    xi: Tensor | None


class Source(Protocol):
    """Makes data sets."""

    def draw(self, problem: InverseProblem) -> Drawn:
        """Data sets for one evaluation. Collective."""

    def typical(self, problem: InverseProblem) -> Tensor:
        """Many data sets, `(count, num_data)`, from which scales are taken. Collective."""


@dataclass(frozen=True)
class Fresh:
    """New ones each time, from the prior: one forward solve for each.

    Attributes:
        batch: Data sets for each evaluation.
    """

    batch: int = 16

    def __post_init__(self) -> None:
        whole("Fresh: batch", self.batch, least=1)

    @torch.no_grad()
    def draw(self, problem: InverseProblem) -> Drawn:
        """Data sets for one evaluation. Collective."""
        xi = problem.prior.white_noise(torch.Size([self.batch]))
        return Drawn(problem.likelihood.sample(problem.predict(problem.prior.unwhiten(xi))), xi)

    @torch.no_grad()
    def typical(self, problem: InverseProblem) -> Tensor:
        """256 data sets. Collective."""
        return problem.likelihood.sample(simulate(problem, SCALE_SETS, shard=SCALE_SETS).prediction)


@dataclass(frozen=True)
class Stored:
    """Some of many that were simulated beforehand, with new noise each time.

    Attributes:
        simulations: What `simulate` returned.
        batch: Data sets for each evaluation.
    """

    simulations: Simulations
    batch: int = 128

    def __post_init__(self) -> None:
        instance("Stored: simulations", self.simulations, Simulations)
        whole("Stored: batch", self.batch, least=1)

    def draw(self, problem: InverseProblem) -> Drawn:
        """Data sets for one evaluation, by torch's generator, which the ranks share in `fit`. Collective."""
        self._check(problem)
        chosen = torch.randint(len(self.simulations), (self.batch,))
        y = problem.likelihood.sample(self.simulations.prediction[chosen])
        return Drawn(y, problem.prior.scatter(self.simulations.xi[chosen]))

    def typical(self, problem: InverseProblem) -> Tensor:
        """Up to 4,096 data sets."""
        self._check(problem)
        return problem.likelihood.sample(self.simulations.prediction[:4096])

    def _check(self, problem: InverseProblem) -> None:
        """Refuse simulations of another problem, as far as their sizes tell."""
        unknowns = self.simulations.xi.shape[-1]
        if unknowns != problem.prior.num_global:
            raise InvalidInput(f"Stored: the simulations have {unknowns} unknowns; the problem has {problem.prior.num_global}.")


@dataclass(frozen=True)
class Recorded:
    """Data sets that were measured: what is behind them is not known. For `ExpectedELBO` only.

    Attributes:
        y: `(count, num_data)`, replicated.
        batch: Data sets for each evaluation.
    """

    y: Tensor
    batch: int = 16

    def __post_init__(self) -> None:
        instance("Recorded: y", self.y, Tensor)
        whole("Recorded: batch", self.batch, least=1)
        if self.y.ndim != 2 or len(self.y) < 2 or not bool(torch.isfinite(self.y).all()):
            raise InvalidInput(f"Recorded: y has shape {tuple(self.y.shape)}; it must be (count >= 2, num_data) and finite.")

    def __repr__(self) -> str:
        return f"Recorded({len(self.y)} data sets, batch={self.batch})"

    def draw(self, problem: InverseProblem) -> Drawn:
        """Data sets for one evaluation, by torch's generator, which the ranks share in `fit`."""
        return Drawn(self.y[torch.randint(len(self.y), (self.batch,))], None)

    def typical(self, problem: InverseProblem) -> Tensor:
        """All of them."""
        return self.y
