"""`KarhunenLoeveField` against closed forms, dense algebra, and itself on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dolfinx import fem, mesh
from mpi4py import MPI
from scipy.optimize import brentq
from torch import Tensor

import fem_vi
from tests.bridge.test_field_prior import dense_root, space
from tests.helpers import CASES, interpolated

COMM = MPI.COMM_WORLD
F64 = torch.float64


def exact_eigenvalues(length: float, count: int) -> np.ndarray:
    """Of exp(-|x - y| / length) on the unit interval: roots of two transcendental equations, even and odd modes in turn."""
    values = []
    for k in range(count):
        low, high = k * np.pi + 1e-9, (k + 1) * np.pi - 1e-9
        # With w = frequency: even modes 1 = length w tan(w / 2), odd ones tan(w / 2) = -length w; without poles:
        even = lambda w: np.cos(w / 2) - length * w * np.sin(w / 2)  # noqa: E731
        odd = lambda w: np.sin(w / 2) + length * w * np.cos(w / 2)  # noqa: E731
        w = brentq(even if k % 2 == 0 else odd, low, high)
        values.append(2 * length / (1 + (length * w) ** 2))
    return np.array(values)


def gram(prior: fem_vi.KarhunenLoeveField) -> Tensor:
    return fem_vi.all_sum((prior.modes * prior.mass) @ prior.modes.T, prior.comm)


@pytest.mark.mpi
def test_eigenvalues_of_the_exponential_covariance() -> None:
    """They converge to the closed form with order two, with their modes orthonormal."""
    exact = 2.25 * exact_eigenvalues(0.4, 5)
    errors = []
    for n in (40, 80):
        prior = fem_vi.KarhunenLoeveField(space(1, n, COMM), fem_vi.Exponential(1.5, 0.4), truncation=fem_vi.Modes(5))
        errors.append(np.abs(prior.eigenvalues.numpy() / exact - 1).max())
        assert torch.allclose(gram(prior), torch.eye(5, dtype=F64), atol=1e-9)
    assert errors[1] < 3e-3
    assert 3.3 < errors[0] / errors[1] < 4.7
    assert prior.energy == pytest.approx(float(exact.sum()) / 2.25, rel=2e-3), "the variance is 1.5^2 everywhere"


@pytest.mark.parametrize("kind", ["kernel", "matern", "matern, fractional"])
def test_energy_is_what_was_asked_for_with_no_mode_too_many(kind: str) -> None:
    V = space(2, 6)
    alpha = 1.5 if "fractional" in kind else 2.0
    covariance = fem_vi.Exponential(0.8, 0.5) if kind == "kernel" else fem_vi.MaternField(V, std=0.8, length=0.5, alpha=alpha)
    prior = fem_vi.KarhunenLoeveField(V, covariance, truncation=fem_vi.Energy(0.9))
    assert prior.energy >= 0.9 > prior.energy - float(prior.eigenvalues[-1]) / 0.64
    assert prior.num_global < V.dofmap.index_map.size_global
    assert bool((prior.eigenvalues.diff() <= 1e-12).all())
    integral = fem_vi.all_sum((prior.mass * prior.field_variance).sum(), COMM)
    assert float(integral) == pytest.approx(0.64 * prior.energy, rel=1e-9)


def test_all_modes_are_the_covariance() -> None:
    V = space(2, 3)
    matern = fem_vi.MaternField(V, std=0.8, length=0.5, alpha=1.5, mean=0.3)
    prior = fem_vi.KarhunenLoeveField(V, matern, truncation=fem_vi.Modes(16))
    root = dense_root(matern)
    factor = prior.modes.T * prior.eigenvalues.sqrt()
    assert torch.allclose(factor @ factor.T, root @ root.T, rtol=1e-8, atol=1e-10)
    assert torch.allclose(matern.multiply_covariance(torch.eye(16, dtype=F64)), root @ root.T, rtol=1e-10, atol=1e-12)
    assert torch.equal(prior.field_mean, matern.mean)
    assert prior.energy == pytest.approx(1.0, rel=1e-9)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["kernel", "matern"])
def test_modes_are_the_same_on_any_number_of_ranks(kind: str) -> None:
    """Quadrilaterals have all symmetries of the square, so that eigenvalues come in pairs, one of which the last mode cuts."""
    fields, values = [], []
    for comm in (COMM, MPI.COMM_SELF):
        V = fem.functionspace(mesh.create_unit_square(comm, 6, 6, mesh.CellType.quadrilateral), ("Lagrange", 1))
        matern = fem_vi.MaternField(V, std=0.8, length=0.5)
        prior = fem_vi.KarhunenLoeveField(
            V, fem_vi.Exponential(1.0, 0.5) if kind == "kernel" else matern, truncation=fem_vi.Modes(5)
        )
        values.append(prior.eigenvalues)
        fields.append(matern.gather(prior.field(torch.eye(5, dtype=F64))))
    assert torch.allclose(*values, rtol=1e-9)
    assert torch.allclose(*fields, rtol=1e-6, atol=1e-7)
    gaps = values[1].diff().abs() / values[1][:-1]
    assert float(gaps.min()) < 1e-8, "there is a pair"


@pytest.mark.mpi
def test_field_is_differentiable_and_coefficients_are_its_inverse() -> None:
    V = space(2, 5, COMM)
    prior = fem_vi.KarhunenLoeveField(V, fem_vi.Exponential(1.0, 0.5), truncation=fem_vi.Modes(4), mean=interpolated(V, 1.0, 0.2))
    torch.manual_seed(0)
    xi = prior.rsample((3, 2)).requires_grad_()
    assert xi.shape == (3, 2, 4)
    assert torch.allclose(prior.coefficients(prior.field(xi)), xi, rtol=1e-8, atol=1e-9)
    weight = interpolated(V, 1.0, 0.9)
    (gradient,) = torch.autograd.grad(fem_vi.all_sum((prior.field(xi) * weight).sum(), COMM), xi)
    exact = fem_vi.all_sum(prior.modes @ weight, COMM) * prior.eigenvalues.sqrt()
    assert torch.allclose(gradient, exact.expand(3, 2, 4), rtol=1e-10)
    with pytest.raises(fem_vi.InvalidInput, match="4 entries"):
        prior.field(torch.zeros(3, dtype=F64))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(fem_vi.FullRankNormal, marks=pytest.mark.mpi),
        fem_vi.MeanFieldNormal,
        lambda prior: fem_vi.LowRankNormal(prior, rank=3),
    ],
)
def test_every_family_for_vectors_takes_it(family: object) -> None:
    """Direct observation of the field at points: the posterior of the coefficients is known."""
    V = space(2, 5, COMM)
    prior = fem_vi.KarhunenLoeveField(V, fem_vi.Exponential(1.0, 0.5), truncation=fem_vi.Modes(6))
    observe = fem_vi.PointObservation(V, [[0.21, 0.33], [0.72, 0.4], [0.51, 0.93]])
    y = torch.tensor([0.3, -0.2, 0.8], dtype=F64)
    problem = fem_vi.InverseProblem(prior, lambda xi: observe(prior.field(xi)), fem_vi.GaussianNoise(0.2), y)
    run = fem_vi.fit(problem, family(prior), fem_vi.ELBO(samples=4), steps=3)  # type: ignore[operator]
    A = observe(prior.field(torch.eye(6, dtype=F64))).T
    mean = torch.linalg.solve(torch.eye(6, dtype=F64) + A.T @ A / 0.04, A.T @ y / 0.04)
    assert torch.allclose(run.posterior().mean, mean, atol=2e-2)


@pytest.mark.mpi
def test_what_cannot_be_is_refused() -> None:
    V, W = space(2, 3, COMM), space(2, 3, COMM)
    matern = fem_vi.MaternField(V, std=1.0, length=0.3)
    cases = [
        (lambda: fem_vi.KarhunenLoeveField(W, matern), "another space"),
        (lambda: fem_vi.KarhunenLoeveField(V, matern, mean=1.0), "mean"),
        (lambda: fem_vi.KarhunenLoeveField(V, fem_vi.Exponential), "Exponential"),
        (lambda: fem_vi.KarhunenLoeveField(V, matern, truncation=5), "Modes or Energy"),
        (lambda: fem_vi.KarhunenLoeveField(V, matern, truncation=fem_vi.Modes(100)), "16 unknowns"),
        (lambda: fem_vi.KarhunenLoeveField(V, lambda x, y: np.ones(3)), "covariance returned shape"),
        (lambda: fem_vi.Energy(1.5), "between 0 and 1"),
        (lambda: fem_vi.Modes(0), "at least 1"),
    ]
    for build, words in cases:
        with pytest.raises(fem_vi.InvalidInput, match=words):
            build()


@pytest.mark.mpi
def test_coefficients_in_place_of_the_field_are_told_from_a_whole_vector() -> None:
    case = CASES["log_diffusion"](COMM)
    prior = fem_vi.KarhunenLoeveField(case.given[0].function_space, fem_vi.Exponential(1.0, 0.5), truncation=fem_vi.Modes(3))
    problem = fem_vi.InverseProblem(prior, case.solve, fem_vi.GaussianNoise(1.0), torch.zeros(2, dtype=F64))
    with pytest.raises(fem_vi.InvalidInput, match=r"prior\.field of a KarhunenLoeveField makes a field of a few numbers"):
        fem_vi.fit(problem, fem_vi.MeanFieldNormal(prior), fem_vi.ELBO(), steps=1)
