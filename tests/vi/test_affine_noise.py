"""Normal distributions as maps of white noise: covariance, density and its gradient; and the rule that is exact for cubics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Laplace, Normal

import fem_vi
from fem_vi.vi.posterior.affine_noise import affine_noise

F64 = torch.float64
SIZE, BATCH = 4, 3
HEADS = {
    "diagonal": fem_vi.DiagonalHead(2, SIZE),
    "full": fem_vi.FullHead(2, SIZE),
    "low rank": fem_vi.LowRankCovarianceHead(2, SIZE, rank=2),
    "precision": fem_vi.LowRankPrecisionHead(2, SIZE, rank=2),
}


def made(name: str) -> tuple[Distribution, Tensor]:
    """A distribution for each of three features, and the numbers that it was made of."""
    generator = torch.Generator().manual_seed(7)
    head = HEADS[name]
    width = head.linear.weight.shape[0]
    raw = (0.3 * torch.randn(BATCH, width, dtype=F64, generator=generator)).requires_grad_()
    return head.at(raw), raw


@pytest.mark.parametrize("name", HEADS)
def test_the_map_and_the_density_are_those_of_the_distribution(name: str) -> None:
    q, raw = made(name)
    noise = affine_noise(q)
    assert noise is not None
    eye = torch.eye(noise.size, dtype=F64)[:, None]
    zero = torch.zeros(1, 1, noise.size, dtype=F64)
    L = noise.push(eye) - noise.push(zero)  # columns of L, for each of the batch
    covariance = getattr(q, "covariance_matrix", None)
    expected = torch.diag_embed(q.variance) if covariance is None else covariance
    torch.testing.assert_close(torch.einsum("kbi,kbj->bij", L, L), expected)
    torch.testing.assert_close(noise.push(zero)[0], q.mean)

    eps = noise.draw()
    assert eps.shape == (BATCH, noise.size)
    u = noise.push(eps)
    torch.testing.assert_close(noise.log_prob(q, eps, u), q.log_prob(u))
    ours, theirs = (torch.autograd.grad(x.sum(), raw, retain_graph=True)[0] for x in (noise.log_prob(q, eps, u), q.log_prob(u)))
    torch.testing.assert_close(ours, theirs, msg="the total derivative")
    held = noise.held()
    torch.testing.assert_close(held.log_prob(u), q.log_prob(u))
    assert not held.log_prob(u.detach()).requires_grad


def test_other_distributions_have_no_map() -> None:
    zeros, ones = torch.zeros(2, 3, dtype=F64), torch.ones(2, 3, dtype=F64)
    assert affine_noise(Independent(Laplace(zeros, ones), 1)) is None
    assert affine_noise(Independent(Normal(zeros[..., None], ones[..., None]), 2)) is None


def test_spherical_radial_rule_is_exact_for_cubics_and_unbiased_beyond() -> None:
    torch.manual_seed(0)
    n = 5
    a, B, C = torch.randn(n, dtype=F64), torch.randn(n, n, dtype=F64), torch.randn(n, n, n, dtype=F64)

    def cubic(x: Tensor) -> Tensor:
        return 1.3 + x @ a + torch.einsum("pi,ij,pj->p", x, B, x) + torch.einsum("pi,pj,pk,ijk->p", x, x, x, C)

    for _ in range(3):
        points, weights = fem_vi.SphericalRadial().draw(n)
        assert points.shape == (2 * n + 1, n)
        assert float(weights @ cubic(points)) == pytest.approx(1.3 + float(B.trace()), rel=1e-10)
        assert float(weights.sum()) == pytest.approx(1.0)
    for directions in (None, 2):
        values = []
        for _ in range(2000):
            points, weights = fem_vi.SphericalRadial(directions).draw(n)
            values.append(weights @ (points[:, 0] ** 4 + torch.cos(points[:, 1])))
        each = torch.stack(values)
        exact, error = 3.0 + 0.6065306597126334, float(each.std()) / len(each) ** 0.5  # cos: exp(-1/2)
        assert abs(float(each.mean()) - exact) < 4 * error, directions
        assert error < 0.2
