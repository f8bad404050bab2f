"""Are these data like those that a network was trained on?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fem_vi.arguments import instance
from fem_vi.errors import InvalidInput
from fem_vi.vi.kriging import Kriging
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.randomness import private_generator
from fem_vi.vi.sensors import AllSensors, Data, RandomSensors, SensorData, Sensors
from fem_vi.vi.simulations import Simulations

LEVEL = 0.01


@dataclass(frozen=True)
class Typicality:
    """How usual one data set is.

    Attributes:
        distance: Mahalanobis distance from the mean of the training data, squared, per datum: about one where usual.
        p_value: Share of training data that are as far or farther.
        verdict: What to make of it, in words.
    """

    distance: float
    p_value: float
    verdict: str

    def __str__(self) -> str:
        return self.verdict


class TypicalData:
    """The squared Mahalanobis distance of data in the space of the training data, and how often training data are so far.

        t(y) = P(chi2_k >= (y - mean)' S^-1 (y - mean)),   p(y) = (1 + #{i: t(y_i) <= t(y)}) / (1 + N)

    with k the number of sensors that reported. Half of the simulations give mean and covariance, the others the y_i: for data of
    the kind of the simulations, p is uniform, so that the share of false alarms is what the level says, however far the data are
    from normal.

    Args:
        problem: Prior, forward map and likelihood.
        simulations: Pairs of that problem, some hundreds at least.
        sensors: Those of the model.

    Raises:
        InvalidInput: Where there are too few pairs.

    MPI: Not collective; every tensor is replicated.

    References:
        Laxhammar, Falkman (2015), Inductive conformal anomaly detection for sequential detection of anomalous sub-trajectories.

    Example:
        >>> typical = fem_vi.TypicalData(problem, simulations, model.sensors)
        >>> print(typical(y))
    """

    def __init__(
        self,
        problem: InverseProblem,
        simulations: Simulations,
        sensors: Sensors = AllSensors(),  # noqa: B008 - frozen
    ) -> None:
        instance("problem", problem, InverseProblem)
        instance("simulations", simulations, Simulations)
        instance("sensors", sensors, Sensors)
        half = len(simulations) // 2
        if half < 100:
            raise InvalidInput(f"simulations holds {len(simulations)} pairs; false alarms of 1 % are judged from 200 at least.")
        first = Simulations(simulations.xi[:half], simulations.prediction[:half])
        points = sensors.points if isinstance(sensors, RandomSensors) else None
        self.kriging = Kriging(problem, first, points=points)
        with private_generator(0), torch.no_grad():
            y = sensors.observe(problem.likelihood.sample(simulations.prediction[half:]))
            self.calibration = self._statistic(y).sort().values

    def p_values(self, y: Data) -> Tensor:
        """Share of training data that are as unusual, `(*batch,)`."""
        below = torch.searchsorted(self.calibration, self._statistic(y), right=True)
        return (1.0 + below) / (1.0 + len(self.calibration))

    def __call__(self, y: Data) -> Typicality:
        """Judge one data set.

        Raises:
            InvalidInput: Where y holds several.
        """
        values = y.values if isinstance(y, SensorData) else y
        if values.ndim != 1:
            raise InvalidInput(f"y holds {tuple(values.shape[:-1])} data sets; one is expected. p_values(y) takes many.")
        predicted = self.kriging(y)
        distance = float(predicted.residual.square().sum(-1) / predicted.count)
        p = float(self.p_values(y))
        return Typicality(distance, p, _verdict(distance, p))

    @torch.no_grad()
    def _statistic(self, y: Data) -> Tensor:
        predicted = self.kriging(y)
        t = torch.special.gammaincc(0.5 * predicted.count, 0.5 * predicted.residual.square().sum(-1))
        return t.clamp_min(torch.finfo(t.dtype).tiny)


def _verdict(distance: float, p: float) -> str:
    """What to do."""
    if p > LEVEL:
        return f"The data look like the training data (p = {p:.2g})."
    return (
        f"The data are unlike the training data: squared distance {distance:.3g} per datum, with 1 usual (p = {p:.2g}). "
        "Do not believe the network. Is prior, noise or unit wrong? Else correct(y) or refine(y), and look at diagnose."
    )
