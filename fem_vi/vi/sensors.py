"""Which data a posterior is asked about: those of fixed sensors, or of sensors that fail and move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.real_tensor import real_tensor


@dataclass(frozen=True)
class SensorData:
    """What sensors of varying number and place have measured; every tensor is replicated.

    Attributes:
        points: Where, `(*batch, most, dim)`, mesh units.
        values: What, `(*batch, most)`, unit of the data.
        present: Which entries are data, `(*batch, most)`, bool; the others only fill the rows.
        index: The number of each among the model's candidates, `(*batch, most)`; None where they are none of these.

    Example:
        >>> y = SensorData.create(points, values)  # one data set, (num, dim) and (num,)
    """

    points: Tensor
    values: Tensor
    present: Tensor
    index: Tensor | None = None

    @staticmethod
    def create(points: Any, values: Any) -> SensorData:
        """One data set.

        Args:
            points: `(num_data, dim)`.
            values: `(num_data,)`.

        Raises:
            InvalidInput: Where these are no finite numbers of such shapes.

        MPI: Not collective.
        """
        x, y = real_tensor("points", points), real_tensor("values", values)
        if x.ndim != 2 or y.shape != x.shape[:1]:
            raise InvalidInput(
                f"points has shape {tuple(x.shape)} and values {tuple(y.shape)}; they must be (num_data, dim) and (num_data,)."
            )
        if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise InvalidInput("points or values are not finite. Leave sensors that failed out.")
        return SensorData(x, y, torch.ones_like(y, dtype=torch.bool))

    @property
    def batch_shape(self) -> torch.Size:
        """Axes in front."""
        return self.values.shape[:-1]

    def __getitem__(self, item: Any) -> SensorData:
        """Some of the data sets."""
        return SensorData(
            self.points[item], self.values[item], self.present[item], None if self.index is None else self.index[item]
        )


Data = Tensor | SensorData


@runtime_checkable
class Sensors(Protocol):
    """How a data set comes of what all sensors together would measure."""

    def observe(self, y: Tensor) -> Data:
        """Data sets, of what all sensors would measure, `(batch, num_data)`; random choices are torch's generator's."""

    def log_likelihood(self, problem: InverseProblem, data: Data, prediction: Tensor) -> Tensor:
        """Log p(data | prediction), `(samples, batch)`, of predictions for all sensors, `(samples, batch, num_predicted)`."""

    def problem_of(self, problem: InverseProblem, data: Data) -> InverseProblem:
        """The inverse problem of one data set. Collective."""


@dataclass(frozen=True)
class AllSensors:
    """The sensors are always the same, and all of them report: a data set is a vector, `(num_data,)`."""

    def observe(self, y: Tensor) -> Data:
        """The same numbers."""
        return y

    def log_likelihood(self, problem: InverseProblem, data: Data, prediction: Tensor) -> Tensor:
        """Log p(y | prediction), `(samples, batch)`."""
        return problem.likelihood.log_prob(_vector(data), prediction)

    def problem_of(self, problem: InverseProblem, data: Data) -> InverseProblem:
        """The inverse problem of one data set. Collective."""
        with raise_on_all(problem.prior.comm):
            y = _vector(data)
        return InverseProblem(problem.prior, problem.forward, problem.likelihood, y)


@dataclass(frozen=True)
class RandomSensors:
    """Sensors fail and move: each data set is of some of many candidate places, as many and which ones at random.

    The forward map predicts what all candidates would measure. Their noise must be independent.

    Attributes:
        points: The candidates, `(num_data, dim)`, in the order of the predictions.
        fewest: Fewest that report.
        most: Most that report.

    Raises:
        InvalidInput: Where there are fewer candidates than `most`, or `fewest` exceeds it.
    """

    points: Tensor
    fewest: int
    most: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", real_tensor("RandomSensors: points", self.points))
        whole("RandomSensors: fewest", self.fewest, least=1)
        whole("RandomSensors: most", self.most, least=self.fewest)
        if self.points.ndim != 2 or len(self.points) < self.most:
            raise InvalidInput(
                f"RandomSensors: points has shape {tuple(self.points.shape)}; it must be (candidates, dim) with at least "
                f"{self.most} candidates, the most that report."
            )

    def __repr__(self) -> str:
        return f"RandomSensors({len(self.points)} candidates, {self.fewest} to {self.most} report)"

    def observe(self, y: Tensor) -> SensorData:
        """Some of what all candidates would measure, `(batch, num_data)`: each number of reports is as likely as the next."""
        if y.shape[-1] != len(self.points):
            raise InvalidInput(f"RandomSensors: {len(self.points)} candidates; the problem has {y.shape[-1]} data.")
        index = torch.rand(y.shape, dtype=torch.float64).argsort(dim=-1)[..., : self.most]
        count = torch.randint(self.fewest, self.most + 1, (*y.shape[:-1], 1))
        return self.take(y, index, torch.arange(self.most) < count)

    def take(self, y: Tensor, index: Tensor, present: Tensor | None = None) -> SensorData:
        """The data of candidates that are named, `(*batch, most)`; all of them where `present` is None."""
        present = torch.ones_like(index, dtype=torch.bool) if present is None else present
        values = y.gather(-1, index) * present
        return SensorData(self.points[index] * present[..., None], values, present, index)

    def log_likelihood(self, problem: InverseProblem, data: Data, prediction: Tensor) -> Tensor:
        """Log p(values | prediction) of those that reported, `(samples, batch)`."""
        data = numbered(data, self.points)
        assert data.index is not None
        columns = []
        for k in range(len(data.values)):
            index = data.index[k][data.present[k]]
            noise = noise_of(problem, index)
            columns.append(noise.log_prob(data.values[k][data.present[k]], prediction[:, k, index]))
        return torch.stack(columns, dim=-1)

    def problem_of(self, problem: InverseProblem, data: Data) -> InverseProblem:
        """The inverse problem of one data set. Collective."""
        with raise_on_all(problem.prior.comm):
            data = numbered(data, self.points)
            assert data.index is not None
            if data.values.ndim != 1:
                raise InvalidInput(f"y holds {tuple(data.batch_shape)} data sets; one is expected.")
            index = data.index[data.present]
            noise = noise_of(problem, index)
        return InverseProblem(problem.prior, lambda m: problem.forward(m)[..., index], noise, data.values[data.present])


def numbered(data: Data, points: Tensor) -> SensorData:
    """The same data, with the numbers of their places among candidates, `(num_data, dim)`.

    Raises:
        InvalidInput: Where a place is no candidate.
    """
    if not isinstance(data, SensorData):
        raise InvalidInput(f"y is {data!r:.60}; with RandomSensors it must be SensorData, such as SensorData.create(x, y).")
    if data.index is not None:
        return data
    distance, index = torch.cdist(data.points, points.expand(*data.batch_shape, -1, -1)).min(-1)
    extent = float((points.amax(0) - points.amin(0)).norm())
    far = (distance > 1e-6 * extent) & data.present
    if bool(far.any()):
        where = data.points[far][0].tolist()
        raise InvalidInput(
            f"{int(far.sum())} of the sensors, {where} first, are at none of the {len(points)} candidates, where alone the "
            "forward map predicts. A SetEncoder takes them all the same; to refine, pass problem=InverseProblem(...)."
        )
    return replace(data, index=index)


def noise_of(problem: InverseProblem, index: Tensor) -> Any:
    """The noise of some of the data.

    Raises:
        InvalidInput: Where the likelihood's data are not independent of each other.
    """
    at = getattr(problem.likelihood, "at", None)
    if at is None:
        raise InvalidInput(
            f"RandomSensors: {problem.likelihood!r:.60} has no at(index), the noise of some of the data. Use independent noise, "
            "such as GaussianNoise."
        )
    return at(index)


def _vector(data: object) -> Tensor:
    instance("y", data, Tensor)
    assert isinstance(data, Tensor)
    return data
