"""Hamiltonian Monte Carlo with exact rotations."""

from __future__ import annotations

from dataclasses import dataclass

from fem_vi.arguments import positive, whole
from fem_vi.vi.mcmc.kernel import Info
from fem_vi.vi.mcmc.rotation import QUARTER, trajectory
from fem_vi.vi.mcmc.settings import check_kernel
from fem_vi.vi.mcmc.target import State, Target

JITTER = 0.4


@dataclass(frozen=True)
class HMC:
    """Hamiltonian Monte Carlo: kicks by grad h between exact rotations of position and velocity (`rotation.py`).

    A trajectory of a quarter turn leaves nothing of where it began in a density that is the reference. Its length is drawn anew
    for each step, uniformly within 40 % and the same for all chains, so that no direction comes back to where it was.

    Attributes:
        step_size: Angle between kicks in radians, up to pi / 2; None lets the warm-up find it.
        length: Mean angle of a trajectory, in radians.
        acceptance: Mean acceptance probability at which the warm-up aims.
        most_rotations: A trajectory stops after so many, each a forward and a backward solve.

    References:
        Beskos, Pinski, Sanz-Serna, Stuart (2011), Hybrid Monte Carlo on Hilbert spaces.
        Hoffman, Gelman (2014), The No-U-Turn Sampler: adaptively setting path lengths in Hamiltonian Monte Carlo.

    Example:
        >>> samples = fem_vi.sample(problem, fem_vi.HMC(), chains=8, draws=1000, warmup=500, reference=fem_vi.laplace(problem))
    """

    step_size: float | None = None
    length: float = QUARTER
    acceptance: float = 0.8
    most_rotations: int = 100

    def __post_init__(self) -> None:
        check_kernel("HMC", self.step_size, self.acceptance)
        positive("HMC: length", self.length)
        whole("HMC: most_rotations", self.most_rotations, least=1)

    @property
    def uses_gradient(self) -> bool:
        """True."""
        return True

    def step(self, target: Target, state: State, size: float, *, temperature: float = 1.0) -> tuple[State, Info]:
        """Move every chain once: `length / size` forward and backward solves of each. Collective."""
        length = self.length * (1.0 + JITTER * (2.0 * target.crowd.one_uniform() - 1.0))
        rotations = min(max(round(length / size), 1), self.most_rotations)
        return trajectory(target, state, size, rotations=rotations, temperature=temperature)
