"""The Metropolis-adjusted Langevin algorithm, in the form that has a limit on function spaces."""

from __future__ import annotations

from dataclasses import dataclass

from fem_vi.vi.mcmc.kernel import Info
from fem_vi.vi.mcmc.rotation import trajectory
from fem_vi.vi.mcmc.settings import check_kernel
from fem_vi.vi.mcmc.target import State, Target


@dataclass(frozen=True)
class MALA:
    """x' = cos(t) x + sin(t) (w + (t / 2) grad h(x)),  w ~ N(0, I),  accepted by Metropolis and Hastings' rule.

    A Langevin step in which the normal part is taken exactly (a Crank-Nicolson step, up to the choice of t), preconditioned by
    the reference. One forward and one backward solve a step.

    Attributes:
        step_size: t in radians, up to pi / 2; None lets the warm-up find it.
        acceptance: Mean acceptance probability at which the warm-up aims.

    References:
        Cotter, Roberts, Stuart, White (2013), MCMC methods for functions: modifying old algorithms to make them faster.
        Beskos, Girolami, Lan, Farrell, Stuart (2017), Geometric MCMC for infinite-dimensional inverse problems.

    Example:
        >>> samples = fem_vi.sample(problem, fem_vi.MALA(), chains=4, draws=2000, warmup=500)
    """

    step_size: float | None = None
    acceptance: float = 0.57

    def __post_init__(self) -> None:
        check_kernel("MALA", self.step_size, self.acceptance)

    @property
    def uses_gradient(self) -> bool:
        """True."""
        return True

    def step(self, target: Target, state: State, size: float, *, temperature: float = 1.0) -> tuple[State, Info]:
        """Move every chain once: one forward and one backward solve of each. Collective."""
        return trajectory(target, state, size, rotations=1, temperature=temperature)
