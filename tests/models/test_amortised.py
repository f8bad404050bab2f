"""Amortised inversion against what is known: the Kalman gain, the exact posterior of each data set, calibrated ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch.distributions import MultivariateNormal, kl_divergence

from fem_vi.errors import InvalidInput, RunFolderError
from fem_vi.models import AmortisedInversion
from fem_vi.vi.amortised_objective import ExpectedELBO, ExpectedForwardKL, InTurn
from fem_vi.vi.calibration import calibrate
from fem_vi.vi.data_sets import Fresh, Recorded, Stored
from fem_vi.vi.diagnostics import diagnose
from fem_vi.vi.encoder.dense import DenseEncoder
from fem_vi.vi.encoder.kalman import KalmanEncoder
from fem_vi.vi.encoder.point_set import SetEncoder
from fem_vi.vi.fit import fit
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.objective import ELBO, TotalDerivative
from fem_vi.vi.optimizer import Adam, Cosine
from fem_vi.vi.posterior.amortised import Amortised
from fem_vi.vi.posterior.flow import Flow
from fem_vi.vi.posterior.flow_head import FlowHead
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.heads import DiagonalHead, FullHead, LowRankCovarianceHead, LowRankPrecisionHead
from fem_vi.vi.posterior.low_rank import FreeDiagonal, LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.posterior.neural_spline import NeuralSpline
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.sensors import AllSensors, RandomSensors, SensorData
from fem_vi.vi.simulations import simulate
from tests.vi.helpers import F64, Affine, numbers, perturb, split_pair

AFFINE = Affine.create()
SPLINE = NeuralSpline(transforms=2, bins=4, hidden=(16,), passes=2)
HEADS = {
    "diagonal": DiagonalHead,
    "full": FullHead,
    "covariance": partial(LowRankCovarianceHead, rank=2),
    "precision": partial(LowRankPrecisionHead, rank=3),
    "flow": partial(FlowHead, transform=SPLINE),
}


def linear(**options: Any) -> AmortisedInversion:
    """A network whose mean is an affine function of the data."""
    torch.manual_seed(0)
    return AmortisedInversion(AFFINE.problem(), DenseEncoder(3, hidden=()), **options)


@pytest.fixture(scope="module")
def unsupervised() -> AmortisedInversion:
    """The linear network, fitted with the solver in the loop."""
    model = linear()
    objective = ExpectedELBO(Fresh(64), samples=2)
    run = fit(model.problem, model, objective, steps=800, optimizer=Adam(lr=0.1))
    # Every sample of every data set gives that data set's evidence: the bound has no gap.
    terms = objective(model.problem, model)
    assert float(terms.elbo) == pytest.approx(run.history[-1].elbo, abs=2.0)
    return model


def simulated(count: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Whitened unknowns and data of the affine problem."""
    pairs = simulate(AFFINE.problem(), count, seed=seed)
    return pairs.xi, pairs.prediction + AFFINE.std * numbers(50, count, 3)


def gain_error(model: AmortisedInversion, y: torch.Tensor) -> float:
    """Largest relative error of d mean / d y over the data sets, against the Kalman gain."""
    gain = AFFINE.posterior().covariance_matrix @ AFFINE.A.T / AFFINE.std**2
    y = y.clone().requires_grad_()
    mean = model(y).mean
    rows = [torch.autograd.grad(mean[:, k].sum(), y, retain_graph=True)[0] for k in range(5)]
    return float(((torch.stack(rows, 1) - gain).norm(dim=(1, 2)) / gain.norm()).max())


def covariances(model: AmortisedInversion, y: torch.Tensor) -> torch.Tensor:
    """Of the unknowns, one for each data set."""
    root = torch.linalg.cholesky(AFFINE.prior.covariance)
    return root @ model.posterior(y).whitened.covariance_matrix @ root.T


def exact_means(y: torch.Tensor) -> torch.Tensor:
    """Of the posteriors of data sets."""
    gain = AFFINE.posterior().covariance_matrix @ AFFINE.A.T / AFFINE.std**2
    return AFFINE.prior.mean + (y - AFFINE.b - AFFINE.A @ AFFINE.prior.mean) @ gain.T


def test_the_solver_in_the_loop_finds_the_kalman_gain(unsupervised):
    _, y = simulated(40)
    assert gain_error(unsupervised, y) < 1e-2
    exact = AFFINE.posterior().covariance_matrix
    error = (covariances(unsupervised, y) - exact).norm(dim=(1, 2)) / exact.norm()
    assert float(error.max()) < 0.02
    torch.testing.assert_close(unsupervised.posterior(y).mean, exact_means(y), rtol=1e-2, atol=1e-2)
    diagonal = exact.diagonal().expand(40, 5)
    torch.testing.assert_close(unsupervised.posterior(y).variance, diagonal, rtol=0.02, atol=0)


def test_its_bound_is_the_evidence_of_each_data_set(unsupervised):
    terms = ELBO(samples=8)(AFFINE.problem(), unsupervised.at(AFFINE.y))
    assert float(terms.elbo) == pytest.approx(AFFINE.log_evidence(), abs=1e-2)


def test_simulated_pairs_find_the_kalman_gain_without_a_gradient_of_the_forward_map():
    model = linear()
    model.problem.forward = lambda m: (m @ AFFINE.A.T + AFFINE.b).detach()
    pairs = simulate(model.problem, 400_000, shard=20_000)
    fit(model.problem, model, ExpectedForwardKL(Stored(pairs, 8192)), steps=500, optimizer=Adam(lr=0.05), schedule=Cosine(0.001))
    assert model.problem.cost.backward == 0
    _, y = simulated(40)
    assert gain_error(model, y) < 1e-2
    exact = AFFINE.posterior().covariance_matrix
    assert float(((covariances(model, y) - exact).norm(dim=(1, 2)) / exact.norm()).max()) < 0.02


def test_ranks_are_uniform_where_the_network_is_right(unsupervised):
    calibration = calibrate(AFFINE.problem(), lambda problem, seed: unsupervised.posterior(problem.y), repeats=200)
    assert min(calibration.p_values) > 0.01, calibration
    assert len(calibration.p_values) == 6  # five unknowns, and the log-likelihood, which sees what they do not


def test_ranks_are_not_uniform_where_it_is_not():
    model = linear()
    calibration = calibrate(AFFINE.problem(), lambda problem, seed: model.posterior(problem.y), repeats=200)
    assert calibration.p_values[-1] < 1e-6


@pytest.mark.parametrize("hidden", [(), (16,)])
def test_linear_prediction_is_the_exact_posterior_before_any_training(hidden):
    problem = AFFINE.problem()
    pairs = simulate(problem, 40_000)
    model = AmortisedInversion(problem, KalmanEncoder(problem, pairs, hidden=hidden))
    _, y = simulated(40)
    exact = AFFINE.posterior().covariance_matrix
    torch.testing.assert_close(model.posterior(y).mean, exact_means(y), rtol=0, atol=0.03)
    assert float(((covariances(model, y) - exact).norm(dim=(1, 2)) / exact.norm()).max()) < 0.02


def test_sensors_that_fail_have_posteriors_of_their_own():
    problem, points = AFFINE.problem(), numbers(30, 3, 2)
    sensors = RandomSensors(points, fewest=1, most=2)
    model = AmortisedInversion(problem, KalmanEncoder(problem, simulate(problem, 40_000), points=points), sensors=sensors)
    for index in ([0], [1, 2], [2, 0]):
        part = Affine(AFFINE.prior, AFFINE.A[index], AFFINE.b[index], AFFINE.std, AFFINE.y[index])
        q = model.posterior(SensorData.create(points[index], AFFINE.y[index]))
        torch.testing.assert_close(q.mean, part.posterior().mean, rtol=0, atol=0.03)
        torch.testing.assert_close(q.variance, part.posterior().variance, rtol=0.02, atol=0)
        own = model.problem_of(SensorData.create(points[index], AFFINE.y[index]))
        m = numbers(31, 4, 5)
        torch.testing.assert_close(own.log_likelihood(m), part.problem().log_likelihood(m))


def test_a_batch_of_failing_sensors_is_weighed_as_each_of_its_problems():
    problem = AFFINE.problem()
    problem.likelihood = GaussianNoise(torch.tensor([0.1, 0.2, 0.3]))
    sensors = RandomSensors(numbers(30, 3, 2), fewest=1, most=3)
    torch.manual_seed(0)
    y = sensors.observe(numbers(31, 24, 3))
    m = numbers(32, 4, 24, 5)
    together = sensors.log_likelihood(problem, y, problem.predict(m))
    alone = torch.stack([sensors.problem_of(problem, y[k]).log_likelihood(m[:, k]) for k in range(24)], dim=-1)
    torch.testing.assert_close(together, alone)
    assert set(y.present.sum(1).tolist()) == {1, 2, 3}


@pytest.mark.parametrize("name", ["diagonal", "full", "precision"])
def test_refining_closes_a_gap_of_nats(name):
    model = AmortisedInversion(AFFINE.problem(), DenseEncoder(3, hidden=(8,)), head=HEADS[name])
    perturb(model, size=0.02)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    run = model.refine(AFFINE.y, ELBO(samples=64), steps=400, optimizer=Adam(lr=0.05))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    left = whitened_divergence(run.posterior)
    precision = AFFINE.whitened_precision()
    best = 0.0 if name != "diagonal" else float(0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)))
    assert left == pytest.approx(best, abs=0.01)  # the bound is the log evidence less this
    assert whitened_divergence(model.at(AFFINE.y)) > best + 1.0


def whitened_divergence(posterior) -> float:
    """KL of a normal member of the family from the exact posterior."""
    q, exact = posterior().whitened, AFFINE.posterior()
    root = torch.linalg.inv(torch.linalg.cholesky(AFFINE.prior.covariance))
    covariance = root @ exact.covariance_matrix @ root.T
    p = MultivariateNormal(root @ (exact.mean - AFFINE.prior.mean), 0.5 * (covariance + covariance.T))
    spread = torch.diag_embed(q.variance) if not hasattr(q, "covariance_matrix") else q.covariance_matrix
    return float(kl_divergence(MultivariateNormal(q.mean, spread), p).detach())


def nonlinear() -> InverseProblem:
    """Curved enough that no affine network is right."""
    prior = GaussianVector(torch.zeros(3))
    A = numbers(40, 4, 3)
    return InverseProblem(prior, lambda m: torch.exp(0.4 * m) @ A.T, GaussianNoise(0.3), torch.tensor([1.0, -1.0, 0.5, 1.5]))


FITS = {
    "diagonal": MeanFieldNormal,
    "full": FullRankNormal,
    "precision": partial(LowRankNormal, rank=3, diagonal=FreeDiagonal()),
    "flow": partial(Flow, transform=SPLINE),
}


@pytest.mark.parametrize("name", FITS)
def test_refining_reaches_the_fit_of_a_nonlinear_problem(name):
    """With its own settings, from a network that was trained in haste."""
    problem = nonlinear()
    torch.manual_seed(0)
    model = AmortisedInversion(problem, DenseEncoder(4, hidden=(32,)), head=HEADS[name])
    fit(problem, model, ExpectedForwardKL(Fresh(64)), steps=200, optimizer=Adam(lr=0.01))
    refined = model.refine(problem.y).posterior
    fitted = fit(problem, FITS[name](problem.prior), ELBO(samples=64), steps=300).posterior
    rough, ours, theirs = (bound(problem, posterior) for posterior in (model.at(problem.y), refined, fitted))
    assert ours > theirs - 0.01
    assert ours > rough + 0.05


@torch.no_grad()
def bound(problem: InverseProblem, posterior: torch.nn.Module) -> float:
    """ELBO, with the same noise for all."""
    torch.manual_seed(1)
    return float(ELBO(samples=50_000)(problem, posterior).elbo)


def test_the_flow_bends_where_the_normal_head_cannot():
    def forward(m):
        return m[..., :1].square()

    problem = InverseProblem(GaussianVector(torch.zeros(2)), forward, GaussianNoise(0.2), torch.tensor([1.0]))
    torch.manual_seed(0)
    told = {}
    for name, head in {"full": FullHead, "flow": partial(FlowHead, transform=SPLINE)}.items():
        model = AmortisedInversion(problem, DenseEncoder(1, hidden=(16,)), head=head)
        run = fit(problem, model, ExpectedForwardKL(Fresh(256)), steps=200, optimizer=Adam(lr=0.015))
        told[name] = sum(row.kl for row in run.history[-20:]) / 20
    # With two modes of equal mass a normal covers both: at least log 2 worse where the data tell them apart.
    assert told["flow"] > told["full"] + 0.4
    m = model.posterior(torch.tensor([1.0])).sample((2000,))[:, 0]
    assert 0.3 < float((m > 0).double().mean()) < 0.7
    assert float((m.abs() < 0.5).double().mean()) < 0.15


@pytest.mark.parametrize("name", ["diagonal", "full", "precision", "flow"])
def test_the_latent_correction_finds_an_exact_posterior_that_it_contains(name):
    prior = GaussianVector(torch.zeros(3))
    scale = torch.tensor([1.0, 2.0, 0.5])
    problem = InverseProblem(prior, lambda m: m * scale, GaussianNoise(0.5), torch.tensor([2.0, -3.0, 1.0]))
    torch.manual_seed(0)
    model = AmortisedInversion(problem, DenseEncoder(3, hidden=(8,)), head=HEADS[name])  # untrained: the prior for all data
    if name == "precision":
        model.head.linear.bias.data.zero_()  # the small directions
    run = model.correct(problem.y, ELBO(samples=8), steps=200, optimizer=Adam(lr=0.15))
    assert sum(value.numel() for value in run.posterior.parameters() if value.requires_grad) == 6
    precision = 1.0 + (scale / 0.5).square()
    torch.testing.assert_close(run.posterior.shift, scale * problem.y / 0.25 / precision, rtol=1e-2, atol=1e-3, check_dtype=False)
    torch.testing.assert_close(run.posterior.log_scale, -0.5 * precision.log(), rtol=0, atol=0.02, check_dtype=False)


def test_data_unlike_the_training_data_are_corrected():
    problem = nonlinear()
    torch.manual_seed(0)
    model = AmortisedInversion(problem, DenseEncoder(4, hidden=(32,)))
    fit(problem, model, ExpectedForwardKL(Fresh(64)), steps=200, optimizer=Adam(lr=0.01))
    strange = problem.forward(torch.tensor([3.5, -3.0, 3.0], dtype=F64))
    own = model.problem_of(strange)
    before = float(ELBO(samples=2000)(own, model.at(strange)).elbo)
    run = model.correct(strange, steps=300)
    after = float(ELBO(samples=2000)(own, run.posterior).elbo)
    best = float(ELBO(samples=2000)(own, fit(own, FullRankNormal(problem.prior), ELBO(16), steps=300).posterior).elbo)
    assert before < best - 5.0
    assert best - after < 0.3 * (best - before)


@pytest.mark.parametrize("name", HEADS)
def test_each_head_learns_in_each_way(name):
    pairs = simulate(AFFINE.problem(), 500)
    for objective, measure in (
        (ExpectedELBO(Stored(pairs, 16), samples=2), "elbo"),
        (ExpectedELBO(Recorded(simulated(50)[1], 16), samples=2, gradient=TotalDerivative()), "elbo"),
        (ExpectedForwardKL(Fresh(64)), "kl"),
    ):
        torch.manual_seed(0)
        model = AmortisedInversion(AFFINE.problem(), DenseEncoder(3, hidden=(8,)), head=HEADS[name])
        run = fit(model.problem, model, objective, steps=40, optimizer=Adam(lr=0.02))
        rows = [getattr(row, measure) for row in run.history]
        assert sum(rows[-10:]) / 10 > sum(rows[:5]) / 5 + 0.5, (name, objective)


def test_two_objectives_in_turn_are_resumed_bit_for_bit(tmp_path):
    def make():
        torch.manual_seed(0)
        return AmortisedInversion(AFFINE.problem(), DenseEncoder(3, hidden=(8,)))

    objective = InTurn((ExpectedELBO(Fresh(8)), ExpectedForwardKL(Fresh(8))))
    whole = make()
    fit(whole.problem, whole, objective, steps=20)
    stopped = make()
    options = {"steps": 20, "path": tmp_path / "run", "checkpoint_every": 5}
    fit(stopped.problem, stopped, objective, stop=lambda history: len(history) >= 10, **options)
    again = make()
    run = fit(again.problem, again, objective, resume=True, stop=lambda history: len(history) >= 20, **options)
    assert len(run.history) == 20
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    kinds = {row.elbo == row.elbo for row in run.history}
    assert kinds == {True, False}  # some steps of each kind


def test_saved_and_loaded(tmp_path, unsupervised):
    unsupervised.save(tmp_path / "there" / "network.safetensors")
    fresh = linear()
    fresh.load(tmp_path / "there" / "network.safetensors")
    _, y = simulated(5)
    assert torch.equal(fresh.posterior(y).mean, unsupervised.posterior(y).mean)
    other = AmortisedInversion(AFFINE.problem(), DenseEncoder(3, hidden=(8,)))
    with pytest.raises(RunFolderError, match="this model has"):
        other.load(tmp_path / "there" / "network.safetensors")
    elsewhere = AmortisedInversion(Affine.create(num_data=4).problem(), DenseEncoder(4, hidden=()))
    with pytest.raises(RunFolderError, match="another model: they differ in num_data"):
        elsewhere.load(tmp_path / "there" / "network.safetensors")
    with pytest.raises(InvalidInput, match=r"must end in .safetensors"):
        fresh.save(tmp_path / "network.pt")
    (tmp_path / "there" / "network.safetensors").write_bytes(b"no network")
    with pytest.raises(RunFolderError, match="is damaged"):
        fresh.load(tmp_path / "there" / "network.safetensors")


def test_what_it_says_of_one_data_set_can_be_diagnosed(unsupervised):
    assert diagnose(AFFINE.problem(), unsupervised.at(AFFINE.y), samples=200).khat < 0.5


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: AmortisedInversion(3, DenseEncoder(3)), "problem is 3"),
        (lambda: AmortisedInversion(AFFINE.problem(), torch.nn.Linear(3, 3)), "encoder is a Linear.*must be of type Encoder"),
        (lambda: AmortisedInversion(AFFINE.problem(), DenseEncoder(3), head=lambda a, b: 7), "head: what it makes is 7"),
        (lambda: AmortisedInversion(AFFINE.problem(), DenseEncoder(3), sensors=3), "sensors is 3"),
        (lambda: linear().posterior(torch.zeros(4)), r"DenseEncoder: y is \(4,\); it must be a tensor whose last axis has 3"),
        (lambda: linear().refine(torch.zeros(2, 3)), r"y has shape \(2, 3\)"),
        (lambda: linear().at(torch.zeros(2, 3)), r"y holds \(2,\) data sets"),
        (
            lambda: ExpectedELBO(Fresh(2))(AFFINE.problem(), FullRankNormal(AFFINE.prior)),
            "FullRankNormal is the posterior of one",
        ),
        (lambda: ExpectedELBO(samples=0), "samples is 0"),
        (lambda: ExpectedForwardKL(Recorded(torch.zeros(3, 3))), "data is a Recorded"),
        (lambda: InTurn((ExpectedELBO(),), shares=(1.0, 2.0)), "1 objectives with shares"),
        (lambda: Recorded(torch.full((3, 2), torch.nan)), r"it must be \(count >= 2, num_data\) and finite"),
        (lambda: RandomSensors(torch.zeros(3, 2), fewest=2, most=4), "at least 4 candidates"),
        (
            lambda: RandomSensors(torch.zeros(3, 2), fewest=1, most=2).observe(torch.zeros(5, 4)),
            "3 candidates; the problem has 4",
        ),
        (lambda: SensorData.create([[0.0, 0.0]], [1.0, 2.0]), r"points has shape \(1, 2\) and values \(2,\)"),
        (lambda: SensorData.create([[0.0, 0.0]], [float("nan")]), "not finite"),
        (lambda: KalmanEncoder(AFFINE.problem(), simulate(AFFINE.problem(), 8)), "8 pairs of 5 unknowns"),
    ],
)
def test_refuses(act, words):
    with pytest.raises(InvalidInput, match=words):
        act()


def test_sensors_elsewhere_are_refused_where_nothing_is_predicted():
    sensors = RandomSensors(numbers(30, 3, 2), fewest=1, most=3)
    model = AmortisedInversion(AFFINE.problem(), SetEncoder(2, width=8), sensors=sensors)
    y = SensorData.create([[9.0, 9.0]], [1.0])
    assert model.posterior(y).mean.shape == (5,)
    with pytest.raises(InvalidInput, match=r"1 of the sensors, \[9.0, 9.0\] first, are at none of the 3 candidates"):
        model.refine(y)


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["full", "flow"])
def test_unknowns_split_over_ranks(name, tmp_path):
    histories, models = [], []
    for problem in split_pair(5, 3):
        torch.manual_seed(MPI.COMM_WORLD.rank if problem.prior.comm.size > 1 else 0)  # rank 0's first parameters count
        model = AmortisedInversion(problem, DenseEncoder(3, hidden=(8,)), head=HEADS[name])
        perturb(model, size=0.02)
        objective = InTurn((ExpectedELBO(Fresh(4), samples=2), ExpectedForwardKL(Fresh(8))))
        run = fit(problem, model, objective, steps=6, optimizer=Adam(lr=0.02))
        histories.append([row.kl for row in run.history])
        models.append(model)
    assert histories[0] == pytest.approx(histories[1], rel=1e-9)
    ours, alone = models
    for (key, value), other in zip(ours.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-7, atol=1e-9, msg=key)
    y = split_pair(5, 3)[0].y
    torch.testing.assert_close(ours.prior.gather(ours.posterior(y).mean), alone.posterior(y).mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours.prior.gather(ours.posterior(y).variance), alone.posterior(y).variance, rtol=1e-6, atol=1e-9)
    bounds = [model.refine(y, ELBO(samples=4), steps=4).history[-1].elbo for model in models]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-7)
    ours.save(tmp_path / "network.safetensors")
    alone.load_state_dict(ours.state_dict())
    ours.load(tmp_path / "network.safetensors")
    assert isinstance(ours, Amortised)
    assert ours.sensors == AllSensors()
