"""A fit under way on one rank, and its checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fem_vi.errors import InvalidInput, RunFolderError, SolveFailed
from fem_vi.output import Checkpoint
from fem_vi.vi.objective import Objective, Terms
from fem_vi.vi.problem import Cost, Problem
from fem_vi.vi.run import Row
from fem_vi.vi.state import gather_optimizer, gather_parameters, gather_state, scatter_optimizer, scatter_parameters
from fem_vi.vi.stopping import Average, Best, Last


@dataclass
class Session:
    """A fit under way on this rank.

    Attributes:
        problem: What the posterior is fitted to.
        posterior: What is fitted.
        objective: What it is fitted to.
        optimizer: Made with the posterior's parameters.
        schedule: Factor on the learning rate after a fraction of the steps.
        steps: Steps of the whole run.
        step: Steps done.
        history: One row a step.
        spent: What earlier sessions of this run cost, less what the problem had cost when this one began.
        began: When the run would have begun, had it not been interrupted.
        keep: Which parameters the fit ends with.
        longest: Length to which gradients are shortened.
        noise: Seed of every evaluation, where all share one draw of noise; None for fresh ones.
        best: The best mean ELBO of a window, and the parameters at its end; with `Best` only.
        average: The mean of the parameters; with `Average` only.
    """

    problem: Problem
    posterior: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Callable[[float], float]
    steps: int
    step: int = 0
    history: list[Row] = field(default_factory=list)
    spent: Cost = field(default_factory=Cost)
    began: float = field(default_factory=time.monotonic)
    keep: Last | Best | Average = Last()  # noqa: RUF009 - frozen
    longest: float = math.inf
    noise: int | None = None
    best: tuple[float, dict[str, Tensor]] | None = None
    average: dict[str, Tensor] | None = None

    def evaluate(self) -> Terms:
        """The objective at the present parameters. Collective."""
        if self.noise is not None:
            torch.default_generator.manual_seed(self.noise)
        return self.objective(self.problem, self.posterior)

    @torch.no_grad()
    def loss(self) -> float:
        """The loss alone, for a line search; infinite where the forward map has no solution or is not a number. Collective."""
        try:
            value = float(self.evaluate().loss)
        except (SolveFailed, InvalidInput):
            return math.inf
        return value if math.isfinite(value) else math.inf

    def note(self) -> None:
        """Take note of the present parameters, for those that the fit will end with."""
        mean = self.keep.mean(self.history) if isinstance(self.keep, Best) else None
        if mean is not None and (self.best is None or mean > self.best[0]):
            self.best = mean, _copied(self.posterior)
        if isinstance(self.keep, Average):
            if self.average is None:
                self.average = _copied(self.posterior)
            share = self.keep.share(self.step)
            for name, value in self.posterior.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, share)

    def take_kept(self) -> None:
        """Set the parameters that the fit ends with."""
        kept = self.average if self.best is None else self.best[1]
        if kept is not None:
            self.posterior.load_state_dict(kept)

    def cost(self) -> Cost:
        """Samples solved by this run."""
        now = self.problem.cost
        return Cost(now.forward + self.spent.forward, now.backward + self.spent.backward)

    def continue_from(self, cost: Cost, seconds: float) -> None:
        """Count from what earlier sessions spent."""
        now = self.problem.cost
        self.spent = Cost(cost.forward - now.forward, cost.backward - now.backward)
        self.began = time.monotonic() - seconds


def _copied(posterior: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as they are now, field tensors owned."""
    return {name: value.detach().clone() for name, value in posterior.state_dict().items()}


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
    if "best" in checkpoint.tensors:
        session.best = float(checkpoint.tensors["best"]), _scattered(session, part("best."))
    if average := part("average."):
        session.average = _scattered(session, average)
    numbers = checkpoint.numbers
    session.step = checkpoint.step
    session.continue_from(Cost(int(numbers["forward"]), int(numbers["backward"])), numbers["seconds"])


def _scattered(session: Session, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this rank owns of a state that is not the present one. Collective."""
    present = _copied(session.posterior)
    scatter_parameters(session.posterior, session.problem.prior, tensors)
    state = _copied(session.posterior)
    session.posterior.load_state_dict(present)
    return state


def make_checkpoint(session: Session) -> Checkpoint:
    """The state of a fit after `session.step` steps. Collective."""
    prior = session.problem.prior
    parameters = gather_parameters(session.posterior, prior)
    moments = gather_optimizer(session.optimizer, session.posterior, prior)
    tensors = {f"posterior.{name}": value for name, value in parameters.items()}
    tensors |= {f"optimizer.{name}": value for name, value in moments.items()}
    tensors["generator"] = torch.get_rng_state()
    if session.best is not None:
        mean, state = session.best
        tensors["best"] = torch.tensor(mean, dtype=torch.float64)
        tensors |= {f"best.{name}": value for name, value in gather_state(session.posterior, prior, state).items()}
    if session.average is not None:
        state = gather_state(session.posterior, prior, session.average)
        tensors |= {f"average.{name}": value for name, value in state.items()}
    cost = session.cost()
    numbers = {"forward": cost.forward, "backward": cost.backward, "seconds": time.monotonic() - session.began}
    return Checkpoint(session.step, tensors, numbers)
