"""Powers x^-beta on [1, upper] as rational functions whose zeros and poles are real and negative.

A fractional power of a sparse matrix is full; a rational function of it takes a few sparse solves. Here beta = n + f with a whole
n and 0 <= f < 1, and

    x^-beta  ~  x^-n c prod_j (x + z_j) / (x + p_j),    z_j, p_j > 0,

where the largest error of the *logarithm* is minimised. The function and its reciprocal are then equally exact, and both are
positive: the matrix function is a covariance's root whose inverse and determinant cost the same solves and no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from fem_vi.errors import InvalidInput

Array = NDArray[np.float64]
MOST_POLES = 20
LEAST_TOLERANCE = 5e-4
"""Below that the linear programs, which HiGHS solves to 1e-7, stall."""


@dataclass(frozen=True)
class RationalPower:
    """x^-whole scale prod (x + zeros) / (x + poles).

    Attributes:
        whole: The whole part of the power.
        scale: c.
        zeros: z_j, ascending.
        poles: p_j, ascending.
        error: The largest |log(value) + beta log(x)| for x in [1, upper].
    """

    whole: int
    scale: float
    zeros: tuple[float, ...]
    poles: tuple[float, ...]
    error: float

    def __call__(self, x: Array) -> Array:
        """The value at numbers x > 0."""
        value = self.scale * np.asarray(x, dtype=np.float64) ** -self.whole
        for zero, pole in zip(self.zeros, self.poles, strict=True):
            value = value * (x + zero) / (x + pole)
        return value


@cache
def rational_power(beta: float, upper: float, tolerance: float) -> RationalPower:
    """The power x^-beta on [1, upper], with the fewest poles that meet a tolerance.

    Args:
        beta: Positive.
        upper: More than 1.
        tolerance: Largest error of the logarithm, at least 5e-4.

    Returns:
        A power that is whole is exact and has no poles.

    Raises:
        InvalidInput: Where 20 poles are not enough.

    References:
        Bolin, Kirchner (2020), The rational SPDE approach for Gaussian random fields with general smoothness.
    """
    whole = math.floor(beta + 1e-12)
    fraction = beta - whole
    if fraction < 1e-12:
        return RationalPower(whole, 1.0, (), (), 0.0)
    period = math.log(upper)
    fewest = max(1, int(period * math.log(0.5 / tolerance) / 25.0))  # errors fall like exp(-2 pi^2 m / log(16 upper))
    for m in range(fewest, MOST_POLES + 1):
        zeros, poles, log_scale, error = _best_fit(fraction, period, m)
        if error <= tolerance:
            return RationalPower(whole, math.exp(log_scale), tuple(np.exp(zeros)), tuple(np.exp(poles)), error)
    raise InvalidInput(
        f"the power -{beta:g} on [1, {upper:.3g}] is not met to {tolerance:g} by {MOST_POLES} poles. Ask for a larger tolerance, "
        "or a whole power."
    )


# In u = log x the function log c + sum_j [softplus(u, z_j) - softplus(u, p_j)] falls with slope -1 between p_j and z_j and is
# flat between z_j and p_(j+1): evenly spaced corners, with a fraction f of falling parts, are a good first guess. The maximum
# norm of the error is then lowered by linear programs within a trust region.


def _best_fit(fraction: float, period: float, m: int) -> tuple[Array, Array, float, float]:
    """Logarithms of zeros, poles and scale, and the largest error."""
    spacing = period / m
    poles = (np.arange(m) + 0.5 * (1.0 - fraction)) * spacing
    x = np.concatenate([poles + fraction * spacing, poles, [0.0]])
    u = 0.5 * period * (1.0 - np.cos(np.linspace(0.0, np.pi, 24 * (m + 1) + 1)))
    error = _log_error(x, u, fraction)
    x[-1] -= 0.5 * (error.max() + error.min())
    error, radius = _log_error(x, u, fraction), spacing
    for _ in range(40):
        now = float(np.abs(error).max())
        step, promised = _best_step(x, u, error, radius)
        trial = _log_error(x + step, u, fraction)
        gained = now - float(np.abs(trial).max())
        if gained > 0.0:
            x, error = x + step, trial
        radius *= 2.0 if gained > 0.5 * (now - promised) else 0.25
        if now - promised < 1e-3 * now or radius < 1e-10:
            break
    fine = _log_error(x, np.linspace(0.0, period, 200 * (m + 1), dtype=np.float64), fraction)
    return np.sort(x[:m]), np.sort(x[m:-1]), float(x[-1]), float(np.abs(fine).max())


def _log_error(x: Array, u: Array, fraction: float) -> Array:
    zeros, poles = x[:-1].reshape(2, -1)
    corners = np.logaddexp(u[:, None], zeros) - np.logaddexp(u[:, None], poles)
    return np.asarray(x[-1] + fraction * u + corners.sum(axis=1))


def _best_step(x: Array, u: Array, error: Array, radius: float) -> tuple[Array, float]:
    """The step within the trust region that lowers the linearised error most, and what it lowers it to; in units of the error."""
    unit = float(np.abs(error).max())
    zeros, poles = x[:-1].reshape(2, -1)
    slopes = np.hstack([1 / (1 + np.exp(u[:, None] - zeros)), -1 / (1 + np.exp(u[:, None] - poles)), np.ones((len(u), 1))])
    bound = -np.ones((len(u), 1))
    solution = linprog(
        np.eye(len(x) + 1)[-1],
        A_ub=np.block([[slopes, bound], [-slopes, bound]]),
        b_ub=np.concatenate([-error, error]) / unit,
        bounds=[(-radius / unit, radius / unit)] * len(x) + [(0.0, None)],
        method="highs",
    )
    return unit * solution.x[:-1], unit * float(solution.x[-1])
