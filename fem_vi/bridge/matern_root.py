"""The root of a Matern covariance on a mesh: from white noise to a field of variance about one, its inverse and its determinant.

With the stiffness matrix S of -div(H grad), the lumped mass D, and the lumped boundary mass B times sqrt(n'Hn) / 1.42, let

    K_s = S + s kappa^2 D + kappa B,      A = kappa^-2 D^(-1/2) K_1 D^(-1/2),   whose eigenvalues are at least one.

The stochastic PDE (kappa^2 - div(H grad))^(alpha/2) x = white noise becomes y = a kappa^(-d/2) D^(-1/2) r(A) xi, where r(x) is
x^(-alpha/2), or a rational function close to it, and a makes the variance one far from the boundary. Its factors are

    A^-1 = kappa^2 D^(1/2) K_1^-1 D^(1/2),      (A + z)(A + p)^-1 = I + (z - p) kappa^2 D^(1/2) K_(1+p)^-1 D^(1/2),

one sparse solve each, and so are those of the inverse, where z and p change places.

The derivative for kappa is that of the factors: with x = K_s^-1 b and a cotangent g of x let lam = K_s^-1 g; then
dL/db = lam and dL/dkappa = -lam' (2 s kappa D + B) x, where K_s' is diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import ufl
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from fem_vi.bridge.layout import all_sum, as_numpy, localise, num_global
from fem_vi.bridge.linear import apply_linear
from fem_vi.parallel import max_over_ranks
from fem_vi.pde.fields import boundary_mass, lumped_mass
from fem_vi.pde.inputs import Array
from fem_vi.pde.petsc_options import Option
from fem_vi.pde.rational import RationalPower, rational_power
from fem_vi.pde.shifted import ShiftedMatrix

ROBIN = 1.0 / 1.42
"""Robin coefficient over kappa (Roininen, Huttunen, Lasanen 2014)."""
MARGIN = 4.0
"""How much further than the eigenvalues the interval of a rational power reaches."""


class MaternRoot:
    """y = R(kappa) xi, where y has variance about one: R, its inverse and its determinant; differentiable in kappa.

    Args:
        V: Scalar continuous Lagrange space of degree 1.
        alpha: Power of the operator, more than d / 2.
        metric: H, a UFL tensor; None for the identity.
        least_kappa: The smallest kappa that will be asked for; rational powers hold from there up.
        tolerance: Largest relative error of the standard deviation of any mode, where alpha / 2 is not whole.
        petsc_options: Of the solver for K_s.

    MPI: Collective.
    """

    def __init__(
        self, V: Any, *, alpha: float, metric: Any, least_kappa: float, tolerance: float, petsc_options: Mapping[str, Option]
    ) -> None:
        self.V, self.comm, self.alpha = V, V.mesh.comm, alpha
        self.dimension = V.mesh.topology.dim
        x, v, n = ufl.TrialFunction(V), ufl.TestFunction(V), ufl.FacetNormal(V.mesh)
        flux = ufl.grad(x) if metric is None else metric * ufl.grad(x)
        self._matrix = ShiftedMatrix(ufl.inner(flux, ufl.grad(v)) * ufl.dx, petsc_options, capacity=4)
        self.mass = torch.from_numpy(lumped_mass(V))
        outward = 1.0 if metric is None else ufl.sqrt(ufl.dot(n, metric * n))
        self._boundary = ROBIN * torch.from_numpy(boundary_mass(V, outward))
        self._volume = 1.0 if metric is None else (torch.from_numpy(lumped_mass(V, ufl.det(metric))) / self.mass) ** 0.25
        self._least_kappa, self._tolerance = least_kappa, tolerance
        nu = alpha - self.dimension / 2
        self._amplitude = math.sqrt(math.gamma(alpha) * (4 * math.pi) ** (self.dimension / 2) / math.gamma(nu))

    @cached_property
    def power(self) -> RationalPower:
        """r. Collective when first asked for."""
        bound = 1.0
        if abs(self.alpha / 2 - round(self.alpha / 2)) > 1e-12:
            weights = as_numpy(self.mass)
            rows = self._matrix.row_sums(weights) / self._least_kappa**2
            largest = max_over_ranks(self.comm, float(np.max(as_numpy(self._boundary) / weights, initial=0.0)))
            bound = MARGIN * (1.0 + rows + largest / self._least_kappa)
            bound = 10.0 ** math.ceil(math.log10(bound))
        power = rational_power(self.alpha / 2, max(bound, 10.0), self._tolerance)
        self._matrix.reserve(2 * (2 * len(power.poles) + 1))
        return power

    def apply(self, kappa: Tensor, xi: Tensor) -> Tensor:
        """R xi, `(*batch, n_owned)`, kappa a scalar. Collective."""
        local = localise(kappa, self.comm)
        y = xi / self.mass.sqrt()
        for _ in range(self.power.whole):
            y = local**2 * self._solve(kappa, 1.0, self.mass * y)
        for zero, pole in zip(self.power.zeros, self.power.poles, strict=True):
            y = y + (zero - pole) * local**2 * self._solve(kappa, 1.0 + pole, self.mass * y)
        return self._scale(local) * y

    def invert(self, kappa: Tensor, y: Tensor) -> Tensor:
        """R^-1 y, `(*batch, n_owned)`. Collective."""
        local = localise(kappa, self.comm)
        x = y / self._scale(local)
        for zero, pole in zip(self.power.zeros, self.power.poles, strict=True):
            x = x + (pole - zero) * local**2 * self._solve(kappa, 1.0 + zero, self.mass * x)
        for _ in range(self.power.whole):
            product = self._map(self._matrix.multiply, x) + self._diagonal(local, 1.0) * x
            x = product / (local**2 * self.mass)
        return self.mass.sqrt() * x

    def logdet(self, kappa: float) -> float:
        """log |det R|, replicated. Collective.

        Raises:
            SolveFailed: Where the solver is no factorisation by MUMPS.
        """
        size = num_global(self.V)
        log_mass = float(all_sum(self.mass.log().sum(), self.comm))

        def shifted(s: float) -> float:
            d = as_numpy(self._diagonal(torch.tensor(kappa, dtype=torch.float64), s))
            return self._matrix.logdet((kappa, s), d) - 2.0 * size * math.log(kappa) - log_mass

        power = self.power
        value = -0.5 * log_mass - power.whole * (shifted(1.0) if power.whole else 0.0)
        value += sum(shifted(1.0 + z) - shifted(1.0 + p) for z, p in zip(power.zeros, power.poles, strict=True))
        scale = torch.as_tensor(self._scale(torch.tensor(kappa, dtype=torch.float64))).log().expand(self.mass.shape)
        return value + float(all_sum(scale.sum(), self.comm))

    def sparse_root(self, kappa: float) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64], Array], Tensor]:
        """K and w with R^-1 = D^(-1/2) K diag(w), where alpha is 2: the owned rows of K, and w, `(n_owned,)`. Collective."""
        at = torch.tensor(kappa, dtype=torch.float64)
        rows = self._matrix.owned_rows(as_numpy(self._diagonal(at, 1.0)))
        return rows, (1.0 / (self._scale(at) * kappa**2)).expand(self.mass.shape)

    def symmetric(self, kappa: float, xi: Tensor) -> Tensor:
        """The symmetric matrix whose square has the variances on its diagonal, but for `spread`. Collective."""
        return self.apply(torch.tensor(kappa, dtype=torch.float64), xi) / self.spread

    @property
    def spread(self) -> Tensor:
        """R is this diagonal, `(n_owned,)`, times a symmetric matrix."""
        return torch.as_tensor(self._volume) / self.mass.sqrt()

    def _scale(self, kappa: Tensor) -> Tensor:
        scale = self.power.scale * self._amplitude * kappa ** (-self.dimension / 2)
        return torch.as_tensor(scale * self._volume)

    def _diagonal(self, kappa: Tensor, s: float) -> Tensor:
        return s * kappa**2 * self.mass + kappa * self._boundary

    def _slope(self, kappa: Tensor, s: float) -> Tensor:
        return 2.0 * s * kappa * self.mass + self._boundary

    def _solve(self, kappa: Tensor, s: float, b: Tensor) -> Tensor:
        """K_s^-1 b."""
        if kappa.requires_grad or forward_ad.unpack_dual(kappa).tangent is not None:
            return _Solve.apply(self, s, kappa, b)  # type: ignore[no-any-return]
        return self._map(lambda rows: self._inverse(float(kappa.detach()), s, rows), b)

    def _inverse(self, kappa: float, s: float, rows: Array) -> Array:
        d = as_numpy(self._diagonal(torch.tensor(kappa, dtype=torch.float64), s))
        return self._matrix.solve((kappa, s), d, rows)

    def _map(self, symmetric: Callable[[Array], Array], x: Tensor) -> Tensor:
        """A symmetric matrix, its own adjoint, times field tensors with any batch axes."""

        def rows(values: Tensor) -> Tensor:
            flat = as_numpy(values.reshape(math.prod(values.shape[:-1]), values.shape[-1]))  # counted: a rank may own nothing
            return torch.from_numpy(symmetric(flat)).reshape(values.shape)

        return apply_linear(rows, rows, x)


class _Solve(torch.autograd.Function):
    """K_s(kappa)^-1 b, differentiable in both to any order."""

    @staticmethod
    def forward(root: MaternRoot, s: float, kappa: Tensor, b: Tensor) -> Tensor:
        rows = as_numpy(b.reshape(math.prod(b.shape[:-1]), b.shape[-1]))
        return torch.from_numpy(root._inverse(float(kappa.detach()), s, np.array(rows))).reshape(b.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[MaternRoot, float, Tensor, Tensor], output: Tensor) -> None:
        ctx.root, ctx.s, kappa, _ = inputs
        ctx.save_for_backward(kappa, output)
        ctx.save_for_forward(kappa, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, Tensor]:
        kappa, x = ctx.saved_tensors
        lam = _Solve.apply(ctx.root, ctx.s, kappa, grads[0])
        slope = ctx.root._slope(localise(kappa, ctx.root.comm), ctx.s)
        return None, None, -all_sum((slope * lam * x).sum(), ctx.root.comm), lam

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        kappa, x = ctx.saved_tensors
        kappa_dot = torch.zeros_like(kappa) if tangents[2] is None else tangents[2]
        b_dot = torch.zeros_like(x) if tangents[3] is None else tangents[3]
        moved = b_dot - kappa_dot * ctx.root._slope(kappa, ctx.s) * x
        return _Solve.apply(ctx.root, ctx.s, kappa, moved)  # type: ignore[no-any-return]
