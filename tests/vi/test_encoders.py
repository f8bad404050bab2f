"""Encoders: what must not matter does not, and what must is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import stats

from fem_vi.errors import InvalidInput
from fem_vi.vi.correlated_noise import LowRankNoise
from fem_vi.vi.encoder.dense import DenseEncoder
from fem_vi.vi.encoder.kalman import KalmanEncoder
from fem_vi.vi.encoder.point_set import SetEncoder
from fem_vi.vi.kriging import Kriging
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.sensors import RandomSensors, SensorData
from fem_vi.vi.simulations import Simulations, simulate
from fem_vi.vi.typical import TypicalData
from tests.vi.helpers import F64, Affine, numbers

AFFINE = Affine.create(num_data=4)
SENSORS = RandomSensors(numbers(30, 4, 2), fewest=1, most=4)


def some_data(count: int = 6) -> SensorData:
    torch.manual_seed(0)
    return SENSORS.observe(numbers(31, count, 4))


def set_encoders() -> list[SetEncoder | KalmanEncoder]:
    torch.manual_seed(0)
    problem = AFFINE.problem()
    deep, attentive = (SetEncoder(2, width=8, layers=layers, heads=2) for layers in (0, 2))
    for encoder in (deep, attentive):
        encoder.scale_by(some_data(50))
    return [deep, attentive, KalmanEncoder(problem, simulate(problem, 200), points=SENSORS.points, hidden=(8,))]


@pytest.mark.parametrize("which", range(3), ids=["deep set", "attention", "Kalman"])
def test_order_and_filling_do_not_matter(which):
    encoder, y = set_encoders()[which], some_data()
    features = encoder(y)
    assert features.shape == (6, encoder.num_features)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(encoder(y[:, order]), features)
    garbage = torch.where(y.present, y.values, torch.full_like(y.values, 7.0))
    torch.testing.assert_close(encoder(replace(y, values=garbage)), features)
    alone = torch.stack([encoder(y[k][y.present[k]]) for k in range(6)])
    torch.testing.assert_close(alone, features)
    without_numbers = replace(y, index=None)
    torch.testing.assert_close(encoder(without_numbers), features)


@pytest.mark.parametrize("which", range(3), ids=["deep set", "attention", "Kalman"])
def test_places_and_values_do_matter(which):
    encoder, y = set_encoders()[which], some_data()
    features = encoder(y)
    louder = encoder(replace(y, values=y.values + y.present))
    assert bool(((louder - features).norm(dim=1) > 1e-3).all())
    index = (y.index + 1) % 4
    elsewhere = replace(y, index=index, points=SENSORS.points[index] * y.present[..., None])
    assert bool(((encoder(elsewhere) - features).norm(dim=1) > 1e-4).all())


def test_attention_learns_to_compare_sensors():
    # Which of the values belongs to the sensor farthest left? A mean over sensors cannot tell.
    torch.manual_seed(0)
    encoder = SetEncoder(1, width=16, layers=1, heads=2)
    last = torch.nn.Linear(encoder.num_features, 1, dtype=F64)

    def batch() -> tuple[SensorData, torch.Tensor]:
        x, values = torch.rand(128, 3, 1, dtype=F64), torch.randn(128, 3, dtype=F64)
        wanted = values.gather(1, x[..., 0].argmin(1, keepdim=True))
        return SensorData(x, values, torch.ones(128, 3, dtype=torch.bool)), wanted

    encoder.scale_by(batch()[0])
    optimizer = torch.optim.Adam([*encoder.parameters(), *last.parameters()], lr=5e-3)
    for _ in range(250):
        y, wanted = batch()
        loss = (last(encoder(y)) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    y, wanted = batch()
    assert float((last(encoder(y)) - wanted).square().mean().detach()) < 0.25  # 2 / 3 without comparing


def test_scales_are_those_of_the_data():
    encoder = DenseEncoder(3, hidden=())
    y = torch.tensor([1.0, -2.0, 5.0]) + torch.tensor([0.1, 10.0, 0.0]) * numbers(1, 500, 3)
    encoder.scale_by(y)
    z = encoder(y)
    torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std(0), torch.tensor([1.0, 1.0, 0.0], dtype=F64))


def test_kriging_is_conditioning_of_the_joint_normal():
    problem = AFFINE.problem()
    pairs = simulate(problem, 400)
    kriging = Kriging(problem, pairs, points=SENSORS.points)
    index = torch.tensor([3, 1])
    y = SENSORS.take(numbers(31, 4), index)
    predicted = kriging(y)
    S = kriging.covariance[index][:, index] + kriging.noise[index][:, index]
    gain = kriging.cross[:, index] @ torch.linalg.inv(S)
    delta = y.values - kriging.mean[index]
    torch.testing.assert_close(predicted.mean, kriging.xi_mean + gain @ delta)
    torch.testing.assert_close(predicted.covariance, kriging.xi_covariance - gain @ kriging.cross[:, index].T)
    there = kriging.mean + kriging.covariance[:, index] @ torch.linalg.inv(S) @ delta
    torch.testing.assert_close(predicted.data, there)
    assert float(predicted.residual.square().sum()) == pytest.approx(float(delta @ torch.linalg.inv(S) @ delta))
    torch.testing.assert_close(kriging.noise, AFFINE.std**2 * torch.eye(4, dtype=F64), rtol=0.5, atol=0)


def test_kriging_knows_of_correlated_noise():
    """A drift that all sensors share: the exact posterior, which independent noise of the same size misses by far."""
    drift = LowRankNoise(0.1, torch.full((4, 1), 0.6, dtype=F64))
    R = 0.01 * torch.eye(4, dtype=F64) + 0.36
    problem = InverseProblem(AFFINE.prior, AFFINE.problem().forward, drift, AFFINE.y)
    predicted = Kriging(problem, simulate(problem, 60_000))(AFFINE.y)
    J = AFFINE.A @ torch.linalg.cholesky(AFFINE.prior.covariance)
    exact, independent = (
        torch.linalg.inv(torch.eye(5, dtype=F64) + J.T @ torch.linalg.inv(noise) @ J) for noise in (R, torch.diag(R.diagonal()))
    )
    mean = exact @ J.T @ torch.linalg.solve(R, AFFINE.y - AFFINE.b - AFFINE.A @ AFFINE.prior.mean)
    torch.testing.assert_close(predicted.mean, mean, rtol=0, atol=0.03)
    error = float((predicted.covariance - exact).norm() / exact.norm())
    assert error < 0.02 < 0.2 * float((independent - exact).norm() / exact.norm())


@pytest.mark.parametrize("sensors", ["all", "some"])
def test_false_alarms_come_as_often_as_the_level_says(sensors):
    problem = AFFINE.problem()
    problem.forward = lambda m: (m @ AFFINE.A.T).exp()  # far from normal
    choice = {"sensors": SENSORS} if sensors == "some" else {}
    typical = TypicalData(problem, simulate(problem, 4000), **choice)
    torch.manual_seed(1)
    y = problem.likelihood.sample(simulate(problem, 2000, seed=1).prediction)
    p = typical.p_values(SENSORS.observe(y) if choice else y)
    assert stats.kstest(p.numpy(), "uniform").pvalue > 0.01
    assert abs(float((p <= 0.05).double().mean()) - 0.05) < 4 * (0.05 * 0.95 / 2000) ** 0.5


def test_data_of_another_kind_raise_an_alarm():
    problem = AFFINE.problem()
    typical = TypicalData(problem, simulate(problem, 2000))
    usual = typical(AFFINE.y)
    assert usual.p_value > 0.01
    assert str(usual).startswith("The data look like the training data")
    strange = typical(AFFINE.y + 5.0 * torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert strange.p_value <= 0.01
    assert strange.distance > 5.0
    assert "Do not believe the network" in str(strange)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: SetEncoder(2, width=10, heads=4), "heads is 4; it must divide the width, 10"),
        (lambda: SetEncoder(2)(torch.zeros(3)), "SetEncoder: y has Tensor"),
        (lambda: SetEncoder(3)(some_data()), r"points \(6, 4, 2\)"),
        (lambda: DenseEncoder(0), "num_data is 0"),
        (lambda: DenseEncoder(4)(some_data()), "DenseEncoder: y is SensorData"),
        (lambda: set_encoders()[2](torch.zeros(3)), r"Kriging: y is \(3,\)"),
        (lambda: set_encoders()[2](SensorData.create([[9.0, 9.0]], [1.0])), "at none of the 4 candidates"),
        (lambda: TypicalData(AFFINE.problem(), Simulations(numbers(1, 50, 5), numbers(2, 50, 4))), "50 pairs"),
        (lambda: TypicalData(AFFINE.problem(), simulate(AFFINE.problem(), 200))(numbers(1, 2, 4)), r"\(2,\) data sets"),
        (lambda: Kriging(AFFINE.problem(), simulate(AFFINE.problem(), 200))(replace(some_data(), index=None)), "numbers of cand"),
    ],
)
def test_refuses(act, words):
    with pytest.raises(InvalidInput, match=words):
        act()
