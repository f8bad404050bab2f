"""Flows and mixtures: densities that are densities, and targets that no normal distribution fits, against quadrature."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import zuko
from mpi4py import MPI
from torch import Tensor, nn

from fem_vi.errors import InvalidInput
from fem_vi.vi.diagnostics import diagnose
from fem_vi.vi.divergence import ForwardKL, SelfNormalised
from fem_vi.vi.draws import QuasiMonteCarlo
from fem_vi.vi.fit import fit
from fem_vi.vi.laplace import laplace
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.objective import ELBO, PathDerivative, TotalDerivative, frozen
from fem_vi.vi.optimizer import Adam
from fem_vi.vi.posterior.flow import FastDensity, FastSampling, Flow
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.low_rank import LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.posterior.mixture import Mixture
from fem_vi.vi.posterior.neural_spline import AffineSpline, NeuralSpline
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.start import PresentParameters
from tests.vi.helpers import F64, Affine, numbers, split_pair

KINDS: dict[str, Callable[[int], nn.Module]] = {
    "spline": NeuralSpline(transforms=2, bins=4, hidden=(8,)),
    "affine spline": AffineSpline(transforms=2, bins=4, hidden=(8,)),
    "MAF": partial(zuko.flows.MAF, transforms=2, hidden_features=(8,)),
    "coupling": partial(zuko.flows.NICE, transforms=2, hidden_features=(8,)),
}
kind = pytest.mark.parametrize("name", KINDS)
direction = pytest.mark.parametrize("direction", [FastSampling(), FastDensity()])


def unit_prior(n: int = 2) -> GaussianVector:
    return GaussianVector(torch.zeros(n))


def bent(prior, name="spline", direction=FastSampling(), *, size=0.3):  # noqa: B008
    """A flow whose every parameter has been moved."""
    torch.manual_seed(0)
    flow = Flow(prior, KINDS[name], affine=MeanFieldNormal(prior), direction=direction)
    with torch.no_grad():
        for k, value in enumerate(flow.parameters()):
            value += size * numbers(k, *value.shape)
    return flow


@kind
@direction
def test_density_is_that_of_the_draws(name, direction):
    q = bent(Affine.create(3).prior, name, direction)()
    xi, log_ratio = q.push_weighed(numbers(1, 6, 3))
    torch.testing.assert_close(q.push(numbers(1, 6, 3)), xi)
    torch.testing.assert_close(q.log_ratio(xi), log_ratio, rtol=1e-6, atol=1e-6)
    m = q.prior.unwhiten(xi)
    torch.testing.assert_close(q.log_prob(m) - q.prior.log_prob(m), log_ratio, rtol=1e-6, atol=1e-6)
    # Change of variables with the Jacobian of one draw.
    J = torch.autograd.functional.jacobian(q.push, numbers(1, 6, 3)[0])
    eps = numbers(1, 6, 3)[0]
    expected = 0.5 * (xi[0] @ xi[0] - eps @ eps) - torch.linalg.slogdet(J)[1]
    torch.testing.assert_close(log_ratio[0], expected)


@kind
@direction
def test_density_integrates_to_one_and_has_the_moments_it_says(name, direction):
    prior = unit_prior()
    with torch.no_grad():
        q = bent(prior, name, direction, size=0.15)()
        axis = torch.linspace(-14, 14, 281, dtype=F64)
        points = torch.cartesian_prod(axis, axis)
        mass = torch.cat([q.log_prob(part) for part in points.split(60000)]).exp() * float(axis[1] - axis[0]) ** 2
    assert float(mass.sum()) == pytest.approx(1.0, abs=2e-3)
    mean = mass @ points / mass.sum()
    sd = (mass @ (points - mean).square() / mass.sum()).sqrt()
    assert bool(((q.mean - mean).abs() < 5 * sd / 4096**0.5).all())
    torch.testing.assert_close(q.variance.sqrt(), sd, rtol=0.1, atol=0.0)


@direction
def test_gradients(direction):
    flow = bent(Affine.create(2).prior, "MAF", direction)
    names = [name for name, value in flow.named_parameters() if value.requires_grad]
    xi = numbers(3, 2, 2)

    def everything(*values):
        q = torch.func.functional_call(flow, dict(zip(names, values, strict=True)), ())
        return (*q.push_weighed(numbers(1, 3, 2)), q.log_ratio(xi))

    values = tuple(flow.get_parameter(name).detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(everything, values, fast_mode=True)


@kind
def test_starts_as_the_normal_family_it_stands_on(name):
    affine = Affine.create()
    problem = affine.problem()
    normal = laplace(problem)
    flow = Flow(affine.prior, KINDS[name], affine=normal)
    m = normal().rsample((7,)).detach()
    torch.testing.assert_close(flow().log_prob(m), normal().log_prob(m))
    assert not flow.is_fresh()
    fresh = Flow(affine.prior, KINDS[name])
    assert fresh.is_fresh()
    run = fit(problem, fresh, ELBO(samples=4), steps=3)
    assert run.history[0].elbo == pytest.approx(affine.log_evidence(), abs=1e-6)
    assert run.config["optimizer"].startswith("Adam(lr=0.003,")
    assert all(value.dtype == F64 for value in flow.parameters())
    assert flow.affine is not normal
    assert normal.mu.requires_grad


def test_objectives_take_the_derivative_that_is_cheap():
    affine = Affine.create(3, 2)
    problem = affine.problem()
    eps = {}
    for direction in (FastSampling(), FastDensity()):
        flow = bent(affine.prior, "coupling", direction)
        grads = {}
        for gradient in (PathDerivative(), TotalDerivative()):
            torch.manual_seed(1)
            loss = ELBO(16, gradient)(problem, flow).loss
            grads[type(gradient)] = torch.autograd.grad(loss, flow.shift)[0]
        eps[type(direction)] = torch.equal(grads[PathDerivative], grads[TotalDerivative])
    assert eps == {FastSampling: True, FastDensity: False}


LAYERS = {name: KINDS[name] for name in ("spline", "affine spline", "MAF")} | {
    "coupling by layers": NeuralSpline(transforms=3, bins=4, hidden=(9,), passes=2),
    "deep": partial(zuko.flows.MAF, transforms=2, hidden_features=(11, 6, 5), activation=nn.ELU, randperm=True),
    "linear": partial(zuko.flows.MAF, transforms=1, hidden_features=()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_path_derivative_along_the_map_is_that_of_the_density(name):
    prior = Affine.create(4).prior
    torch.manual_seed(0)
    flow = Flow(prior, LAYERS[name])
    with torch.no_grad():
        for k, value in enumerate(flow.parameters()):
            value += 0.3 * numbers(k, *value.shape)
    q, eps, weights = flow(), numbers(1, 6, 4), numbers(2, 6)
    assert q.has_path
    xi, log_ratio = q.push_on_path(eps)
    for ours, theirs in zip((xi, log_ratio), q.push_weighed(eps), strict=True):
        torch.testing.assert_close(ours, theirs)
    # The textbook: the density with its parameters held constant, at the draws, by the inverse of the map.
    expected = frozen(flow).log_ratio(q.push(eps))
    parameters = [value for value in flow.parameters() if value.requires_grad]
    ours, theirs = (torch.autograd.grad((weights * each).sum(), parameters) for each in (log_ratio, expected))
    assert max(float(value.abs().max()) for value in theirs) > 1.0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(q.push_on_path(eps)[1], log_ratio.detach())


@pytest.mark.parametrize(
    "transform",
    [
        partial(zuko.flows.NICE, transforms=2, hidden_features=(8,)),
        partial(zuko.flows.MAF, transforms=2, hidden_features=(8, 8), residual=True),
        partial(zuko.flows.MAF, transforms=1, hidden_features=(8,), activation=partial(nn.Softmax, dim=-1)),
        partial(zuko.flows.MAF, transforms=1, hidden_features=(8,), activation=partial(nn.ReLU, inplace=True)),
        partial(zuko.flows.NAF, transforms=2, hidden_features=(8,)),  # squeezes between its layers
    ],
)
def test_other_maps_are_not_followed(transform):
    prior = Affine.create(4).prior
    assert not Flow(prior, transform)().has_path
    assert not Flow(prior, LAYERS["MAF"], direction=FastDensity())().has_path


@direction
def test_path_derivative_has_no_variance_at_the_exact_posterior(direction):
    affine = Affine.create()
    flow = Flow(affine.prior, KINDS["MAF"], affine=laplace(affine.problem()), direction=direction)
    terms = ELBO(samples=4)(affine.problem(), flow)
    terms.loss.backward()
    assert max(float(value.grad.abs().max()) for value in flow.parameters() if value.grad is not None) < 1e-6


def test_importing_zuko_leaves_validation_as_it_was():
    script = """
import torch
from torch.distributions import Distribution, Normal
before = (Distribution._validate_args, Distribution.arg_constraints)
from fem_vi.vi.posterior.flow import Flow
from fem_vi.vi.prior import GaussianVector
q = Flow(GaussianVector(torch.zeros(2)))()
q.log_prob(q.rsample((3,)))
assert (Distribution._validate_args, Distribution.arg_constraints) == before
assert before[0]
try:
    Normal(0.0, -1.0)
except ValueError:
    print("validated")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "validated\n", done.stderr


@pytest.mark.mpi
def test_same_flow_and_fit_on_all_ranks():
    comm = MPI.COMM_WORLD
    prior = GaussianVector(torch.zeros(2), comm=comm)
    torch.manual_seed(comm.rank)
    problem = InverseProblem(prior, lambda m: m[..., :1] + m[..., 1:].square(), GaussianNoise(0.3), torch.tensor([0.7]))
    flow = Flow(prior, NeuralSpline(transforms=1, bins=4, hidden=(8,)))
    run = fit(problem, flow, ELBO(samples=4), steps=3)
    ours = torch.cat([value.detach().reshape(-1) for value in run.posterior.parameters()]).tolist()
    assert all(theirs == ours for theirs in comm.allgather(ours))


def test_copies_share_the_prior(tmp_path):
    flow = bent(unit_prior())
    other = copy.deepcopy(flow)
    m = numbers(1, 3, 2)
    assert other.prior is flow.prior
    torch.testing.assert_close(other().log_prob(m), flow().log_prob(m))
    torch.manual_seed(9)
    again = Flow(flow.prior, KINDS["spline"], affine=MeanFieldNormal(flow.prior))
    again.load_state_dict(flow.state_dict())
    torch.testing.assert_close(again().log_prob(m), flow().log_prob(m))


def test_resumes_with_the_same_bits(tmp_path):
    affine = Affine.create(2, 1)

    def flow():
        torch.manual_seed(5)
        return Flow(affine.prior, KINDS["spline"])

    whole = fit(affine.problem(), flow(), ELBO(samples=3), steps=6, seed=2)

    def stop(row):
        if row.step == 4:
            raise KeyboardInterrupt

    arguments = {"steps": 6, "seed": 2, "path": tmp_path / "run", "checkpoint_every": 3}
    with pytest.raises(KeyboardInterrupt):
        fit(affine.problem(), flow(), ELBO(samples=3), callbacks=[stop], **arguments)
    resumed = fit(affine.problem(), flow(), ELBO(samples=3), resume=True, **arguments)
    assert [row.elbo for row in resumed.history] == [row.elbo for row in whole.history]


# Targets in the plane, whose evidence and moments are known by quadrature


@dataclass(frozen=True)
class Target:
    """A posterior of two unknowns with prior N(0, I)."""

    forward: Callable[[Tensor], Tensor]
    y: float
    std: float

    def problem(self) -> InverseProblem:
        return InverseProblem(unit_prior(), lambda m: self.forward(m)[..., None], GaussianNoise(self.std), torch.tensor([self.y]))

    def quadrature(self) -> tuple[float, Tensor, Tensor]:
        """Log evidence, mean and standard deviation."""
        axis = torch.linspace(-7, 7, 701, dtype=F64)
        points = torch.cartesian_prod(axis, axis)
        log_joint = self.problem().log_joint(points)
        log_evidence = torch.logsumexp(log_joint, 0)
        p = (log_joint - log_evidence).exp()
        mean = p @ points
        return float(log_evidence) + 2 * math.log(0.02), mean, (p @ (points - mean).square()).sqrt()


TARGETS = {
    "banana": Target(lambda m: m[..., 1] - 0.8 * m[..., 0].square(), -0.3, 0.15),
    "two modes": Target(lambda m: m[..., 0].square(), 2.0, 0.8),
    "funnel": Target(lambda m: 3.0 * m[..., 1] * torch.exp(-0.5 * m[..., 0]), 0.0, 1.0),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name != "banana")) for name in TARGETS])
def test_flow_meets_quadrature_where_normals_do_not(name):
    # The evidence lower bound finds the shape; the forward divergence then widens tails that it left too light.
    target = TARGETS[name]
    problem = target.problem()
    log_evidence, mean, sd = target.quadrature()
    torch.manual_seed(0)
    networks = AffineSpline(transforms=3, hidden=(32, 32), bound=8.0)
    flow = Flow(problem.prior, networks, affine=MeanFieldNormal(problem.prior), direction=FastDensity())
    arguments = {"start": PresentParameters()}
    fit(problem, flow, ELBO(samples=64, noise=QuasiMonteCarlo()), steps=400, optimizer=Adam(lr=0.01), **arguments)
    fit(problem, flow, ForwardKL(SelfNormalised(512)), steps=150, optimizer=Adam(lr=0.003), **arguments)
    good = [diagnose(problem, flow, samples=5000, batch=2500, seed=seed) for seed in range(3)]
    assert log_evidence - good[0].elbo < 0.02
    assert abs(good[0].log_evidence - log_evidence) < 0.01
    q = flow()
    assert bool(((q.mean - mean).abs() < 0.06 * sd).all())
    torch.testing.assert_close(q.variance.sqrt(), sd, rtol=0.05, atol=0.0)

    normal = FullRankNormal(problem.prior)
    fit(problem, normal, ELBO(samples=32), steps=120, optimizer=Adam(lr=0.08), **arguments)
    bad = [diagnose(problem, normal, samples=5000, batch=2500, seed=seed) for seed in range(3)]
    assert log_evidence - bad[0].elbo > 0.1
    if name == "banana":  # k-hat cannot see a mode without any draw, and tails of a funnel are hard to tell from 5,000 draws
        # Reached: 0.01 to 0.30 over six seeds. Splines without a shift and a scale fit as well, 99 % of the samples being
        # effective, and yet have 0.5 to 0.8: where weights are all but equal, k-hat is the shape of a tail of next to nothing.
        assert max(each.khat for each in good) < 0.5
        assert min(each.ess / each.samples for each in good) > 0.95
        assert max(each.ess / each.samples for each in bad) < 0.5
        assert sorted(each.khat for each in bad)[1] > 0.7


def test_mixture_of_normals_finds_two_modes_and_their_weights():
    target = Target(lambda m: m[..., 0].square() + 0.4 * m[..., 0], 2.0, 0.25)
    problem = target.problem()
    log_evidence, mean, sd = target.quadrature()
    posterior = Mixture([FullRankNormal(problem.prior) for _ in range(2)])
    with torch.no_grad():
        for component, at in zip(posterior.components, (1.0, -1.0), strict=True):
            component.mu[0] = at
            component.log_diagonal.fill_(-1.0)
    fit(problem, posterior, ELBO(samples=32), steps=250, optimizer=Adam(lr=0.05), start=PresentParameters())
    q = posterior()
    diagnosis = diagnose(problem, posterior, samples=4000, batch=2000)
    assert log_evidence - diagnosis.elbo < 0.03
    assert diagnosis.ess > 0.95 * diagnosis.samples
    assert bool(((q.mean - mean).abs() < 0.06 * sd).all())
    torch.testing.assert_close(q.variance.sqrt(), sd, rtol=0.05, atol=0.0)
    weight = float(torch.softmax(posterior.logits, 0)[0].detach())
    assert abs(weight - 0.5) > 0.05


@pytest.mark.mpi
def test_mixture_of_fields_over_ranks():
    results = []
    for problem in split_pair():
        torch.manual_seed(3)
        posterior = Mixture([MeanFieldNormal(problem.prior), FullRankNormal(problem.prior)])
        fit(problem, posterior, ELBO(samples=4), steps=4)
        q = posterior()
        torch.manual_seed(4)
        m = problem.prior.gather(q.rsample((5,)))
        results.append([m, q.log_prob(q.prior.scatter(m)), problem.prior.gather(q.mean), posterior.logits.detach()])
    assert posterior.fields == ("components.0.mu", "components.0.log_scale", "components.1.mu")
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_mixture_starts_a_few_nats_from_the_linearised_posterior_whatever_the_unknowns():
    # Draws of 60 unknowns are 30 nats away from their mean, on average, which small steps do not make good.
    affine = Affine.create(60, 10)
    problem = affine.problem()
    torch.manual_seed(2)
    posterior = Mixture([LowRankNormal(affine.prior, 10) for _ in range(2)])
    run = fit(problem, posterior, ELBO(samples=64), steps=1)
    assert 0.2 < affine.log_evidence() - run.history[0].elbo < 4.0
    apart = (posterior.components[0].mu - posterior.components[1].mu).norm()
    assert float(apart.detach()) > 1.0


def test_mixture_is_its_density():
    prior = Affine.create(2).prior
    posterior = Mixture([FullRankNormal(prior), MeanFieldNormal(prior)])
    with torch.no_grad():
        posterior.components[1].mu.fill_(2.0)
        posterior.logits.copy_(torch.tensor([1.0, 0.0]))
    q, m = posterior(), numbers(1, 4, 2)
    w = torch.softmax(posterior.logits, 0)
    parts = torch.stack([component().log_prob(m).exp() for component in posterior.components])
    torch.testing.assert_close(q.log_prob(m).exp(), w @ parts)
    torch.manual_seed(0)
    draws = q.rsample((20000,))
    torch.testing.assert_close(q.variance, draws.var(0), rtol=0.05, atol=0.0)
    exact = w @ torch.stack([component().mean for component in posterior.components])
    torch.testing.assert_close(q.mean, exact)
    assert bool(((draws.mean(0) - exact).abs() < 4 * draws.std(0) / 20000**0.5).all())
    assert q.rsample((2, 3)).shape == (2, 3, 2)


@pytest.mark.mpi
def test_refuses_fields_over_ranks():
    split, _ = split_pair()
    if MPI.COMM_WORLD.size > 1:
        with pytest.raises(InvalidInput, match=r"Flow takes replicated unknowns.*SplitGaussian spreads 13 over"):
            Flow(split.prior)
    else:
        assert Flow(split.prior, affine=MeanFieldNormal(split.prior))().mean.shape == (13,)


def test_refusals():
    prior, other = unit_prior(), unit_prior()
    for make, words in (
        (lambda: Flow(prior, "maf"), r"transform is 'maf'"),
        (lambda: Flow(prior, lambda n: nn.Linear(n, n)), r"made a Linear; .*flow of zuko"),
        (lambda: Flow(prior, affine=FullRankNormal(other)), r"over another prior"),
        (lambda: Flow(prior, affine="laplace"), r"affine is 'laplace'"),
        (lambda: Flow(prior, direction=FastDensity), r"direction is .*FastSampling or FastDensity"),
        (lambda: NeuralSpline(transforms=0), r"transforms is 0"),
        (lambda: NeuralSpline(bins=1), r"bins is 1"),
        (lambda: NeuralSpline(hidden=(0,)), r"hidden: an entry is 0"),
        (lambda: Mixture([FullRankNormal(prior)]), r"has 1 entries"),
        (lambda: Mixture([FullRankNormal(prior)] * 2), r"two different"),
        (lambda: Mixture([FullRankNormal(prior), FullRankNormal(other)]), r"different priors"),
        (lambda: Mixture(["a", "b"]), r"a component is 'a'"),
    ):
        with pytest.raises(InvalidInput, match=words):
            make()
