"""Affine-Gaussian on a mesh, 2,000 unknowns and 40 data: every normal family against closed forms, on any number of ranks.

An unknown source f in -div(grad u) + u = f, seen at 40 points, and for the sparse precision the field itself at 40 points. The
closed forms are dense algebra in the whitened coordinates, with J from 40 adjoint solves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi

COMM = MPI.COMM_WORLD
F64 = torch.float64
SENSORS = np.random.default_rng(5).uniform(0.05, 0.95, (40, 2))
NOISE = np.random.default_rng(6).standard_normal(40)
STD = 0.05


def inversion(comm: MPI.Comm, *, through_pde: bool = True) -> fem_vi.InverseProblem:
    """44 by 44 squares: 2,025 unknowns."""
    V = fem.functionspace(mesh.create_unit_square(comm, 44, 44), ("Lagrange", 1))
    observe = fem_vi.PointObservation(V, SENSORS)
    prior = fem_vi.MaternField(V, std=2.0, length=0.3, mean=0.5)
    y = torch.from_numpy(0.8 + np.sin(3 * SENSORS[:, 0]) * np.cos(4 * SENSORS[:, 1]) + STD * NOISE)
    if not through_pde:
        return fem_vi.InverseProblem(prior, observe, fem_vi.GaussianNoise(STD), y)
    u, f, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + (u - f) * v * ufl.dx
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[f]))
    return fem_vi.InverseProblem(prior, lambda m: observe(solve(m)), fem_vi.GaussianNoise(STD), y)


@dataclass(frozen=True)
class Exact:
    """The answer in the order of the mesh file.

    Attributes:
        mean: Posterior mean, `(n,)`.
        variance: Pointwise, `(n,)`.
        prior_sd: Pointwise, `(n,)`.
        log_evidence: log p(y).
        added: Diagonal of the precision that data add in whitened coordinates, `(n,)`.
    """

    mean: Tensor
    variance: Tensor
    prior_sd: Tensor
    log_evidence: float
    added: Tensor


@cache
def exact(*, through_pde: bool = True) -> Exact:
    """Closed forms, by Woodbury in the 40 data, on one rank."""
    problem = inversion(MPI.COMM_SELF, through_pde=through_pde)
    prior = problem.prior
    xi = torch.zeros(prior.event_shape, dtype=F64, requires_grad=True)
    prediction = problem.forward(prior.unwhiten(xi))
    J = torch.stack([torch.autograd.grad(each, xi, retain_graph=True)[0] for each in prediction]) / STD
    r = (problem.y - prediction.detach()) / STD
    inner = torch.eye(40, dtype=F64) + J @ J.T
    mu = J.T @ torch.linalg.solve(inner, r)
    removed = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), J, upper=False)
    fields = prior.unwhiten(removed) - prior.mean
    log_evidence = -0.5 * float(r @ torch.linalg.solve(inner, r) + torch.logdet(2 * math.pi * STD**2 * inner))
    return Exact(
        mean=prior.gather(prior.unwhiten(mu)),
        variance=prior.gather(prior.variance - fields.square().sum(0)),
        prior_sd=prior.gather(prior.variance.sqrt()),
        log_evidence=log_evidence,
        added=prior.gather(J.square().sum(0)),
    )


def check(posterior: torch.nn.Module, answer: Exact, *, variance: Tensor | None = None) -> None:
    """Means to 1e-3 prior standard deviations, variances to 1 %."""
    gather, q = posterior.prior.gather, posterior()
    with torch.no_grad():
        assert ((gather(q.mean) - answer.mean).abs() / answer.prior_sd).max() < 1e-3
        expected = answer.variance if variance is None else variance
        assert (gather(q.variance) / expected - 1).abs().max() < 0.01


@torch.no_grad()
def push_mean(posterior: torch.nn.Module) -> None:
    """Push the mean off by half a standard deviation, in a direction drawn from the posterior."""
    torch.manual_seed(1)
    posterior.mu.copy_(posterior().rsample_whitened().lerp(posterior.mu, 0.5))


@pytest.mark.mpi
def test_laplace_and_low_rank_by_natural_gradients_from_it() -> None:
    problem, answer = inversion(COMM), exact()
    posterior = fem_vi.laplace(problem, mode=fem_vi.NewtonCG(threshold=1e-9))
    check(posterior, answer)
    assert posterior.report.search.converged
    assert len(posterior.report.eigenvalues) == 40
    assert posterior.report.log_evidence == pytest.approx(answer.log_evidence, abs=0.01)
    run = fem_vi.fit(problem, posterior, fem_vi.ELBO(samples=4), steps=5, optimizer=fem_vi.NaturalGradient(lr=0.01))
    check(posterior, answer)
    assert run.history[-1].elbo == pytest.approx(answer.log_evidence, abs=0.01)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.mpi
def test_low_rank_comes_back_by_natural_gradients() -> None:
    problem, answer = inversion(COMM), exact()
    posterior = fem_vi.laplace(problem, rank=40, mode=fem_vi.NewtonCG(threshold=1e-9))
    push_mean(posterior)
    with torch.no_grad():  # and scales by a fifth
        posterior.U *= 1.2
    before = float(fem_vi.ELBO(samples=16)(problem, posterior).elbo)
    arguments: dict[str, Any] = {"start": fem_vi.PresentParameters(), "schedule": lambda progress: 1.0}
    optimizer = fem_vi.NaturalGradient(lr=0.06, most=50.0)  # below 2 samples / unknowns
    run = fem_vi.fit(problem, posterior, fem_vi.ELBO(samples=128), steps=199, optimizer=optimizer, **arguments)
    assert before < answer.log_evidence - 100.0
    check(posterior, answer)
    assert run.history[-1].elbo == pytest.approx(answer.log_evidence, abs=0.01)


@pytest.mark.mpi
def test_mean_field_from_laplace() -> None:
    # Its natural gradient has steps below 2e-3 here, where one datum ties a thousand unknowns together; Adam's are elementwise.
    problem, answer = inversion(COMM), exact()
    posterior = fem_vi.MeanFieldNormal(problem.prior)
    objective = fem_vi.ELBO(samples=16, noise=fem_vi.Antithetic())  # the mean's noise is odd, and cancels
    fem_vi.fit(problem, posterior, objective, steps=8)
    gather = problem.prior.gather
    assert ((gather(posterior().mean.detach()) - answer.mean).abs() / answer.prior_sd).max() < 1e-3
    torch.testing.assert_close((2 * gather(posterior.log_scale.detach())).exp(), 1 / (1 + answer.added), rtol=0.01, atol=0.0)


@pytest.mark.mpi
def test_sparse_precision_of_local_data() -> None:
    problem, answer = inversion(COMM, through_pde=False), exact(through_pde=False)
    posterior = fem_vi.SparsePrecisionNormal(problem.prior)
    run = fem_vi.fit(problem, posterior, fem_vi.ELBO(samples=2), steps=3)
    check(posterior, answer)
    assert run.history[-1].elbo == pytest.approx(answer.log_evidence, abs=0.01)


@pytest.mark.mpi
def test_full_rank_by_natural_gradients_from_laplace() -> None:
    problem, answer = inversion(COMM), exact()
    posterior = fem_vi.FullRankNormal(problem.prior)
    run = fem_vi.fit(problem, posterior, fem_vi.ELBO(samples=4), steps=1, optimizer=fem_vi.NaturalGradient(lr=0.01))
    check(posterior, answer)
    assert run.history[-1].elbo == pytest.approx(answer.log_evidence, abs=0.01)
    # The mean pushed off by half a standard deviation of the posterior: a full step takes it back, and a pair of draws leaves the
    # covariance where it is.
    push_mean(posterior)
    arguments: dict[str, Any] = {"start": fem_vi.PresentParameters(), "schedule": lambda progress: 1.0}
    objective, optimizer = fem_vi.ELBO(samples=2, noise=fem_vi.Antithetic()), fem_vi.NaturalGradient(lr=1.0, most=1e4)
    run = fem_vi.fit(problem, posterior, objective, steps=2, optimizer=optimizer, **arguments)
    assert run.history[0].elbo < answer.log_evidence - 100.0
    check(posterior, answer)
    assert run.history[-1].elbo == pytest.approx(answer.log_evidence, abs=0.01)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.mpi
def test_full_rank_comes_back_by_natural_gradients() -> None:
    problem, answer = inversion(COMM), exact()
    posterior = fem_vi.FullRankNormal(problem.prior)
    fem_vi.GaussNewton()(problem, posterior)
    push_mean(posterior)
    with torch.no_grad():  # and scales by a twentieth
        posterior.log_diagonal += 0.05
        posterior.below *= math.exp(0.05)
    before = float(fem_vi.ELBO(samples=16)(problem, posterior).elbo)
    arguments: dict[str, Any] = {"start": fem_vi.PresentParameters(), "schedule": lambda progress: 1.0}
    objective = fem_vi.ELBO(samples=512, noise=fem_vi.Antithetic())  # the mean's error is no noise in the scale
    optimizer = fem_vi.NaturalGradient(lr=0.1, most=50.0)
    run = fem_vi.fit(problem, posterior, objective, steps=80, optimizer=optimizer, **arguments)
    assert before < answer.log_evidence - 100.0
    check(posterior, answer)
    assert run.history[-1].elbo == pytest.approx(answer.log_evidence, abs=0.01)


def test_full_rank_of_latent_variables() -> None:
    """60 coefficients of random fields of the prior in place of the nodes: a latent vector, replicated."""
    field = inversion(MPI.COMM_SELF)
    basis = torch.linalg.qr(torch.randn(field.prior.num_global, 60, dtype=F64, generator=torch.Generator().manual_seed(2))).Q.T
    prior = fem_vi.GaussianVector(torch.zeros(60, dtype=F64))

    def forward(z: Tensor) -> Tensor:
        return field.forward(field.prior.unwhiten(z @ basis))

    problem = fem_vi.InverseProblem(prior, forward, fem_vi.GaussianNoise(STD), field.y)
    posterior = fem_vi.FullRankNormal(prior)
    at_zero = forward(torch.zeros(60, dtype=F64))
    J, r = (forward(torch.eye(60, dtype=F64)) - at_zero).T / STD, (problem.y - at_zero) / STD
    precision = torch.eye(60, dtype=F64) + J.T @ J
    inner = torch.eye(40, dtype=F64) + J @ J.T
    log_evidence = -0.5 * float(r @ torch.linalg.solve(inner, r) + torch.logdet(2 * math.pi * STD**2 * inner))
    fem_vi.GaussNewton()(problem, posterior)
    with torch.no_grad():
        posterior.mu += 0.05
        posterior.log_diagonal += 0.2
    before = float(fem_vi.ELBO(samples=16)(problem, posterior).elbo)
    arguments: dict[str, Any] = {"start": fem_vi.PresentParameters(), "schedule": lambda progress: 1.0}
    optimizer = fem_vi.NaturalGradient(lr=0.3)
    run = fem_vi.fit(problem, posterior, fem_vi.ELBO(samples=32), steps=80, optimizer=optimizer, **arguments)
    covariance = torch.linalg.inv(precision)
    q = posterior()
    assert before < log_evidence - 1.0
    assert (q.mean.detach() - covariance @ J.T @ r).abs().max() < 1e-3
    torch.testing.assert_close(q.variance.detach(), covariance.diagonal(), rtol=0.01, atol=0.0)
    assert run.history[-1].elbo == pytest.approx(log_evidence, abs=0.01)
