"""Every posterior family against dense linear algebra, on one rank and split over several."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.distributions import kl_divergence

from fem_vi.errors import InvalidInput
from fem_vi.vi.posterior import whitened
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.low_rank import FreeDiagonal, LowRankNormal
from fem_vi.vi.prior import GaussianVector
from tests.vi.helpers import F64, FAMILIES, Affine, dense, gathered, numbers, perturb, split_pair, with_noise

family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def prior():
    torch.manual_seed(0)
    return Affine.create().prior


@family
def test_is_the_dense_normal(name, prior):
    posterior = FAMILIES[name](prior)
    perturb(posterior)
    q, exact = posterior(), dense(posterior)
    p = torch.distributions.MultivariateNormal(prior.mean, prior.covariance)
    m = numbers(7, 2, 3, 5)
    torch.testing.assert_close(q.mean, exact.mean)
    torch.testing.assert_close(q.variance, exact.variance)
    torch.testing.assert_close(q.log_prob(m), exact.log_prob(m))
    torch.testing.assert_close(q.entropy(), exact.entropy())
    torch.testing.assert_close(kl_divergence(q, prior), kl_divergence(exact, p))
    torch.testing.assert_close(q.log_ratio(prior.whiten(m)), exact.log_prob(m) - p.log_prob(m))


@family
def test_samples_have_the_dense_covariance(name, prior):
    # Samples are affine in the noise: mean + T eps. T from the unit vectors; T T' must be the covariance.
    posterior = FAMILIES[name](prior)
    perturb(posterior, size=2.0)
    q, exact = posterior(), dense(posterior)
    root = with_noise(q, torch.eye(5, dtype=F64)) - q.mean
    torch.testing.assert_close(root.T @ root, exact.covariance_matrix)
    torch.manual_seed(3)
    m = q.rsample((4, 2))
    torch.manual_seed(3)
    torch.testing.assert_close(m, with_noise(q, prior.white_noise((4, 2))))


@family
def test_kl_is_the_mean_log_ratio(name, prior):
    posterior = FAMILIES[name](prior)
    perturb(posterior)
    with torch.no_grad():
        q = posterior()
        log_ratio = q.log_ratio(q.rsample_whitened(torch.Size([20000])))
    error = float(log_ratio.std()) / 20000**0.5
    assert abs(float(log_ratio.mean() - q.kl_to_prior())) < 4 * error


@family
def test_gradients(name, prior):
    posterior = FAMILIES[name](prior)
    perturb(posterior)
    names = [key for key, _ in posterior.named_parameters()]
    eps, m = numbers(8, 2, 5), numbers(9, 2, 5)

    def everything(*values):
        q = torch.func.functional_call(posterior, dict(zip(names, values, strict=True)), ())
        return with_noise(q, eps), q.log_prob(m), q.kl_to_prior(), q.variance, q.entropy(), q.mean

    assert torch.autograd.gradcheck(everything, tuple(value.detach().requires_grad_() for value in posterior.parameters()))


def test_low_rank_gradient_at_repeated_eigenvalues(prior):
    # Where an eigendecomposition of U'U would divide by zero.
    posterior = LowRankNormal(prior, 3)
    with torch.no_grad():
        posterior.U.copy_(2.0 * torch.eye(3, 5, dtype=F64))

    def samples(U):
        q = torch.func.functional_call(posterior, {"U": U, "mu": posterior.mu.detach()}, ())
        return with_noise(q, numbers(8, 2, 5)), q.kl_to_prior()

    assert torch.autograd.gradcheck(samples, posterior.U.detach().requires_grad_())


def test_precise_data_lose_no_digits():
    # Precision 1e12 in one direction: its standard deviation is 1e-6, found from 1 - (1 - 1e-12).
    prior = GaussianVector(torch.zeros(3, dtype=F64))
    posterior = LowRankNormal(prior, 1)
    with torch.no_grad():
        posterior.U.copy_(torch.tensor([[1e6, 0.0, 0.0]], dtype=F64))
        q = posterior()
        assert abs(float(q.scale.apply(torch.eye(3, dtype=F64))[0, 0]) / 1e-6 - 1) < 1e-4
        assert abs(float(q.log_ratio(torch.zeros(3, dtype=F64)) - torch.tensor(1e12, dtype=F64).log1p() / 2)) < 1e-9


def test_low_rank_draws_start_apart_from_the_prior_but_close(prior):
    q = LowRankNormal(prior, 2)()
    assert 0 < float(q.kl_to_prior()) < 0.1


@pytest.mark.parametrize("diagonal", [LowRankNormal, lambda p, r: LowRankNormal(p, r, diagonal=FreeDiagonal())])
def test_variance_of_large_fields(monkeypatch, diagonal, prior):
    # Past 512 unknowns the variance is not from unit vectors: exact for D = I, and estimated to 9 % otherwise.
    posterior = diagonal(prior, 2)
    perturb(posterior)
    monkeypatch.setattr(whitened, "EXACT_SIZE", 0)
    state = torch.get_rng_state()
    variance = posterior().variance.detach()
    assert torch.equal(state, torch.get_rng_state())
    exact = dense(posterior).variance.detach()
    torch.testing.assert_close(variance, exact, rtol=1e-8 if posterior.log_precision is None else 4 * 0.09, atol=0.0)


def test_sampled_variance_of_the_prior_is_exact(monkeypatch, prior):
    monkeypatch.setattr(whitened, "EXACT_SIZE", 0)
    torch.testing.assert_close(FAMILIES["mean-field"](prior)().variance, prior.variance)


@family
def test_a_deep_copy_shares_the_prior_alone(name, prior):
    posterior = FAMILIES[name](prior)
    perturb(posterior)
    other = copy.deepcopy(posterior)
    assert other.prior is prior
    assert float(kl_divergence(other(), prior)) == float(kl_divergence(posterior(), prior))
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    assert all(bool(value.any()) for value in posterior.parameters())


@family
@pytest.mark.parametrize("write", [pickle.dumps, lambda posterior: torch.save(posterior, io.BytesIO())], ids=["pickle", "torch"])
def test_a_pickle_is_refused_and_its_numbers_are_saved(name, write, prior):
    posterior = FAMILIES[name](prior)
    perturb(posterior)
    with pytest.raises(InvalidInput, match=f"{type(posterior).__name__} cannot be pickled.*state_dict"):
        write(posterior)
    other = FAMILIES[name](prior)
    other.load_state_dict(pickle.loads(pickle.dumps(posterior.state_dict())))
    assert torch.equal(other().mean, posterior().mean)


def test_refusals(prior):
    with pytest.raises(InvalidInput, match="prior is 'abc'"):
        LowRankNormal("abc", 2)
    with pytest.raises(InvalidInput, match="rank is 6"):
        LowRankNormal(prior, 6)
    huge = split_pair()[0].prior
    huge.num_global = 10**8  # more than can be allocated
    with pytest.raises(
        InvalidInput, match=r"FullRankNormal: the 100000000 unknowns of a SplitGaussian make 4.*GB.*LowRankNormal"
    ):
        FullRankNormal(huge)
    other = GaussianVector(torch.zeros(5, dtype=F64))
    with pytest.raises(NotImplementedError, match="its own prior"):
        kl_divergence(FAMILIES["mean-field"](prior)(), other)


@pytest.mark.mpi
@family
def test_split_over_ranks(name):
    split, alone = (problem.prior for problem in split_pair())
    torch.manual_seed(5)
    ours = FAMILIES[name](split)
    torch.manual_seed(5)
    reference = FAMILIES[name](alone)
    perturb(ours)
    perturb(reference)
    values = []
    for posterior in (ours, reference):
        torch.manual_seed(6)
        q = posterior()
        m = q.rsample((3,))
        weights = posterior.prior.gather(q.variance)
        number = q.log_prob(m).sum() + q.kl_to_prior() + q.entropy() + weights.sum() + posterior.prior.gather(m).sin().sum()
        posterior.zero_grad()
        number.backward()
        grads = gathered(posterior, {key: value.grad for key, value in posterior.named_parameters()})
        values.append([number, posterior.prior.gather(m), posterior.prior.gather(q.mean), weights, *grads])
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.mpi
def test_split_start_does_not_depend_on_the_partition():
    split, alone = (problem.prior for problem in split_pair())
    torch.manual_seed(5)
    ours = LowRankNormal(split, 3)
    torch.manual_seed(5)
    assert torch.equal(split.gather(ours.U.detach()), LowRankNormal(alone, 3).U.detach())
