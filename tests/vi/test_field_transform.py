"""Positive and bounded fields against closed forms and quadrature; level sets against their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import LogNormal

import fem_vi

F64 = torch.float64
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=F64)
PRIOR = fem_vi.GaussianVector(torch.tensor([0.2, -0.4], dtype=F64), covariance=COVARIANCE)
TRANSFORMS = pytest.mark.parametrize("transform", [fem_vi.Positive(2.0), fem_vi.Bounded(-1.0, 3.0)], ids=["positive", "bounded"])


@TRANSFORMS
def test_inverse_and_slope(transform: object) -> None:
    m = torch.linspace(-3.0, 3.0, 11, dtype=F64, requires_grad=True)
    x = transform(m)
    assert torch.allclose(transform.inverse(x), m, rtol=1e-10)
    (slope,) = torch.autograd.grad(x.sum(), m)
    assert torch.allclose(transform.log_slope(m), slope.log(), rtol=1e-10)
    assert torch.autograd.gradcheck(transform, m)


@TRANSFORMS
def test_density_integrates_to_one_and_gives_the_moments(transform: object) -> None:
    field = fem_vi.TransformedField(PRIOR, transform)

    grid = transform(torch.linspace(-8.0, 8.0, 401, dtype=F64))
    slope = transform.log_slope(torch.linspace(-8.0, 8.0, 401, dtype=F64)).exp() * 0.04
    points = torch.cartesian_prod(grid, grid)
    weights = torch.cartesian_prod(slope, slope).prod(-1) * field.log_prob(points).exp()
    assert float(weights.sum()) == pytest.approx(1.0, rel=1e-6)
    mean = (weights[:, None] * points).sum(0)
    assert torch.allclose(field.mean, mean, rtol=1e-5)
    assert torch.allclose(field.variance, (weights[:, None] * (points - mean).square()).sum(0), rtol=1e-4)
    assert torch.isnan(field.log_prob(torch.full((2,), -5.0, dtype=F64))), "outside the range"


def test_positive_is_log_normal() -> None:
    prior = fem_vi.GaussianVector(torch.tensor([0.3], dtype=F64), covariance=torch.tensor([[0.49]], dtype=F64))
    field, exact = fem_vi.TransformedField(prior, fem_vi.Positive()), LogNormal(torch.tensor(0.3, dtype=F64), 0.7)
    x = torch.tensor([[0.4], [2.0]], dtype=F64)
    assert torch.allclose(field.log_prob(x), exact.log_prob(x[:, 0]), rtol=1e-12)
    assert torch.allclose(field.mean, exact.mean) and torch.allclose(field.variance, exact.variance)
    assert torch.allclose(field.median, torch.tensor(0.3, dtype=F64).exp())


def test_draws_have_the_law() -> None:
    field = fem_vi.TransformedField(PRIOR, fem_vi.Bounded(0.0, 1.0))
    torch.manual_seed(0)
    draws = field.rsample((4000,))
    assert draws.shape == (4000, 2)
    expected = stats.norm(0.2, 1.0)
    assert stats.kstest(torch.logit(draws[:, 0]).numpy(), expected.cdf).pvalue > 0.01
    assert field.rsample().shape == (2,)


def test_transform_of_a_posterior() -> None:
    posterior = fem_vi.FullRankNormal(PRIOR)
    with torch.no_grad():
        posterior.mu += 0.5
    q = posterior()
    field = fem_vi.TransformedField(q, fem_vi.Positive())
    assert torch.allclose(field.mean, (q.mean + 0.5 * q.variance).exp())
    m = torch.tensor([0.1, 0.2], dtype=F64)
    assert torch.allclose(field.log_prob(m.exp()), q.log_prob(m) - m.sum())


def test_level_set_has_its_values_and_sharpens() -> None:
    m = torch.linspace(-2.0, 2.0, 401, dtype=F64, requires_grad=True)
    sharp = np.select([m.detach().numpy() < -0.5, m.detach().numpy() < 1.0], [3.0, -1.0], 7.0)
    errors = []
    for width in (0.1, 0.05, 0.025):
        x = fem_vi.LevelSet(values=(3.0, -1.0, 7.0), thresholds=(-0.5, 1.0), width=width)(m)
        errors.append(integrate.trapezoid(np.abs(x.detach().numpy() - sharp), m.detach().numpy()))
    # The integral of |sigmoid - step| is 2 log(2) width for each jump of one.
    assert errors[1] == pytest.approx((4.0 + 8.0) * 2 * np.log(2) * 0.05, rel=0.02)
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.02)
    assert torch.autograd.gradcheck(fem_vi.LevelSet((0.0, 1.0)), m[::40])


def test_moments_of_what_is_not_normal() -> None:
    """A mixture of two normal laws: those of a normal law with its mean and variance are another law's."""
    prior = fem_vi.GaussianVector(torch.zeros(2))
    parts = [fem_vi.MeanFieldNormal(prior) for _ in range(2)]
    for part, at in zip(parts, (2.0, -2.0), strict=True):
        part.mu.data.fill_(at)
        part.log_scale.data.fill_(-1.5)
    law = fem_vi.TransformedField(fem_vi.Mixture(parts)(), fem_vi.Positive())
    variance = float(np.exp(-3.0))
    first = np.cosh(2.0) * np.exp(variance / 2)
    second = np.cosh(4.0) * np.exp(2 * variance)
    assert law.mean.numpy() == pytest.approx(first, rel=0.05)
    assert law.variance.numpy() == pytest.approx(second - first**2, rel=0.1)
    assert np.exp(-1.6) < float(law.median[0]) < np.exp(1.6)  # between the modes


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: fem_vi.Positive(-1.0), "scale"),
        (lambda: fem_vi.Bounded(1.0, 0.0), "low below high"),
        (lambda: fem_vi.LevelSet((1.0, 2.0), thresholds=(0.0, 1.0)), "one value more"),
        (lambda: fem_vi.LevelSet((1.0, 2.0, 3.0), thresholds=(1.0, 0.0)), "ascend"),
        (lambda: fem_vi.TransformedField(PRIOR, fem_vi.Positive), "Positive"),
        (lambda: fem_vi.TransformedField(PRIOR, fem_vi.LevelSet((0.0, 1.0))), "Bounded"),
        (lambda: fem_vi.TransformedField(torch.distributions.Normal(0.0, 1.0), fem_vi.Positive()), "prior of fem_vi"),
    ],
)
def test_what_cannot_be_is_refused(build: object, words: str) -> None:
    with pytest.raises(fem_vi.InvalidInput, match=words):
        build()  # type: ignore[operator]
