"""A fit under way on one rank, and its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fem_vi.errors import RunFolderError
from fem_vi.output import Checkpoint
from fem_vi.vi.objective import Objective
from fem_vi.vi.problem import Cost, InverseProblem
from fem_vi.vi.run import Row
from fem_vi.vi.state import gather_optimizer, gather_parameters, scatter_optimizer, scatter_parameters


@dataclass
class Session:
    """A fit under way on this rank.

    Attributes:
        problem: Prior, forward map, likelihood, data.
        posterior: What is fitted.
        objective: What it is fitted to.
        optimizer: Made with the posterior's parameters.
        schedule: Factor on the learning rate after a fraction of the steps.
        steps: Steps of the whole run.
        step: Steps done.
        history: One row a step.
        spent: What earlier sessions of this run cost, less what the problem had cost when this one began.
        began: When the run would have begun, had it not been interrupted.
    """

    problem: InverseProblem
    posterior: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Callable[[float], float]
    steps: int
    step: int = 0
    history: list[Row] = field(default_factory=list)
    spent: Cost = field(default_factory=Cost)
    began: float = field(default_factory=time.monotonic)

    def cost(self) -> Cost:
        """Samples solved by this run."""
        now = self.problem.cost
        return Cost(now.forward + self.spent.forward, now.backward + self.spent.backward)

    def continue_from(self, cost: Cost, seconds: float) -> None:
        """Count from what earlier sessions spent."""
        now = self.problem.cost
        self.spent = Cost(cost.forward - now.forward, cost.backward - now.backward)
        self.began = time.monotonic() - seconds


def take_checkpoint(session: Session, checkpoint: Checkpoint) -> None:
    """Set parameters, optimiser, generator and counts.

    Raises:
        RunFolderError: Where the checkpoint is of another posterior, or has no state of the generator.

    MPI: Collective.
    """
    prior = session.problem.prior

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in checkpoint.tensors.items() if name.startswith(prefix)}

    generator = checkpoint.tensors.get("generator")
    if generator is None or generator.shape != torch.get_rng_state().shape:
        raise RunFolderError("the state of the random generator is missing.")
    scatter_parameters(session.posterior, prior, part("posterior."))
    scatter_optimizer(session.optimizer, session.posterior, prior, part("optimizer."))
    torch.set_rng_state(generator)
    numbers = checkpoint.numbers
    session.step = checkpoint.step
    session.continue_from(Cost(int(numbers["forward"]), int(numbers["backward"])), numbers["seconds"])


def make_checkpoint(session: Session) -> Checkpoint:
    """The state of a fit after `session.step` steps. Collective."""
    prior = session.problem.prior
    parameters = gather_parameters(session.posterior, prior)
    moments = gather_optimizer(session.optimizer, session.posterior, prior)
    tensors = {f"posterior.{name}": value for name, value in parameters.items()}
    tensors |= {f"optimizer.{name}": value for name, value in moments.items()}
    tensors["generator"] = torch.get_rng_state()
    cost = session.cost()
    numbers = {"forward": cost.forward, "backward": cost.backward, "seconds": time.monotonic() - session.began}
    return Checkpoint(session.step, tensors, numbers)
