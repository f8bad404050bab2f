"""Markov chains where the answer is known: closed forms, quadrature, truncation, and every way they refuse."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from mpi4py import MPI
from torch import Tensor
from torch.distributions import Normal

from fem_vi.errors import InvalidInput, SolveFailed
from fem_vi.parallel import ProcessGrid
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.mcmc.chains import sample
from fem_vi.vi.mcmc.coordinates import Coordinates
from fem_vi.vi.mcmc.crowd import Crowd
from fem_vi.vi.mcmc.hmc import HMC
from fem_vi.vi.mcmc.mala import MALA
from fem_vi.vi.mcmc.pcn import PCN
from fem_vi.vi.mcmc.rotation import trajectory
from fem_vi.vi.mcmc.samples import Samples
from fem_vi.vi.mcmc.target import Target
from fem_vi.vi.mcmc.warm_up import KeepReference, LearnDense, LearnDiagonal
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.low_rank import LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.randomness import private_generator
from fem_vi.vi.start import GaussNewton
from fem_vi.vi.unknown_scale import UnknownScale
from tests.vi.helpers import F64, Affine, numbers, split_pair

KERNELS = {"pCN": PCN(step_size=0.9), "MALA": MALA(step_size=0.7), "HMC": HMC(step_size=0.6)}


def normal_near(problem: InverseProblem, affine: Affine, *, shift: float = 0.2, widen: float = 0.1) -> FullRankNormal:
    """The exact posterior, moved and widened a little in units of the prior."""
    q = FullRankNormal(affine.prior)
    GaussNewton()(problem, q)
    with torch.no_grad():
        q.mu += shift
        q.log_diagonal += widen
    return q


@cache
def banana() -> tuple[InverseProblem, Tensor, Tensor, float]:
    """m1 + m2^2 = 1 +- 0.5 under N(0, I), with its means, variances and evidence by quadrature."""
    prior = GaussianVector(torch.zeros(2))
    problem = InverseProblem(prior, lambda m: m[..., :1] + m[..., 1:].square(), GaussianNoise(0.5), torch.ones(1))
    line = torch.linspace(-6.0, 6.0, 601, dtype=F64)
    m = torch.cartesian_prod(line, line)
    log_joint = problem.log_joint(m)
    log_evidence = float(log_joint.logsumexp(0)) + 2 * math.log(float(line[1] - line[0]))
    weights = log_joint.softmax(0)
    mean = weights @ m
    return problem, mean, weights @ (m - mean).square(), log_evidence


def z_scores(samples: Samples, mean: Tensor, variance: Tensor) -> Tensor:
    """Errors of means and mean squared deviations in units of their standard errors, from the scatter of many chains."""
    chains = torch.cat([samples.m.mean(1), (samples.m - mean).square().mean(1)], dim=-1)
    return (chains.mean(0) - torch.cat([mean, variance])) / (chains.std(0) / math.sqrt(len(chains)))


# The kernels


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("name", list(KERNELS))
def test_kernel_leaves_the_posterior_alone(name, temperature):
    # 10,000 exact draws of exp(T h) N(0, I), moved six times: first and second moments stay within their Monte Carlo errors.
    affine = Affine.create(std=1.5)
    problem = affine.problem()
    tempered = Affine(affine.prior, affine.A, affine.b, affine.std / math.sqrt(temperature), affine.y).posterior()
    chains = 10_000
    with private_generator(1):
        m = tempered.sample((chains,))
        crowd = Crowd.create(problem.prior, chains, None, seed=2)
        target = Target(problem, Coordinates(problem.prior), crowd, KERNELS[name].uses_gradient)
        state = target.begin(problem.prior.whiten(m))
        rates = []
        for _ in range(10):
            state, info = KERNELS[name].step(target, state, KERNELS[name].step_size, temperature=temperature)
            rates.append(float(info.acceptance.mean()))
    assert 0.1 < np.mean(rates) < 0.98  # with nothing rejected, the rule of acceptance would not be tested
    assert float((state.m == m).all(-1).double().mean()) < 0.1  # the chains have moved
    exact = torch.linalg.cholesky(tempered.covariance_matrix)
    white = torch.linalg.solve_triangular(exact, (state.m - tempered.mean).T, upper=False)
    z_mean = white.mean(1) * math.sqrt(chains)
    z_square = (white.square().mean(1) - 1.0) * math.sqrt(chains / 2.0)
    z_cross = (white[:-1] * white[1:]).mean(1) * math.sqrt(chains)
    z = torch.cat([z_mean, z_square, z_cross])
    assert float(z.abs().max()) < 4.0
    assert float(z.square().mean()) < 2.5


def test_energy_error_is_of_second_order():
    # Kick, rotation, kick: over a fixed angle the change of energy falls by four when the step is halved.
    problem = banana()[0]
    crowd = Crowd.create(problem.prior, 500, None, seed=1)
    target = Target(problem, Coordinates(problem.prior), crowd, gradient=True)
    errors = []
    for rotations in (40, 80):
        with private_generator(3):
            state = target.begin(crowd.noise())
            _, info = trajectory(target, state, 1.0 / rotations, rotations=rotations, temperature=1.0)
        errors.append(-info.acceptance.clamp_min(1e-300).log())
    typical = errors[0] > errors[0].quantile(0.7)  # the others end with less energy, and all of those are accepted
    ratio = (errors[0] / errors[1])[typical & (errors[0] < 0.05)]
    assert len(ratio) > 20
    assert float(ratio.median()) == pytest.approx(4.0, rel=0.1)


def test_where_the_reference_is_the_posterior_everything_is_accepted():
    affine = Affine.create()
    problem = affine.problem()
    q = normal_near(problem, affine, shift=0.0, widen=0.0)
    for kernel in (PCN(step_size=math.pi / 2), MALA(step_size=math.pi / 2), HMC(step_size=0.5)):
        samples = sample(problem, kernel, chains=4, draws=50, warmup=0, reference=q)
        assert float(samples.acceptance.min()) > 1 - 1e-6
        assert samples.num_diverged == 0


def test_acceptance_does_not_fall_with_more_unknowns():
    # Data see eight unknowns; 192 more, seen by none, change nothing.
    rates = []
    for n in (8, 200):
        prior = GaussianVector(torch.zeros(n))
        problem = InverseProblem(prior, lambda m: m[..., :8].tanh(), GaussianNoise(0.3), torch.ones(8))
        samples = sample(problem, HMC(step_size=0.3), chains=100, draws=20, warmup=20, adaptation=KeepReference())
        rates.append(float(samples.acceptance.mean()))
    assert abs(rates[0] - rates[1]) < 0.03


# Chains


@pytest.mark.parametrize(
    ("kernel", "draws", "options"),
    [
        (HMC(), 40, {}),
        (HMC(), 40, {"adaptation": LearnDense()}),
        (HMC(), 40, {"reference": "near", "adaptation": LearnDiagonal()}),
        (MALA(), 150, {"adaptation": LearnDense()}),
        (PCN(), 400, {"reference": "near"}),
        (PCN(), 800, {"adaptation": KeepReference()}),
    ],
)
def test_affine_posterior(kernel, draws, options):
    affine = Affine.create(std=0.6)
    problem, exact = affine.problem(), affine.posterior()
    if options.get("reference") == "near":
        options = {**options, "reference": normal_near(problem, affine)}
    samples = sample(problem, kernel, chains=200, draws=draws, warmup=100, seed=3, **options)
    z = z_scores(samples, exact.mean, exact.variance)
    assert float(z.abs().max()) < 3.5
    torch.testing.assert_close(samples.log_joint, problem.log_joint(samples.m))
    torch.testing.assert_close(samples.log_likelihood, problem.log_likelihood(samples.m))
    assert float(samples.acceptance.mean()) > kernel.acceptance - 0.1
    if samples.step_size < 1.2:  # else it is at its bound, a quarter turn, or near
        assert float(samples.acceptance.mean()) < kernel.acceptance + 0.15


@pytest.mark.parametrize(("kernel", "draws"), [(HMC(), 60), (MALA(), 300), (PCN(), 600)])
def test_banana_by_quadrature(kernel, draws):
    problem, mean, variance, _ = banana()
    samples = sample(problem, kernel, chains=200, draws=draws, warmup=100, adaptation=KeepReference(), seed=1)
    assert float(z_scores(samples, mean, variance).abs().max()) < 3.5
    assert float((samples.mean - mean).abs().max()) < 0.1


def test_a_proposal_where_the_forward_map_fails_is_rejected():
    # Without data's help: the posterior is the prior cut off at one, where the solver gives up. E m = -phi(1) / Phi(1).
    def forward(m: Tensor) -> Tensor:
        if bool((m[..., 0] > 1.0).any()):
            raise SolveFailed("no solution above one.")
        return 0.0 * m

    problem = InverseProblem(GaussianVector(torch.zeros(1)), forward, GaussianNoise(1.0), torch.zeros(1))
    kernel = HMC(step_size=0.5)
    samples = sample(problem, kernel, chains=10, draws=150, warmup=20, start=-torch.ones(10, 1), adaptation=KeepReference())
    assert float(samples.m.max()) <= 1.0
    assert samples.num_diverged > 50
    one = torch.ones(1, dtype=F64)
    ratio = Normal(0.0 * one, one).log_prob(one).exp() / Normal(0.0 * one, one).cdf(one)
    assert float(z_scores(samples, -ratio, 1 - ratio - ratio.square()).abs().max()) < 4.5  # t with 9 degrees of freedom


def test_a_chain_that_begins_on_a_steep_slope_is_not_left_there():
    # Where the noise is small the misfit is steep: one of eight draws of this prior was rejected for ever at steps for the rest.
    y, x = torch.tensor([1.2, 0.9, 1.5, 0.8, 1.1, 2.9], dtype=F64), torch.linspace(-1, 1, 6, dtype=F64)

    def forward(m):
        return torch.cat([torch.exp(0.3 * m[..., :1] + 0.4 * m[..., 1:2] * x), m[..., 2:]], dim=-1)

    problem = InverseProblem(GaussianVector(torch.zeros(3)), forward, UnknownScale(GaussianNoise(0.5)), y)
    samples = sample(problem, HMC(), chains=8, draws=100, warmup=300)
    assert float(samples.acceptance.mean(1).min()) > 0.5
    assert samples.report().rhat < 1.1


def test_failures_at_the_start_are_told():
    prior = GaussianVector(torch.zeros(1))
    problem = InverseProblem(prior, lambda m: torch.where(m > 0.0, torch.inf, m), GaussianNoise(1.0), torch.zeros(1))
    with pytest.raises(InvalidInput, match=r"not finite at the starting points of chains \[1\]"):
        sample(problem, PCN(), chains=2, draws=5, start=torch.tensor([[-1.0], [1.0]]))


def test_repeats_and_leaves_the_generator_alone():
    problem = banana()[0]
    state = torch.get_rng_state()
    first = sample(problem, HMC(), chains=3, draws=20, warmup=20, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first.m, sample(problem, HMC(), chains=3, draws=20, warmup=20, seed=5).m)
    assert not torch.equal(first.m, sample(problem, HMC(), chains=3, draws=20, warmup=20, seed=6).m)
    with torch.no_grad():  # the caller's setting of gradients changes nothing
        assert torch.equal(first.m, sample(problem, HMC(), chains=3, draws=20, warmup=20, seed=5).m)


@pytest.mark.parametrize("kernel", [PCN(step_size=0.3), MALA(step_size=0.3), HMC(step_size=0.5, length=2.0)])
def test_cost_is_counted(kernel):
    problem = Affine.create().problem()
    samples = sample(problem, kernel, chains=3, draws=10, warmup=5, thin=2, adaptation=KeepReference())
    assert samples.m.shape == (3, 5, 5)
    assert samples.acceptance.shape == (3, 10)
    if isinstance(kernel, HMC):
        assert 16 * 3 * 2 < samples.cost.forward < 16 * 3 * 6
    else:
        assert samples.cost.forward == 16 * 3
    assert samples.cost.backward == (samples.cost.forward if kernel.uses_gradient else 0)


@pytest.mark.parametrize("start", ["tensor", "module", "distribution"])
def test_starting_points(start):
    affine = Affine.create()
    problem = affine.problem()
    q = normal_near(problem, affine)
    m = affine.posterior().mean + 1e-6 * numbers(1, 4, 5)
    given = {"tensor": m, "module": LowRankNormal(affine.prior, 2), "distribution": affine.posterior()}[start]
    samples = sample(problem, PCN(step_size=1e-9), chains=4, draws=1, warmup=0, start=given, reference=q)
    if start == "tensor":
        torch.testing.assert_close(samples.m[:, 0], m, atol=1e-7, rtol=0.0)
    assert bool(torch.isfinite(samples.log_joint).all())


def test_report_is_arviz_and_its_verdicts_differ():
    problem = Affine.create(std=1.5).problem()
    good = sample(problem, HMC(), chains=4, draws=500, warmup=100)
    report = good.report()
    tree = good.to_arviz("theta")
    x = np.concatenate([tree["posterior"]["theta"].values.transpose(2, 0, 1), good.log_joint[None].numpy()])
    assert report.rhat == pytest.approx(max(float(array_stats.rhat(v, chain_axis=0, draw_axis=1)) for v in x))
    assert report.ess_bulk == pytest.approx(min(float(array_stats.ess(v, chain_axis=0, draw_axis=1)) for v in x))
    assert "The chains agree" in report.verdict
    text = str(report)
    assert "R-hat" in text
    assert " ".join(text.split()).endswith(report.verdict)
    problem = banana()[0]
    bad = sample(problem, PCN(step_size=0.01), chains=4, draws=100, warmup=0).report()
    assert bad.rhat > 1.1
    assert "Do not use" in bad.verdict
    stuck = sample(problem, MALA(step_size=1.5), chains=2, draws=5, warmup=0, start=torch.tensor([[0.0, 9.0]] * 2)).report()
    assert stuck.rhat == math.inf


def test_to_arviz_has_what_arviz_expects():
    problem = banana()[0]
    samples = sample(problem, HMC(), chains=2, draws=6, warmup=5, thin=2, seed=4)
    tree = samples.to_arviz()
    assert tree["posterior"]["m"].dims[:2] == ("chain", "draw")
    assert tree["posterior"]["m"].shape == (2, 3, 2)
    np.testing.assert_array_equal(tree["sample_stats"]["lp"].values, samples.log_joint.numpy())
    np.testing.assert_array_equal(tree["sample_stats"]["acceptance_rate"].values, samples.acceptance[:, 1::2].numpy())
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, problem.y.numpy())
    assert tree.attrs["seed"] == 4
    with pytest.raises(InvalidInput, match="name is 3"):
        samples.to_arviz(3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernel": HMC}, "kernel is"),
        ({"chains": 0}, "chains is 0"),
        ({"draws": 2, "thin": 3}, "nothing would be kept"),
        ({"warmup": 0}, "no step size would be found"),
        ({"reference": 1.0}, "reference is of float"),
        ({"reference": Normal(0.0, 1.0)}, "reference is of Normal"),
        ({"start": torch.zeros(2, 5)}, r"for 4 chains it must be \(4, 5\)"),
        ({"start": "here"}, "start is of str"),
        ({"adaptation": LearnDiagonal}, "adaptation is"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_refuses(arguments, words):
    problem = Affine.create().problem()
    with pytest.raises(InvalidInput, match=words):
        sample(problem, arguments.pop("kernel", HMC()), **{"draws": 5, **arguments})


def test_refuses_a_reference_of_another_prior():
    with pytest.raises(InvalidInput, match="made with the problem's prior"):
        sample(Affine.create().problem(), HMC(), draws=5, reference=FullRankNormal(Affine.create().prior))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PCN(step_size=2.0), "at most pi / 2"),
        (lambda: HMC(step_size=-0.1), "HMC: step_size"),
        (lambda: HMC(length=0.0), "HMC: length"),
        (lambda: MALA(acceptance=1.0), "below 1"),
        (lambda: HMC(most_rotations=0), "most_rotations"),
    ],
)
def test_kernels_refuse(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


# Ranks


@pytest.mark.mpi
@pytest.mark.parametrize("kernel", [PCN(), MALA(), HMC(step_size=0.2)], ids=lambda kernel: type(kernel).__name__)
def test_split_over_ranks(kernel):
    results = []
    for problem in split_pair():
        q = MeanFieldNormal(problem.prior)
        GaussNewton()(problem, q)
        for reference in (None, q):
            samples = sample(problem, kernel, chains=3, draws=5, warmup=4, reference=reference)
            results.append((problem.prior.gather(samples.m), samples.step_size, samples.cost.solves, samples.report()))
    for ours, reference in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(ours[0], reference[0], rtol=1e-6, atol=1e-6)  # trajectories amplify rounding
        assert ours[1:3] == pytest.approx(reference[1:3])
        assert ours[3].ess_bulk == pytest.approx(reference[3].ess_bulk, rel=1e-3)
        assert ours[3].rhat == pytest.approx(reference[3].rhat, rel=1e-4)


@pytest.mark.mpi
def test_chains_shared_out_over_ranks_are_those_of_one():
    grid = ProcessGrid.create(MPI.COMM_WORLD, 1)
    problem = banana()[0]
    shared = sample(problem, HMC(), chains=5, draws=5, warmup=10, grid=grid, seed=2 + MPI.COMM_WORLD.rank)
    alone = sample(problem, HMC(), chains=5, draws=5, warmup=10, seed=2)
    torch.testing.assert_close(shared.m, alone.m, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shared.acceptance, alone.acceptance, rtol=1e-6, atol=1e-6)
    assert shared.step_size == pytest.approx(alone.step_size)
    assert shared.cost == alone.cost


@pytest.mark.mpi
def test_more_groups_than_chains_are_refused():
    grid = ProcessGrid.create(MPI.COMM_WORLD, 1)
    problem = banana()[0]
    if grid.sample_comm.size == 1:
        assert sample(problem, MALA(), chains=1, draws=5, warmup=5, grid=grid).m.shape == (1, 5, 2)
        return
    with pytest.raises(InvalidInput, match=f"{grid.sample_comm.size} groups"):
        sample(problem, MALA(), chains=1, draws=5, warmup=5, grid=grid)


@pytest.mark.mpi
def test_a_start_that_fails_in_one_group_is_raised_in_all():
    grid = ProcessGrid.create(MPI.COMM_WORLD, 1)
    prior = GaussianVector(torch.zeros(1))
    problem = InverseProblem(prior, lambda m: torch.where(m > 0.0, torch.inf, m), GaussianNoise(1.0), torch.zeros(1))
    with pytest.raises(InvalidInput, match=r"starting points of chains \[3\]"):
        sample(problem, PCN(), chains=4, draws=5, start=torch.tensor([[-1.0], [-1.0], [-1.0], [1.0]]), grid=grid)


@pytest.mark.mpi
def test_a_grid_of_other_ranks_is_refused():
    if MPI.COMM_WORLD.size == 1:
        pytest.skip("one rank has one communicator")
    prior = GaussianVector(torch.zeros(1), comm=MPI.COMM_WORLD)
    problem = InverseProblem(prior, lambda m: m, GaussianNoise(1.0), torch.zeros(1))
    with pytest.raises(InvalidInput, match="grid: its mesh_comm has 1 ranks"):
        sample(problem, PCN(), draws=5, grid=ProcessGrid.create(MPI.COMM_WORLD, 1))
