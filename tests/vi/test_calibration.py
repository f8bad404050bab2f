"""Calibration of whole inference chains on affine problems, where the exact answer is known."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI

from fem_vi.errors import InvalidInput
from fem_vi.vi.calibration import calibrate
from fem_vi.vi.fit import fit
from fem_vi.vi.laplace import laplace
from fem_vi.vi.mcmc.chains import sample
from fem_vi.vi.mcmc.hmc import HMC
from fem_vi.vi.objective import ELBO
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.start import GaussNewton
from tests.vi.helpers import Affine, split_pair


def laplace_with(shift: float = 0.0, widen: float = 0.0):
    """The exact posterior of an affine problem, moved and widened (in log standard deviations)."""

    def infer(problem, seed):
        q = FullRankNormal(problem.prior)
        GaussNewton()(problem, q)
        with torch.no_grad():
            q.mu += shift
            q.below *= 1.0 if widen == 0.0 else torch.tensor(widen).exp()
            q.log_diagonal += widen
        return q

    return infer


def test_exact_posteriors_are_calibrated():
    calibration = calibrate(Affine.create(3, 2).problem(), laplace_with(), repeats=300, seed=1)
    assert min(calibration.p_values) > 0.01
    assert calibration.ranks.shape == (300, 4)
    assert int(calibration.ranks.min()) >= 0
    assert int(calibration.ranks.max()) <= 99
    for covered, level in zip(calibration.coverage, calibration.levels, strict=True):
        # Four quantities of 300 repeats, not independent: at least 300 numbers' worth.
        assert abs(covered - level) < 3.5 * (level * (1 - level) / 300) ** 0.5
    assert "No sign" in calibration.verdict
    assert " ".join(str(calibration).split()).endswith(calibration.verdict)


@pytest.mark.parametrize(
    ("shift", "widen", "words"),
    [(0.0, -0.7, "too narrow"), (0.0, 0.7, "too wide"), (0.4, 0.0, "biased high"), (-0.4, 0.0, "biased low")],
)
def test_wrong_posteriors_are_found(shift, widen, words):
    def first(problem, m):
        return problem.prior.whiten(m)[:, :1]

    calibration = calibrate(Affine.create(3, 2).problem(), laplace_with(shift, widen), repeats=150, quantities=first)
    assert max(calibration.p_values) < 1e-3
    assert words in calibration.verdict


def test_the_log_likelihood_sees_what_single_unknowns_do_not():
    # The prior in place of the posterior: each unknown's rank is uniform all the same.
    calibration = calibrate(Affine.create(3, 2).problem(), lambda problem, seed: problem.prior, repeats=200)
    assert min(calibration.p_values[:3]) > 0.01
    assert calibration.p_values[3] < 1e-6
    assert "log p(y | m)" in calibration.verdict


def test_a_chain_of_fits_is_calibrated():
    def infer(problem, seed):
        return fit(problem, FullRankNormal(problem.prior), ELBO(samples=4), steps=2, seed=seed).posterior

    assert min(calibrate(Affine.create(3, 2).problem(), infer, repeats=100, draws=49).p_values) > 0.01


def test_a_chain_of_samplers_is_calibrated():
    def infer(problem, seed):
        q = MeanFieldNormal(problem.prior)
        GaussNewton()(problem, q)
        return sample(problem, HMC(step_size=0.4), chains=19, draws=1, warmup=6, start=q, seed=seed)

    calibration = calibrate(Affine.create(3, 2, std=1.0).problem(), infer, repeats=60, draws=19)
    assert min(calibration.p_values) > 0.01


def test_refuses_an_inference_that_takes_something_else_before_it_simulates():
    problem = Affine.create(3, 2).problem()
    with pytest.raises(InvalidInput, match=r"infer cannot be called as infer\(problem, seed\)"):
        calibrate(problem, laplace)
    assert problem.cost.solves == 0


def test_repeats_and_leaves_the_generator_alone():
    problem = Affine.create(3, 2).problem()
    state = torch.get_rng_state()
    first = calibrate(problem, laplace_with(), repeats=20, draws=9)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.ranks, calibrate(problem, laplace_with(), repeats=20, draws=9).ranks)
    assert not torch.equal(first.ranks, calibrate(problem, laplace_with(), repeats=20, draws=9, seed=1).ranks)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"infer": None}, "infer is None"),
        ({"repeats": 5}, "repeats is 5"),
        ({"draws": 3}, "draws is 3"),
        ({"infer": lambda problem, seed: torch.zeros(4, 3)}, r"infer returned \(4, 3\)"),
        ({"infer": lambda problem, seed: "q"}, "infer returned str"),
        ({"quantities": lambda problem, m: m, "names": ["one"]}, "names has 1 entries; quantities returned 3"),
    ],
)
def test_refuses(arguments, words):
    with pytest.raises(InvalidInput, match=words):
        calibrate(Affine.create(3, 2).problem(), **{"infer": laplace_with(), "repeats": 20, "draws": 9, **arguments})


@pytest.mark.mpi
def test_split_over_ranks():
    def infer(problem, seed):
        return MeanFieldNormal(problem.prior)

    ours, reference = (calibrate(problem, infer, repeats=20, draws=9) for problem in split_pair(5, 3))
    assert torch.equal(ours.ranks, reference.ranks)
    assert ours.verdict == reference.verdict
    assert MPI.COMM_WORLD.allgather(ours.p_values) == [ours.p_values] * MPI.COMM_WORLD.size
