"""Diagnostics on targets where the answer is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fem_vi.errors import InvalidInput
from fem_vi.vi.diagnostics import diagnose
from fem_vi.vi.importance import corrected_moments, pareto_smoothed
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.mcmc.smc import smc
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.low_rank import LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.predictive import predictive_check
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.start import GaussNewton
from tests.vi.helpers import F64, Affine, dense, numbers, split_pair


def fitted(affine, family):
    posterior = family(affine.prior)
    GaussNewton()(affine.problem(), posterior)
    return posterior


def test_exact_posterior():
    affine = Affine.create()
    diagnosis = diagnose(affine.problem(), fitted(affine, FullRankNormal))
    assert diagnosis.khat < 0.5
    assert diagnosis.ess == pytest.approx(1000)
    assert diagnosis.elbo == pytest.approx(affine.log_evidence(), abs=1e-8)
    assert diagnosis.log_evidence == pytest.approx(affine.log_evidence(), abs=1e-8)
    assert diagnosis.elbo_error < 1e-8
    assert "close to the exact" in diagnosis.verdict


def test_elbo_against_its_closed_form():
    affine = Affine.create()
    posterior = fitted(affine, MeanFieldNormal)
    diagnosis = diagnose(affine.problem(), posterior, samples=4000, batch=1000)
    gap = torch.distributions.kl_divergence(dense(posterior), affine.posterior()).detach()
    assert abs(diagnosis.elbo - (affine.log_evidence() - float(gap))) < 4 * diagnosis.elbo_error
    assert diagnosis.kl == pytest.approx(float(posterior().kl_to_prior().detach()))


@pytest.mark.parametrize(("scale", "good"), [(0.9, True), (1.2, True), (0.4, False)])
def test_khat_of_normals(scale, good):
    # p = N(0, 1), q = N(0, scale^2): weights have finite moments of order below 1 / (1 - scale^2), so k = 1 - scale^2.
    x = scale * numbers(1, 4000)
    log_weights = -0.5 * x.square() + 0.5 * (x / scale).square() + torch.tensor(scale).log()
    khat, smoothed, log_evidence = pareto_smoothed(log_weights)
    assert khat < 0.5 if good else khat > 0.7
    assert float(smoothed.exp().sum()) == pytest.approx(1)
    if good:
        assert log_evidence == pytest.approx(0.0, abs=0.05)


def test_weights_at_the_edge():
    khat, smoothed, log_evidence = pareto_smoothed(torch.full((200,), -3.0, dtype=F64))
    assert (khat, log_evidence) == (0.0, -3.0)
    assert float(smoothed.exp().sum()) == pytest.approx(1)
    assert pareto_smoothed(torch.tensor([0.0, float("-inf")] * 100, dtype=F64))[0] == float("inf")


def test_too_narrow_a_posterior_is_not_trusted():
    affine = Affine.create()
    posterior = fitted(affine, FullRankNormal)
    with torch.no_grad():
        posterior.log_diagonal -= 1.0
    diagnosis = diagnose(affine.problem(), posterior)
    assert diagnosis.khat > 0.7
    assert "Do not trust" in diagnosis.verdict


@pytest.mark.parametrize(
    ("factor", "words"), [(0.2, "fit worse than the model allows"), (1.0, "own predictions"), (30.0, "too large")]
)
def test_predictive_check(factor, words):
    # 40 data with noise 0.3; the model believes 0.3 * factor.
    affine = Affine.create(num_data=40)
    wrong = Affine(affine.prior, affine.A, affine.b, affine.std * factor, affine.y)
    diagnosis = diagnose(wrong.problem(), fitted(wrong, FullRankNormal))
    assert words in diagnosis.verdict
    if factor == 1.0:
        assert 0.75 <= diagnosis.coverage <= 1.0
        assert 0.3 < diagnosis.chi2 < 1.5


def test_leaves_the_generator_alone_and_repeats():
    affine = Affine.create()
    posterior = LowRankNormal(affine.prior, 1)
    state = torch.get_rng_state()
    first = diagnose(affine.problem(), posterior, samples=200)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert first == diagnose(affine.problem(), posterior, samples=200)


def test_prints_a_table():
    affine = Affine.create()
    diagnosis = diagnose(affine.problem(), LowRankNormal(affine.prior, 1), samples=200)
    text = str(diagnosis)
    assert "Pareto k-hat" in text
    assert " ".join(text.split()).endswith(diagnosis.verdict)


def test_refuses_few_samples():
    affine = Affine.create()
    with pytest.raises(InvalidInput, match="samples is 10"):
        diagnose(affine.problem(), LowRankNormal(affine.prior, 1), samples=10)


@pytest.mark.mpi
def test_split_over_ranks():
    results = []
    for problem in split_pair():
        posterior = MeanFieldNormal(problem.prior)
        GaussNewton()(problem, posterior)
        results.append(diagnose(problem, posterior, samples=200))
    ours, reference = results
    for name in ("elbo", "elbo_error", "log_evidence", "kl", "khat", "ess", "chi2", "mean_shift", "sd_ratio"):
        assert getattr(ours, name) == pytest.approx(getattr(reference, name), rel=1e-6), name
    assert ours.coverage == reference.coverage


def test_corrected_moments_are_exact_where_the_posterior_is_not():
    affine = Affine.create()
    posterior = fitted(affine, FullRankNormal)
    with torch.no_grad():
        posterior.mu += 0.2 * posterior.log_diagonal.exp()
        posterior.log_diagonal += 0.15
    corrected = corrected_moments(affine.problem(), posterior, samples=4000, batch=700)
    exact = affine.posterior()
    assert corrected.khat < corrected.khat_limit
    assert float(((posterior().mean.detach() - exact.mean) / corrected.mean_error).abs().max()) > 5  # it was wrong
    assert float(((corrected.mean - exact.mean) / corrected.mean_error).abs().max()) < 3.5
    assert float((corrected.variance / exact.variance - 1).abs().max()) < 0.15
    assert abs(corrected.log_evidence - affine.log_evidence()) < 4 * corrected.log_evidence_error
    expected = (exact.variance / corrected.ess).sqrt()
    torch.testing.assert_close(corrected.mean_error, expected, rtol=0.2, atol=0.0)


def test_diagnosis_says_how_far_weights_move_it():
    affine = Affine.create()
    posterior = fitted(affine, FullRankNormal)
    exact = diagnose(affine.problem(), posterior)
    assert exact.mean_shift < 1e-6
    assert exact.sd_ratio == pytest.approx(1.0)
    assert exact.kl_error == 0.0
    with torch.no_grad():
        posterior.log_diagonal += 0.2
        posterior.below *= 1.2214
    wide = diagnose(affine.problem(), posterior, samples=4000)
    assert wide.sd_ratio == pytest.approx(0.82, abs=0.05)
    assert 0.3 * wide.chance_shift < wide.mean_shift < 3.0 * wide.chance_shift  # its mean is right


def test_the_verdict_is_that_of_the_table():
    affine = Affine.create()
    posterior = fitted(affine, FullRankNormal)
    with torch.no_grad():
        posterior.log_diagonal += 0.2
        posterior.below *= 1.2214
    wide = diagnose(affine.problem(), posterior, samples=4000)
    assert wide.khat < 0.5
    assert "Usable with care: spreads that importance weights change." in wide.verdict
    row = next(line for line in str(wide).splitlines() if "standard deviations by" in line)
    assert "no" in row.split()
    narrow = dataclasses.replace(wide, khat=1.3)
    assert "Do not trust" in narrow.verdict
    assert "not known: see k-hat" in str(narrow)
    moved = dataclasses.replace(wide, sd_ratio=1.0, mean_shift=0.3, chance_shift=0.1)
    assert "means that importance weights move" in moved.verdict
    by_chance = dataclasses.replace(moved, chance_shift=0.3)
    assert "close to the exact one" in by_chance.verdict


def test_nearly_equal_weights_are_no_reason_for_distrust():
    # Weights within 1e-3 of each other have whatever tail rounding of the fit gives them.
    affine = Affine.create()
    posterior = fitted(affine, FullRankNormal)
    with torch.no_grad():
        posterior.log_diagonal -= 0.01
    diagnosis = diagnose(affine.problem(), posterior)
    assert diagnosis.ess > 950
    assert "all but equal" in diagnosis.verdict


def test_predictive_check_names_the_datum_that_is_off():
    affine = Affine.create(num_data=30)
    y = affine.y.clone()
    y[17] += 20 * affine.std
    wrong = Affine(affine.prior, affine.A, affine.b, affine.std, y)
    m = wrong.posterior().sample((400,))
    check = predictive_check(wrong.problem(), m)
    assert check.outside[0] == 17
    assert check.p_value < 0.01
    assert "fit worse" in check.verdict
    assert " ".join(str(check).split()).endswith(check.verdict)
    good = predictive_check(affine.problem(), affine.posterior().sample((2, 200)))
    assert 0.01 < good.p_value < 0.99
    exact = torch.distributions.Normal(
        affine.posterior().mean @ affine.A.T + affine.b,
        (torch.einsum("ij,jk,ik->i", affine.A, affine.posterior().covariance_matrix, affine.A) + affine.std**2).sqrt(),
    )
    torch.testing.assert_close(good.median, exact.mean, atol=4 * 1.25 * affine.std / 400**0.5, rtol=0.0)
    with pytest.raises(InvalidInput, match="m holds 3 draws"):
        predictive_check(affine.problem(), torch.zeros(3, 5))


@pytest.mark.mpi
def test_corrected_moments_split_over_ranks():
    results = []
    for problem in split_pair():
        posterior = MeanFieldNormal(problem.prior)
        GaussNewton()(problem, posterior)
        corrected = corrected_moments(problem, posterior, samples=200)
        results.append([problem.prior.gather(x) for x in (corrected.mean, corrected.variance, corrected.mean_error)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-8)


def test_a_mode_that_all_draws_miss_shows_in_the_evidence_of_smc_and_the_verdict_says_so():
    """y = m^2: half of the mass is at minus the root, of which draws at the other root know nothing."""
    prior = GaussianVector(torch.zeros(1))
    problem = InverseProblem(prior, lambda m: m**2, GaussianNoise(0.1), torch.ones(1))
    posterior = MeanFieldNormal(prior)
    posterior.mu.data.fill_(1.0)
    posterior.log_scale.data.fill_(math.log(0.05))
    diagnosis = diagnose(problem, posterior)
    assert diagnosis.khat < diagnosis.khat_limit
    assert "Where its draws go" in diagnosis.verdict and "smc(problem)" in diagnosis.verdict
    whole = smc(problem, particles=200, islands=4)
    assert whole.log_evidence - diagnosis.log_evidence == pytest.approx(math.log(2.0), abs=0.2)
