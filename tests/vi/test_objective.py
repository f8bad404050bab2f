"""The evidence lower bound against closed forms: A.1 to A.3 of the affine-Gaussian tests, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from fem_vi.errors import InvalidInput
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.objective import ELBO, AnalyticKL, PathDerivative
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.low_rank import FreeDiagonal, LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.start import GaussNewton, PresentParameters, default_start
from tests.vi.helpers import F64, FAMILIES, Affine, gathered, perturb, split_pair

EXACT = {
    "full-rank": FullRankNormal,
    "low-rank": lambda prior: LowRankNormal(prior, 3),
    "low-rank, rank above the data": lambda prior: LowRankNormal(prior, 5),
    "low-rank, free diagonal": lambda prior: LowRankNormal(prior, 4, diagonal=FreeDiagonal()),
}
estimator = pytest.mark.parametrize("gradient", [PathDerivative(), AnalyticKL()], ids=["path", "analytic"])


@pytest.mark.parametrize("name", EXACT)
def test_no_variance_at_the_exact_posterior(name):
    affine = Affine.create()
    problem, posterior = affine.problem(), EXACT[name](affine.prior)
    GaussNewton()(problem, posterior)
    if isinstance(posterior, LowRankNormal):
        with torch.no_grad():
            posterior.U[3:] = 0.0  # spare directions start small, not at zero
    q, exact = posterior(), affine.posterior()
    torch.testing.assert_close(q.mean, exact.mean)
    torch.testing.assert_close(q.variance, exact.variance)
    terms = ELBO(samples=8)(problem, posterior)
    terms.loss.backward()
    torch.testing.assert_close(terms.log_likelihood - terms.log_ratio, torch.full((8,), affine.log_evidence(), dtype=F64))
    assert max(float(value.grad.abs().max()) for value in posterior.parameters()) < 1e-9


def test_mean_field_optimum_is_stationary():
    # A.1: variances one over the diagonal of the whitened precision, mean exact. The expected gradient vanishes there.
    affine = Affine.create()
    problem, posterior = affine.problem(), MeanFieldNormal(affine.prior)
    GaussNewton()(problem, posterior)
    torch.testing.assert_close((2 * posterior.log_scale).exp().detach(), 1 / affine.whitened_precision().diagonal())
    torch.testing.assert_close(posterior().mean, affine.posterior().mean)
    grads = []
    torch.manual_seed(0)
    for _ in range(200):
        posterior.zero_grad()
        ELBO(samples=50)(problem, posterior).loss.backward()
        grads.append(torch.cat([value.grad for value in posterior.parameters()]))
    grads = torch.stack(grads)
    assert bool((grads.mean(0).abs() < 4.5 * grads.std(0) / 200**0.5).all())


@estimator
@pytest.mark.parametrize("name", FAMILIES)
def test_value_and_gradient_are_unbiased(name, gradient):
    # For an affine map the bound is known: E|y - A m - b|^2 from the moments of q.
    affine = Affine.create()
    problem, posterior = affine.problem(), FAMILIES[name](affine.prior)
    perturb(posterior)
    q = posterior()
    root = affine.prior.unwhiten(q.scale.apply(torch.eye(5, dtype=F64))) - affine.prior.mean
    spread = (root @ affine.A.T).square().sum() / affine.std**2
    expected = problem.log_likelihood(q.mean) - 0.5 * spread - q.kl_to_prior()
    exact = torch.autograd.grad(expected, list(posterior.parameters()))
    exact, expected = torch.cat([value.flatten() for value in exact]), expected.detach()
    values, grads = [], []
    torch.manual_seed(0)
    for _ in range(100):
        terms = ELBO(samples=40, gradient=gradient)(problem, posterior)
        grads.append(-torch.cat([g.flatten() for g in torch.autograd.grad(terms.loss, list(posterior.parameters()))]))
        values.append(float(terms.elbo))
        torch.testing.assert_close(terms.kl, q.kl_to_prior().detach())
    values, grads = torch.tensor(values), torch.stack(grads)
    assert abs(float(values.mean()) - float(expected)) < 4 * float(values.std()) / 10
    assert bool(((grads.mean(0) - exact).abs() < 4.5 * grads.std(0) / 10 + 1e-9).all())


class Plain(nn.Module):
    """A family that knows nothing of whitening: N(mu, 1) in coordinates of m."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(n, dtype=F64))

    def forward(self) -> Independent:
        return Independent(Normal(self.mu, torch.ones_like(self.mu)), 1)


def test_any_distribution_will_do():
    affine = Affine.create()
    problem, posterior = affine.problem(), Plain(5)
    torch.manual_seed(0)
    terms = ELBO(samples=5000)(problem, posterior)
    covariance = affine.prior.covariance
    kl = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(torch.zeros(5, dtype=F64), torch.eye(5, dtype=F64)),
        torch.distributions.MultivariateNormal(affine.prior.mean, covariance),
    )
    error = float(terms.log_ratio.std()) / 5000**0.5
    assert abs(float(terms.kl - kl)) < 4 * error
    terms.loss.backward()
    assert posterior.mu.grad.abs().max() > 0
    with pytest.raises(InvalidInput, match="no closed form is known for Independent"):
        ELBO(gradient=AnalyticKL())(problem, posterior)


def test_refuses_no_samples():
    with pytest.raises(InvalidInput, match="samples is 0"):
        ELBO(samples=0)


def test_gauss_newton_finds_the_most_probable():
    _, problem = split_pair()
    lin = GaussNewton().linearise(problem)
    assert lin.converged
    xi = lin.mu.clone().requires_grad_()
    joint = problem.log_likelihood(problem.prior.unwhiten(xi)) - 0.5 * xi.square().sum()
    # Gauss-Newton stops where a step is below 1e-6; the gradient is that step times a precision of about 100.
    assert float(torch.autograd.grad(joint, xi)[0].abs().max()) < 1e-3
    J = torch.autograd.functional.jacobian(lambda xi: problem.predict(problem.prior.unwhiten(xi)) / 0.1, lin.mu)
    torch.testing.assert_close(lin.jacobian, J)


def test_gauss_newton_halves_a_step_that_overshoots():
    # The full first step from m = 0 on exp(5 m) overshoots by far; the most probable m is near log(y) / 5.
    y = torch.tensor([150.0], dtype=F64)
    problem = InverseProblem(GaussianVector(torch.zeros(1)), lambda m: torch.exp(5 * m), GaussianNoise(0.01), y)
    lin = GaussNewton(iterations=50).linearise(problem)
    assert lin.converged
    assert abs(float(lin.mu) - float(y.log() / 5)) < 1e-4


def test_default_start_takes_new_posteriors_only():
    affine = Affine.create()
    problem, posterior = affine.problem(), LowRankNormal(affine.prior, 2)
    assert default_start(problem, posterior) == GaussNewton()
    assert default_start(problem, Plain(5)) == PresentParameters()
    with torch.no_grad():
        posterior.mu[0] = 1.0
    assert default_start(problem, posterior) == PresentParameters()
    with pytest.raises(InvalidInput, match="Plain"):
        GaussNewton()(problem, Plain(5))


@pytest.mark.mpi
@pytest.mark.parametrize("name", FAMILIES)
def test_split_over_ranks(name):
    results = []
    for problem in split_pair():
        torch.manual_seed(3)
        posterior = FAMILIES[name](problem.prior)
        GaussNewton()(problem, posterior)
        perturb(posterior, size=0.1)
        terms = ELBO(samples=4)(problem, posterior)
        terms.loss.backward()
        grads = gathered(posterior, {key: value.grad for key, value in posterior.named_parameters()})
        results.append([terms.elbo, terms.kl, terms.log_likelihood, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
