"""The warm-up: a step size, and the scales of the unknowns, learned before the draws that count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fem_vi.vi.mcmc.coordinates import Coordinates, Layer
from fem_vi.vi.mcmc.dual_averaging import DualAveraging
from fem_vi.vi.mcmc.kernel import Kernel
from fem_vi.vi.mcmc.target import State, Target
from fem_vi.vi.posterior.scale import DiagonalScale, Scale, TriangularScale

FIRST_SIZE = 0.3
WINDOWS = (0.15, 0.3, 0.55, 0.9)
"""Fractions of the warm-up between which scales are learned; before and after, the step size alone."""
PSEUDO_DRAWS = 5
HOPELESS, PATIENCE = 1e-3, 10
"""A chain whose acceptance stays below this for so many steps is stuck, and the step size shrinks until it moves. The others, who
accept, would never let it: a chain that began far out on a steep slope would stay there for good."""


@dataclass(frozen=True)
class KeepReference:
    """The coordinates stay those of the reference."""


@dataclass(frozen=True)
class LearnDiagonal:
    """A mean and a standard deviation of each unknown are learned in three windows of the warm-up, from all chains together.

    The diagonal mass matrix of other packages. Meant for a handful of unknowns without a reference; for fields pass a Laplace
    approximation as reference instead.
    """


@dataclass(frozen=True)
class LearnDense:
    """Means and a full covariance are learned in three windows of the warm-up, from all chains together.

    The dense mass matrix of other packages, for replicated unknowns only, and few against the steps of all chains.
    """


Adaptation = KeepReference | LearnDiagonal | LearnDense


def warm_up(
    target: Target, kernel: Kernel, state: State, *, steps: int, adaptation: Adaptation, show: Callable[[float], None]
) -> tuple[Target, State, float]:
    """Take `steps` steps that do not count.

    Args:
        target: The density.
        kernel: What moves the chains.
        state: Where they begin.
        steps: How many steps.
        adaptation: Whether the coordinates change.
        show: Called after each step.

    Returns:
        The density in the coordinates that were learned, the state in them, and the step size.

    MPI: Collective over all groups.
    """
    crowd = target.crowd
    averaging = DualAveraging.begin(FIRST_SIZE if kernel.step_size is None else kernel.step_size, kernel.acceptance)
    edges = [round(share * steps) for share in WINDOWS] if not isinstance(adaptation, KeepReference) else []
    seen: list[Tensor] = []
    idle = torch.zeros(crowd.last - crowd.first)  # steps that each chain has all but surely rejected, one after another
    for k in range(1, steps + 1):
        state, info = kernel.step(target, state, kernel.step_size or averaging.size)
        idle = torch.where(info.steering < HOPELESS, idle + 1.0, 0.0)
        steering, stuck = crowd.together(torch.stack([info.steering.sum(), (idle >= PATIENCE).double().sum()])).tolist()
        averaging = averaging.update(0.0 if stuck else steering / crowd.total)
        if edges and edges[0] < k <= edges[-1]:
            seen.append(state.x)
        if k in edges[1:] and seen:
            xi = target.coordinates.whitened(state.x)
            target = replace(target, coordinates=_learned(target, torch.cat(seen), adaptation))
            state = target.begin(target.coordinates.of_whitened(xi))
            seen = []
            averaging = DualAveraging.begin(averaging.size, kernel.acceptance)
        show(1.0)
    return target, state, kernel.step_size or (averaging.mean if steps else FIRST_SIZE)


def _learned(target: Target, x: Tensor, adaptation: Adaptation) -> Coordinates:
    """Coordinates in which the draws x, `(count, n_owned)`, have mean zero and variance one, held back a little towards these."""
    crowd, old = target.crowd, target.coordinates
    count = float(crowd.together(torch.tensor([len(x)], dtype=torch.float64)))
    share = count / (count + PSEUDO_DRAWS)
    mean = crowd.together(x.sum(0)) / count
    delta = x - mean
    scale: Scale
    if isinstance(adaptation, LearnDense):
        covariance = share * crowd.together(delta.T @ delta) / count + (1.0 - share) * torch.eye(len(mean), dtype=x.dtype)
        scale = TriangularScale(old.prior, torch.linalg.cholesky(covariance))
    else:
        variance = share * crowd.together(delta.square().sum(0)) / count + (1.0 - share)
        scale = DiagonalScale(old.prior, 0.5 * variance.log())
    return replace(old, layers=(*old.layers, Layer(share * mean, scale)))
