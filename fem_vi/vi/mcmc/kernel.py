"""What every kernel has: one step of all chains, and what it tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fem_vi.vi.mcmc.target import State, Target

DIVERGED = 1000.0


@dataclass(frozen=True)
class Info:
    """What happened in one step.

    Attributes:
        acceptance: Probability with which each chain's proposal was accepted, `(chains,)`, replicated over the mesh.
        accepted: Whether it was.
        diverged: Whether the proposal's density was zero or lower by a factor of exp(1000), `(chains,)`.
        steering: The acceptance probability that the step size governs, `(chains,)`: that one, or a cheap problem's.
    """

    acceptance: Tensor
    accepted: Tensor
    diverged: Tensor
    steering: Tensor


class Kernel(Protocol):
    """A Markov kernel over a crowd of chains that leaves exp(temperature * h(x)) N(x; 0, I) as it is.

    Attributes:
        step_size: Angle of a step, or None to find one in the warm-up.
        acceptance: Mean acceptance probability at which the warm-up aims.
    """

    @property
    def step_size(self) -> float | None:
        """Angle of a step in radians, or None to find one in the warm-up."""

    @property
    def acceptance(self) -> float:
        """Mean acceptance probability at which the warm-up aims."""

    @property
    def uses_gradient(self) -> bool:
        """Whether states must carry the gradient of h."""

    def step(self, target: Target, state: State, size: float, *, temperature: float = 1.0) -> tuple[State, Info]:
        """Move every chain once. Collective."""


def accept_or_stay(target: Target, state: State, proposal: State, log_ratio: Tensor) -> tuple[State, Info]:
    """Metropolis and Hastings' choice; every rank of the mesh makes the same one.

    Args:
        target: The density.
        state: Where the chains are.
        proposal: Where they may go.
        log_ratio: Logarithm of the ratio of densities and proposals, `(chains,)`, replicated; NaN counts as minus infinity.
    """
    log_ratio = torch.nan_to_num(log_ratio, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    probability = log_ratio.clamp_max(0.0).exp()
    accepted = target.crowd.uniform() < probability
    return proposal.where(accepted, state), Info(probability, accepted, log_ratio < -DIVERGED, probability)
