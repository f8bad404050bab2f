"""Priors of a handful of parameters, noise, and inverse problems: values, and every way they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch.distributions import MultivariateNormal, Normal

from fem_vi.errors import FemViError, InvalidInput
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.prior import FieldPrior, GaussianVector
from fem_vi.vi.problem import InverseProblem
from tests.vi.helpers import F64, Affine, SplitGaussian, numbers, split_pair


def test_gaussian_vector_is_the_multivariate_normal():
    prior = Affine.create().prior
    exact = MultivariateNormal(prior.mean, prior.covariance)
    m = numbers(1, 2, 3, 5)
    torch.testing.assert_close(prior.log_prob(m), exact.log_prob(m))
    torch.testing.assert_close(prior.entropy(), exact.entropy())
    torch.testing.assert_close(prior.variance, exact.variance)
    torch.testing.assert_close(prior.unwhiten(prior.whiten(m)), m)
    assert prior.rsample((4, 2)).shape == (4, 2, 5)
    assert isinstance(prior, FieldPrior)
    assert isinstance(SplitGaussian(4, MPI.COMM_SELF), FieldPrior)


def test_gaussian_vector_samples():
    prior = Affine.create().prior
    torch.manual_seed(0)
    m = prior.rsample((20000,))
    # Standard errors are about |C0| / sqrt(20000) = 1 % of the largest entry.
    assert float((torch.cov(m.T) - prior.covariance).abs().max()) < 0.05 * float(prior.covariance.max())
    assert float((m.mean(0) - prior.mean).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mean": torch.zeros(2, 2)}, r"shape \(2, 2\)"),
        ({"mean": torch.tensor([0.0, float("nan")])}, "finite"),
        ({"mean": torch.zeros(2), "covariance": torch.eye(3)}, r"must be \(2, 2\)"),
        ({"mean": torch.zeros(2), "covariance": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}, "symmetric"),
        ({"mean": torch.zeros(2), "covariance": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, "positive definite"),
        ({"mean": torch.zeros(2), "covariance": torch.eye(2), "scale_tril": torch.eye(2)}, "one of them"),
        ({"mean": torch.zeros(2), "scale_tril": torch.ones(2, 2)}, "lower triangular"),
    ],
)
def test_gaussian_vector_refuses(arguments, words):
    with pytest.raises(InvalidInput, match=words):
        GaussianVector(**arguments)


@pytest.mark.parametrize("std", [0.3, torch.tensor([0.1, 0.2, 0.3], dtype=F64)])
def test_noise_is_normal(std):
    noise = GaussianNoise(std)
    y, prediction = numbers(1, 3), numbers(2, 4, 2, 3)
    expected = Normal(prediction, torch.as_tensor(std, dtype=F64)).log_prob(y).sum(-1)
    torch.testing.assert_close(noise.log_prob(y, prediction), expected)
    torch.manual_seed(0)
    z = noise.standardise(noise.sample(prediction.expand(500, 4, 2, 3)), prediction)
    assert z.shape == (500, 4, 2, 3)
    assert abs(float(z.std()) - 1) < 0.03
    assert abs(float(z.mean())) < 0.03


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf"), torch.ones(2, 2), torch.tensor([0.1, 0.0])])
def test_noise_refuses(std):
    with pytest.raises(InvalidInput, match="std"):
        GaussianNoise(std)


def test_noise_says_where_it_is_wrong():
    with pytest.raises(InvalidInput, match=r"std is -1.0 at \[1, 3\] \(2 of 4 data\)"):
        GaussianNoise(torch.tensor([0.1, -1.0, 0.2, 0.0]))


def test_noise_names_the_bad_shape():
    noise = GaussianNoise(torch.ones(3))
    with pytest.raises(InvalidInput, match=r"prediction has shape \(2, 4\)"):
        noise.log_prob(torch.zeros(3), torch.zeros(2, 4))
    with pytest.raises(InvalidInput, match="std has 3 entries; y has 4"):
        noise.log_prob(torch.zeros(4), torch.zeros(2, 4))


def test_joint_density_and_cost():
    affine = Affine.create()
    problem = affine.problem()
    m = numbers(6, 2, 4, 5).requires_grad_()
    joint = problem.log_joint(m)
    exact = affine.posterior().log_prob(m) + affine.log_evidence()
    torch.testing.assert_close(joint, exact)
    assert (problem.cost.forward, problem.cost.backward) == (8, 0)
    joint.sum().backward()
    assert (problem.cost.forward, problem.cost.backward, problem.cost.solves) == (8, 8, 16)
    with torch.no_grad():
        problem.log_likelihood(m[0, 0])
    assert problem.cost.solves == 17


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (torch.zeros(3, 1), r"shape \(3, 1\)"),
        (torch.zeros(0), "one vector"),
        (torch.tensor([0.0, float("nan"), float("inf")]), r"not finite at \[1, 2\] \(2 of 3"),
        (torch.zeros(4), "std has 3 entries"),
        (torch.zeros(3, dtype=torch.complex128), "complex128; it must be real"),
    ],
)
def test_problem_refuses_data(y, words):
    with pytest.raises(InvalidInput, match=words):
        InverseProblem(GaussianVector(torch.zeros(5)), lambda m: m[..., :3], GaussianNoise(torch.ones(3)), y)


@pytest.mark.parametrize("wrong", ["abc", None, ["a", "b"], [[1.0], [1.0, 2.0]], {"a": 1.0}, 1j])
def test_refuses_what_is_no_array_of_numbers(wrong):
    prior = GaussianVector(torch.zeros(2))
    with pytest.raises(InvalidInput, match=r"^std is "):
        GaussianNoise(wrong)
    with pytest.raises(InvalidInput, match=r"^y is "):
        InverseProblem(prior, lambda m: m, GaussianNoise(1.0), wrong)
    with pytest.raises(InvalidInput, match=r"^mean is "):
        GaussianVector(wrong)
    if wrong is not None:
        with pytest.raises(InvalidInput, match=r"^covariance is "):
            GaussianVector(torch.zeros(2), covariance=wrong)


@pytest.mark.parametrize("y", [[1.0, 2.0], np.array([2.0, 1.0])[::-1], np.array([1, 2]), np.array([1, 2], dtype=">f4")])
def test_takes_any_array_of_numbers(y):
    problem = InverseProblem(GaussianVector(np.zeros(2)), lambda m: m, GaussianNoise([0.1, 0.2]), y)
    assert problem.y.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "value"), [("prior", "abc"), ("prior", Normal(0.0, 1.0)), ("forward", None), ("likelihood", 0.1)]
)
def test_problem_refuses_arguments_of_another_type(name, value):
    prior = GaussianVector(torch.zeros(2))
    given = {"prior": prior, "forward": lambda m: m, "likelihood": GaussianNoise(1.0), "y": torch.zeros(2)}
    with pytest.raises(InvalidInput, match=f"^{name} is "):
        InverseProblem(**{**given, name: value})


def test_problem_names_the_bad_shape():
    prior = GaussianVector(torch.zeros(5))
    problem = InverseProblem(prior, lambda m: m.sum(0), GaussianNoise(1.0), torch.zeros(3))
    with pytest.raises(InvalidInput, match=r"returned shape \(5,\); with 3 data it must be \(2, 3\)"):
        problem.log_likelihood(torch.zeros(2, 5))
    with pytest.raises(InvalidInput, match="5 entries, those of the prior"):
        problem.log_likelihood(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda m: None, "forward returned NoneType"),
        (lambda m: (m, m), "forward returned tuple"),
        (lambda m: m.numpy(), "forward returned ndarray"),
        (lambda m: m.to(torch.float32), "returned torch.float32; it must return torch.float64"),
        (lambda m: m.to(torch.complex128), "returned torch.complex128"),
        (lambda m: torch.log(m - 1.0), "forward returned NaN for 2 of 3 samples"),
    ],
)
def test_problem_refuses_predictions(forward, words):
    problem = InverseProblem(GaussianVector(torch.zeros(2)), forward, GaussianNoise(1.0), torch.zeros(2))
    with pytest.raises(InvalidInput, match=words):
        problem.predict(torch.tensor([[0.0, 2.0], [0.0, 0.0], [2.0, 2.0]], dtype=F64))


def test_problem_and_noise_keep_copies():
    y, std = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    problem = InverseProblem(GaussianVector(torch.zeros(2)), lambda m: m, GaussianNoise(std), y)
    y += 1.0
    std *= 2.0
    assert problem.y.tolist() == [0.0, 0.0]
    assert problem.likelihood.std.tolist() == [1.0, 1.0]


@pytest.mark.mpi
def test_split_problem_is_the_whole_one():
    split, alone = split_pair()
    m = numbers(8, 3, 13)
    torch.testing.assert_close(split.log_joint(split.prior.scatter(m)), alone.log_joint(m))


@pytest.mark.mpi
@pytest.mark.parametrize("wrong", ["value", "length"])
def test_data_that_differ_between_ranks(wrong):
    comm = MPI.COMM_WORLD
    last = comm.rank == comm.size - 1 and comm.size > 1
    y = torch.full((3 + (last and wrong == "length"),), 1.0 + 0.5 * (last and wrong == "value"), dtype=F64)
    prior = GaussianVector(torch.zeros(2), comm=comm)

    def build():
        return InverseProblem(prior, lambda m: m, GaussianNoise(1.0), y)

    if comm.size == 1:
        assert build().y is not None
        return
    with pytest.raises(FemViError, match=r"same on all ranks|differs from rank 0|entries on ranks"):
        build()


@pytest.mark.mpi
@pytest.mark.parametrize("std", [torch.tensor(2.0, dtype=F64), torch.tensor([1.0, 2.0], dtype=F64), torch.ones(2, dtype=F64)])
def test_noise_that_differs_between_ranks(std):
    comm = MPI.COMM_WORLD
    noise = GaussianNoise(std if comm.rank == comm.size - 1 else 1.0)
    prior = GaussianVector(torch.zeros(2), comm=comm)
    if comm.size == 1:
        assert InverseProblem(prior, lambda m: m, noise, torch.zeros(2)).likelihood is noise
        return
    with pytest.raises(InvalidInput, match=f"std on rank {comm.size - 1} differs"):
        InverseProblem(prior, lambda m: m, noise, torch.zeros(2))


@pytest.mark.mpi
def test_bad_forward_on_one_rank_is_raised_on_all():
    comm = MPI.COMM_WORLD
    prior = GaussianVector(torch.zeros(2), comm=comm)
    problem = InverseProblem(prior, lambda m: m[..., : 1 + (comm.rank != 0)], GaussianNoise(1.0), torch.zeros(2))
    with pytest.raises(InvalidInput, match="returned shape"):
        problem.log_likelihood(torch.zeros(2))


@pytest.mark.mpi
def test_noise_of_a_replicated_vector_is_that_of_rank_0():
    comm = MPI.COMM_WORLD
    prior = GaussianVector(torch.zeros(3), comm=comm)
    torch.manual_seed(comm.rank)
    theirs = comm.allgather(prior.white_noise((2,)))
    assert all(torch.equal(theirs[0], other) for other in theirs)
