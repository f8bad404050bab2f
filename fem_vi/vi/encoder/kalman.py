"""Features of data that begin with the best linear prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.encoder.encoder import Encoder, dense, widths_of
from fem_vi.vi.kriging import Kriging, Predicted
from fem_vi.vi.posterior.frame import Frame
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.simulations import Simulations

MOST_UNKNOWNS = 512


class KalmanEncoder(Encoder):
    """The linear posterior of each data set, and a dense network for what is not linear.

    From the moments of simulated pairs, data of any of the sensors give a mean and a covariance of xi (`Kriging`), which become
    the head's frame, xi = mean + L z, z ~ head. A new head leaves z ~ N(0, I): the ensemble Kalman posterior, exact for a linear
    problem. The network reads that mean, the diagonal of L, the data of all sensors predicted from those that reported (their
    principal components), and how many reported; it bends and moves z.

    For sensors that fail and move among candidates it learns far more from the same simulations than a network that reads
    positions and values alone (`SetEncoder`), and more quickly.

    Args:
        problem: Prior, forward map and likelihood. At most 512 unknowns.
        simulations: Pairs of that problem.
        points: The candidates of `RandomSensors`, `(num_data, dim)`, for data without their numbers; or None.
        hidden: Widths of the layers.
        components: Most principal components.

    Attributes:
        kriging: The moments.
        directions: Principal components of the data, each over its standard deviation, `(num_data, components)`.

    Raises:
        InvalidInput: Where there are too many unknowns or too few pairs.

    MPI: Not collective; parameters are replicated, in float64, drawn from torch's generator.

    References:
        Evensen (1994), Sequential data assimilation with a nonlinear quasi-geostrophic model using Monte Carlo methods.

    Example:
        >>> encoder = KalmanEncoder(problem, simulations, points=sensors.points)
    """

    directions: Tensor

    def __init__(
        self,
        problem: InverseProblem,
        simulations: Simulations,
        *,
        points: Tensor | None = None,
        hidden: Sequence[int] = (128, 128),
        components: int = 40,
    ) -> None:
        instance("problem", problem, InverseProblem)
        instance("simulations", simulations, Simulations)
        n = simulations.xi.shape[1]
        if n > MOST_UNKNOWNS:
            raise InvalidInput(
                f"KalmanEncoder: {n} unknowns; it keeps dense covariances of at most {MOST_UNKNOWNS}. Take fewer modes, with a "
                "KarhunenLoeveField."
            )
        kriging = Kriging(problem, simulations, points=points)
        values, vectors = torch.linalg.eigh(kriging.covariance)
        kept = min(whole("components", components, least=1), int((values > 1e-10 * values[-1]).sum()))
        inputs = 2 * n + kept + 1
        widths = widths_of(inputs, hidden)
        super().__init__(inputs + (widths[-1] if hidden else 0))
        self.kriging = kriging
        self.network = dense(widths)
        self.register_buffer("directions", vectors[:, -kept:] / values[-kept:].sqrt())
        self.is_scaled.fill_(True)

    def scale_by(self, y: Any) -> None:
        """Nothing: the scales are those of the simulations."""

    def forward(self, y: Any) -> Tensor:
        """Features, `(*batch, num_features)`."""
        return self.read(y)[0]

    def read(self, y: Any) -> tuple[Tensor, Frame]:
        """Features, and the linear posterior as a frame."""
        with torch.no_grad():
            predicted: Predicted = self.kriging(y)
            tril = torch.linalg.cholesky(predicted.covariance)
            data = (predicted.data - self.kriging.mean) @ self.directions
            log_diagonal = tril.diagonal(dim1=-2, dim2=-1).log().expand(predicted.mean.shape)
            inputs = torch.cat([predicted.mean, log_diagonal, data, predicted.count.log()[..., None]], dim=-1)
        features = torch.cat([inputs, self.network(inputs)], dim=-1) if len(self.network) else inputs
        return features, Frame(predicted.mean, tril)
