"""`MaternField` for other powers, metrics and hyperparameters: exact algebra, and derivatives by Taylor tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import ufl
from mpi4py import MPI
from scipy import stats
from torch import Tensor

import fem_vi
from fem_vi.pde import shifted
from tests.bridge.test_field_prior import covariance_with, dense_root, matern, space
from tests.helpers import interpolated

COMM = MPI.COMM_WORLD
F64 = torch.float64
PLAIN = fem_vi.PlainVariance()
KINDS = {
    "alpha 2": {},
    "alpha 1.6": {"alpha": 1.6},
    "alpha 3.4": {"alpha": 3.4},
    "plain": {"variance": PLAIN},
    "metric": {"metric": [[1.0, 0.3], [0.3, 0.4]]},
}
ALL_KINDS = pytest.mark.parametrize("kind", [pytest.param("alpha 2", marks=pytest.mark.mpi), *list(KINDS)[1:]])


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


@pytest.mark.parametrize(
    ("dimension", "alpha"), [(1, 1.0), (1, 2.7), pytest.param(2, 1.5, marks=pytest.mark.mpi), (2, 4.0), (3, 2.5)]
)
def test_whitening_and_density_for_any_power(dimension: int, alpha: float) -> None:
    together, alone = (
        fem_vi.MaternField(space(dimension, 3, comm), std=0.8, length=0.4, mean=0.3, alpha=alpha)
        for comm in (COMM, MPI.COMM_SELF)
    )
    assert together.nu == alpha - dimension / 2
    xi = together.white_noise((2, 3))
    assert torch.allclose(together.whiten(together.unwhiten(xi)), xi, rtol=1e-9, atol=1e-10)
    root = dense_root(alone)
    assert torch.allclose(alone.stddev, torch.tensor(0.8, dtype=F64))
    assert torch.allclose(root.square().sum(1).sqrt(), torch.tensor(0.8, dtype=F64), rtol=1e-10)
    m = alone.mean + 0.5 * torch.randn(4, *alone.event_shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    dense = stats.multivariate_normal(alone.mean.numpy(), (root @ root.T).numpy()).logpdf(m.numpy())
    assert np.allclose(alone.log_prob(m).numpy(), dense, rtol=1e-8)
    assert np.allclose(together.log_prob(together.scatter(alone.gather(m))).numpy(), dense, rtol=1e-8)


@pytest.mark.parametrize(("dimension", "alpha"), [(1, 1.0), (1, 1.5), (2, 1.5), (3, 2.5)])
def test_rational_power_is_within_its_tolerance_of_the_matrix_function(dimension: int, alpha: float) -> None:
    """D^(-1/2) A^(-alpha/2), by a dense eigendecomposition: no direction's deviation is off by more."""
    prior = fem_vi.MaternField(space(dimension, 5), std=1.0, length=0.3, alpha=alpha, variance=PLAIN, tolerance=2e-3)
    even = fem_vi.MaternField(prior.V, std=1.0, length=0.3 * math.sqrt((4 - dimension) / (2 * alpha - dimension)), variance=PLAIN)
    assert even.kappa == pytest.approx(prior.kappa)
    symmetric = dense_root(even) * prior._root.mass.sqrt()[:, None]  # a multiple of A^-1
    values, vectors = torch.linalg.eigh(0.5 * (symmetric + symmetric.T))
    ours = (vectors.T @ (dense_root(prior) * prior._root.mass.sqrt()[:, None]) @ vectors).diagonal()
    d = dimension
    scale = math.gamma(alpha) / math.gamma(alpha - d / 2) / (math.gamma(2.0) / math.gamma(2.0 - d / 2))
    base = prior._root._amplitude * prior.kappa ** (-d / 2) / math.sqrt(scale)
    expected = math.sqrt(scale) * base * (values / base) ** (alpha / 2)
    assert float((ours / expected).log().abs().max()) < 2e-3
    assert float((ours / expected).log().abs().max()) > 1e-8, "it is no exact power"


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_covariance_of_any_smoothness_is_that_of_matern(alpha: float) -> None:
    """In one dimension, where a fine mesh is cheap; alpha = 1 is the exponential covariance."""
    prior = fem_vi.MaternField(space(1, 300), std=1.5, length=0.1, alpha=alpha)
    x = prior.V.tabulate_dof_coordinates()[:, 0]
    r = np.abs(x - 0.5)
    covariance = covariance_with(prior, [0.5]).numpy()
    assert np.abs(covariance - matern(r, prior))[r < 0.3].max() / 2.25 < 0.012
    if alpha == 1.0:
        assert np.allclose(matern(r, prior), 2.25 * np.exp(-r / 0.1), atol=1e-9)


@pytest.mark.parametrize("size", [1, 2], ids=["constant", "varying"])
def test_metric_stretches_the_covariance(size: int) -> None:
    """Half the correlation length across; along the axes the covariance is that of the distance in the metric."""
    V = space(2, 60)
    x = ufl.SpatialCoordinate(V.mesh)
    metric = np.diag([1.0, 0.25]) if size == 1 else ufl.as_matrix([[1.0, 0.0], [0.0, 0.25 + 0.0 * x[0]]])
    prior = fem_vi.MaternField(V, std=1.5, length=0.2, metric=metric, variance=PLAIN)
    where = V.tabulate_dof_coordinates()
    r = np.hypot(where[:, 0] - 0.5, (where[:, 1] - 0.5) / 0.5)
    near = (r > 0.05) & (r < 0.35)
    assert np.abs(covariance_with(prior, [0.5, 0.5]).numpy() - matern(r, prior))[near].max() / 2.25 < 0.03


def test_standard_deviation_is_uniform_where_the_metric_varies() -> None:
    V = space(2, 10)
    x = ufl.SpatialCoordinate(V.mesh)
    metric = ufl.as_matrix([[1.0 + x[0], 0.2], [0.2, 0.3 + x[1]]])
    prior = fem_vi.MaternField(V, std=0.7, length=0.3, metric=metric)
    draws = prior.unwhiten(prior.scatter(torch.eye(prior.num_global, dtype=F64))).square().sum(0).sqrt()
    assert torch.allclose(draws, torch.tensor(0.7, dtype=F64), rtol=1e-10)


@ALL_KINDS
def test_another_length_is_another_prior(kind: str) -> None:
    """Interpolated deviations and determinants, against those of a prior that was built for the length."""
    V = space(2, 5, COMM)
    base = fem_vi.MaternField(V, std=0.8, length=0.3, mean=0.2, lengths=(0.15, 0.6), **KINDS[kind])
    built = fem_vi.MaternField(V, std=1.7, length=0.41, mean=0.2, lengths=(0.15, 0.6), **KINDS[kind])
    moved = base.at(std=1.7, length=0.41)
    xi = base.white_noise((3,))
    m = built.unwhiten(xi)
    assert torch.allclose(moved.unwhiten(xi), m, rtol=1e-6, atol=1e-7)
    assert torch.allclose(moved.whiten(m), xi, rtol=1e-6, atol=1e-6)
    assert torch.allclose(moved.log_prob(m), built.log_prob(m), rtol=0.0, atol=2e-5)
    assert torch.allclose(moved.variance, built.variance, rtol=1e-6)
    assert repr(moved) == repr(built)
    assert (base.std, base.length) == (0.8, 0.3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("log_prob", "alpha 1.6", marks=pytest.mark.mpi),
        pytest.param("unwhiten", "alpha 2", marks=pytest.mark.mpi),
        *[(name, kind) for name in ("whiten", "log_prob", "variance") for kind in ("alpha 3.4", "plain", "metric")],
    ],
)
def test_gradients_of_hyperparameters(kind: str, name: str) -> None:
    """First derivatives against differences of values, second against differences of gradients, on any number of ranks."""
    V = space(2, 4, COMM)
    base = fem_vi.MaternField(V, std=0.8, length=0.3, lengths=(0.15, 0.6), **KINDS[kind])
    x, w = interpolated(V, 1.0, 0.4), interpolated(V, 1.0, 1.3)

    def value(std: Tensor, length: Tensor) -> Tensor:
        prior = base.at(std=std, length=length)
        if name == "variance":
            return base.all_sum((w * prior.variance).sum())
        result = getattr(prior, name)(x)
        return result if name == "log_prob" else base.all_sum((w * result).sum())

    def gradient(std: float, length: float) -> tuple[Tensor, Tensor]:
        """Along the step, and the derivative of that along the step."""
        at = [number(std), number(length)]
        along = torch.autograd.grad(value(*at), at, create_graph=True, materialize_grads=True)
        first = along[0] * step[0] + along[1] * step[1]
        second = torch.autograd.grad(first, at, materialize_grads=True)
        return first.detach(), second[0] * step[0] + second[1] * step[1]

    step, e = (0.7, -0.5), 1e-4
    first, second = gradient(0.9, 0.35)
    ends = [(0.9 + sign * e * step[0], 0.35 + sign * e * step[1]) for sign in (1, -1)]
    with torch.no_grad():
        plus, minus = (float(value(*(torch.tensor(x, dtype=F64) for x in end))) for end in ends)
    assert float(first) == pytest.approx((plus - minus) / (2 * e), rel=1e-5)
    plus, minus = (float(gradient(*end)[0]) for end in ends)
    assert float(second) == pytest.approx((plus - minus) / (2 * e), rel=1e-5)
    assert min(abs(float(first)), abs(float(second))) > 1e-3


def test_gradcheck_of_hyperparameters_and_fields_together() -> None:
    base = fem_vi.MaternField(space(2, 2), std=0.8, length=0.5, alpha=1.5, lengths=(0.3, 0.8))
    x = torch.randn(2, 9, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for name in ("whiten", "unwhiten", "log_prob"):
        assert torch.autograd.gradcheck(
            lambda s, k, x, name=name: getattr(base.at(std=s, length=k), name)(x), [number(0.9), number(0.5), x]
        )
    forward = torch.func.jvp(
        lambda k: base.at(length=k).unwhiten(x.detach()), (number(0.5).detach(),), (torch.ones((), dtype=F64),)
    )[1]
    assert forward.shape == x.shape
    step = 1e-5
    ends = [base.at(length=0.5 + s).unwhiten(x.detach()) for s in (-step, step)]
    assert torch.allclose(forward, (ends[1] - ends[0]) / (2 * step), rtol=1e-5, atol=1e-8)


def test_length_and_deviation_are_found_by_maximising_the_evidence() -> None:
    """Direct observation of the whole field without noise: the maximum of log_prob is that of the dense likelihood."""
    V = space(2, 12)
    truth = fem_vi.MaternField(V, std=1.3, length=0.2)
    torch.manual_seed(3)
    m = truth.rsample((20,))
    base = fem_vi.MaternField(V, std=0.6, length=0.35, lengths=(0.1, 0.7))
    logs = torch.tensor([math.log(0.6), math.log(0.35)], dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=40, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -base.at(std=logs[0].exp(), length=logs[1].exp()).log_prob(m).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    std, length = logs.detach().exp().tolist()
    assert std == pytest.approx(1.3, rel=0.04)  # 20 draws of 169 values: measured
    assert length == pytest.approx(0.2, rel=0.04)


@pytest.mark.mpi
def test_what_cannot_be_is_refused() -> None:
    V = space(2, 3, COMM)
    prior = fem_vi.MaternField(V, std=1.0, length=0.3)
    cases = [
        (lambda: fem_vi.MaternField(V, std=1.0, length=0.3, alpha=1.0), "alpha is 1"),
        (lambda: fem_vi.MaternField(V, std=number(1.0), length=0.3), r"prior\.at"),
        (lambda: fem_vi.MaternField(V, std=1.0, length=0.3, metric=np.diag([1.0, -1.0])), "positive definite"),
        (lambda: fem_vi.MaternField(V, std=1.0, length=0.3, metric=ufl.Identity(3)), "shape"),
        (lambda: fem_vi.MaternField(V, std=1.0, length=0.3, lengths=(0.5, 0.1)), "shortest, longest"),
        (lambda: fem_vi.MaternField(V, std=1.0, length=0.3, tolerance=1e-9), "tolerance"),
        (lambda: fem_vi.MaternField(V, std=1.0, length=0.3, variance=fem_vi.UniformVariance), "UniformVariance"),
        (lambda: prior.at(length=2.0), "lengths="),
        (lambda: prior.at(std=-1.0), "std"),
    ]
    for build, words in cases:
        with pytest.raises(fem_vi.InvalidInput, match=words):
            build()
    if COMM.size > 1:
        with pytest.raises(fem_vi.InvalidInput, match="differ between ranks"):
            prior.at(std=1.0 + COMM.rank)


@pytest.mark.mpi
def test_large_priors_are_solved_by_multigrid_without_a_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of large spaces, made that of a small one: draws, whitening and divergences, against Cholesky."""
    V = space(3, 2, COMM)
    exact = fem_vi.MaternField(V, std=0.8, length=0.4)
    monkeypatch.setattr(shifted, "LATER", 0)
    prior = fem_vi.MaternField(V, std=0.8, length=0.4)
    xi = prior.white_noise((2,))
    assert torch.allclose(prior.unwhiten(xi), exact.unwhiten(xi), rtol=1e-6, atol=1e-7)
    assert torch.allclose(prior.whiten(prior.unwhiten(xi)), xi, rtol=1e-6, atol=1e-6)
    posterior = fem_vi.LowRankNormal(prior, rank=3)
    assert float(torch.distributions.kl_divergence(posterior(), prior).detach()) > 0.0
    with pytest.raises(fem_vi.SolveFailed, match=r"draws.*divergences"):
        prior.log_prob(xi)
