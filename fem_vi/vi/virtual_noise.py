"""The standard deviation eps of virtual data, r = 0 seen with noise N(0, eps^2): fixed, annealed, or learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fem_vi.arguments import positive, whole
from fem_vi.errors import InvalidInput

GAIN = 5.0  # log eps is so many times its parameter: it has further to go than weights of networks, by steps of one length


class VirtualNoise(nn.Module):
    """Eps as a part of a model; made by `FixedEps`, `AnnealedEps` or `LearnedEps`."""

    def log_eps(self) -> Tensor:
        """Log eps, scalar."""
        raise NotImplementedError

    def log_prior(self, num_residuals: int) -> Tensor:
        """Log density of eps, up to a constant, in the bound for one z; scalar."""
        return torch.zeros((), dtype=torch.float64)

    def advance(self) -> None:
        """Another evaluation of a bound, with gradients, has been made."""


class _Fixed(VirtualNoise):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(math.log(value), dtype=torch.float64))

    def log_eps(self) -> Tensor:
        return self.get_buffer("value")


class _Annealed(VirtualNoise):
    def __init__(self, given: AnnealedEps) -> None:
        super().__init__()
        self._given = given
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def log_eps(self) -> Tensor:
        share = (self.get_buffer("count").double() / self._given.steps).clamp(max=1.0)
        return (1.0 - share) * math.log(self._given.first) + share * math.log(self._given.last)

    def advance(self) -> None:
        self.get_buffer("count").add_(1)


class _Learned(VirtualNoise):
    def __init__(self, given: LearnedEps) -> None:
        super().__init__()
        self._floor = math.log(given.least)
        self.raw = nn.Parameter(torch.tensor((math.log(given.first) - self._floor) / GAIN, dtype=torch.float64))

    def log_eps(self) -> Tensor:
        # From the floor on upwards, and never quite there: log(least + what is learned).
        return torch.logaddexp(torch.tensor(self._floor, dtype=torch.float64), GAIN * self.raw + self._floor)

    def log_prior(self, num_residuals: int) -> Tensor:
        return -num_residuals * self.log_eps()


@dataclass(frozen=True)
class FixedEps:
    """One eps throughout.

    Attributes:
        value: In the unit of the residual.
    """

    value: float = 1e-2

    def __post_init__(self) -> None:
        positive("FixedEps: value", self.value)

    def create(self) -> VirtualNoise:
        """The part of a model."""
        return _Fixed(self.value)


@dataclass(frozen=True)
class AnnealedEps:
    """From a large eps, where networks learn fast, to a small one, where they learn precisely; geometric in the steps of a fit.

    Attributes:
        first: At the first step.
        last: After so many steps, and from there on.
        steps: Evaluations of the bound with gradients. The count is part of the model's state.
    """

    first: float = 1.0
    last: float = 1e-3
    steps: int = 1000

    def __post_init__(self) -> None:
        if positive("AnnealedEps: first", self.first) < positive("AnnealedEps: last", self.last):
            raise InvalidInput(f"AnnealedEps: first is {self.first}, last {self.last}; eps goes down. Swap them.")
        whole("AnnealedEps: steps", self.steps, least=1)

    def create(self) -> VirtualNoise:
        """The part of a model."""
        return _Annealed(self)


@dataclass(frozen=True)
class LearnedEps:
    """Eps is fitted with the networks, under the scale prior p(eps) = eps^-n for n residuals.

    With a flat p(u) the evidence of r = 0 does not depend on eps, so that data say nothing about it: without a prior it would
    grow without bound, to hide the errors of the networks. With this one the bound is largest, for a linear PDE and a normal
    q(u | z) that has its optimal covariance, where eps^2 is the mean square of the residual at q's mean: where the bands of q are
    as wide as the errors that the network makes.

    Attributes:
        first: Where it starts.
        least: It stays above: a network without errors would take eps to zero.
    """

    first: float = 0.1
    least: float = 1e-6

    def __post_init__(self) -> None:
        if positive("LearnedEps: first", self.first) <= positive("LearnedEps: least", self.least):
            raise InvalidInput(f"LearnedEps: first is {self.first}; it must lie above least, {self.least}.")

    def create(self) -> VirtualNoise:
        """The part of a model."""
        return _Learned(self)


Eps = FixedEps | AnnealedEps | LearnedEps
