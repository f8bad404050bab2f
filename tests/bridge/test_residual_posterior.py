"""What a posterior built from residuals gets wrong, and both corrections, by quadrature.

-(kappa u')' = 1 on (-1, 1), u(+-1) = 0, log kappa = m ~ N(0, 1), one sensor u(0) with noise 0.05, the datum of m = 0.
With p(r = 0 | u, m) = N(r(u, m); 0, eps^2 I), eps = 1e-4, and a flat p(u), all of u is integrated out in closed form: for
r = K u + c,

    int N(K u + c; 0, eps^2) N(y; b . u, sigma^2) du = |det K|^-1 N(y; -b . K^-1 c, sigma^2 + eps^2 |K^-T b|^2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi

EPS, NOISE = 1e-4, 0.05
BAYES = (0.015, 0.102)
# From the formula above with NumPy's inverse of tridiag(-1, 2, -1) / h and 2001 points of quadrature on [-1.5, 1.5].
UNCORRECTED = {10: (-0.068, 0.090), 20: (-0.141, 0.082), 40: (-0.255, 0.070), 80: (-0.413, 0.057)}
GRID = torch.linspace(-1.2, 1.2, 161, dtype=torch.float64)
every_mesh = pytest.mark.parametrize("elements", UNCORRECTED)


@dataclass(frozen=True)
class Rod:
    residual: fem_vi.Residual
    observe: fem_vi.PointObservation
    size: int

    @staticmethod
    def create(elements: int) -> Rod:
        msh = mesh.create_interval(MPI.COMM_SELF, elements, [-1.0, 1.0])
        V = fem.functionspace(msh, ("Lagrange", 1))
        u, m, v = fem.Function(V), fem.Constant(msh, 0.0), ufl.TestFunction(V)
        F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
        ends = fem.locate_dofs_geometrical(V, lambda x: np.isclose(abs(x[0]), 1.0))
        pde = fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(0.0, ends, V)])
        return Rod(fem_vi.Residual(pde), fem_vi.PointObservation(V, [[0.0]]), pde.unknown.size)

    def mean_and_sd(self, r: Callable[[Tensor, Tensor], Tensor], correction: Tensor | float = 0.0) -> tuple[float, float]:
        """Moments of m given r = 0 and the datum, for a function r(u, m) that is affine in u."""
        units = torch.cat([torch.zeros(1, self.size), torch.eye(self.size)]).to(torch.float64)
        at = r(units[:, None, :], GRID)
        c, K = at[0], (at[1:] - at[0]).permute(1, 2, 0)
        b = self.observe(units[1:])[:, 0]
        solved = torch.linalg.solve(K, -c[..., None])[..., 0]
        spread = torch.linalg.solve(K.transpose(1, 2), b.expand(len(GRID), -1)[..., None])[..., 0]
        variance = NOISE**2 + EPS**2 * spread.square().sum(-1)
        misfit = 0.5 - solved @ b
        log_weight = -0.5 * GRID**2 - torch.linalg.slogdet(K)[1] - 0.5 * misfit**2 / variance - 0.5 * variance.log() + correction
        weight = torch.softmax(log_weight, 0)
        mean = float(weight @ GRID)
        return mean, float(weight @ (GRID - mean) ** 2) ** 0.5


@every_mesh
def test_the_uncorrected_posterior_gets_worse_on_finer_meshes(elements: int) -> None:
    rod = Rod.create(elements)
    assert rod.mean_and_sd(rod.residual) == pytest.approx(UNCORRECTED[elements], abs=6e-4)


@every_mesh
def test_logdet_makes_it_the_bayesian_one(elements: int) -> None:
    rod = Rod.create(elements)
    correction = rod.residual.logdet(torch.zeros(rod.size, dtype=torch.float64), GRID)
    assert rod.mean_and_sd(rod.residual, correction) == pytest.approx(BAYES, abs=6e-4)


@every_mesh
def test_solution_units_make_it_the_bayesian_one(elements: int) -> None:
    rod = Rod.create(elements)
    assert rod.mean_and_sd(rod.residual.in_solution_units) == pytest.approx(BAYES, abs=6e-4)


def test_a_constant_preconditioner_changes_nothing() -> None:
    rod = Rod.create(20)
    preconditioned = rod.residual.precondition(reference=torch.tensor(0.3, dtype=torch.float64))
    assert rod.mean_and_sd(preconditioned) == pytest.approx(UNCORRECTED[20], abs=6e-4)


def test_logdet_of_the_rod_in_closed_form() -> None:
    """exp(m)^(n - 1) times the determinant of the second difference, n, over h^(n - 1); its slope is n - 1."""
    elements, m = 40, torch.tensor([-0.3, 0.7], dtype=torch.float64, requires_grad=True)
    value = Rod.create(elements).residual.logdet(torch.zeros(elements + 1, dtype=torch.float64), m)
    expected = (elements - 1) * (m.detach() + np.log(elements / 2)) + np.log(elements)
    assert torch.allclose(value, expected, rtol=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), m)
    assert torch.allclose(slope, torch.full((2,), elements - 1.0, dtype=torch.float64), rtol=1e-11)
