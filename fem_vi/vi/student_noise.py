"""Noise with outliers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fem_vi.arguments import positive
from fem_vi.vi.likelihood import check_count, check_last_axes, checked_scale


class StudentNoise:
    """Independent noise with outliers, y = prediction + scale * t(df), Student's t.

        log p = sum_i -((df + 1) / 2) log(1 + r_i^2 / df) + const,   r_i = (y_i - prediction_i) / scale_i

    A datum far from its prediction pulls with a force that falls as 1 / r, where normal noise pulls in proportion to r.

    Args:
        scale: Scale, in the unit of the data: one for all data, or `(num_data,)`. The standard deviation is scale
            times sqrt(df / (df - 2)).
        df: Degrees of freedom: 4 by default; 1 is Cauchy's distribution; large ones are normal.

    Attributes:
        scale: That scale.
        df: Those degrees of freedom.

    Raises:
        InvalidInput: Where one is not positive and finite.

    MPI: Not collective; every tensor is replicated.

    References:
        Lange, Little, Taylor (1989), Robust statistical modeling using the t distribution.

    Example:
        >>> problem = fem_vi.InverseProblem(prior, forward, fem_vi.StudentNoise(scale=0.01), y)
    """

    additive = True

    def __init__(self, scale: float | Tensor, df: float = 4.0) -> None:
        self.scale = checked_scale("scale", "StudentNoise", scale)
        self.df = positive("df", df)

    @property
    def scale_information(self) -> float:
        """Fisher information of the logarithm of the scale, of one datum."""
        return 2.0 * self.df / (self.df + 3.0)

    def __repr__(self) -> str:
        scale = f"{self.scale.item()!r}" if self.scale.ndim == 0 else f"{len(self.scale)} values"
        return f"StudentNoise(scale={scale}, df={self.df:g})"

    def check(self, y: Tensor) -> None:
        """Refuse data of another number; see `GaussianNoise.check`."""
        check_count("scale", self.scale, y)

    def at(self, index: Tensor) -> StudentNoise:
        """The noise of some of the data, `(batch,)`."""
        return self if self.scale.ndim == 0 else StudentNoise(self.scale[index], self.df)

    def standardise(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Residuals made normal, `(*batch, num_data)`: of mean zero and, to 2 %, of variance one under the model for df >= 2.

            z = sign(r) (8 df + 1) / (8 df + 3) sqrt(df log(1 + r^2 / df))

        The square of z is, but for a factor, minus the log density, as it should be for Gauss and Newton's method.

        References:
            Wallace (1959), Bounds on normal approximations to Student's and the chi-square distributions.
        """
        r = self._residual(y, prediction)
        square = r.square() / self.df
        small = square < 1e-4
        safe = torch.where(small, torch.ones_like(square), square)
        series = 1.0 - square / 2.0 + square.square() / 3.0 - square.pow(3) / 4.0
        ratio = torch.where(small, series, safe.log1p() / safe)
        return r * ratio.sqrt() * ((8.0 * self.df + 1.0) / (8.0 * self.df + 3.0))

    def log_prob(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Log p(y | prediction), `(*batch,)`, replicated."""
        r, df = self._residual(y, prediction), self.df
        constant = math.lgamma(0.5 * (df + 1.0)) - math.lgamma(0.5 * df) - 0.5 * math.log(df * math.pi)
        tails = -0.5 * (df + 1.0) * (r.square() / df).log1p().sum(-1)
        return tails + y.shape[-1] * constant - self.scale.log().expand(y.shape[-1:]).sum()

    def sample(self, prediction: Tensor) -> Tensor:
        """Noisy data around `prediction`, `(*batch, num_data)`, from torch's generator; see `GaussianNoise.sample`."""
        half = torch.full_like(prediction, 0.5 * self.df)
        precision = torch._standard_gamma(half) / half  # chi-square over df
        return prediction + self.scale * torch.randn_like(prediction) * precision.rsqrt()

    def _residual(self, y: Tensor, prediction: Tensor) -> Tensor:
        check_last_axes(y, prediction)
        self.check(y)
        return (y - prediction) / self.scale
