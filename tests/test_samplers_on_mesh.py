"""Reference samplers over fields: against dense algebra, on any number of ranks, and as the mesh is refined."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mpi4py import MPI

import fem_vi
from tests.test_posterior_on_mesh import exact_source, log_diffusion, source_inversion

COMM = MPI.COMM_WORLD


def reference_of(problem: fem_vi.InverseProblem, scale: float = 1.0) -> fem_vi.LowRankNormal:
    """The linearised posterior, wider by a factor where data see."""
    q = fem_vi.LowRankNormal(problem.prior, rank=30)
    fem_vi.GaussNewton()(problem, q)
    with torch.no_grad():
        q.U *= scale
    return q


@pytest.mark.parametrize(
    "kernel", [fem_vi.HMC(step_size=0.8), pytest.param(fem_vi.PCN(step_size=1.0), marks=pytest.mark.mpi)], ids=["HMC", "PCN"]
)
def test_field_posterior_is_that_of_dense_algebra(kernel: fem_vi.HMC | fem_vi.PCN) -> None:
    exact, problem = exact_source(), source_inversion(COMM).problem
    steps = 6 if isinstance(kernel, fem_vi.HMC) else 12
    samples = fem_vi.sample(problem, kernel, chains=40, draws=steps, warmup=4, reference=reference_of(problem, 0.9), seed=1)
    gather = problem.prior.gather
    error = gather(samples.m.mean(1)).std(0) / math.sqrt(40)
    z = (gather(samples.mean) - exact.mean) / error
    # 169 correlated unknowns, each Student's t with 39 degrees of freedom.
    assert float(z.abs().max()) < 4.5
    assert 0.3 < float(z.square().mean()) < 3.0
    assert float((gather(samples.variance) / exact.variance).mean()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.mpi
def test_a_cheap_model_that_is_wrong_does_not_show() -> None:
    # Predictions that are off by 0.4 standard deviations of the noise, all to one side, move the mean of the source.
    exact, inversion = exact_source(), source_inversion(COMM)
    problem, off = inversion.problem, 0.4 * inversion.std
    cheap = fem_vi.InverseProblem(problem.prior, lambda m: problem.forward(m) + off, problem.likelihood, problem.y)
    kernel, z = fem_vi.MALA(step_size=1.3), []
    for posed, mover in ((problem, fem_vi.DelayedAcceptance(cheap, kernel)), (cheap, kernel)):
        samples = fem_vi.sample(posed, mover, chains=40, draws=25, warmup=4, reference=reference_of(problem, 0.9), seed=1)
        means = problem.prior.gather(samples.m).mean((1, 2))
        z.append(float((means.mean() - exact.mean.mean()) / (means.std() / math.sqrt(40))))
    assert abs(z[0]) < 3.0
    assert abs(z[1]) > 4.0


@pytest.mark.mpi
def test_field_evidence_is_that_of_dense_algebra() -> None:
    exact, problem = exact_source(), source_inversion(COMM).problem
    tempered = fem_vi.smc(
        problem, fem_vi.HMC(step_size=0.8), particles=12, islands=4, moves=1, reference=reference_of(problem, 0.9)
    )
    assert abs(tempered.log_evidence - exact.log_evidence) < 6 * tempered.log_evidence_error
    assert tempered.log_evidence_error < 0.4


@pytest.mark.mpi
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("kernel", [fem_vi.HMC(step_size=0.4), fem_vi.MALA(step_size=0.2), fem_vi.PCN(step_size=0.2)])
def test_numbers_do_not_depend_on_the_ranks(kernel: Any, delayed: bool) -> None:
    chains = []
    for comm in (COMM, MPI.COMM_SELF):
        problem = log_diffusion(comm)
        mover = kernel
        if delayed:
            cheap = fem_vi.InverseProblem(problem.prior, problem.forward, fem_vi.GaussianNoise(0.1), problem.y)
            mover = fem_vi.DelayedAcceptance(cheap, kernel)
        samples = fem_vi.sample(problem, mover, chains=2, draws=2, warmup=2, adaptation=fem_vi.LearnDiagonal(), seed=4)
        chains.append((problem.prior.gather(samples.m), samples.log_joint, samples.acceptance))
    for ours, reference in zip(*chains, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.mpi
def test_a_dense_reference_over_ranks() -> None:
    chains = []
    for comm in (COMM, MPI.COMM_SELF):
        problem = log_diffusion(comm)
        q = fem_vi.FullRankNormal(problem.prior)
        fem_vi.GaussNewton()(problem, q)
        start = problem.prior.unwhiten(0.5 * q.mu.detach()).expand(2, -1)
        samples = fem_vi.sample(problem, fem_vi.HMC(step_size=0.2), chains=2, draws=2, warmup=0, reference=q, start=start, seed=4)
        chains.append((problem.prior.gather(samples.m), samples.log_joint, samples.acceptance))
    assert float(samples.acceptance.max()) > 0.0
    for ours, reference in zip(*chains, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.mpi
def test_groups_of_ranks_with_a_mesh_each() -> None:
    grid = fem_vi.ProcessGrid.create(COMM, 1)
    problem = log_diffusion(grid.mesh_comm)
    kernel = fem_vi.MALA()
    shared = fem_vi.sample(problem, kernel, chains=4, draws=4, warmup=4, grid=grid)
    alone = fem_vi.sample(problem, kernel, chains=4, draws=4, warmup=4)
    torch.testing.assert_close(shared.m, alone.m, rtol=1e-8, atol=1e-8)
    assert shared.cost == alone.cost
    assert shared.to_arviz()["posterior"]["m"].shape == (4, 4, problem.prior.num_global)


def test_acceptance_does_not_change_with_the_mesh() -> None:
    # The same inversion on h, h / 2 and h / 4, the same angle of a step.
    rates = []
    for n in (6, 12, 24):
        problem = source_inversion(MPI.COMM_SELF, n, std=0.1).problem
        reference = reference_of(problem, 0.5)
        samples = fem_vi.sample(problem, fem_vi.PCN(step_size=0.5), chains=40, draws=15, warmup=10, reference=reference)
        rates.append(float(samples.acceptance.mean()))
    assert 0.2 < rates[-1] < 0.9
    assert max(rates) - min(rates) < 0.05
