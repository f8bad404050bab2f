"""Samplers in the coordinates of a flow: right whatever the flow, and quick where it is close to the posterior."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from fem_vi.errors import InvalidInput
from fem_vi.vi.fit import fit
from fem_vi.vi.mcmc.chains import sample
from fem_vi.vi.mcmc.coordinates import Coordinates, Layer
from fem_vi.vi.mcmc.hmc import HMC
from fem_vi.vi.mcmc.pcn import PCN
from fem_vi.vi.mcmc.smc import smc
from fem_vi.vi.mcmc.warm_up import LearnDense
from fem_vi.vi.objective import ELBO
from fem_vi.vi.posterior.flow import FastDensity, FastSampling, Flow
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.posterior.mixture import Mixture
from fem_vi.vi.posterior.neural_spline import NeuralSpline
from fem_vi.vi.posterior.scale import TriangularScale
from fem_vi.vi.randomness import private_generator
from tests.vi.helpers import F64, Affine, numbers
from tests.vi.test_mcmc import banana, normal_near, z_scores


def flow_near(affine: Affine, direction: FastSampling | FastDensity = FastSampling(), *, bend: float = 0.3) -> Flow:  # noqa: B008
    """A flow near the exact posterior, with every parameter moved."""
    torch.manual_seed(0)
    normal = normal_near(affine.problem(), affine)
    flow = Flow(affine.prior, NeuralSpline(transforms=2, bins=4, hidden=(8,)), affine=normal, direction=direction)
    with torch.no_grad():
        for k, value in enumerate(flow.networks.parameters()):
            value += bend * numbers(k, *value.shape)
    return flow


@pytest.mark.parametrize("direction", [FastSampling(), FastDensity()])
def test_coordinates_are_inverse_to_each_other_and_have_the_density_of_the_jacobian(direction):
    affine = Affine.create()
    base = Coordinates.of(affine.prior, flow_near(affine, direction))
    n = affine.prior.num_global
    scale = TriangularScale(affine.prior, torch.tril(0.2 * numbers(8, n, n), -1) + 1.5 * torch.eye(n, dtype=F64))
    coordinates = Coordinates(affine.prior, (Layer(numbers(9, n), scale),), base.transport)
    x = numbers(3, 4, n)
    xi, logdet = coordinates.weighed(x)
    torch.testing.assert_close(coordinates.of_whitened(xi), x, rtol=1e-6, atol=1e-6)
    for k, point in enumerate(x):
        J = torch.autograd.functional.jacobian(lambda each: coordinates.weighed(each[None])[0][0], point)
        assert float(logdet[k]) == pytest.approx(float(torch.linalg.slogdet(J)[1]), abs=1e-8)


@pytest.mark.parametrize("adaptation", [None, LearnDense()])
@pytest.mark.parametrize("kernel", [HMC(step_size=0.5), PCN(step_size=0.5)])
def test_affine_posterior(kernel, adaptation):
    affine = Affine.create(std=0.6)
    problem, exact = affine.problem(), affine.posterior()
    draws = 12 if isinstance(kernel, HMC) else 200
    with private_generator(4):
        start = exact.sample(torch.Size([100]))  # so that what is seen is that the posterior stays, however far the flow is
    flow = flow_near(affine)
    where = {"reference": flow, "start": start}
    samples = sample(problem, kernel, chains=100, draws=draws, warmup=24, adaptation=adaptation, **where, seed=3)
    z = z_scores(samples, exact.mean, exact.variance)
    assert float(z.abs().max()) < 3.8
    assert float(z.square().mean()) < 3.0
    torch.testing.assert_close(samples.log_joint, problem.log_joint(samples.m))
    assert flow.shift.requires_grad  # the flow that was passed is as it was


def test_affine_evidence():
    affine = Affine.create()
    tempered = smc(affine.problem(), particles=100, islands=10, moves=2, reference=flow_near(affine), seed=2)
    assert abs(tempered.log_evidence - affine.log_evidence()) < 4 * tempered.log_evidence_error
    assert tempered.log_evidence_error < 0.1
    z = (tempered.mean - affine.posterior().mean) / tempered.mean_error
    assert float(z.abs().max()) < 5.0


def test_a_fitted_flow_makes_a_banana_easy():
    problem, mean, variance, log_evidence = banana()
    flow = Flow(problem.prior, NeuralSpline(transforms=2, hidden=(16,)))
    fit(problem, flow, ELBO(samples=64), steps=300)
    kernel = HMC(step_size=0.4)
    samples = sample(problem, kernel, chains=100, draws=15, warmup=0, reference=flow, seed=1)
    assert float(z_scores(samples, mean, variance).abs().max()) < 3.8
    # Against the coordinates of the prior: more is accepted, and the evidence takes one or two steps in temperature.
    plain = sample(problem, kernel, chains=100, draws=15, warmup=15, seed=1)
    assert 1 - float(samples.acceptance.mean()) < 0.5 * (1 - float(plain.acceptance.mean()))
    tempered = smc(problem, particles=100, islands=10, reference=flow)
    assert abs(tempered.log_evidence - log_evidence) < 4 * tempered.log_evidence_error
    assert len(tempered.temperatures) <= 3


def test_what_is_no_map_of_noise_is_refused():
    affine = Affine.create()
    mixture = Mixture([MeanFieldNormal(affine.prior), MeanFieldNormal(affine.prior)])
    with pytest.raises(InvalidInput, match=r"reference is of MixtureDistribution.*or a Flow"):
        sample(affine.problem(), HMC(), reference=mixture)
    with pytest.raises(InvalidInput, match="reference is of Normal"):
        smc(affine.problem(), reference=Normal(0.0, 1.0))
    with pytest.raises(InvalidInput, match="made with the problem's prior"):
        sample(affine.problem(), HMC(), reference=Flow(Affine.create().prior, affine=None))
