"""Step sizes by dual averaging."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fem_vi.vi.mcmc.rotation import QUARTER

GAMMA, DELAY, DECAY = 0.05, 10.0, 0.75


@dataclass(frozen=True)
class DualAveraging:
    """A step size that is moved until the mean acceptance probability is as wanted.

    Attributes:
        wanted: Mean acceptance probability.
        anchor: Logarithm of the size to which early steps are drawn.
        count: Updates done.
        shortfall: Running mean of wanted less observed acceptance.
        log_size: Logarithm of the size to use while adapting.
        log_mean: Logarithm of the size to use afterwards: a weighted mean.

    References:
        Nesterov (2009), Primal-dual subgradient methods for convex problems.
        Hoffman, Gelman (2014), The No-U-Turn Sampler, section 3.2.
    """

    wanted: float
    anchor: float
    count: int
    shortfall: float
    log_size: float
    log_mean: float

    @staticmethod
    def begin(size: float, wanted: float) -> DualAveraging:
        """Start from a first guess."""
        return DualAveraging(wanted, math.log(2.0 * size), 0, 0.0, math.log(size), math.log(size))

    def update(self, acceptance: float) -> DualAveraging:
        """After a step with this mean acceptance probability."""
        count = self.count + 1
        share = 1.0 / (count + DELAY)
        shortfall = (1.0 - share) * self.shortfall + share * (self.wanted - acceptance)
        log_size = min(self.anchor - math.sqrt(count) / GAMMA * shortfall, math.log(QUARTER))
        weight = count**-DECAY
        return DualAveraging(
            self.wanted, self.anchor, count, shortfall, log_size, weight * log_size + (1.0 - weight) * self.log_mean
        )

    @property
    def size(self) -> float:
        """Size to use while adapting."""
        return math.exp(self.log_size)

    @property
    def mean(self) -> float:
        """Size to use afterwards."""
        return math.exp(self.log_mean)
