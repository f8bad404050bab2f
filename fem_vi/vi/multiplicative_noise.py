"""Noise in proportion to what is measured."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fem_vi.errors import InvalidInput
from fem_vi.vi.predicted import curvature_root, num_predicted


@runtime_checkable
class Noise(Protocol):
    """A likelihood that another one can be made of."""

    def check(self, y: Tensor) -> None:
        """Raise `InvalidInput` where the likelihood cannot take these data."""

    def log_prob(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Log p(y | prediction), `(*batch,)`."""

    def standardise(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Residuals with mean zero and variance one under the model, `(*batch, num_data)`."""

    def sample(self, prediction: Tensor) -> Tensor:
        """Data around a prediction, `(*batch, num_data)`."""


class MultiplicativeNoise:
    """Noise in proportion to what is measured, y = prediction * exp(e), where e is additive noise.

        log p(y | prediction) = log p_e(log y | log prediction) - sum_i log y_i

    With `GaussianNoise(0.05)` it is log-normal: about 5 % of each datum. Predictions that are not positive have no density.

    Args:
        noise: Of the logarithms: `GaussianNoise(0.05)`, `StudentNoise(0.05)`, or any other.

    Attributes:
        noise: That noise.

    Raises:
        InvalidInput: Where it is no likelihood.

    MPI: Not collective; every tensor is replicated.

    Example:
        >>> fem_vi.InverseProblem(prior, concentration, fem_vi.MultiplicativeNoise(fem_vi.GaussianNoise(0.05)), y)
    """

    additive = False

    def __init__(self, noise: Noise) -> None:
        if isinstance(noise, type) or not isinstance(noise, Noise):
            raise InvalidInput(f"noise is {noise!r:.80}; it must be a likelihood of the logarithms, such as GaussianNoise(0.05).")
        self.noise = noise

    def __repr__(self) -> str:
        return f"MultiplicativeNoise({self.noise!r})"

    def num_predicted(self, num_data: int) -> int:
        """Numbers that the forward map returns."""
        return num_predicted(self.noise, num_data)

    def check(self, y: Tensor) -> None:
        """Refuse data that are not positive; see `GaussianNoise.check`."""
        wrong = torch.nonzero(~(y > 0)).flatten().tolist()
        if wrong:
            raise InvalidInput(
                f"y is {float(y[wrong[0]]):.4g} at {wrong[:10]} ({len(wrong)} of {len(y)} data); under MultiplicativeNoise data "
                "are positive. Leave out what lies below the detection limit, or use additive noise."
            )
        self.noise.check(y.log())

    def at(self, index: Tensor) -> MultiplicativeNoise:
        """The noise of some of the data, `(batch,)`."""
        return MultiplicativeNoise(part_of(self.noise, index))

    def standardise(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Residuals of the logarithms, `(*batch, num_data)`; NaN where a prediction is not positive."""
        return self.noise.standardise(y.log(), self._logarithms(prediction, y.shape[-1]))

    def curvature_root(self, y: Tensor, prediction: Tensor) -> Tensor:
        """That of the noise of the logarithms, `(*batch, rows)`."""
        return curvature_root(self.noise, y.log(), self._logarithms(prediction, y.shape[-1]))

    def log_prob(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Log p(y | prediction), `(*batch,)`, replicated; minus infinity where a prediction is not positive."""
        possible = (prediction[..., : y.shape[-1]] > 0).all(-1)
        safe = torch.where(possible[..., None], prediction, torch.ones_like(prediction))
        density = self.noise.log_prob(y.log(), self._logarithms(safe, y.shape[-1])) - y.log().sum(-1)
        return torch.where(possible, density, torch.full_like(density, -torch.inf))

    def sample(self, prediction: Tensor) -> Tensor:
        """Noisy data around `prediction`, `(*batch, num_data)`, from torch's generator; see `GaussianNoise.sample`."""
        count = prediction.shape[-1] - (num_predicted(self.noise, 1) - 1)
        return self.noise.sample(self._logarithms(prediction, count)).exp()

    def _logarithms(self, prediction: Tensor, num_data: int) -> Tensor:
        """Logarithms of predicted data; what follows them, such as the logarithm of a scale, stays."""
        return torch.cat([prediction[..., :num_data].log(), prediction[..., num_data:]], dim=-1)


def part_of(noise: Noise, index: Tensor) -> Noise:
    """The noise of some of the data.

    Args:
        noise: Of all data.
        index: Which, `(batch,)`.

    Raises:
        InvalidInput: Where data are not independent under it.
    """
    at = getattr(noise, "at", None)
    if at is None:
        raise InvalidInput(f"{type(noise).__name__}: data are not independent, so that no part of them stands for the whole.")
    return at(index)  # type: ignore[no-any-return]
