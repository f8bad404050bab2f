"""When a fit may stop, and which of its parameters it keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fem_vi.arguments import positive, whole
from fem_vi.vi.run import Row


def _gains(rows: Sequence[Row]) -> NDArray[np.float64]:
    """What rose in some steps: the ELBO, or minus the loss where the objective knew no ELBO in any of them."""
    elbo = np.array([row.elbo for row in rows])
    return -np.array([row.loss for row in rows]) if np.isnan(elbo).all() else elbo


@dataclass(frozen=True)
class AllSteps:
    """Take all the steps."""

    def __call__(self, history: Sequence[Row]) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Plateau:
    """Stop where the mean ELBO of the last steps exceeds that of as many before by less than a number of nats.

    The statistic is that difference plus two standard errors, from the spread within the two windows: noise that could hide a
    gain of `tolerance` does not stop a fit. Of objectives that know no ELBO, as of given samples, minus the loss takes its place.

    Attributes:
        window: Steps in each of the two means.
        tolerance: In nats.
    """

    window: int = 50
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        whole("Plateau: window", self.window, least=2)
        positive("Plateau: tolerance", self.tolerance)

    def statistic(self, history: Sequence[Row]) -> float:
        """What is compared with the tolerance; infinity before both windows are full."""
        if len(history) < 2 * self.window:
            return math.inf
        gains = _gains(history[-2 * self.window :]).reshape(2, self.window)
        if not np.isfinite(gains).all():
            return math.inf
        error = math.sqrt(float(gains.var(1, ddof=1).sum()) / self.window)
        return float(gains[1].mean() - gains[0].mean()) + 2.0 * error

    def __call__(self, history: Sequence[Row]) -> bool:
        """Whether to stop after these steps."""
        return self.statistic(history) < self.tolerance


@dataclass(frozen=True)
class Last:
    """Keep the parameters after the last step."""


@dataclass(frozen=True)
class Best:
    """Keep the parameters at the end of the window whose mean ELBO was the highest.

    A mean over a window, since the largest of single noisy values is that of a lucky draw. Minus the loss takes the ELBO's place
    where an objective knows none.

    Attributes:
        window: Steps in each mean.
    """

    window: int = 20

    def __post_init__(self) -> None:
        whole("Best: window", self.window, least=1)

    def mean(self, history: Sequence[Row]) -> float | None:
        """Mean ELBO, or minus the loss, of the window that has just ended; None within a window, or where it has no number."""
        if not history or len(history) % self.window:
            return None
        value = float(_gains(history[-self.window :]).mean())
        return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Average:
    """Keep a mean of the parameters over the last steps, those k steps ago with weight exp(-k / window).

    The steps of a stochastic gradient wander around an optimum; their mean lies nearer to it than the last of them. Over the
    first `window` steps it is the plain mean.

    Attributes:
        window: Steps that it reaches back; few against those of the fit.

    References:
        Polyak, Juditsky (1992), Acceleration of stochastic approximation by averaging.
        Dhaka, Catalina, Andersen, Magnusson, Huggins, Vehtari (2020), Robust, accurate stochastic optimization for variational
        inference.
    """

    window: int = 200

    def __post_init__(self) -> None:
        whole("Average: window", self.window, least=1)

    def share(self, step: int) -> float:
        """Weight of the parameters after a step, the first being 1, in the mean so far."""
        return 1.0 / min(step, self.window)
