"""`ReducedSolve`: the state of a linear PDE in the span of some hundred states that are known, without a solve on the mesh.

Where r(u, m) is affine in u, and in some features f of the parameters (the conductivities of the parts of a plate, say),

    r(u0 + sum_j c_j v_j, m(theta)) = b(theta) + A(theta) c,    [b, A](theta) = [b, A]_0 + sum_k f_k(theta) [b, A]_k,

in the directions v_i alone, A(theta) c = -b(theta) is Galerkin's system: small, dense, and the same on all ranks. Its matrices
are found once, from residuals at as many parameters as they need; at others the residuals must agree, or the form is none of this
kind.

With A c + b = 0 and a cotangent g = dL/dc, A' lam = g gives dL/df_k = -lam . (A_k c + b_k).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fem_vi.arguments import described, instance, whole
from fem_vi.bridge.layout import all_sum, check_last_axis
from fem_vi.bridge.residual import Residual
from fem_vi.bridge.state_map import ReducedBasis
from fem_vi.errors import InvalidInput, SolveFailed, UnsupportedForm
from fem_vi.parallel import raise_on_all

Factor = tuple[Tensor, ...]
NEGLIGIBLE = 1e-12  # of the largest variance: below are modes that rounding errors spoil
ROUNDING = 1e-24  # of the squares of the states: below are no differences
AGREES = 1e-6


class ReducedSolve:
    """u = solve(theta), in the span of given states; differentiable to any order, in reverse mode.

    Proper orthogonal decomposition gives the modes, the directions in which the states vary most about their mean. The result
    is Galerkin's solution in their span: exact where the span holds the solution, and else about as near as the modes allow,
    which no number here tells. A posterior that was fitted to a reduced model is judged by the full one:
    `diagnose(problem, posterior)`.

    Args:
        residual: Of the PDE, affine in the state, whose prescribed values are no inputs.
        inputs: The inputs of the PDE, as a function of the parameters theta `(*batch, num_parameters)`: a `PiecewiseConstant`.
        states: Solutions, `(num_states, n_owned)`.
        theta: The parameters that they belong to, `(num_states, num_parameters)`, replicated.
        features: Functions of theta in which the residual is affine, `(*batch, num_features)`; `torch.exp` where a coefficient is
            the exponential of a parameter.
        rank: Most modes; None for all that differ from rounding errors.

    Attributes:
        rank: Modes taken.
        neglected: Share of the states' variance that these leave out.

    Call:
        `solve(theta)`: `(*batch, num_parameters)`, replicated, to field tensors `(*batch, n_owned)`.

    Raises:
        InvalidInput: Where shapes do not fit, values are not finite, states do not differ, features cannot be told apart, or the
            residual is not affine in the state and the features.
        UnsupportedForm: Where prescribed values are inputs.
        SolveFailed: In a call, where the reduced system is singular.

    MPI: Collective, forward and backward.

    References:
        Cui, Marzouk, Willcox (2015), Data-driven model reduction for the Bayesian solution of inverse problems.
        Quarteroni, Manzoni, Negri (2016), Reduced basis methods for partial differential equations.

    Example:
        >>> theta = posterior().sample((300,))
        >>> reduced = fem_vi.ReducedSolve(fem_vi.Residual(pde), blocks, solve(blocks(theta)), theta, features=torch.exp)
        >>> cheap = fem_vi.InverseProblem(prior, lambda theta: observe(reduced(theta)), likelihood, y)
    """

    @torch.no_grad()
    def __init__(
        self,
        residual: Residual,
        inputs: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
        states: Tensor,
        theta: Tensor,
        *,
        features: Callable[[Tensor], Tensor],
        rank: int | None = None,
    ) -> None:
        instance("ReducedSolve: residual", residual, Residual)
        pde = residual.pde
        self.comm = pde.comm
        with raise_on_all(self.comm):
            instance("ReducedSolve: theta", theta, Tensor)
            instance("ReducedSolve: inputs", inputs, Callable)  # type: ignore[arg-type]
            instance("ReducedSolve: features", features, Callable)  # type: ignore[arg-type]
            rank = None if rank is None else whole("ReducedSolve: rank", rank, least=1)
            check_last_axis("ReducedSolve: states", states, pde.unknown.size, "the coefficients of a state that this rank owns.")
            states, theta = states.to(torch.float64), theta.to(torch.float64)
            _check_given(states, theta)
            if pde.boundary.sources:
                raise UnsupportedForm(
                    "ReducedSolve: a Dirichlet condition takes its values from an input, and all states must have the same ones. "
                    "Make a WeakForm with constant boundary values."
                )
        self._features = features
        mean, modes, self.neglected = _decompose(states, rank, self.comm)
        self.rank, self.num_parameters = len(modes), theta.shape[1]
        self._map = ReducedBasis(modes, offset=mean).create(pde)

        def system(at: Tensor) -> Tensor:
            """[b, A] at one vector of parameters, `(1 + rank, rank)`, by rows: images of the mean and of the modes."""
            m = inputs(at)
            r = residual(torch.cat([mean[None], mean + modes]), *(m if isinstance(m, tuple) else (m,)))
            products = all_sum(r @ modes.T, self.comm)
            return torch.cat([products[:1], products[1:] - products[:1]])

        points = _points(theta, self._table(theta[0]).shape[-1] - 1)
        table, images = self._table(points), torch.stack([system(at) for at in points])
        if int(torch.linalg.matrix_rank(table)) < table.shape[1]:
            raise InvalidInput(
                f"ReducedSolve: {table.shape[1] - 1} features of {self.num_parameters} parameters cannot be told apart, or not "
                "from a constant; leave out those that are sums of others."
            )
        parts = torch.linalg.lstsq(table, images.reshape(len(points), -1)).solution
        parts = parts.reshape(-1, 1 + self.rank, self.rank)
        for one in (parts[:, :1], parts[:, 1:]):  # b and A; rounding errors would stand for them where all features are small
            sizes = one.flatten(1).norm(dim=1) * table.abs().amax(0)
            one[sizes <= NEGLIGIBLE * sizes.max()] = 0.0
        self._check_affine(residual, inputs, (mean, modes), parts, theta)
        self._load, self._matrices = parts[:, 0].contiguous(), parts[:, 1:].contiguous()
        self._products = self._matrices.movedim(1, 0).contiguous()
        self._is_symmetric = _is_symmetric(self._matrices)

    def __call__(self, theta: Tensor) -> Tensor:
        """States; see the class.

        Raises:
            InvalidInput: Where the last axis of theta is another, or theta is not finite.
            SolveFailed: Where the reduced system is singular, or has no finite solution.
        """
        with raise_on_all(self.comm):
            check_last_axis("ReducedSolve: theta", theta, self.num_parameters, "those that the states belong to.")
            theta = theta.to(torch.float64)
            _check_finite("theta", theta)
        weights = self._table(theta)
        with torch.no_grad():
            factor = _factorised(torch.einsum("...k,kij->...ji", weights, self._matrices), self._is_symmetric)
        c = _Solved.apply(weights, -(weights @ self._load), self._products, False, *factor)
        if not bool(c.isfinite().all()):
            wrong = torch.nonzero(~c.isfinite().all(-1).flatten()).flatten().tolist()
            raise SolveFailed(f"ReducedSolve: the reduced system is singular, or not finite, for samples {wrong[:10]}.")
        return self._map.lift(c)

    def _table(self, theta: Tensor) -> Tensor:
        """A one, and the features, `(*batch, 1 + num_features)`."""
        values = self._features(theta)
        fits = isinstance(values, Tensor) and values.ndim == theta.ndim and values.shape[:-1] == theta.shape[:-1]
        if not fits or values.dtype is not torch.float64:
            raise InvalidInput(
                f"ReducedSolve: features of a tensor {tuple(theta.shape)} are {_shape(values)}; they must be a float64 "
                "tensor with the same batch axes and one more."
            )
        return torch.cat([torch.ones_like(values[..., :1]), values], dim=-1)

    def _check_affine(self, residual: Residual, inputs: Any, span: tuple[Tensor, Tensor], parts: Tensor, theta: Tensor) -> None:
        """Refuse a residual that is not what its parts make of it, at some of the given parameters and a sum of modes."""
        (mean, modes), at = span, theta[:: max(len(theta) // 4, 1)][:4]
        c = torch.linspace(-0.5, 1.5, self.rank, dtype=torch.float64)
        m = inputs(at)
        u = (mean + c @ modes).expand(len(at), -1)
        found = all_sum(residual(u, *(m if isinstance(m, tuple) else (m,))) @ modes.T, self.comm)
        known = torch.einsum("bk,kij,i->bj", self._table(at), parts, torch.cat([c.new_ones(1), c]))
        error = float((found - known).norm() / found.norm())
        if not error <= AGREES:
            raise InvalidInput(
                f"ReducedSolve: the residual is not affine in the state and in the features: it is off by {error:.1e}. "
                "Give the features that coefficients are linear in, such as features=torch.exp; a PDE that is not linear in its "
                "state has no reduced model here."
            )


class _Solved(torch.autograd.Function):
    """The solution of A x = rhs, or A' x = rhs, A = sum_k weights_k A_k; its backward is such a solution again.

    `products` has A_k[i, j] at [j, k, i].
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, rhs: Tensor, products: Tensor, adjoint: bool, *factor: Tensor) -> Tensor:
        if len(factor) == 1:
            return torch.cholesky_solve(rhs[..., None], factor[0])[..., 0]
        return torch.linalg.lu_solve(*factor, rhs[..., None], adjoint=adjoint)[..., 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights, _, products, ctx.adjoint, *factor = inputs
        ctx.save_for_backward(weights, output, products, *factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weights, x, products, *factor = ctx.saved_tensors
        lam = _Solved.apply(weights, grads[0], products, not ctx.adjoint, *factor)
        left, right = (x, lam) if ctx.adjoint else (lam, x)  # left' A_k right
        images = (right @ products.flatten(1)).unflatten(-1, products.shape[1:])
        return -(images @ left[..., None])[..., 0], lam, None, None, *(None for _ in factor)


def _check_given(states: Tensor, theta: Tensor) -> None:
    """Refuse states and parameters that do not fit together. Not collective."""
    if states.ndim != 2 or len(states) == 0:
        raise InvalidInput(
            f"ReducedSolve: states have shape {tuple(states.shape)}; it must be (num_states, n_owned), one or more."
        )
    if theta.ndim != 2 or len(theta) != len(states):
        raise InvalidInput(
            f"ReducedSolve: theta has shape {tuple(theta.shape)}; it must be ({len(states)}, num_parameters), a row for each of "
            "the states."
        )
    for name, values in (("states", states), ("theta", theta)):
        _check_finite(name, values)


def _shape(values: object) -> str:
    return f"{values.dtype}, {tuple(values.shape)}" if isinstance(values, Tensor) else described(values)


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise InvalidInput(f"ReducedSolve: {name} contains values that are not finite.")


def _factorised(A: Tensor, is_symmetric: bool) -> Factor:
    """Cholesky's factor where there is one, else those of Gauss."""
    if is_symmetric:
        lower, failed = torch.linalg.cholesky_ex(A)
        if not bool(failed.any()):
            return (lower,)
    factors, pivots, _ = torch.linalg.lu_factor_ex(A)  # solutions tell of those that are singular
    return factors, pivots


def _decompose(states: Tensor, rank: int | None, comm: Any) -> tuple[Tensor, Tensor, float]:
    """The mean of states, the orthonormal directions in which they vary most, and the share of variance left out. Collective."""
    mean = states.mean(0)
    rows = states - mean
    values, vectors = torch.linalg.eigh(all_sum(rows @ rows.T, comm))
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    least = torch.maximum(NEGLIGIBLE * values[0], ROUNDING * all_sum(states.square().sum(), comm))
    kept = int((values > least).sum())
    if kept == 0:
        raise InvalidInput(f"ReducedSolve: the {len(states)} states are all the same; give those of several parameters.")
    kept = kept if rank is None else min(rank, kept)
    modes = (vectors[:, :kept] / values[:kept].sqrt()).T @ rows
    return mean, modes, float(values[kept:].sum() / values.sum())


def _points(theta: Tensor, num_features: int) -> Tensor:
    """Parameters that tell features apart: the mean of the given ones, unit steps from it along each axis, then longer ones."""
    mean, unit = theta.mean(0), torch.eye(theta.shape[1], dtype=theta.dtype)
    points, step = [mean[None]], 1.0
    while sum(len(part) for part in points) < 1 + num_features:
        points.append(mean + step * unit)
        step = -step if step > 0 else 1.0 - step
    return torch.cat(points)


def _is_symmetric(parts: Tensor) -> bool:
    """Whether matrices are their own transposes, up to rounding."""
    return bool((parts - parts.mT).abs().max() <= 1e-9 * parts.abs().max())
