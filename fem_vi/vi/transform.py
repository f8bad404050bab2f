"""Parameters that are not normal, made of numbers that are.

Priors here are normal, so that posteriors can be relative to them. A positive or bounded parameter enters as a function of a
standard normal number, inside the forward map: its prior is then the law of that function, exactly, and nothing else changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import gammainccinv, gammaincinv
from torch import Tensor

from fem_vi.arguments import is_number, positive
from fem_vi.errors import InvalidInput


@dataclass(frozen=True)
class LogNormalPrior:
    """A positive parameter: within `median / factor` to `median * factor` with probability 68 %.

        x(xi) = median * factor^xi,   xi ~ N(0, 1)

    Attributes:
        median: Unit of the parameter.
        factor: Above one.

    Example:
        >>> conductivity = LogNormalPrior(median=2.0, factor=1.5)
        >>> solve(conductivity(m[..., 0]))
    """

    median: float
    factor: float

    def __post_init__(self) -> None:
        positive("LogNormalPrior: median", self.median)
        if positive("LogNormalPrior: factor", self.factor) <= 1.0:
            raise InvalidInput(
                f"LogNormalPrior: factor is {self.factor}; it must be above 1: a factor of 1.5 is plus or minus 50 %."
            )

    def __call__(self, xi: Tensor) -> Tensor:
        """The parameter, shape of `xi`; differentiable."""
        return self.median * (math.log(self.factor) * xi).exp()

    def inverse(self, x: Tensor) -> Tensor:
        """The standard normal number, shape of `x`."""
        return (x / self.median).log() / math.log(self.factor)


@dataclass(frozen=True)
class UniformPrior:
    """A parameter between two bounds, uniform.

        x(xi) = low + (high - low) Phi(xi),   xi ~ N(0, 1)

    Attributes:
        low, high: Bounds, unit of the parameter.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (is_number(self.low) and is_number(self.high) and self.low < self.high):
            raise InvalidInput(f"UniformPrior: low is {self.low!r} and high {self.high!r}; they must be numbers, low below high.")

    def __call__(self, xi: Tensor) -> Tensor:
        """The parameter, shape of `xi`; differentiable."""
        return self.low + (self.high - self.low) * torch.special.ndtr(xi)

    def inverse(self, x: Tensor) -> Tensor:
        """The standard normal number, shape of `x`."""
        return torch.special.ndtri((x - self.low) / (self.high - self.low))


@dataclass(frozen=True)
class GammaPrior:
    """A positive parameter of Gamma distribution, such as the precision of noise.

        x(xi) = F^-1(Phi(xi)),   F(x) = P(shape, rate x),   xi ~ N(0, 1),   dx/dxi = phi(xi) / F'(x)

    Attributes:
        shape: Positive; the mean is shape / rate.
        rate: Positive, inverse unit of the parameter.
    """

    shape: float
    rate: float

    def __post_init__(self) -> None:
        positive("GammaPrior: shape", self.shape)
        positive("GammaPrior: rate", self.rate)

    def __call__(self, xi: Tensor) -> Tensor:
        """The parameter, shape of `xi`; twice differentiable."""
        return _GammaQuantile.apply(xi, self.shape) / self.rate  # type: ignore[no-any-return]


class _GammaQuantile(torch.autograd.Function):
    """The standard Gamma number at the probability of a standard normal one; each tail from its own side."""

    @staticmethod
    def forward(xi: Tensor, shape: float) -> Tensor:
        values = xi.detach().to(torch.float64)
        low = gammaincinv(shape, torch.special.ndtr(values).numpy())
        high = gammainccinv(shape, torch.special.ndtr(-values).numpy())
        return torch.where(values < 0.0, torch.as_tensor(low), torch.as_tensor(high))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.shape = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        xi, x = ctx.saved_tensors
        log_density = (ctx.shape - 1.0) * x.log() - x - math.lgamma(ctx.shape)
        return grad[0] * (-0.5 * xi.square() - 0.5 * math.log(2.0 * math.pi) - log_density).exp(), None
