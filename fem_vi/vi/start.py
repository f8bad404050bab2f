"""Where to start a fit: the linearised (Laplace) posterior around the most probable parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fem_vi.arguments import positive, whole
from fem_vi.errors import InvalidInput, SolveFailed
from fem_vi.vi.problem import InverseProblem

MOST_DATA = 1000


@dataclass(frozen=True)
class Linearisation:
    """The posterior of the problem linearised at its most probable whitened parameters: N(mu, (I + J'J)^-1).

    Attributes:
        mu: Most probable xi, `(n_owned,)`.
        jacobian: J, derivative of the predictions in units of the noise with respect to xi, `(num_data, n_owned)`.
        gram: J J', `(num_data, num_data)`, replicated.
        iterations: Gauss-Newton steps taken.
        converged: Whether the last step was below the tolerance.
    """

    mu: Tensor
    jacobian: Tensor
    gram: Tensor
    iterations: int
    converged: bool


@runtime_checkable
class Startable(Protocol):
    """A posterior that can take the linearised posterior as its parameters."""

    def is_fresh(self) -> bool:
        """Whether it is still centred at the prior mean, as a new one is. Collective."""

    def start_at(self, linearisation: Linearisation) -> None:
        """Set the parameters. Collective."""


# Gauss-Newton in whitened coordinates. With r = (y - G(unwhiten(xi))) / std and J = -dr/dxi, minimise
#
#     phi(xi) = (|xi|^2 + |r|^2) / 2,  grad phi = xi - J' r,  step = -(I + J'J)^-1 grad phi.
#
# By Woodbury (I + J'J)^-1 v = v - J' (I + J J')^-1 J v: one dense solve in the number of data. J has one row for each datum,
# each an adjoint solve on one kept forward solve.


@dataclass(frozen=True)
class PresentParameters:
    """Start at the parameters that the posterior has: the prior for a new one, the last fit's for one fitted before.

    From the prior, precise data (a signal-to-noise ratio of 100) take first-order optimisers many thousands of steps.
    """

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> None:
        """Leave the parameters alone."""


@dataclass(frozen=True)
class GaussNewton:
    """Start at the linearised posterior around the most probable parameters, found by Gauss-Newton.

    Costs one forward solve and `num_data` adjoint solves an iteration, and a few forward solves for the line search.

    Attributes:
        iterations: Most Gauss-Newton steps.
        rtol: Stop where a step is shorter than this fraction of |xi| + 1.

    References:
        Bui-Thanh, Ghattas, Martin, Stadler (2013), A computational framework for infinite-dimensional Bayesian inverse
        problems, part I.
    """

    iterations: int = 20
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        whole("GaussNewton: iterations", self.iterations, least=1)
        positive("GaussNewton: rtol", self.rtol)

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Linearisation:
        """Set the parameters of `posterior`.

        Args:
            problem: Prior, forward map, likelihood, data.
            posterior: A posterior with a method `start_at`.

        Returns:
            The linearised posterior it was set to.

        Raises:
            InvalidInput: Where the posterior cannot take a linearised posterior.

        MPI: Collective.
        """
        if not isinstance(posterior, Startable):
            raise InvalidInput(f"GaussNewton: {type(posterior).__name__} has no start_at(linearisation). Use start=None.")
        linearisation = linearise(problem, iterations=self.iterations, rtol=self.rtol)
        posterior.start_at(linearisation)
        return linearisation


def default_start(problem: InverseProblem, posterior: nn.Module) -> GaussNewton | PresentParameters:
    """`GaussNewton()` for a new posterior that can use it, with at most 1,000 data; else `PresentParameters()`.

    MPI: Collective.
    """
    if len(problem.y) <= MOST_DATA and isinstance(posterior, Startable) and posterior.is_fresh():
        return GaussNewton()
    return PresentParameters()


def linearise(problem: InverseProblem, *, iterations: int = 20, rtol: float = 1e-6) -> Linearisation:
    """The most probable whitened parameters, and the linearised posterior around them.

    Args:
        problem: Prior, forward map, likelihood, data.
        iterations: Most Gauss-Newton steps.
        rtol: Stop where a step is shorter than this fraction of |xi| + 1.

    Returns:
        Mean and Jacobian in whitened coordinates.

    MPI: Collective.
    """
    prior = problem.prior
    xi = torch.zeros(prior.event_shape, dtype=torch.float64)
    residual, jacobian = _residual_and_jacobian(problem, xi)
    for iteration in range(iterations):
        gram = prior.all_sum(jacobian @ jacobian.T)
        gradient = xi - residual @ jacobian
        w = torch.linalg.solve(torch.eye(len(gram), dtype=gram.dtype) + gram, prior.all_sum(jacobian @ gradient))
        step = w @ jacobian - gradient
        size, slope, length = prior.all_sum(torch.stack([step @ step, step @ gradient, xi @ xi])).tolist()
        if size**0.5 <= rtol * (1.0 + length**0.5):
            return Linearisation(xi, jacobian, gram, iteration, True)
        xi = _line_search(problem, xi, step, slope, 0.5 * (length + float(residual @ residual)))
        residual, jacobian = _residual_and_jacobian(problem, xi)
    return Linearisation(xi, jacobian, prior.all_sum(jacobian @ jacobian.T), iterations, False)


def _residual_and_jacobian(problem: InverseProblem, xi: Tensor) -> tuple[Tensor, Tensor]:
    """r, `(num_data,)`, and J = -dr/dxi, `(num_data, n_owned)`."""
    with torch.enable_grad():
        xi = xi.detach().requires_grad_()
        residual = problem.likelihood.standardise(problem.y, problem.predict(problem.prior.unwhiten(xi)))
        last = len(residual) - 1
        rows = [-torch.autograd.grad(residual[k], xi, retain_graph=k < last)[0] for k in range(len(residual))]
    return residual.detach(), torch.stack(rows)


@torch.no_grad()
def _line_search(problem: InverseProblem, xi: Tensor, step: Tensor, slope: float, value: float) -> Tensor:
    """The first of xi + step, xi + step / 2, ... that decreases phi enough (Armijo); xi itself where none of ten does."""
    for halving in range(10):
        length = 0.5**halving
        trial = xi + length * step
        try:
            prediction = problem.predict(problem.prior.unwhiten(trial))
        except (SolveFailed, InvalidInput):  # no solution, or NaN: too far
            continue
        residual = problem.likelihood.standardise(problem.y, prediction)
        phi = 0.5 * float(problem.prior.all_sum(trial @ trial) + residual @ residual)
        if phi <= value + 1e-4 * length * slope + 1e-12 * abs(value):
            return trial
    return xi
