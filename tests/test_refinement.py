"""A nonlinear inversion on h, h/2 and h/4: what it finds converges, and what it is told need not change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.helpers import boundary_dofs, everywhere

COMM = MPI.COMM_WORLD
F64 = torch.float64
SENSORS = np.stack(np.meshgrid([0.25, 0.5, 0.75], [0.25, 0.5, 0.75]), axis=-1).reshape(-1, 2)  # nodes of every mesh here
PROBES = [[0.5, 0.5], [0.25, 0.75], [0.75, 0.5]]


def inversion(comm: MPI.Comm, n: int, std: float) -> fem_vi.InverseProblem:
    """-div(exp(m) grad u) = 10, u = 0 on the boundary, with data that no mesh has made."""
    V = fem.functionspace(mesh.create_unit_square(comm, n, n), ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - 10.0 * v * ufl.dx
    bc = fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[bc]))
    observe = fem_vi.PointObservation(V, SENSORS)
    x, y = SENSORS.T
    heads = 11.0 * x * (1 - x) * y * (1 - y) * (1 + 0.5 * np.sin(3 * x - 2 * y))
    prior = fem_vi.MaternField(V, std=1.0, length=0.4)
    return fem_vi.InverseProblem(prior, lambda m: observe(solve(m)), fem_vi.GaussianNoise(std), torch.from_numpy(heads))


@pytest.mark.parametrize(
    "comm", [MPI.COMM_SELF, pytest.param(COMM, marks=[pytest.mark.mpi, pytest.mark.long])], ids=["one rank", "all ranks"]
)
def test_divergence_misfit_and_statistics_converge(comm: MPI.Comm) -> None:
    rows = []
    for n in (8, 16, 32):
        problem = inversion(comm, n, 0.05)
        torch.manual_seed(0)
        q = fem_vi.LowRankNormal(problem.prior, rank=9)
        fem_vi.GaussNewton()(problem, q)
        probe = fem_vi.PointObservation(problem.prior.V, PROBES)
        with torch.no_grad():
            law = q()
            misfit = -problem.log_likelihood(law.mean)
            rows.append(torch.cat([torch.stack([law.kl_to_prior(), misfit]), probe(law.mean), probe(law.variance.sqrt())]))
    coarse, fine = (rows[1] - rows[0]).abs(), (rows[2] - rows[1]).abs()
    assert float(rows[2][0]) > 3.0, "the data say something"
    assert bool((fine < 0.7 * coarse).all()), (coarse, fine)  # measured 0.2 to 0.4, and 0.6 for deviations
    assert bool((fine[2:] < 0.03).all()), fine
    assert float(fine[0] / rows[2][0]) < 0.02


def descended(problem: fem_vi.InverseProblem, step: float, whitened: bool) -> float:
    """The value that twelve steps of gradient descent from the prior mean reach, infinite where they are too long."""
    prior = problem.prior
    x = torch.zeros(prior.event_shape, dtype=F64, requires_grad=True)

    def value() -> Tensor:
        m = prior.unwhiten(x) if whitened else x
        xi = x if whitened else prior.whiten(x)
        return 0.5 * prior.all_sum(xi.square().sum()) - problem.log_likelihood(m)

    optimizer = torch.optim.SGD([x], lr=step)
    try:
        for _ in range(12):
            optimizer.zero_grad()
            value().backward()
            optimizer.step()
        with torch.no_grad():
            return float(value())
    except (fem_vi.SolveFailed, fem_vi.InvalidInput):
        return math.inf


def test_optimal_step_does_not_change() -> None:
    """In whitened coordinates one step is best on every mesh; in coefficients the best shrinks with the cells."""
    best, reached, in_coefficients = [], [], []
    for n in (8, 16, 32):
        problem = inversion(MPI.COMM_SELF, n, 0.2)
        steps = [0.2, 0.1, 0.05, 0.025]
        values = [descended(problem, step, whitened=True) for step in steps]
        best.append(steps[int(np.argmin(values))])
        reached.append(min(values))
        shorter = [0.25**k for k in range(1, 6)]
        in_coefficients.append(shorter[int(np.argmin([descended(problem, step, whitened=False) for step in shorter]))])
    assert best[0] == best[1] == best[2]
    assert steps[0] > best[0] > steps[-1], "the best is none of the ends"
    assert abs(reached[2] - reached[1]) < 0.6 * abs(reached[1] - reached[0])
    assert in_coefficients[0] >= 4 * in_coefficients[1] >= 16 * in_coefficients[2]
