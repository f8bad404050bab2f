"""Every objective against quadrature and closed forms: values, gradients, and no variance at the exact posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fem_vi.errors import InvalidInput
from fem_vi.vi import draws
from fem_vi.vi.divergence import ForwardKL, GivenSamples, ImportanceWeighted, JensenShannon, Renyi, SelfNormalised
from fem_vi.vi.draws import Antithetic, Independent, QuasiMonteCarlo
from fem_vi.vi.fit import fit
from fem_vi.vi.laplace import laplace
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.objective import ELBO, AnalyticKL, PathDerivative, TotalDerivative
from fem_vi.vi.optimizer import Adam, Cosine
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.low_rank import LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.posterior.mixture import Mixture
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.start import GaussNewton, PresentParameters
from tests.vi.helpers import F64, Affine, numbers, split_pair

SAMPLES = 2000
PATH, TOTAL = PathDerivative(), TotalDerivative()
OBJECTIVES = {
    "ELBO": lambda gradient: ELBO(SAMPLES, gradient),
    "forward KL": lambda gradient: ForwardKL(SelfNormalised(SAMPLES, gradient)),
    "Jensen-Shannon 0.1": lambda gradient: JensenShannon(0.1, SAMPLES, gradient),
    "Jensen-Shannon 0.6": lambda gradient: JensenShannon(0.6, SAMPLES, gradient),
    "Renyi 0.5": lambda gradient: Renyi(0.5, SAMPLES, gradient),
    "Renyi 2": lambda gradient: Renyi(2.0, SAMPLES, gradient),
    "importance-weighted": lambda gradient: ImportanceWeighted(2, SAMPLES // 2, gradient),
}
objective = pytest.mark.parametrize("name", OBJECTIVES)
estimator = pytest.mark.parametrize("gradient", [PATH, TOTAL], ids=["path", "total"])


@dataclass(frozen=True)
class Line:
    """One unknown, G(m) = m + curve sin(2 m): everything by quadrature on a grid of xi = m."""

    curve: float

    def problem(self) -> InverseProblem:
        y = torch.tensor([0.8], dtype=F64)
        return InverseProblem(GaussianVector(torch.zeros(1)), lambda m: m + self.curve * torch.sin(2 * m), GaussianNoise(0.7), y)

    def exact(self, name: str, problem: InverseProblem, mu: Tensor, log_scale: Tensor) -> Tensor:
        """The loss as a differentiable function of the parameters."""
        x = torch.linspace(-7, 7, 1401, dtype=F64)
        dx = float(x[1] - x[0])
        log_q = -0.5 * ((x - mu) * (-log_scale).exp()).square() - log_scale - 0.5 * math.log(2 * math.pi)
        log_joint = problem.log_joint(x[:, None])
        q, u = log_q.exp() * dx, log_joint - log_q
        log_evidence = torch.logsumexp(log_joint, 0) + math.log(dx)
        log_r = u - log_evidence
        r = log_r.exp()
        if name == "ELBO":
            return -(q * u).sum()
        if name == "forward KL":
            return (q * r * log_r).sum()
        if name.startswith("Jensen"):
            a = float(name.split()[-1])
            mean = (1 - a) + a * r
            return (q * (-a * mean.log() + (1 - a) * r * (log_r - mean.log()))).sum()
        if name.startswith("Renyi"):
            s = 1 - float(name.split()[-1])
            return -torch.logsumexp(log_q + math.log(dx) + s * u, 0) / s
        pair = torch.logaddexp(u[:, None], u[None, :]) - math.log(2)
        return -(q[:, None] * q[None, :] * pair).sum()


@estimator
@objective
def test_value_and_gradient_are_those_of_quadrature(name, gradient):
    line = Line(0.3)
    problem = line.problem()
    posterior = MeanFieldNormal(problem.prior)
    with torch.no_grad():
        posterior.mu.fill_(0.5)
        posterior.log_scale.fill_(-0.6)
    exact = line.exact(name, problem, posterior.mu, posterior.log_scale)
    exact_gradient = torch.cat(torch.autograd.grad(exact, [posterior.mu, posterior.log_scale]))
    torch.manual_seed(0)
    values, grads = [], []
    for _ in range(60):
        loss = OBJECTIVES[name](gradient)(problem, posterior).loss
        grads.append(torch.cat(torch.autograd.grad(loss, [posterior.mu, posterior.log_scale])))
        values.append(float(loss))
    values, grads = torch.tensor(values), torch.stack(grads)
    # Self-normalisation and the logarithm of a mean are biased by O(1 / SAMPLES).
    assert abs(float(values.mean() - exact)) < 4 * float(values.std()) / 60**0.5 + 2 / SAMPLES
    assert bool(((grads.mean(0) - exact_gradient).abs() < 4 * grads.std(0) / 60**0.5 + 4 / SAMPLES).all())
    assert bool((exact_gradient.abs() > 0.01).any())


@objective
def test_no_variance_at_the_exact_posterior(name):
    affine = Affine.create()
    problem = affine.problem()
    posterior = laplace(problem)
    terms = OBJECTIVES[name](PATH)(problem, posterior)
    terms.loss.backward()
    bound = name in ("ELBO", "importance-weighted") or name.startswith("Renyi")
    assert float(terms.loss) == pytest.approx(-affine.log_evidence() if bound else 0.0, abs=1e-6)
    assert float(terms.elbo) == pytest.approx(affine.log_evidence(), abs=1e-6)
    assert max(float(value.grad.abs().max()) for value in posterior.parameters()) < 1e-6


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_renyi_is_the_closed_form_of_normals(alpha):
    # Gil, Alajaji, Linder (2013): the divergence of two normal distributions, here in five dimensions.
    affine = Affine.create()
    problem, posterior = affine.problem(), FullRankNormal(affine.prior)
    exact = affine.posterior()
    with torch.no_grad():
        start = laplace(problem)
        L = torch.linalg.cholesky(torch.linalg.inv(affine.whitened_precision()))
        posterior.mu.copy_(start.mu + 0.3 * L @ numbers(3, 5))
        posterior.log_diagonal.copy_(L.diagonal().log() - 0.1)
        posterior.below.copy_(L[tuple(torch.tril_indices(5, 5, -1))])
    q = posterior()
    root = affine.prior.unwhiten(q.scale.apply(torch.eye(5, dtype=F64))) - affine.prior.mean
    cov_q, cov_p = (root.T @ root).detach(), exact.covariance_matrix
    between = alpha * cov_p + (1 - alpha) * cov_q
    shift = (q.mean - exact.mean).detach()
    logdets = torch.logdet(between) - (1 - alpha) * torch.logdet(cov_q) - alpha * torch.logdet(cov_p)
    divergence = 0.5 * alpha * shift @ torch.linalg.solve(between, shift) - 0.5 / (alpha - 1) * logdets
    torch.manual_seed(0)
    with torch.no_grad():
        values = torch.tensor([-float(Renyi(alpha, samples=5000)(problem, posterior).loss) for _ in range(30)])
    expected = affine.log_evidence() - float(divergence)
    assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / 30**0.5 + 2e-3
    assert float(divergence) > 0.05


def test_bounds_are_ordered():
    # ELBO < importance-weighted < log evidence; Renyi falls with alpha.
    problem = Line(0.3).problem()
    posterior = MeanFieldNormal(problem.prior)
    torch.manual_seed(0)

    def bound(objective):
        with torch.no_grad():
            return -float(torch.stack([objective(problem, posterior).loss for _ in range(20)]).mean())

    weighted = [bound(ImportanceWeighted(k, 2000 // k)) for k in (1, 4, 50)]
    assert weighted == sorted(weighted)
    assert weighted[0] == pytest.approx(bound(ELBO(2000)), abs=0.03)
    renyi = [bound(Renyi(alpha, 2000)) for alpha in (2.0, 0.999, 0.5, 0.0, -1.0)]
    assert renyi == sorted(renyi)
    assert renyi[1] == pytest.approx(bound(ELBO(2000)), abs=0.03)


@estimator
@pytest.mark.parametrize("name", ["ELBO", "forward KL", "Jensen-Shannon 0.6", "Renyi 0.5", "importance-weighted"])
def test_mixtures_have_right_gradients(name, gradient):
    # Weights, means and scales of two components, against quadrature of the same losses.
    line = Line(0.3)
    problem = line.problem()
    posterior = Mixture([MeanFieldNormal(problem.prior), MeanFieldNormal(problem.prior)])
    with torch.no_grad():
        posterior.logits.copy_(torch.tensor([0.4, -0.2]))
        posterior.components[0].mu.fill_(0.2)
        posterior.components[1].mu.fill_(0.9)
        posterior.components[1].log_scale.fill_(-0.5)
    x = torch.linspace(-7, 7, 701, dtype=F64)
    dx = float(x[1] - x[0])
    log_q = posterior().log_prob(x[:, None])
    u = problem.log_joint(x[:, None]) - log_q
    q, log_r = log_q.exp() * dx, u - torch.logsumexp(u + log_q, 0) - math.log(dx)
    r = log_r.exp()
    mean = 0.4 + 0.6 * r
    if name == "ELBO":
        exact = -(q * u).sum()
    elif name == "forward KL":
        exact = (q * r * log_r).sum()
    elif name.startswith("Jensen"):
        exact = (q * (-0.6 * mean.log() + 0.4 * r * (log_r - mean.log()))).sum()
    elif name.startswith("Renyi"):
        exact = -2 * torch.logsumexp(log_q + math.log(dx) + 0.5 * u, 0)
    else:  # stratified, one draw from each component: weights w_k, densities q_k
        w = torch.softmax(posterior.logits, 0)
        parts = [c().log_prob(x[:, None]).exp() * dx for c in posterior.components]
        pair = torch.logaddexp(w[0].log() + u[:, None], w[1].log() + u[None, :])
        exact = -(parts[0][:, None] * parts[1][None, :] * pair).sum()
    parameters = list(posterior.parameters())
    exact_gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(exact, parameters)])
    torch.manual_seed(0)
    values, grads = [], []
    for _ in range(60):
        objective = ImportanceWeighted(2, 25, gradient) if name == "importance-weighted" else OBJECTIVES[name](gradient)
        loss = objective(problem, posterior).loss
        grads.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]))
        values.append(float(loss))
    values, grads = torch.tensor(values), torch.stack(grads)
    assert abs(float(values.mean() - exact)) < 4 * float(values.std()) / 60**0.5 + 2 / SAMPLES
    assert bool(((grads.mean(0) - exact_gradient).abs() < 4.5 * grads.std(0) / 60**0.5 + 4 / SAMPLES).all())


def test_forward_kl_of_given_samples_matches_their_moments():
    affine = Affine.create()
    exact = affine.posterior()
    torch.manual_seed(0)
    m = exact.sample((4000,))
    problem = affine.problem()
    run = fit(
        problem,
        FullRankNormal(affine.prior),
        ForwardKL(GivenSamples(m)),
        steps=250,
        optimizer=Adam(lr=0.05),
        schedule=Cosine(final=1e-3),
        start=PresentParameters(),
    )
    assert problem.cost.solves == 0
    q = run.posterior()
    torch.testing.assert_close(q.mean, m.mean(0), rtol=0.0, atol=1e-3)
    torch.testing.assert_close(q.variance, m.var(0, correction=0), rtol=1e-2, atol=0.0)
    assert math.isnan(run.history[-1].elbo)
    assert "GivenSamples(4000 samples, batch=None)" in run.config["objective"]


def test_noise_is_what_it_says():
    prior = GaussianVector(torch.zeros(3))
    torch.manual_seed(0)
    pairs = Antithetic()(prior, 6)
    assert torch.equal(pairs[:3], -pairs[3:])
    assert Antithetic()(prior, 5).shape == (5, 3)
    points = QuasiMonteCarlo()(prior, 4096)
    assert bool(torch.isfinite(points).all())
    assert float(points.mean(0).abs().max()) < 2e-3  # 0.016 for independent draws
    torch.testing.assert_close(points.T @ points / 4096, torch.eye(3, dtype=F64), rtol=0.0, atol=6e-3)
    assert not torch.equal(points, QuasiMonteCarlo()(prior, 4096))


@pytest.mark.parametrize(("noise", "factor"), [(Antithetic(), 20.0), (QuasiMonteCarlo(), 20.0)])
def test_noise_lowers_the_variance_of_a_gradient(noise, factor):
    # The gradient of the mean is affine in the noise for an affine map: antithetic pairs make it exact.
    affine = Affine.create()
    problem, posterior = affine.problem(), FullRankNormal(affine.prior)
    torch.manual_seed(0)

    def variance(noise):
        grads = []
        for _ in range(40):
            posterior.zero_grad()
            ELBO(64, AnalyticKL(), noise)(problem, posterior).loss.backward()
            grads.append(posterior.mu.grad.clone())
        return float(torch.stack(grads).var(0).sum())

    assert variance(noise) * factor < variance(Independent())


@pytest.mark.mpi
@pytest.mark.parametrize("name", [*OBJECTIVES, "antithetic", "quasi", "given"])
def test_split_over_ranks(name):
    results = []
    for problem in split_pair():
        torch.manual_seed(3)
        posterior = LowRankNormal(problem.prior, 4)
        posterior.start_at(GaussNewton().linearise(problem))
        special = {
            "antithetic": ELBO(6, noise=Antithetic()),
            "quasi": ELBO(8, noise=QuasiMonteCarlo()),
            "given": ForwardKL(GivenSamples(problem.prior.scatter(numbers(9, 7, 13)))),
        }
        objective = special.get(name) or OBJECTIVES[name](PATH)
        terms = objective(problem, posterior)
        terms.loss.backward()
        results.append([terms.loss.detach(), *(problem.prior.gather(value.grad) for value in posterior.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("noise", [Antithetic(), QuasiMonteCarlo()])
def test_gradient_of_a_bound_from_paired_draws(noise):
    """Of E log mean_k exp(u), k = 2, by differences of the bound itself; PathDerivative() takes no such draws."""
    prior = GaussianVector(torch.zeros(1))
    problem = InverseProblem(prior, lambda m: m, GaussianNoise(0.5), torch.tensor([1.0]))
    objective = ImportanceWeighted(k=2, batches=1, gradient=TotalDerivative(), noise=noise)

    def bound(mu):
        posterior = MeanFieldNormal(prior)
        posterior.mu.data.fill_(mu)
        posterior.log_scale.data.fill_(-0.5)
        torch.manual_seed(0)
        losses = torch.stack([objective(problem, posterior).loss for _ in range(300)])
        (gradient,) = torch.autograd.grad(losses.mean(), posterior.mu)
        return float(losses.mean()), float(gradient)

    slope = (bound(0.2 + 1e-4)[0] - bound(0.2 - 1e-4)[0]) / 2e-4
    assert bound(0.2)[1] == pytest.approx(slope, rel=1e-5)


def test_refusals(monkeypatch):
    affine = Affine.create()
    problem = affine.problem()
    for make, words in (
        (lambda: JensenShannon(1.0), r"alpha is 1.0; .*between 0 and 1"),
        (lambda: Renyi(1), r"alpha is 1; .*other than 1"),
        (lambda: Renyi("a"), r"alpha is 'a'"),
        (lambda: ImportanceWeighted(0), r"k is 0"),
        (lambda: ImportanceWeighted(2, 0), r"batches is 0"),
        (lambda: Renyi(0.5, gradient=AnalyticKL()), r"gradient is .*PathDerivative or TotalDerivative"),
        (lambda: Renyi(0.5, noise=Antithetic()), r"Renyi: noise is Antithetic.*independent draws.*TotalDerivative"),
        (lambda: ImportanceWeighted(noise=QuasiMonteCarlo()), r"ImportanceWeighted: noise is QuasiMonteCarlo.*independent draws"),
        (lambda: ELBO(noise=Antithetic), r"noise is .*Independent or Antithetic or QuasiMonteCarlo"),
        (lambda: ForwardKL("samples"), r"source is .*GivenSamples or SelfNormalised"),
        (lambda: GivenSamples(torch.zeros(3)), r"m has shape \(3,\)"),
        (lambda: ELBO(1)(problem, Mixture([MeanFieldNormal(affine.prior), MeanFieldNormal(affine.prior)])), r"at least one for"),
    ):
        with pytest.raises(InvalidInput, match=words):
            make()
    monkeypatch.setattr(draws, "MOST_SOBOL", 4)
    with pytest.raises(InvalidInput, match=r"5 unknowns.*Use Antithetic"):
        QuasiMonteCarlo()(affine.prior, 2)
