"""Pictures of diagnostics: importance weights with their k-hat, and the ranks and coverage of a calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from fem_vi.arguments import instance
from fem_vi.errors import InvalidInput
from fem_vi.vi.calibration import Calibration
from fem_vi.vi.importance import checked_draws, khat_limit, pareto_smoothed, weighted_draws
from fem_vi.vi.problem import InverseProblem

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_weights(
    problem: InverseProblem, posteriors: Mapping[str, nn.Module], *, samples: int = 1000, seed: int = 0, batch: int = 50
) -> Figure:
    """How large importance weights get, for one posterior or several.

    For each weight w, the fraction of draws with a larger one, on logarithmic axes. A posterior that is right has all weights at
    one: a vertical line. A heavy tail, k-hat above its limit, is a line that falls slowly to the right.

    Args:
        problem: Prior, forward map, likelihood, data.
        posteriors: Modules by name.
        samples: Draws of each, each a forward solve; at least 100.
        seed: Of the draws; rank 0's counts.
        batch: Draws solved at a time.

    Returns:
        The figure.

    Raises:
        InvalidInput: Where an argument is of the wrong type, or there are fewer than 100 samples.

    MPI: Collective.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.

    Example:
        >>> fem_vi.plot_weights(problem, {"Laplace": fem_vi.laplace(problem), "low rank": run.posterior})
    """
    from matplotlib.figure import Figure

    if not isinstance(posteriors, Mapping) or not posteriors:
        raise InvalidInput(f"posteriors is {posteriors!r:.80}; it must map names to posteriors.")
    for posterior in posteriors.values():
        samples, seed, batch = checked_draws(problem, posterior, samples=samples, seed=seed, batch=batch)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    ax = figure.subplots()
    fraction = np.arange(samples, 0, -1) / samples
    largest = [10.0]
    for name, posterior in posteriors.items():
        log_weights = weighted_draws(problem, posterior, samples=samples, seed=seed, batch=batch).log_weights
        khat, _, _ = pareto_smoothed(log_weights)
        relative = (log_weights - log_weights.logsumexp(0) + math.log(samples)).sort().values.exp().numpy()
        largest.append(float(relative[-1]))
        trusted = "" if khat < khat_limit(samples) else ", not to be trusted"
        ax.step(relative, fraction, where="post", label=f"{name}: k-hat {khat:.2f}{trusted}")
    ax.axvline(1.0, color="0.7", linewidth=1, zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="importance weight over its mean", ylabel="fraction of draws with a larger one")
    ax.set_xlim(1e-3, 3.0 * max(largest))
    ax.set_ylim(0.5 / samples, 1.5)
    ax.legend(frameon=False, title=f"k-hat limit for {samples} draws: {khat_limit(samples):.2f}", fontsize="small")
    return figure


def plot_calibration(calibration: Calibration) -> Figure:
    """Ranks of the truth, as departures of their distribution from the uniform one, and coverage of central intervals.

    Ranks of a calibrated inference stay inside the grey band, which 99 % of such curves nowhere leave. Above it at the left and
    below it at the right: posteriors too narrow. The reverse: too wide. All above or all below: biased.

    Args:
        calibration: What `calibrate` returned.

    Returns:
        The figure.

    Raises:
        InvalidInput: Where it is something else.

    MPI: Not collective.

    References:
        Saeilynoja, Buerkner, Vehtari (2022), Graphical test for discrete uniformity and its applications.
    """
    from matplotlib.figure import Figure

    instance("calibration", calibration, Calibration, way_out="It is what calibrate returns.")
    repeats, quantities = calibration.ranks.shape
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1.0])
    u = (calibration.ranks.double().numpy() + 0.5) / (calibration.draws + 1)
    grid = np.linspace(0.0, 1.0, 101)
    low, high = _band(repeats, grid)
    left.fill_between(grid, low - grid, high - grid, color="0.88", label="99 % of right ones")
    for k, name in enumerate(calibration.names):
        below = (u[:, k, None] <= grid).mean(0)
        left.plot(grid, below - grid, linewidth=1.2, label=f"{name}, p = {calibration.p_values[k]:.2g}")
    left.set(xlabel="rank of the truth among draws, 0 to 1", ylabel="fraction of ranks below, less uniform")
    left.legend(frameon=False, fontsize="x-small", ncols=1 + quantities // 5)
    levels = np.linspace(0.0, 1.0, 41)
    right.fill_between(levels, *_band(repeats, levels), color="0.88")
    for k in range(quantities):
        right.plot(levels, (np.abs(u[:, k, None] - 0.5) <= 0.5 * levels).mean(0), linewidth=1.2)
    right.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
    right.set(xlabel="central interval", ylabel="truths inside it", aspect="equal", xlim=(0, 1), ylim=(0, 1))
    return figure


def _band(repeats: int, grid: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the distribution function of uniform numbers stays with probability 0.99, at all points together.

    The level at each point is that whose band keeps 99 % of simulated functions.
    """
    uniform = np.sort(np.random.default_rng(0).random((2000, repeats)), axis=1)
    counts = np.stack([(uniform <= point).sum(1) for point in grid], axis=1)
    tails = np.minimum(stats.binom.cdf(counts, repeats, grid), stats.binom.sf(counts - 1, repeats, grid))
    level = np.quantile(tails.min(1), 0.01)
    return stats.binom.ppf(level, repeats, grid) / repeats, stats.binom.ppf(1.0 - level, repeats, grid) / repeats
