"""Heads: features become distributions, whose densities are those of their draws."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import zuko
from torch.distributions import MultivariateNormal

from fem_vi.errors import InvalidInput
from fem_vi.vi.posterior.flow_head import FlowHead
from fem_vi.vi.posterior.heads import DiagonalHead, FullHead, LowRankCovarianceHead, LowRankPrecisionHead
from fem_vi.vi.posterior.neural_spline import NeuralSpline
from tests.vi.helpers import F64, numbers

SPLINE = NeuralSpline(transforms=2, bins=4, hidden=(8,), passes=2)
NORMAL = {
    "diagonal": DiagonalHead,
    "full": FullHead,
    "covariance": partial(LowRankCovarianceHead, rank=2),
    "precision": partial(LowRankPrecisionHead, rank=2),
}
HEADS = {
    **NORMAL,
    "flow": partial(FlowHead, transform=SPLINE),
    "flow, diagonal": partial(FlowHead, transform=SPLINE, affine=DiagonalHead),
}
every = pytest.mark.parametrize("name", HEADS)
normal = pytest.mark.parametrize("name", NORMAL)


def moved(name, size=4, num_features=3, *, by=0.3, **options):
    """A head whose every parameter has been moved."""
    torch.manual_seed(0)
    head = HEADS[name](num_features, size, **options)
    with torch.no_grad():
        for k, value in enumerate(head.parameters()):
            value += by * numbers(k, *value.shape)
    return head


def covariance_of(q):
    return torch.diag_embed(q.variance) if not hasattr(q, "covariance_matrix") else q.covariance_matrix


@every
def test_shapes_follow_the_features(name):
    head = moved(name)
    for batch in ((), (5,), (2, 5)):
        q = head(numbers(9, *batch, 3))
        assert q.batch_shape == batch
        assert q.event_shape == (4,)
        x = q.rsample(torch.Size([7]))
        assert x.shape == (7, *batch, 4)
        assert q.log_prob(x).shape == (7, *batch)
        assert q.mean.shape == q.variance.shape == (*batch, 4)


@every
def test_rows_of_a_batch_are_distributions_of_their_own(name):
    head, features, x = moved(name), numbers(9, 5, 3), numbers(10, 5, 4)
    together = head(features).log_prob(x)
    alone = torch.stack([head(row).log_prob(value) for row, value in zip(features, x, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@normal
def test_density_is_that_of_the_covariance(name):
    q, x = moved(name)(numbers(9, 5, 3)), numbers(10, 5, 4)
    reference = MultivariateNormal(q.mean, covariance_of(q))
    torch.testing.assert_close(q.log_prob(x), reference.log_prob(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(q.entropy(), reference.entropy(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(q.variance, covariance_of(q).diagonal(dim1=-2, dim2=-1))


@normal
def test_draws_have_these_moments(name):
    q = moved(name)(numbers(9, 2, 3))
    torch.manual_seed(1)
    draws = q.rsample(torch.Size([40_000])).detach()
    error = 5 * (covariance_of(q).diagonal(dim1=-2, dim2=-1).amax() / 40_000**0.5).item()
    torch.testing.assert_close(draws.mean(0), q.mean, rtol=0, atol=5 * (q.variance.amax() / 40_000).sqrt().item())
    centred = draws - draws.mean(0)
    covariance = torch.einsum("sbi,sbj->bij", centred, centred) / len(draws)
    torch.testing.assert_close(covariance, covariance_of(q), rtol=0, atol=2 * error)


def test_the_density_of_a_flow_integrates_to_one_and_is_that_of_its_draws():
    q = moved("flow", size=2)(numbers(9, 3))
    grid = torch.linspace(-9, 9, 241, dtype=F64)
    cell = float(grid[1] - grid[0]) ** 2
    x = torch.cartesian_prod(grid, grid)
    density = q.log_prob(x).exp().detach()
    assert float(density.sum() * cell) == pytest.approx(1.0, abs=3e-3)
    mean = (density[:, None] * x).sum(0) * cell
    variance = (density[:, None] * (x - mean).square()).sum(0) * cell
    torch.manual_seed(2)
    draws = q.rsample(torch.Size([40_000])).detach()
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=5 * (variance.max() / 40_000).sqrt().item())
    torch.testing.assert_close(draws.var(0), variance, rtol=0.05, atol=0)


def test_a_flow_on_other_noise_is_the_density_of_its_draws():
    q = moved("flow", size=2)(numbers(9, 3)).with_base(torch.tensor([0.5, -0.3]), torch.tensor([-0.4, 0.3]))
    grid = torch.linspace(-9, 9, 241, dtype=F64)
    x = torch.cartesian_prod(grid, grid)
    density = q.log_prob(x).exp().detach() * float(grid[1] - grid[0]) ** 2
    assert float(density.sum()) == pytest.approx(1.0, abs=3e-3)
    torch.manual_seed(2)
    draws = q.rsample(torch.Size([40_000])).detach()
    torch.testing.assert_close(draws.mean(0), (density[:, None] * x).sum(0), rtol=0, atol=0.05)


@every
def test_starts_near_the_same_normal_for_all_features(name):
    torch.manual_seed(0)
    q = HEADS[name](3, 4, std=2.0)(numbers(9, 6, 3))
    if name in NORMAL:
        assert float(q.mean.abs().max()) == 0.0
        torch.testing.assert_close(q.stddev, torch.full((6, 4), 2.0, dtype=F64), rtol=0.05, atol=0)
    x = 2.0 * numbers(10, 6, 4)
    reference = MultivariateNormal(torch.zeros(4, dtype=F64), 4.0 * torch.eye(4, dtype=F64))
    torch.testing.assert_close(q.log_prob(x), reference.log_prob(x), rtol=0.02, atol=0)


@every
def test_every_parameter_gets_a_gradient_through_draws_and_densities(name):
    head = moved(name)
    features = numbers(9, 6, 3).requires_grad_()
    q = head(features)
    x = q.rsample(torch.Size([3]))
    (q.log_prob(x.detach()).sum() + x.square().sum()).backward()
    assert bool(features.grad.abs().sum() > 0)
    silent = [n for n, value in head.named_parameters() if value.grad is None or not bool(value.grad.abs().sum() > 0)]
    assert silent == []


def test_a_flow_goes_on_from_a_trained_normal_head():
    features = numbers(9, 6, 3)
    normal = moved("full")
    flow = FlowHead(3, 4, transform=SPLINE, affine=lambda *sizes, std: normal)
    x = numbers(10, 6, 4)
    torch.testing.assert_close(flow(features).log_prob(x), normal(features).log_prob(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DiagonalHead(0, 4), "num_features is 0"),
        (lambda: FullHead(3, 4, std=0.0), "std is 0.0"),
        (lambda: LowRankPrecisionHead(3, 4, rank=5), "rank is 5; it must lie between 1 and the 4"),
        (lambda: LowRankCovarianceHead(3, 4, rank=0), "rank is 0"),
        (lambda: FullHead(3, 4)(torch.zeros(2, 5)), r"features have shape \(2, 5\); the last axis must be 3"),
        (lambda: FlowHead(3, 4, transform=lambda n, context: torch.nn.Linear(n, n)), "FlowHead: transform made a Linear"),
        (lambda: FlowHead(3, 4, affine=partial(LowRankPrecisionHead, rank=1)), "FlowHead: affine is a LowRankPrecisionHead"),
        (lambda: FlowHead(3, 4, affine=lambda *sizes, std: FullHead(3, 5)), "affine made a head of 3 features and 5 entries"),
    ],
)
def test_refuses(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


def test_a_flow_of_zuko_serves():
    head = FlowHead(3, 4, transform=lambda n, context: zuko.flows.MAF(n, context, transforms=2, hidden_features=(8,)))
    assert head(numbers(9, 5, 3)).log_prob(numbers(10, 5, 4)).shape == (5,)
