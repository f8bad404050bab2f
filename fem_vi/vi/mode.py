"""The most probable parameters, by Newton's method with the Gauss-Newton Hessian in whitened coordinates.

With r = (y - G(unwhiten(xi))) / noise and J = -dr/dxi, minimise

    phi(xi) = -log p(y | m) + |xi|^2 / 2,    step = -(I + J'J)^-1 grad phi.

The unit matrix is the prior's precision: the eigenvalues of I + J'J that differ from one are those of the few directions that
data see, whatever the mesh, and conjugate gradients take about as many iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fem_vi.errors import InvalidInput, SolveFailed
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.products import GaussNewtonProducts, JacobianRows, Linearised

Point = TypeVar("Point", bound=Linearised)


@dataclass(frozen=True)
class Convergence:
    """How a search for the most probable parameters went.

    Attributes:
        converged: Whether the last step was shorter than the tolerance, or promised to gain less than is asked for.
        iterations: Newton steps.
        inner_iterations: Iterations of conjugate gradients in all steps together; 0 where the steps were direct.
        grad_norm: Norm of the gradient of phi at the end, in nats per whitened unit.
        first_grad_norm: The same at the prior mean, where the search began.
        gain: What the last step promised to gain, in nats; about what is left.
        reason: Why the search ended, in words.
    """

    converged: bool
    iterations: int
    inner_iterations: int
    grad_norm: float
    first_grad_norm: float
    gain: float
    reason: str


@dataclass
class _Progress:
    """Where a search stands."""

    first: float = math.nan
    norm: float = math.nan
    gain: float = math.nan
    inner: int = 0

    def ended(self, iterations: int, reason: str, *, converged: bool = False) -> Convergence:
        return Convergence(converged, iterations, self.inner, self.norm, self.first, self.gain, reason)


def find_mode(
    problem: InverseProblem,
    linearise: Callable[[InverseProblem, Tensor], Point],
    solve: Callable[[InverseProblem, Point, float], tuple[Tensor, int]],
    *,
    iterations: int,
    rtol: float,
    gain: float = 0.0,
) -> tuple[Point, Convergence]:
    """Minimise phi from the prior mean.

    Args:
        problem: Prior, forward map, likelihood, data.
        linearise: Makes the linearised problem at a point.
        solve: Makes the step, `(n_owned,)`, and the number of inner iterations, from a linearised problem and the norm of its
            gradient as a fraction of the first one.
        iterations: Most Newton steps.
        rtol: Stop where a step is shorter than this fraction of |xi| + 1.
        gain: Stop where a step promises to gain fewer nats.

    Returns:
        The problem linearised at the last point, and how the search went.

    MPI: Collective.
    """
    prior = problem.prior
    at = linearise(problem, torch.zeros(prior.event_shape, dtype=torch.float64))
    state = _Progress()
    for iteration in range(iterations + 1):
        state.norm = float(prior.all_sum(at.gradient.square().sum()).sqrt())
        state.first = state.norm if iteration == 0 else state.first
        if state.norm == 0.0:
            state.gain = 0.0
            return at, state.ended(iteration, "the gradient is zero", converged=True)
        step, inner = solve(problem, at, state.norm / state.first)
        state.inner += inner
        size, slope, length = prior.all_sum(torch.stack([step @ step, step @ at.gradient, at.xi @ at.xi])).tolist()
        state.gain = -0.5 * slope
        if size**0.5 <= rtol * (1.0 + length**0.5):
            return at, state.ended(iteration, f"the last step was shorter than rtol ({rtol:g})", converged=True)
        if state.gain < gain:
            return at, state.ended(iteration, f"the last step promised fewer nats than gain ({gain:g})", converged=True)
        if iteration == iterations:
            break
        trial = _line_search(problem, at, step, slope)
        if trial is None:
            return at, state.ended(iteration, "no step along the last direction gained anything")
        at = linearise(problem, trial)
    return at, state.ended(iterations, f"iterations ({iterations}) ran out")


def direct_step(problem: InverseProblem, at: JacobianRows, fraction: float) -> tuple[Tensor, int]:
    """-(I + J'J)^-1 grad phi by (I + J'J)^-1 v = v - J' (I + J J')^-1 J v: one dense solve in the number of data. Collective."""
    inner = torch.eye(len(at.gram), dtype=at.gram.dtype) + at.gram
    w = torch.linalg.solve(inner, problem.prior.all_sum(at.jacobian @ at.gradient))
    return w @ at.jacobian - at.gradient, 0


def conjugate_gradients(problem: InverseProblem, at: GaussNewtonProducts, fraction: float, *, most: int) -> tuple[Tensor, int]:
    """-(I + J'J)^-1 grad phi by conjugate gradients, the more exactly the smaller the gradient has become.

    Args:
        problem: Whose prior knows how the unknowns are spread over ranks.
        at: The linearised problem.
        fraction: Norm of the gradient as a fraction of the first one.
        most: Most iterations.

    Returns:
        The step, `(n_owned,)`, and the iterations taken.

    MPI: Collective.

    References:
        Eisenstat, Walker (1996), Choosing the forcing terms in an inexact Newton method.
    """
    all_sum = problem.prior.all_sum
    rtol = min(1e-2, max(fraction, 1e-10))
    step, left = torch.zeros_like(at.gradient), -at.gradient
    direction, square = left, float(all_sum(left.square().sum()))
    goal = rtol**2 * square
    for iteration in range(most):
        if square <= goal:
            return step, iteration
        seen = at.forward(direction)
        curvature = float(all_sum(direction.square().sum()) + seen.square().sum())
        length = square / curvature
        step = step + length * direction
        left = left - length * (direction + at.adjoint(seen))
        square, before = float(all_sum(left.square().sum())), square
        direction = left + (square / before) * direction
    return step, most


@torch.no_grad()
def _line_search(problem: InverseProblem, at: Linearised, step: Tensor, slope: float) -> Tensor | None:
    """The first of xi + step, xi + step / 2, ... that decreases phi enough (Armijo); None where none of ten does."""
    for halving in range(10):
        length = 0.5**halving
        trial = at.xi + length * step
        try:
            prediction = problem.predict(problem.prior.unwhiten(trial))  # all data, of a MinibatchProblem too
            log_likelihood = problem.likelihood.log_prob(problem.y, prediction)
        except (SolveFailed, InvalidInput):  # no solution, or NaN: too far
            continue
        phi = 0.5 * float(problem.prior.all_sum(trial @ trial)) - float(log_likelihood)
        if phi <= at.value + 1e-4 * length * slope + 1e-12 * abs(at.value):
            return trial
    return None
