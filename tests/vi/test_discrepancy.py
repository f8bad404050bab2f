"""Distances between samples against closed forms of normal distributions."""

from __future__ import annotations

import math

import pytest
import torch

from fem_vi.errors import InvalidInput
from fem_vi.vi.discrepancy import MMD, EnergyKernel, GaussianKernel, SlicedWasserstein, mmd_squared, sliced_wasserstein
from fem_vi.vi.divergence import GivenSamples
from fem_vi.vi.fit import fit
from fem_vi.vi.optimizer import Adam, Cosine
from fem_vi.vi.posterior.low_rank import LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.posterior.mixture import Mixture
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.start import PresentParameters
from tests.vi.helpers import F64, Affine, numbers, perturb, split_pair


def mean_kernel(shift, variance, length, n):
    """E k(X, Y) for X - Y ~ N(shift, variance I) in n dimensions."""
    total = length**2 + variance
    return (length**2 / total) ** (n / 2) * math.exp(-float(shift @ shift) / (2 * total))


def test_mmd_with_a_gaussian_kernel():
    shift, n, length = torch.tensor([0.5, -0.3, 0.2], dtype=F64), 3, 1.3
    values = []
    for k in range(40):
        x, y = numbers(2 * k, 300, n), shift + 0.6 * numbers(2 * k + 1, 200, n)
        values.append(float(mmd_squared(x, y, GaussianKernel(length))))
    zero = torch.zeros(n, dtype=F64)
    exact = mean_kernel(zero, 2, length, n) + mean_kernel(zero, 0.72, length, n) - 2 * mean_kernel(shift, 1.36, length, n)
    values = torch.tensor(values)
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 40**0.5
    assert exact > 0.05


def test_energy_distance():
    # E|X - Y| of a normal difference: the mean of a folded normal distribution.
    def folded(mu, sigma):
        return sigma * math.sqrt(2 / math.pi) * math.exp(-((mu / sigma) ** 2) / 2) + mu * math.erf(mu / sigma / math.sqrt(2))

    values = []
    for k in range(40):
        x, y = 0.7 + numbers(2 * k, 300, 1), 0.5 * numbers(2 * k + 1, 200, 1)
        values.append(float(mmd_squared(x, y, EnergyKernel())))
    exact = 2 * folded(0.7, math.sqrt(1.25)) - folded(0, math.sqrt(2)) - folded(0, math.sqrt(0.5))
    values = torch.tensor(values)
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 40**0.5


@pytest.mark.parametrize("kernel", [GaussianKernel(0.8), EnergyKernel()])
def test_mmd_is_differentiable_and_keeps_its_digits_far_from_the_origin(kernel):
    x, y = numbers(1, 4, 2).requires_grad_(), numbers(2, 3, 2)
    assert torch.autograd.gradcheck(lambda x: mmd_squared(x, y, kernel), x)
    near, far = mmd_squared(x, y, kernel), mmd_squared(x + 1e6, y + 1e6, kernel)
    torch.testing.assert_close(near, far, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [4000, 1500])
def test_sliced_wasserstein_of_normals(count):
    # Projections are N(0, 1) and N(shift . theta, 0.25), (shift . theta)^2 + 0.25 apart, on average |shift|^2 / n + 0.25.
    shift, n = torch.tensor([0.6, -0.4, 0.0, 0.8], dtype=F64), 4
    x, y = numbers(1, 4000, n), shift + 0.5 * numbers(2, count, n)
    value = float(sliced_wasserstein(x, y, numbers(3, 500, n)))
    assert value == pytest.approx(float(shift @ shift) / n + 0.25, rel=0.06)


def test_sliced_wasserstein_is_zero_for_the_same_set_and_differentiable():
    x, y, directions = numbers(1, 5, 3).requires_grad_(), numbers(2, 4, 3), numbers(3, 6, 3)
    assert float(sliced_wasserstein(x, x.detach()[torch.tensor([2, 0, 1, 4, 3])], directions)) < 1e-30
    assert torch.autograd.gradcheck(lambda x: sliced_wasserstein(x, y, directions), x)
    assert torch.autograd.gradcheck(lambda x: sliced_wasserstein(x, y[:1], directions), x)


def test_recovers_a_length_scale_from_what_it_does_to_observations():
    # A process on [0, 1] with unknown length scale, seen through integrals over pieces: 12 of methods.md.
    t = torch.linspace(0, 1, 30, dtype=F64)
    B = torch.kron(torch.eye(6, dtype=F64), torch.full((1, 5), 0.2, dtype=F64))

    def pushed(log_length, eps):
        covariance = torch.exp(-((t[:, None] - t[None, :]).abs()) / log_length.exp()) + 1e-8 * torch.eye(30, dtype=F64)
        return eps @ torch.linalg.cholesky(covariance).T @ B.T

    data = pushed(torch.tensor(math.log(0.3), dtype=F64), numbers(1, 2000, 30))
    for distance in (
        lambda x: mmd_squared(x, data[:300], GaussianKernel(1.0)),
        lambda x: sliced_wasserstein(x, data, torch.randn(32, 6, dtype=F64)),
    ):
        log_length = torch.tensor(math.log(0.05), dtype=F64, requires_grad=True)
        optimizer = torch.optim.Adam([log_length], lr=0.1)
        torch.manual_seed(0)
        for step in range(70):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.96**step
            optimizer.zero_grad()
            distance(pushed(log_length, torch.randn(300, 30, dtype=F64))).backward()
            optimizer.step()
        assert float(log_length.exp()) == pytest.approx(0.3, rel=0.2)


@pytest.mark.parametrize(
    ("make", "steps"), [(lambda target: MMD(target, samples=128), 150), (lambda target: SlicedWasserstein(target), 250)]
)
def test_fits_the_moments_of_given_samples(make, steps):
    affine = Affine.create(2, 2)
    torch.manual_seed(0)
    m = affine.posterior().sample((2000,))
    problem = affine.problem()
    run = fit(
        problem,
        LowRankNormal(affine.prior, 2),
        make(GivenSamples(m, batch=256)),
        steps=steps,
        optimizer=Adam(lr=0.1),
        schedule=Cosine(final=1e-2),
        start=PresentParameters(),
    )
    q = run.posterior()
    assert bool(((q.mean - m.mean(0)).abs() < 0.1 * m.std(0)).all())
    torch.testing.assert_close(q.variance.sqrt(), m.std(0), rtol=0.15, atol=0.0)
    assert problem.cost.solves == 0


@pytest.mark.mpi
@pytest.mark.parametrize("kind", [MMD, SlicedWasserstein])
def test_split_over_ranks(kind):
    results = []
    for problem in split_pair():
        torch.manual_seed(3)
        posterior = MeanFieldNormal(problem.prior)
        perturb(posterior)
        loss = kind(GivenSamples(problem.prior.scatter(numbers(9, 7, 13))), samples=5)(problem, posterior).loss
        loss.backward()
        results.append([loss.detach(), *(problem.prior.gather(value.grad) for value in posterior.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_refusals():
    affine = Affine.create()
    target = GivenSamples(numbers(1, 4, 5))
    for make, words in (
        (lambda: MMD(numbers(1, 4, 5)), r"(?s)target is .*GivenSamples"),
        (lambda: MMD(target, samples=1), r"samples is 1"),
        (lambda: MMD(target, kernel="rbf"), r"kernel is 'rbf'; .*GaussianKernel or EnergyKernel"),
        (lambda: GaussianKernel(0.0), r"length is 0.0"),
        (lambda: SlicedWasserstein(target, directions=0), r"directions is 0"),
        (lambda: mmd_squared(numbers(1, 1, 2), numbers(2, 3, 2), EnergyKernel()), r"1 and 3 samples"),
    ):
        with pytest.raises(InvalidInput, match=words):
            make()
    mixture = Mixture([MeanFieldNormal(affine.prior), MeanFieldNormal(affine.prior)])
    with pytest.raises(InvalidInput, match=r"no gradient of its weights.*ForwardKL"):
        MMD(target)(affine.problem(), mixture)
    assert isinstance(affine.prior, GaussianVector)
