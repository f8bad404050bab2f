"""Preconditioned Crank-Nicolson: a random walk that no mesh refinement slows down."""

from __future__ import annotations

from dataclasses import dataclass

from fem_vi.vi.mcmc.kernel import Info
from fem_vi.vi.mcmc.rotation import rotate_once
from fem_vi.vi.mcmc.settings import check_kernel
from fem_vi.vi.mcmc.target import State, Target


@dataclass(frozen=True)
class PCN:
    """x' = cos(t) x + sin(t) w,  w ~ N(0, I),  accepted with probability min(1, exp(h(x') - h(x))).

    Needs no gradient: one forward solve a step. The textbook's beta is sin(t).

    Attributes:
        step_size: t in radians, up to pi / 2; None lets the warm-up find it.
        acceptance: Mean acceptance probability at which the warm-up aims.

    References:
        Cotter, Roberts, Stuart, White (2013), MCMC methods for functions: modifying old algorithms to make them faster.

    Example:
        >>> samples = fem_vi.sample(problem, fem_vi.PCN(), chains=4, draws=5000, warmup=1000)
    """

    step_size: float | None = None
    acceptance: float = 0.25

    def __post_init__(self) -> None:
        check_kernel("PCN", self.step_size, self.acceptance)

    @property
    def uses_gradient(self) -> bool:
        """False."""
        return False

    def step(self, target: Target, state: State, size: float, *, temperature: float = 1.0) -> tuple[State, Info]:
        """Move every chain once: one forward solve of each. Collective."""
        return rotate_once(target, state, size, temperature=temperature)
