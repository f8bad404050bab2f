"""The family with a sparse precision against dense algebra, and the exact posterior of local data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.distributions import MultivariateNormal

from fem_vi.errors import InvalidInput
from fem_vi.vi.fit import fit
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.objective import ELBO
from fem_vi.vi.optimizer import Adam
from fem_vi.vi.posterior.sparse_factor import factorise, multiply_transposed, refactorise, solve_transposed
from fem_vi.vi.posterior.sparse_precision import SparsePrecisionNormal
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.start import GaussNewton, PresentParameters
from tests.vi.helpers import F64, numbers, split_pair


def grid_precision(m: int = 5) -> scipy.sparse.csc_matrix:
    """Squared Laplacian of an m by m grid, plus a bit: a pattern with fill."""
    line = scipy.sparse.diags([-np.ones(m - 1), 2.2 * np.ones(m), -np.ones(m - 1)], [-1, 0, 1])
    K = scipy.sparse.kron(line, scipy.sparse.eye(m)) + scipy.sparse.kron(scipy.sparse.eye(m), line)
    return (K @ K).tocsc()


def grid_prior(m: int = 5) -> GaussianVector:
    covariance = torch.linalg.inv(torch.from_numpy(grid_precision(m).toarray()))
    return GaussianVector(torch.linspace(-1, 1, m * m), covariance=0.5 * (covariance + covariance.T))


def moved(posterior: SparsePrecisionNormal, *, seed: int = 0) -> SparsePrecisionNormal:
    with torch.no_grad():
        posterior.mu += posterior.prior.scatter(numbers(seed, posterior.prior.num_global))
        posterior.theta += 0.1 * numbers(seed + 1, *posterior.theta.shape)
    return posterior


def dense(posterior: SparsePrecisionNormal) -> MultivariateNormal:
    """From the factor as a dense matrix."""
    q = posterior()
    L = torch.from_numpy(posterior.pattern.matrix(q._values.detach().numpy()).toarray())
    Q = torch.zeros_like(L)
    order = torch.from_numpy(posterior.pattern.order)
    Q[order[:, None], order[None, :]] = L @ L.T
    return MultivariateNormal(posterior.prior.gather(q.mean.detach()), precision_matrix=Q)


def test_starts_as_the_prior():
    prior = grid_prior()
    q, m = SparsePrecisionNormal(prior, precision=grid_precision())(), numbers(1, 4, 25)
    torch.testing.assert_close(q.log_prob(m), prior.log_prob(m))
    torch.testing.assert_close(q.variance, prior.variance)
    torch.testing.assert_close(q.mean, prior.mean)
    torch.testing.assert_close(q.entropy(), prior.entropy())


def test_is_the_dense_normal():
    posterior = moved(SparsePrecisionNormal(grid_prior(), precision=grid_precision()))
    q, exact, m = posterior(), dense(posterior), numbers(2, 2, 3, 25)
    torch.testing.assert_close(q.log_prob(m), exact.log_prob(m))
    torch.testing.assert_close(q.mean.detach(), exact.mean)
    torch.testing.assert_close(q.variance, exact.variance)
    torch.testing.assert_close(q.entropy(), exact.entropy())
    # Samples are affine in the noise: the root of the covariance from unit vectors.
    root = solve_transposed(posterior.pattern, q._values, torch.eye(25, dtype=F64)).detach()
    place = torch.from_numpy(posterior.pattern.place)
    torch.testing.assert_close((root.T @ root)[place][:, place], exact.covariance_matrix)
    torch.manual_seed(1)
    draws = q.rsample((3, 2)).detach()
    torch.manual_seed(1)
    eps = posterior.prior.white_noise(torch.Size([3, 2]))[..., torch.from_numpy(posterior.pattern.order)]
    torch.testing.assert_close(draws, exact.mean + (eps @ root)[..., place])


def test_pattern_has_the_fill_of_a_good_order():
    # Exactly the fill of elimination in that order, and less of it than in the order of the grid.
    Q = grid_precision(12)
    pattern, values = factorise(Q)
    permuted = Q.toarray()[pattern.order][:, pattern.order]
    L = np.linalg.cholesky(permuted)
    np.testing.assert_allclose(pattern.matrix(values).toarray(), L, atol=1e-10)
    assert (pattern.rows[pattern.starts[:-1]] == np.arange(144)).all()
    natural = np.count_nonzero(np.abs(np.linalg.cholesky(Q.toarray())) > 1e-13)
    assert len(pattern.rows) < 0.8 * natural


def test_gradients():
    pattern, values = factorise(grid_precision(3))
    values = torch.from_numpy(values).requires_grad_()
    b = numbers(1, 2, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, b: solve_transposed(pattern, v, b), (values, b))
    assert torch.autograd.gradcheck(lambda v, b: multiply_transposed(pattern, v, b), (values, b))
    posterior = moved(SparsePrecisionNormal(grid_prior(3), precision=grid_precision(3)))

    def everything(mu, theta):
        q = torch.func.functional_call(posterior, {"mu": mu, "theta": theta}, ())
        torch.manual_seed(0)
        return q.rsample((2,)), q.log_prob(numbers(3, 2, 9)), q.entropy(), q.mean

    assert torch.autograd.gradcheck(everything, tuple(value.detach().requires_grad_() for value in posterior.parameters()))


def local_data(prior, seen=(0, 7, 12, 18), std=0.1):
    """Some entries, and a difference of neighbours, observed: a precision on the graph."""
    A = torch.eye(prior.num_global, dtype=F64)[list(seen)]
    A[0, 1] = -1.0
    owned = prior.scatter(A)
    y = numbers(4, len(seen))
    problem = InverseProblem(prior, lambda m: prior.all_sum(m @ owned.T), GaussianNoise(std), y)
    return problem, A, y


def exact_posterior(prior, A, y, std):
    precision = torch.linalg.inv(prior.covariance) + A.T @ A / std**2
    mean = prior.mean + torch.linalg.solve(precision, A.T @ (y - A @ prior.mean) / std**2)
    evidence = MultivariateNormal(A @ prior.mean, A @ prior.covariance @ A.T + std**2 * torch.eye(len(y), dtype=F64)).log_prob(y)
    return MultivariateNormal(mean, precision_matrix=precision), float(evidence)


def test_contains_the_posterior_of_local_data():
    prior = grid_prior()
    problem, A, y = local_data(prior)
    posterior = SparsePrecisionNormal(prior, precision=grid_precision())
    GaussNewton()(problem, posterior)
    exact, evidence = exact_posterior(prior, A, y, 0.1)
    m = numbers(5, 3, 25)
    torch.testing.assert_close(posterior().log_prob(m), exact.log_prob(m))
    terms = ELBO(samples=4)(problem, posterior)
    terms.loss.backward()
    torch.testing.assert_close(terms.log_likelihood - terms.log_ratio, torch.full((4,), evidence, dtype=F64))
    assert max(float(value.grad.abs().max()) for value in posterior.parameters()) < 1e-7


def test_finds_the_posterior_from_the_prior():
    prior = grid_prior()
    problem, A, y = local_data(prior, std=1.0)
    posterior = SparsePrecisionNormal(prior, precision=grid_precision())
    fit(problem, posterior, ELBO(samples=16), steps=250, optimizer=Adam(lr=0.05), start=PresentParameters())
    exact, evidence = exact_posterior(prior, A, y, 1.0)
    assert bool(((posterior().mean - exact.mean).abs() < 0.03 * exact.stddev).all())
    torch.testing.assert_close(posterior().variance, exact.variance, rtol=0.05, atol=0.0)
    assert float(ELBO(samples=200)(problem, posterior).elbo) == pytest.approx(evidence, abs=0.02)


def test_another_matrix_on_the_pattern():
    Q = grid_precision(6)
    pattern, values = factorise(Q)
    other = Q + scipy.sparse.diags(np.linspace(1, 2, 36))
    L = np.linalg.cholesky(other.toarray()[pattern.order][:, pattern.order])
    np.testing.assert_allclose(pattern.matrix(refactorise(pattern, other)).toarray(), L, atol=1e-10)
    wide = scipy.sparse.csc_matrix(Q + 0.1 * scipy.sparse.csc_matrix(np.ones((36, 36))))
    with pytest.raises(InvalidInput, match="outside of the pattern"):
        refactorise(pattern, wide)
    with pytest.raises(InvalidInput, match="not positive definite"):
        factorise(Q - 100 * scipy.sparse.eye(36))
    assert len(values) == len(pattern.rows)


def test_keeps_its_precision_where_the_graph_sees_too_little():
    # One datum, the sum of all: what of it lies on the graph is no positive addition; the mean is taken all the same.
    prior = grid_prior()
    row = torch.from_numpy(np.sign(np.random.default_rng(0).standard_normal((1, 25))))
    problem = InverseProblem(prior, lambda m: m @ row.T, GaussianNoise(1e-4), torch.tensor([3.0]))
    posterior = SparsePrecisionNormal(prior, precision=grid_precision())
    GaussNewton()(problem, posterior)
    assert not bool(posterior.theta.any())
    assert float(posterior().mean.detach() @ row[0]) == pytest.approx(3.0, abs=1e-3)


@pytest.mark.mpi
def test_split_over_ranks():
    results = []
    chain = scipy.sparse.diags([-0.3 * np.ones(12), np.linspace(1, 2, 13), -0.3 * np.ones(12)], [-1, 0, 1]).tocsc()
    for problem in split_pair():
        posterior = moved(SparsePrecisionNormal(problem.prior, precision=chain))
        torch.manual_seed(2)
        terms = ELBO(samples=3)(problem, posterior)
        terms.loss.backward()
        gather = problem.prior.gather
        q = posterior()
        results.append([terms.elbo, gather(posterior.mu.grad), posterior.theta.grad, gather(q.variance), gather(q.mean.detach())])
        GaussNewton()(problem, posterior)
        results[-1].append(posterior.theta.detach().clone())
        run = fit(problem, posterior, ELBO(samples=3), steps=3)
        results[-1].append(torch.tensor([row.elbo for row in run.history], dtype=F64))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_sampled_variance(monkeypatch):
    from fem_vi.vi.posterior import sparse_precision

    posterior = moved(SparsePrecisionNormal(grid_prior(), precision=grid_precision()))
    exact = posterior().variance
    monkeypatch.setattr(sparse_precision, "EXACT_SIZE", 0)
    torch.testing.assert_close(posterior().variance, exact, rtol=5 * math.sqrt(2 / 1024), atol=0.0)


def test_refusals():
    prior = grid_prior(3)
    for arguments, words in (
        ({"rings": 3}, r"rings is 3; it must be 1 or 2"),
        ({"rings": True}, r"rings is True"),
        ({}, r"GaussianVector has no sparse precision"),
        ({"precision": grid_precision(4)}, r"precision has shape \(16, 16\); it must be \(9, 9\)"),
        ({"precision": "Q"}, r"precision has shape None"),
        ({"precision": -grid_precision(3)}, r"not positive definite"),
        ({"precision": scipy.sparse.triu(grid_precision(3))}, r"not symmetric"),
        ({"precision": grid_precision(3) * float("nan")}, r"not finite"),
    ):
        with pytest.raises(InvalidInput, match=words):
            SparsePrecisionNormal(prior, **arguments)
