"""The Laplace approximation against dense linear algebra, and its honesty where the search fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fem_vi.errors import InvalidInput
from fem_vi.vi.diagnostics import diagnose
from fem_vi.vi.fit import fit
from fem_vi.vi.laplace import laplace
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.multiplicative_noise import MultiplicativeNoise
from fem_vi.vi.objective import ELBO
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.low_rank import LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.products import GaussNewtonProducts
from fem_vi.vi.spectrum import dominant_directions, orthonormal
from fem_vi.vi.start import GaussNewton, NewtonCG
from fem_vi.vi.student_noise import StudentNoise
from fem_vi.vi.unknown_scale import UnknownScale
from tests.vi.helpers import F64, Affine, numbers, split_pair

EXACTLY = NewtonCG(threshold=1e-14)


def whitened_jacobian(problem: InverseProblem, xi: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(lambda x: problem.predict(problem.prior.unwhiten(x)) / problem.likelihood.std, xi)


@pytest.mark.parametrize("mode", [EXACTLY, GaussNewton()], ids=["NewtonCG", "GaussNewton"])
@pytest.mark.parametrize(("n", "num_data", "std"), [(5, 3, 0.3), (6, 40, 0.3), (40, 30, 0.05), (8, 4, 1e-3)])
def test_is_the_exact_posterior_of_an_affine_map(mode, n, num_data, std):
    affine = Affine.create(n, num_data, std)
    q, exact = laplace(affine.problem(), mode=mode), affine.posterior()
    assert q.report.search.converged
    # Curvatures of 1e7: rounding leaves fewer digits of the evidence.
    assert q.report.log_evidence == pytest.approx(affine.log_evidence(), rel=1e-9, abs=1e-6)
    torch.testing.assert_close(q().mean, exact.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(q().variance, exact.variance, rtol=1e-6, atol=0.0)
    exact_values = torch.linalg.eigvalsh(affine.whitened_precision()).flip(0) - 1
    values = torch.tensor(q.report.eigenvalues, dtype=F64)
    torch.testing.assert_close(values, exact_values[: len(values)], rtol=1e-6, atol=1e-8)
    assert len(values) == min(n, num_data)


def test_truncates_at_a_rank_and_at_a_threshold():
    affine = Affine.create(40, 30, 0.3)
    exact = torch.linalg.eigvalsh(affine.whitened_precision()).flip(0) - 1
    by_rank = laplace(affine.problem(), rank=5).report
    # The spectrum of a random matrix is flat, the worst case for random probes; that of a PDE decays.
    torch.testing.assert_close(torch.tensor(by_rank.eigenvalues, dtype=F64), exact[:5], rtol=0.15, atol=0.0)
    threshold = float(exact[9] + exact[10]) / 2
    by_threshold = laplace(affine.problem(), mode=NewtonCG(threshold=threshold)).report
    assert len(by_threshold.eigenvalues) == 10
    assert by_threshold.neglected == pytest.approx(float(exact[10]), rel=0.05)
    for rank in (5, 12):
        rows = laplace(affine.problem(), rank=rank, mode=GaussNewton()).report
        assert rows.eigenvalues == pytest.approx(exact[:rank].tolist())
        assert rows.neglected == pytest.approx(float(exact[rank]))


def test_probes_stop_early_where_few_directions_matter():
    # 200 data that see 6 directions: one block of 16 probes and a second pass, in place of 200 adjoint solves.
    A = numbers(1, 200, 6) @ numbers(2, 6, 100)
    prior = GaussianVector(torch.zeros(100))
    problem = InverseProblem(prior, lambda m: m @ A.T, GaussianNoise(10.0), numbers(3, 200))
    q = laplace(problem)
    assert len(q.report.eigenvalues) == 6
    assert q.report.solves == problem.cost.solves < 100
    torch.testing.assert_close(
        torch.tensor(q.report.eigenvalues, dtype=F64), torch.linalg.svdvals(A)[:6].square() / 100, rtol=1e-9, atol=0.0
    )


def test_of_few_unknowns_a_product_each_tells_all():
    A = numbers(1, 50, 20)
    problem = InverseProblem(GaussianVector(torch.zeros(20)), lambda m: m @ A.T, GaussianNoise(1.0), numbers(3, 50))
    at = GaussNewtonProducts(problem, torch.zeros(20, dtype=F64))
    before = problem.cost.solves
    rows, neglected = dominant_directions(problem.prior, at, threshold=1e-9)
    assert problem.cost.solves - before == 20 + 1
    assert neglected == 0.0
    torch.testing.assert_close(rows.T @ rows, A.T @ A, rtol=1e-10, atol=1e-10)


@pytest.mark.mpi
def test_products_are_those_of_the_jacobian():
    split, alone = split_pair()
    xi = 0.3 * numbers(6, 13)
    J = whitened_jacobian(alone, xi)
    at = GaussNewtonProducts(split, split.prior.scatter(xi))
    v, w = numbers(7, 3, 13), numbers(8, 2, 4)
    before = split.cost.solves
    torch.testing.assert_close(at.forward(split.prior.scatter(v)), v @ J.T)
    torch.testing.assert_close(split.prior.gather(at.adjoint(w)), w @ J)
    assert split.cost.solves - before == 3 + 2 + 1
    torch.testing.assert_close(at.forward(split.prior.scatter(v[0])), J @ v[0])
    torch.testing.assert_close(split.prior.gather(at.adjoint(w[0])), w[0] @ J)
    x = xi.clone().requires_grad_()
    value = 0.5 * x.square().sum() - alone.log_likelihood(alone.prior.unwhiten(x))
    torch.testing.assert_close(at.value, float(value))
    torch.testing.assert_close(split.prior.gather(at.gradient), torch.autograd.grad(value, x)[0])


@pytest.mark.mpi
def test_orthonormal_rows_over_ranks():
    split, _ = split_pair()
    rows = numbers(1, 5, 13)
    rows[4] = rows[0] * 1e-9 + rows[1]  # nearly dependent
    q = split.prior.gather(orthonormal(split.prior, split.prior.scatter(rows)))
    torch.testing.assert_close(q @ q.T, torch.eye(5, dtype=F64), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(rows @ q.T @ q, rows)


@pytest.mark.mpi
def test_nonlinear_and_the_same_on_any_number_of_ranks():
    split, alone = split_pair()
    ours, reference = laplace(split, mode=EXACTLY), laplace(alone, mode=EXACTLY)
    gather = split.prior.gather
    torch.testing.assert_close(gather(ours().mean.detach()), reference().mean.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gather(ours().variance.detach()), reference().variance.detach(), rtol=1e-8, atol=1e-8)
    assert ours.report.log_evidence == pytest.approx(reference.report.log_evidence, abs=1e-7)
    assert ours.report.solves == reference.report.solves
    xi = reference.mu.detach().clone().requires_grad_()
    phi = 0.5 * xi.square().sum() - alone.log_likelihood(alone.prior.unwhiten(xi))
    assert float(torch.autograd.grad(phi, xi)[0].norm()) < 1e-4 * reference.report.search.first_grad_norm
    J = whitened_jacobian(alone, reference.mu.detach())
    precision = torch.eye(13, dtype=F64) + J.T @ J
    root = alone.prior.unwhiten(torch.eye(13, dtype=F64)) - alone.prior.mean
    torch.testing.assert_close(reference().variance.detach(), (root.T @ torch.linalg.inv(precision) @ root).diagonal())
    assert reference.report.log_evidence == pytest.approx(-float(phi.detach()) - 0.5 * float(torch.logdet(precision)), abs=1e-8)


@pytest.mark.parametrize("family", [FullRankNormal, MeanFieldNormal, lambda prior: LowRankNormal(prior, 3)])
def test_newton_cg_starts_a_fit_where_gauss_newton_does(family):
    affine = Affine.create()
    torch.manual_seed(0)
    one = family(affine.prior)
    torch.manual_seed(0)
    other = family(affine.prior)
    GaussNewton()(affine.problem(), one)
    EXACTLY(affine.problem(), other)
    torch.testing.assert_close(one().mean, other().mean)
    torch.testing.assert_close(one().variance, other().variance)
    run = fit(affine.problem(), family(affine.prior), ELBO(samples=2), steps=2, start=NewtonCG())
    assert run.config["start"] == repr(NewtonCG())
    with pytest.raises(InvalidInput, match=r"NewtonCG: Linear has no start_at"):
        NewtonCG()(affine.problem(), nn.Linear(2, 2))


def test_is_a_posterior_to_diagnose_and_to_fit_from():
    affine = Affine.create()
    problem = affine.problem()
    posterior = laplace(problem)
    diagnosis = diagnose(problem, posterior, samples=100)
    assert diagnosis.khat == 0.0
    assert diagnosis.elbo == pytest.approx(affine.log_evidence(), abs=1e-6)
    run = fit(problem, posterior, ELBO(samples=2), steps=5)
    assert run.history[-1].elbo == pytest.approx(affine.log_evidence(), abs=1e-6)
    assert "0.003" not in run.config["optimizer"] or "Adam(lr=0.00134" in run.config["optimizer"]


def test_says_where_the_search_did_not_converge():
    y = torch.tensor([150.0], dtype=F64)
    problem = InverseProblem(GaussianVector(torch.zeros(1)), lambda m: torch.exp(5 * m), GaussianNoise(0.01), y)
    report = laplace(problem, mode=NewtonCG(iterations=2)).report
    assert not report.search.converged
    assert report.search.reason == "iterations (2) ran out"
    assert "NOT FOUND: iterations (2) ran out" in str(report)
    report = laplace(problem).report
    assert report.search.converged
    assert "NOT FOUND" not in str(report)


def test_stops_where_a_step_promises_less_than_is_asked_for():
    y = torch.tensor([20.0], dtype=F64)
    problem = InverseProblem(GaussianVector(torch.zeros(1)), lambda m: torch.exp(m), GaussianNoise(0.01), y)
    exact = laplace(problem).report
    report = laplace(problem, mode=NewtonCG(gain=10.0)).report
    assert report.search.converged
    assert report.search.reason == "the last step promised fewer nats than gain (10)"
    assert report.search.iterations < exact.search.iterations
    assert report.search.gain < 10.0


def test_stops_where_no_step_gains():
    # A kink at the prior mean: the derivative promises a descent that is not there.
    class Kink(torch.autograd.Function):
        @staticmethod
        def forward(m):
            return m.abs()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return -g

    prior = GaussianVector(torch.zeros(1))
    problem = InverseProblem(prior, Kink.apply, GaussianNoise(0.1), torch.tensor([-1.0]))
    report = laplace(problem, mode=GaussNewton()).report
    assert not report.search.converged
    assert report.search.reason == "no step along the last direction gained anything"


@pytest.mark.mpi
def test_directions_of_precise_data_lose_no_digits():
    # Eigenvalues from 1e10 to 1e-2: the smallest are found beside the largest.
    split, _ = split_pair()
    basis = torch.linalg.qr(numbers(3, 13, 13)).Q
    sizes = torch.logspace(5, -1, 8, dtype=F64)
    A = (basis[:8] * sizes[:, None]) / split.prior.global_std
    owned = A[:, split.prior.first : split.prior.last]
    problem = InverseProblem(split.prior, lambda m: split.prior.all_sum(m @ owned.T), GaussianNoise(1.0), numbers(4, 8))
    at = GaussNewtonProducts(problem, torch.zeros(split.prior.event_shape, dtype=F64))
    rows, neglected = dominant_directions(split.prior, at, threshold=1e-14)
    assert neglected == 0.0
    values = split.prior.all_sum(rows.square().sum(1)).sqrt()
    torch.testing.assert_close(values, sizes, rtol=1e-5, atol=0.0)


def test_refusals():
    affine = Affine.create()
    for arguments, words in (
        ({"mode": NewtonCG}, r"mode is .*NewtonCG or GaussNewton"),
        ({"rank": 0}, r"rank is 0; .*at least 1"),
    ):
        with pytest.raises(InvalidInput, match=words):
            laplace(affine.problem(), **arguments)
    with pytest.raises(InvalidInput, match="problem is 'abc'"):
        laplace("abc")
    for name, value in {"iterations": 0, "rtol": -1.0, "inner": 0, "threshold": 0.0, "rank": 0, "gain": -1.0}.items():
        with pytest.raises(InvalidInput, match=f"NewtonCG: {name} is"):
            NewtonCG(**{name: value})


@pytest.mark.parametrize("mode", [EXACTLY, GaussNewton()], ids=["NewtonCG", "GaussNewton"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["additive", "multiplicative"])
def test_noise_of_unknown_size_has_its_own_curvature(mode, wrapped):
    # Newton's method with that of standardised residuals, a half of it, went forth and back until its steps ran out.
    num_data, prior = 12, GaussianVector(torch.zeros(3))
    A = 0.3 * numbers(1, num_data, 2)
    y = A @ torch.tensor([0.5, -1.0], dtype=F64) + 0.4 * numbers(2, num_data)
    noise: object = UnknownScale(GaussianNoise(0.5))
    if wrapped:  # of the logarithms, with the same answer
        noise, y = MultiplicativeNoise(noise), y.exp()

    def forward(m):
        data = m[..., :2] @ A.T
        return torch.cat([data.exp() if wrapped else data, m[..., 2:]], dim=-1)

    problem = InverseProblem(prior, forward, noise, y)
    q = laplace(problem, mode=mode)
    assert q.report.search.converged
    assert q.report.search.iterations <= 15
    m = q().mean.detach().requires_grad_()
    (slope,) = torch.autograd.grad(problem.log_joint(m), m)
    assert float(slope.abs().max()) < 1e-4
    scale = 0.5 * m[2].detach().exp()
    precision = torch.eye(3, dtype=F64) + torch.block_diag(A.T @ A / scale**2, torch.tensor([[2.0 * num_data]], dtype=F64))
    torch.testing.assert_close(q().variance.detach(), torch.linalg.inv(precision).diagonal(), rtol=1e-5, atol=0.0)


def test_information_on_the_scale_of_student_noise():
    r = torch.linspace(-400.0, 400.0, 80_001, dtype=F64)[:, None]
    for df in (3.0, 10.0):
        noise = StudentNoise(1.0, df)
        density = noise.log_prob(torch.zeros(1, dtype=F64), r).exp()
        slope = (df + 1.0) * r[:, 0].square() / (df + r[:, 0].square()) - 1.0  # of log p(exp(-s) r) - s at s = 0
        assert noise.scale_information == pytest.approx(float((density * slope.square()).sum() * 1e-2), rel=1e-6)
