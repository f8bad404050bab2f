"""Fields that are not normal, made of fields that are: positive, bounded, and of a few phases, point by point.

An inverse problem is stated for the normal field, with the transform at the beginning of its forward map:

    InverseProblem(prior, lambda m: observe(solve(transform(m))), likelihood, y)

Its posterior is then relative to a normal prior, and `TransformedField(posterior(), transform)` is the law of the field itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from fem_vi.arguments import instance, is_number, positive
from fem_vi.errors import InvalidInput
from fem_vi.vi.posterior.sampled import SampledDistribution, sampled_moments
from fem_vi.vi.randomness import private_generator

QUADRATURE = 64
"""Points of Gauss and Hermite for moments."""
MEDIAN_SAMPLES = 1024


class PointwiseTransform(Protocol):
    """An increasing function of each value, with its inverse and the logarithm of its slope."""

    def __call__(self, m: Tensor) -> Tensor:
        """The values of the field, shape of `m`."""

    def inverse(self, x: Tensor) -> Tensor:
        """The normal values, shape of `x`."""

    def log_slope(self, m: Tensor) -> Tensor:
        """Logarithm of the derivative at `m`, its shape."""


@dataclass(frozen=True)
class Positive:
    """x = scale exp(m): log-normal where m is normal.

    Attributes:
        scale: Unit of the field; its median where m has median zero.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive("Positive: scale", self.scale)

    def __call__(self, m: Tensor) -> Tensor:
        """The values of the field, shape of `m`."""
        return self.scale * m.exp()

    def inverse(self, x: Tensor) -> Tensor:
        """The normal values, shape of `x`."""
        return (x / self.scale).log()

    def log_slope(self, m: Tensor) -> Tensor:
        """Logarithm of the derivative at `m`, its shape."""
        return m + float(np.log(self.scale))


@dataclass(frozen=True)
class Bounded:
    """x = low + (high - low) / (1 + exp(-m)).

    A normal m of variance (pi / sqrt(3))^2, about 1.8^2, is close to a uniform x; less keeps to the middle, more to the ends.

    Attributes:
        low: Lower bound, unit of the field.
        high: Upper bound.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (is_number(self.low) and is_number(self.high) and self.low < self.high):
            raise InvalidInput(f"Bounded: low is {self.low!r} and high {self.high!r}; they must be numbers, low below high.")

    def __call__(self, m: Tensor) -> Tensor:
        """The values of the field, shape of `m`."""
        return self.low + (self.high - self.low) * torch.sigmoid(m)

    def inverse(self, x: Tensor) -> Tensor:
        """The normal values, shape of `x`."""
        return torch.logit((x - self.low) / (self.high - self.low))

    def log_slope(self, m: Tensor) -> Tensor:
        """Logarithm of the derivative at `m`, its shape."""
        sigmoid = torch.nn.functional.logsigmoid
        return float(np.log(self.high - self.low)) + sigmoid(m) + sigmoid(-m)


@dataclass(frozen=True)
class LevelSet:
    """A field of phases: values[k] where a normal field lies between thresholds[k - 1] and thresholds[k]; smooth in between.

        x = values[0] + sum_k (values[k + 1] - values[k]) / (1 + exp(-(m - thresholds[k]) / width))

    Phases and interfaces are found together, whatever their number and topology. The transition has a width of about
    4 width / |grad m|; it should span a cell or two, so that gradients know of interfaces between the nodes. The law of x has no
    useful density, and none is given.

    Attributes:
        values: Of each phase, one more than thresholds.
        thresholds: Ascending.
        width: Of the transition, unit of the normal field.

    References:
        Iglesias, Lu, Stuart (2016), A Bayesian level set method for geometric inverse problems.
    """

    values: tuple[float, ...]
    thresholds: tuple[float, ...] = (0.0,)
    width: float = 0.1

    def __post_init__(self) -> None:
        positive("LevelSet: width", self.width)
        for name, given in (("values", self.values), ("thresholds", self.thresholds)):
            instance(f"LevelSet: {name}", given, tuple, list)
        if len(self.values) != len(self.thresholds) + 1 or not all(map(is_number, (*self.values, *self.thresholds))):
            raise InvalidInput(
                f"LevelSet: values are {self.values} and thresholds {self.thresholds}; they must be numbers, one value more."
            )
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise InvalidInput(f"LevelSet: thresholds are {self.thresholds}; they must ascend.")

    def __call__(self, m: Tensor) -> Tensor:
        """The values of the field, shape of `m`."""
        jumps = np.diff(self.values)
        parts = [
            float(jump) * torch.sigmoid((m - threshold) / self.width)
            for jump, threshold in zip(jumps, self.thresholds, strict=True)
        ]
        return self.values[0] + sum(parts, torch.zeros_like(m))


class TransformedField(Distribution):
    """The law of x = transform(m) for a field m with normal values: a prior, or what a posterior family gives.

        log p(x) = log p(m) - sum_i log transform'(m_i),      m = transform^-1(x)

    Args:
        base: The law of m: `MaternField`, `GaussianVector`, or `posterior()` of a family.
        transform: `Positive()` or `Bounded(low, high)`.

    Raises:
        InvalidInput: Where an argument is of the wrong type.

    MPI: Every method is collective, like those of `base`.

    Example:
        >>> permeability = TransformedField(run.posterior(), Positive())
        >>> permeability.mean, permeability.rsample((8,))
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, base: Distribution, transform: PointwiseTransform) -> None:
        instance("TransformedField: base", base, Distribution)
        if isinstance(transform, type) or not hasattr(transform, "log_slope"):
            raise InvalidInput(f"TransformedField: transform is {transform!r:.80}; it must be Positive() or Bounded(low, high).")
        owner = base if hasattr(base, "all_sum") else getattr(base, "prior", None)
        if not hasattr(owner, "all_sum"):
            raise InvalidInput(
                f"TransformedField: base is {base!r:.80}; it must be a prior of fem_vi or posterior() of a family."
            )
        self.base, self.transform = base, transform
        self._all_sum: Callable[[Tensor], Tensor] = owner.all_sum  # type: ignore[union-attr]
        super().__init__(event_shape=base.event_shape, validate_args=False)

    def __repr__(self) -> str:
        return f"TransformedField({self.base!r}, {self.transform!r})"

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Draws of x, `(*sample_shape, n_owned)`."""
        return self.transform(self.base.rsample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Global log density of x with respect to its coefficients, `(*batch,)`, replicated; NaN outside the range."""
        m = self.transform.inverse(value)
        return self.base.log_prob(m) - self._all_sum(self.transform.log_slope(m).sum(-1))

    @property
    def mean(self) -> Tensor:
        """Pointwise mean of x, `(n_owned,)`: closed for `Positive`, else by Gauss-Hermite quadrature with 64 points.

        Where the law of m is not normal, as of a `Flow` or `Mixture`, from 4,096 draws under a fixed key, without gradient.
        """
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """Pointwise variance of x, `(n_owned,)`; see `mean`."""
        return self._moments()[1]

    @property
    def median(self) -> Tensor:
        """Pointwise median of x, `(n_owned,)`; of 1,024 draws under a fixed key where the law of m is not normal."""
        if not isinstance(self.base, SampledDistribution):
            return self.transform(self.base.mean)
        with private_generator(0), torch.no_grad():
            return self.transform(torch.quantile(self.base.rsample(torch.Size([MEDIAN_SAMPLES])), 0.5, dim=0))

    def _moments(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.base, SampledDistribution):
            return sampled_moments(self.rsample, self.transform(self.base.prior.mean))
        mean, variance = self.base.mean, self.base.variance
        if isinstance(self.transform, Positive):
            first = self.transform(mean + 0.5 * variance)
            return first, first.square() * variance.expm1()
        nodes, weights = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(QUADRATURE))
        weights = (weights / weights.sum())[:, None]
        x = self.transform(mean + variance.sqrt() * nodes[:, None])
        first = (weights * x).sum(0)
        return first, (weights * (x - first).square()).sum(0)
