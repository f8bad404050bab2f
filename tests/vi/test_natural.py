"""Natural gradients against the Fisher matrix by automatic differentiation, L-BFGS, and exact posteriors in few steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributions import kl_divergence

from fem_vi.errors import InvalidInput
from fem_vi.vi import natural
from fem_vi.vi.fit import fit
from fem_vi.vi.lbfgs import LBFGS
from fem_vi.vi.natural import NaturalGradient
from fem_vi.vi.objective import ELBO, AnalyticKL, PathDerivative, TotalDerivative
from fem_vi.vi.optimizer import ConstantRate
from fem_vi.vi.posterior.flow import Flow
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.low_rank import FreeDiagonal, LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.start import PresentParameters
from tests.vi.helpers import F64, Affine, dense, gathered, numbers, perturb, split_pair

KNOWN = {
    "mean-field": MeanFieldNormal,
    "full-rank": FullRankNormal,
    "low-rank": lambda prior: LowRankNormal(prior, 2),
}


def fisher(posterior) -> torch.Tensor:
    """The Hessian of the divergence from the present parameters, at them."""
    names = [name for name, _ in posterior.named_parameters()]
    shapes = [value.shape for value in posterior.parameters()]
    here = dense(copy.deepcopy(posterior))
    here = torch.distributions.MultivariateNormal(here.mean.detach(), here.covariance_matrix.detach())

    def divergence(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        q = torch.func.functional_call(posterior, values, ())
        root = q.prior.unwhiten(q.scale.apply(torch.eye(5, dtype=F64))) - q.prior.mean
        return kl_divergence(here, torch.distributions.MultivariateNormal(q.mean, root.T @ root))

    flat = torch.cat([value.detach().reshape(-1) for value in posterior.parameters()])
    return torch.autograd.functional.hessian(divergence, flat)


@pytest.mark.parametrize("name", KNOWN)
def test_steps_are_those_of_the_fisher_matrix(name, monkeypatch):
    monkeypatch.setattr(natural, "BLOCK", 2)  # 5 unknowns: two whole blocks of a dense factor, and a part of one
    prior = Affine.create().prior
    posterior = KNOWN[name](prior)
    perturb(posterior)
    # A gradient that a distribution can have, zero along what does not change it: of some smooth function of its moments.
    q = posterior()
    loss = (q.mean @ numbers(1, 5)) + (q.variance @ numbers(2, 5)).sin() + 0.3 * q.kl_to_prior()
    loss.backward()
    gradient = torch.cat([value.grad.reshape(-1) for value in posterior.parameters()])
    before = torch.cat([value.detach().clone().reshape(-1) for value in posterior.parameters()])
    NaturalGradient(lr=1e-3, most=1e9).create(posterior).step()
    after = torch.cat([value.detach().reshape(-1) for value in posterior.parameters()])
    step = (before - after) / 1e-3
    with torch.no_grad():
        for value, old in zip(
            posterior.parameters(), before.split([value.numel() for value in posterior.parameters()]), strict=True
        ):
            value.copy_(old.reshape(value.shape))
    F = fisher(posterior)
    torch.testing.assert_close(F @ step, gradient, rtol=1e-8, atol=1e-8)
    assert float(torch.linalg.eigvalsh(F)[-1]) > 1.0


@pytest.mark.mpi
@pytest.mark.parametrize("name", KNOWN)
def test_split_over_ranks(name):
    for optimizer, gradient in ((NaturalGradient(0.2), PathDerivative()), (LBFGS(), TotalDerivative())):
        results = []
        for problem in split_pair():
            torch.manual_seed(3)
            posterior = KNOWN[name](problem.prior)
            run = fit(problem, posterior, ELBO(8, gradient), steps=6, optimizer=optimizer, start=PresentParameters())
            elbo = torch.tensor([row.elbo for row in run.history], dtype=F64)
            values = {key: value.detach() for key, value in posterior.named_parameters()}
            results.append([elbo, *gathered(posterior, values)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "steps"), [("full-rank", 120), ("low-rank", 150)])
def test_natural_gradients_find_the_exact_posterior_from_the_prior(name, steps):
    # 700 and 1,500 steps of Adam come to 5e-3.
    affine = Affine.create()
    torch.manual_seed(7)
    posterior = FullRankNormal(affine.prior) if name == "full-rank" else LowRankNormal(affine.prior, 3)
    fit(
        affine.problem(),
        posterior,
        ELBO(samples=8),
        steps=steps,
        optimizer=NaturalGradient(lr=0.3),
        schedule=ConstantRate(),
        start=PresentParameters(),
    )
    q, exact = posterior(), affine.posterior()
    torch.testing.assert_close(q.mean, exact.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.variance, exact.variance, rtol=1e-4, atol=1e-4)


def test_natural_steps_are_bounded():
    affine = Affine.create(std=1e-3)
    posterior = FullRankNormal(affine.prior)
    before = dense(posterior)
    before = torch.distributions.MultivariateNormal(before.mean.detach(), before.covariance_matrix.detach())
    problem = affine.problem()
    torch.manual_seed(0)
    ELBO(samples=4)(problem, posterior).loss.backward()
    NaturalGradient(lr=1.0, most=0.01).create(posterior).step()
    moved = float(kl_divergence(dense(posterior), before).detach())
    assert 0.005 < moved < 0.02


def test_lbfgs_minimises_one_draw_of_the_objective():
    affine = Affine.create()
    problem = affine.problem()
    run = fit(
        problem,
        FullRankNormal(affine.prior),
        ELBO(512, AnalyticKL()),
        steps=40,
        optimizer=LBFGS(),
        schedule=ConstantRate(),
        start=PresentParameters(),
    )
    elbo = [row.elbo for row in run.history]
    assert elbo == sorted(elbo)
    assert run.history[-1].grad_norm < 1e-3 * run.history[0].grad_norm
    q, exact = run.posterior(), affine.posterior()
    assert bool(((q.mean - exact.mean).abs() < 0.2 * exact.stddev).all())
    torch.testing.assert_close(q.variance, exact.variance, rtol=0.2, atol=0.0)
    with pytest.raises(InvalidInput, match=r"LBFGS minimises one draw.*gradient=TotalDerivative"):
        fit(problem, FullRankNormal(affine.prior), ELBO(samples=4), steps=1, optimizer=LBFGS())


def test_resumes_with_the_same_bits(tmp_path):
    for optimizer in (NaturalGradient(0.2), LBFGS(pairs=3)):
        gradient = AnalyticKL()
        affine = Affine.create()
        arguments = {"objective": ELBO(4, gradient), "steps": 9, "optimizer": optimizer, "start": PresentParameters(), "seed": 3}
        whole = fit(affine.problem(), FullRankNormal(affine.prior), **arguments)

        def stop(row):
            if row.step == 7:
                raise KeyboardInterrupt

        folder = {"path": tmp_path / type(optimizer).__name__, "checkpoint_every": 5}
        with pytest.raises(KeyboardInterrupt):
            fit(affine.problem(), FullRankNormal(affine.prior), callbacks=[stop], **arguments, **folder)
        resumed = fit(affine.problem(), FullRankNormal(affine.prior), resume=True, **arguments, **folder)
        assert [(row.elbo, row.solves) for row in resumed.history] == [(row.elbo, row.solves) for row in whole.history]
        assert resumed.config["optimizer"] == repr(optimizer)


def test_refusals():
    affine = Affine.create()
    for family in (lambda prior: LowRankNormal(prior, 2, diagonal=FreeDiagonal()), Flow):
        with pytest.raises(InvalidInput, match=r"NaturalGradient: .* is no family whose natural gradient"):
            fit(affine.problem(), family(affine.prior), ELBO(), steps=1, optimizer=NaturalGradient())
    for make, words in (
        (lambda: NaturalGradient(lr=0), r"lr is 0"),
        (lambda: NaturalGradient(most=-1), r"most is -1"),
        (lambda: LBFGS(lr=-1), r"lr is -1"),
        (lambda: LBFGS(pairs=0), r"pairs is 0"),
        (lambda: LBFGS(tries=0), r"tries is 0"),
    ):
        with pytest.raises(InvalidInput, match=words):
            make()
