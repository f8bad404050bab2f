"""Tempered sequential Monte Carlo against closed forms and quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mpi4py import MPI

from fem_vi.errors import InvalidInput, NotFinite, SolveFailed
from fem_vi.parallel import ProcessGrid
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.mcmc.hmc import HMC
from fem_vi.vi.mcmc.mala import MALA
from fem_vi.vi.mcmc.pcn import PCN
from fem_vi.vi.mcmc.smc import _systematic, smc
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.start import GaussNewton
from tests.vi.helpers import F64, Affine, numbers, split_pair
from tests.vi.test_mcmc import banana, normal_near


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize(("kernel", "moves"), [(HMC(), 3), (HMC(length=0.8), 6), (MALA(), 12), (PCN(), 20)])
def test_affine_evidence_and_means(kernel, moves, near):
    affine = Affine.create()
    problem, exact = affine.problem(), affine.posterior()
    reference = normal_near(problem, affine) if near else None
    tempered = smc(problem, kernel, particles=200, islands=10, moves=moves, reference=reference, seed=2)
    # Errors from the scatter of ten islands: Student's t with nine degrees of freedom.
    assert abs(tempered.log_evidence - affine.log_evidence()) < 4 * tempered.log_evidence_error
    assert tempered.log_evidence_error < 0.1
    z = (tempered.mean - exact.mean) / tempered.mean_error
    assert float(z.abs().max()) < 5.0
    assert float(z.square().mean()) < 4.0
    assert float((tempered.variance / exact.variance - 1).abs().max()) < 0.15
    assert "Islands agree" in tempered.verdict


def test_banana_evidence_by_quadrature():
    problem, mean, variance, log_evidence = banana()
    tempered = smc(problem, particles=250, islands=10)
    assert abs(tempered.log_evidence - log_evidence) < 4 * tempered.log_evidence_error
    assert tempered.log_evidence_error < 0.05
    assert float(((tempered.mean - mean) / tempered.mean_error).abs().max()) < 4.5
    assert float((tempered.variance / variance - 1).abs().max()) < 0.15


def test_evidence_has_honest_errors():
    # 30 runs with other seeds: the estimate of p(y) is unbiased, and errors in units of the stated ones have t_5's spread, 1.29.
    affine = Affine.create()
    problem = affine.problem()
    runs = [smc(problem, PCN(), particles=60, islands=6, moves=4, seed=seed) for seed in range(30)]
    error = np.array([run.log_evidence - affine.log_evidence() for run in runs])
    ratio = np.expm1(error)
    assert abs(ratio.mean()) < 4 * ratio.std() / math.sqrt(len(ratio))
    z = error / np.array([run.log_evidence_error for run in runs])
    assert 0.6 < math.sqrt((z**2).mean()) < 2.2


def test_from_the_posterior_one_step_is_enough():
    affine = Affine.create()
    problem = affine.problem()
    q = FullRankNormal(affine.prior)
    GaussNewton()(problem, q)
    tempered = smc(problem, HMC(), particles=50, islands=2, moves=1, reference=q)
    assert tempered.temperatures == (0.0, 1.0)
    assert tempered.log_evidence == pytest.approx(affine.log_evidence(), abs=1e-8)
    assert tempered.log_evidence_error < 1e-8


def test_systematic_resampling_is_unbiased():
    weights = torch.softmax(numbers(1, 2, 7), 1)
    offsets = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    counts = torch.zeros(2, 7, dtype=F64)
    for offset in offsets:
        index = _systematic(weights, offset.expand(2))
        assert index.shape == (2, 7)
        one = torch.nn.functional.one_hot(index, 7).sum(1).double()
        assert float((one - 7 * weights).abs().max()) < 1.0  # each is kept floor or ceil times
        counts += one / len(offsets)
    torch.testing.assert_close(counts, 7 * weights, atol=0.01, rtol=0.0)


def test_particles_where_the_forward_map_fails_are_left_out():
    # The prior cut off at one: p(y) is that of half-known data times Phi(1).
    def forward(m: torch.Tensor) -> torch.Tensor:
        if bool((m[..., 0] > 1.0).any()):
            raise SolveFailed("no solution above one.")
        return 0.0 * m

    problem = InverseProblem(GaussianVector(torch.zeros(1)), forward, GaussianNoise(1.0), torch.zeros(1))
    tempered = smc(problem, HMC(step_size=0.5), particles=40, islands=6, moves=1)
    assert float(tempered.m.max()) <= 1.0
    exact = math.log(0.5 * (1 + math.erf(math.sqrt(0.5)))) - 0.5 * math.log(2 * math.pi)
    assert abs(tempered.log_evidence - exact) < 5 * tempered.log_evidence_error


def test_a_path_that_is_too_hard_is_told():
    # Two sharp and far modes of very different width, few particles, few moves: islands end up in one or the other.
    prior = GaussianVector(torch.zeros(10))
    affine = Affine.create(10, 8, 0.02)
    assert prior.num_global == 10
    tempered = smc(affine.problem(), PCN(), particles=20, islands=4, moves=1)
    assert tempered.log_evidence_error > 0.5 or int(tempered.ancestors.min()) < 20
    assert "Islands agree" not in tempered.verdict


def test_repeats_prints_and_leaves_the_generator_alone():
    problem = banana()[0]
    state = torch.get_rng_state()
    first = smc(problem, particles=30, islands=3, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    again = smc(problem, particles=30, islands=3, seed=5)
    assert torch.equal(first.m, again.m)
    assert first.cost == again.cost
    assert not torch.equal(first.m, smc(problem, particles=30, islands=3, seed=6).m)
    assert " ".join(str(first).split()).endswith(first.verdict)
    assert first.temperatures[0] == 0.0
    assert first.temperatures[-1] == 1.0
    assert list(first.temperatures) == sorted(set(first.temperatures))
    tree = first.to_arviz()
    assert tree["posterior"]["m"].shape == (3, 30, 2)
    assert tree.attrs["log_evidence"] == first.log_evidence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernel": PCN}, "kernel is"),
        ({"particles": 1}, "particles is 1"),
        ({"islands": 1}, "islands is 1"),
        ({"moves": 0}, "moves is 0"),
        ({"ess": 1.0}, "ess is 1.0"),
        ({"reference": "q"}, "reference is of str"),
        ({"most_temperatures": 0}, "most_temperatures is 0"),
    ],
)
def test_refuses(arguments, words):
    with pytest.raises(InvalidInput, match=words):
        smc(Affine.create().problem(), **arguments)


def test_says_where_it_cannot_go_on():
    with pytest.raises(NotFinite, match="after 2 steps the temperature is"):
        smc(Affine.create(std=0.01).problem(), particles=10, islands=2, most_temperatures=2)
    prior = GaussianVector(torch.zeros(1))
    nowhere = InverseProblem(prior, lambda m: torch.where(m < 9.0, torch.inf, m), GaussianNoise(1.0), torch.zeros(1))
    with pytest.raises(NotFinite, match="every particle of 2 islands"):
        smc(nowhere, particles=10, islands=2)


# Ranks


@pytest.mark.mpi
def test_split_over_ranks():
    results = []
    for problem in split_pair():
        q = MeanFieldNormal(problem.prior)
        GaussNewton()(problem, q)
        with torch.no_grad():
            q.log_scale += 0.1
        for kernel, reference in ((HMC(), q), (PCN(), None)):
            tempered = smc(problem, kernel, particles=20, islands=2, moves=2, reference=reference)
            results.append((problem.prior.gather(tempered.m), tempered.log_evidences, len(tempered.temperatures)))
    for ours, reference in zip(results[:2], results[2:], strict=True):
        assert ours[2] == reference[2]
        torch.testing.assert_close(ours[0], reference[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours[1], reference[1], rtol=1e-7, atol=1e-7)


@pytest.mark.mpi
def test_islands_shared_out_over_ranks_are_those_of_one():
    grid = ProcessGrid.create(MPI.COMM_WORLD, 1)
    problem = banana()[0]
    shared = smc(problem, particles=30, islands=4, grid=grid)
    alone = smc(problem, particles=30, islands=4)
    torch.testing.assert_close(shared.m, alone.m)
    torch.testing.assert_close(shared.log_evidences, alone.log_evidences)
    assert shared.temperatures == pytest.approx(alone.temperatures)
    assert shared.cost == alone.cost
    assert torch.equal(shared.ancestors, alone.ancestors)
