"""Products with the derivative of a problem's predictions, without its matrix.

With r(xi) = (y - G(unwhiten(xi))) / noise, or what else is the `curvature_root` of the likelihood, and J = -dr/dxi, both J v and
J' w use one solve of the state. The pullback w -> J' w is linear in w, so that its own pullback is v -> J v: one tangent solve
with the factorisation that is kept, where forward mode would solve a nonlinear state anew for each v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.func import vjp, vmap  # type: ignore[attr-defined]

from fem_vi.errors import UnsupportedDerivative
from fem_vi.vi.predicted import curvature_root
from fem_vi.vi.problem import Cost, InverseProblem


class Linearised(Protocol):
    """A problem linearised at one whitened point.

    Attributes:
        xi: The point, `(n_owned,)`.
        value: phi = -log p(y | m) + |xi|^2 / 2, what the most probable point minimises.
        log_likelihood: log p(y | m).
        gradient: Gradient of phi, `(n_owned,)`.
    """

    xi: Tensor
    value: float
    log_likelihood: float
    gradient: Tensor


class JacobianRows:
    """A problem linearised at one whitened point, with J row by row: an adjoint solve for each datum.

    Args:
        problem: Prior, forward map, likelihood, data; the forward map need be differentiable once only.
        xi: Whitened unknowns, `(n_owned,)`.

    Attributes:
        xi, value, log_likelihood, gradient: As of `Linearised`.
        jacobian: J, `(num_data, n_owned)`; a row more with `UnknownScale`.
        gram: J J', replicated.

    MPI: Collective.
    """

    def __init__(self, problem: InverseProblem, xi: Tensor) -> None:
        with torch.enable_grad():
            self.xi = xi.detach().requires_grad_()
            prediction = problem.predict(problem.prior.unwhiten(self.xi))
            log_likelihood = problem.likelihood.log_prob(problem.y, prediction)
            residual = curvature_root(problem.likelihood, problem.y, prediction)
            rows = [-torch.autograd.grad(each, self.xi, retain_graph=True)[0] for each in residual]
            (rise,) = torch.autograd.grad(log_likelihood, self.xi)
        self.xi = self.xi.detach()
        self.gradient = self.xi - rise
        self.log_likelihood = float(log_likelihood.detach())
        self.value = float(0.5 * problem.prior.all_sum(self.xi.square().sum())) - self.log_likelihood
        self.jacobian = torch.stack(rows)
        self.gram = problem.prior.all_sum(self.jacobian @ self.jacobian.T)


class GaussNewtonProducts:
    """A problem linearised at one whitened point, by products with J and J'.

    Args:
        problem: Prior, forward map, likelihood, data; the forward map must be twice differentiable, as `Solve` is.
        xi: Whitened unknowns, `(n_owned,)`.

    Attributes:
        xi, value, log_likelihood, gradient: As of `Linearised`.
        num_data: Length of r.

    MPI: Collective; so is every method.
    """

    def __init__(self, problem: InverseProblem, xi: Tensor) -> None:
        self._problem = problem
        self.xi = xi.detach()
        with torch.enable_grad():
            values, pull, *_ = vjp(self._model, self.xi)
            residual, log_likelihood = values
        no_residual, none = torch.zeros_like(residual), torch.zeros_like(log_likelihood)

        def pullback(w: Tensor) -> Tensor:
            return -pull((w, none))[0]

        self._pullback: Callable[[Tensor], Tensor] = pullback
        self._pushforward: Callable[[Tensor], Tensor] | None = None
        (rise,) = pull((no_residual, torch.ones_like(log_likelihood)))
        problem.cost.forward += 1
        problem.cost.backward += 1
        self.num_data = len(residual)
        self.gradient = self.xi - rise
        self.log_likelihood = float(log_likelihood)
        self.value = float(0.5 * problem.prior.all_sum(self.xi.square().sum())) - self.log_likelihood

    def _model(self, xi: Tensor) -> tuple[Tensor, Tensor]:
        """The residual and log p(y | m)."""
        problem = self._problem
        cost, problem.cost = problem.cost, Cost()  # the solves behind a product are counted by the product
        try:
            prediction = problem.predict(problem.prior.unwhiten(xi))
        finally:
            problem.cost = cost
        likelihood, y = problem.likelihood, problem.y
        return curvature_root(likelihood, y, prediction), likelihood.log_prob(y, prediction)

    def forward(self, v: Tensor) -> Tensor:
        """J v.

        Args:
            v: `(n_owned,)`, or a batch `(k, n_owned)`, solved at once.

        Returns:
            `(num_data,)` or `(k, num_data)`, replicated.

        Raises:
            UnsupportedDerivative: Where the forward map is differentiable once only, as `Evolve` is.
        """
        if self._pushforward is None:
            with torch.enable_grad():
                push = vjp(self._pullback, torch.zeros(self.num_data, dtype=torch.float64))[1]
            self._problem.cost.backward += 1  # the pullback, evaluated to be differentiated
            self._pushforward = lambda row: push(row)[0]
        self._problem.cost.forward += 1 if v.ndim == 1 else len(v)
        try:
            return _rows(self._pushforward, v)
        except UnsupportedDerivative as error:
            raise UnsupportedDerivative(
                f"{error} NewtonCG() needs products with the derivative of the predictions; GaussNewton() takes adjoints only: "
                "laplace(problem, mode=fem_vi.GaussNewton()), fit(..., start=fem_vi.GaussNewton())."
            ) from error

    def adjoint(self, w: Tensor) -> Tensor:
        """J' w.

        Args:
            w: `(num_data,)`, or a batch `(k, num_data)`, solved at once; replicated.

        Returns:
            `(n_owned,)` or `(k, n_owned)`.
        """
        self._problem.cost.backward += 1 if w.ndim == 1 else len(w)
        return _rows(self._pullback, w)


@torch.enable_grad()
def _rows(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A product with a vector, or with all rows of a matrix at once.

    With gradients on, whatever the caller's setting: without, an operator's pullback takes a way that knows no `vmap`.
    """
    return product(x) if x.ndim == 1 else vmap(product)(x)
