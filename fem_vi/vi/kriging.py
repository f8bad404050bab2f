"""Best linear prediction from simulated pairs: what some data tell about the unknowns, and about all other data.

With the moments of pairs (xi, g) of unknowns and predictions, and R those of the noise, data y_I of the sensors I give

    S = C_II + R_II,   E[xi] = xi_mean + C_xI S^-1 (y_I - mean_I),   Cov[xi] = C_xx - C_xI S^-1 C_Ix,

which is the posterior of a linear problem, and right on average over data sets for every problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fem_vi.errors import InvalidInput
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.randomness import private_generator
from fem_vi.vi.sensors import SensorData, numbered
from fem_vi.vi.simulations import Simulations


@dataclass(frozen=True)
class Predicted:
    """What data sets tell by linear prediction.

    Attributes:
        mean: Of xi, `(*batch, n)`.
        covariance: Of xi, `(*batch, n, n)`; `(n, n)` of data that always come from all sensors.
        data: Mean of the noise-free data of all sensors, `(*batch, num_data)`.
        residual: S^(-1/2) (y_I - mean_I), zero for absent sensors, `(*batch, most)`: independent with variance one on average.
        count: Sensors that reported, `(*batch,)`.
    """

    mean: Tensor
    covariance: Tensor
    data: Tensor
    residual: Tensor
    count: Tensor


class Kriging(nn.Module):
    """The moments of simulated pairs, and linear prediction by them.

    Args:
        problem: Prior, forward map and likelihood.
        simulations: Pairs of that problem; more than there are unknowns and data together, better ten times as many.
        points: Candidate places of `SensorData`, `(num_data, dim)`, or None.

    Attributes:
        xi_mean, xi_covariance: Of the unknowns, `(n,)` and `(n, n)`.
        mean, covariance: Of the noise-free data, `(num_data,)` and `(num_data, num_data)`.
        cross: Covariance of both, `(n, num_data)`.
        noise: Covariance of the data around their predictions, `(num_data, num_data)`: diagonal where the likelihood has an
            `at(index)`, the noise of some of the data, and so says that data are independent.

    Raises:
        InvalidInput: Where there are too few pairs.

    MPI: Not collective; every tensor is replicated.

    References:
        Evensen (1994), Sequential data assimilation with a nonlinear quasi-geostrophic model using Monte Carlo methods.
    """

    xi_mean: Tensor
    xi_covariance: Tensor
    mean: Tensor
    covariance: Tensor
    cross: Tensor
    noise: Tensor

    def __init__(self, problem: InverseProblem, simulations: Simulations, *, points: Tensor | None = None) -> None:
        super().__init__()
        num_data, count, n = len(problem.y), len(simulations), simulations.xi.shape[1]
        if count <= 2 * n:
            raise InvalidInput(f"simulations holds {count} pairs of {n} unknowns; covariances take more than {2 * n}.")
        self.points = points
        g, xi = simulations.prediction[:, :num_data], simulations.xi
        with private_generator(0), torch.no_grad():
            noise = torch.cov((problem.likelihood.sample(simulations.prediction) - g).T).reshape(num_data, num_data)
        if hasattr(problem.likelihood, "at"):
            noise = torch.diag(noise.diagonal())
        a, b = xi - xi.mean(0), g - g.mean(0)
        for name, value in {
            "xi_mean": xi.mean(0),
            "xi_covariance": a.T @ a / (count - 1),
            "mean": g.mean(0),
            "covariance": b.T @ b / (count - 1),
            "cross": a.T @ b / (count - 1),
            "noise": noise,
        }.items():
            self.register_buffer(name, value.clone())

    def forward(self, y: Any) -> Predicted:
        """Predict from data sets, `(*batch, num_data)` or `SensorData`."""
        values, index, present = self._read(y)
        on = present.to(values.dtype)
        both = on[..., :, None] * on[..., None, :]
        S = both * (self.covariance + self.noise)[index[..., :, None], index[..., None, :]] + torch.diag_embed(1.0 - on)
        L = torch.linalg.cholesky(S)
        root = torch.linalg.solve_triangular(L, torch.eye(S.shape[-1], dtype=S.dtype), upper=False) * on[..., None, :]
        residual = (values - self.mean[index])[..., None, :] @ root.mT
        to_xi, to_data = root @ self.cross.T[index], root @ self.covariance[index]
        return Predicted(
            mean=self.xi_mean + (residual @ to_xi)[..., 0, :],
            covariance=self.xi_covariance - to_xi.mT @ to_xi,
            data=self.mean + (residual @ to_data)[..., 0, :],
            residual=residual[..., 0, :],
            count=on.sum(-1).expand(values.shape[:-1]),
        )

    def _read(self, y: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Values, numbers of their sensors, and which are there; the latter two without batch axes where they are the same."""
        if isinstance(y, SensorData):
            if y.index is None and self.points is None:
                raise InvalidInput("Kriging: y has places but no numbers of candidates. Pass points= where it is built.")
            data = numbered(y, y.points if self.points is None else self.points)
            assert data.index is not None
            return data.values, data.index, data.present
        if not isinstance(y, Tensor) or y.ndim == 0 or y.shape[-1] != len(self.mean):
            given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise InvalidInput(f"Kriging: y is {given}; it must be SensorData or a tensor (*batch, {len(self.mean)}).")
        return y, torch.arange(y.shape[-1]), torch.ones(y.shape[-1], dtype=torch.bool)
