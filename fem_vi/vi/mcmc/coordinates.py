"""Coordinates in which the density to be sampled is as close to a standard normal as is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from fem_vi.errors import InvalidInput
from fem_vi.vi.posterior.scale import Scale
from fem_vi.vi.posterior.whitened import WhitenedNormal
from fem_vi.vi.prior import FieldPrior


@dataclass(frozen=True)
class Layer:
    """An affine map, z = centre + scale.apply(x).

    Attributes:
        centre: `(n_owned,)`.
        scale: Invertible.
    """

    centre: Tensor
    scale: Scale


@dataclass(frozen=True)
class Coordinates:
    """x with m = unwhiten(xi), xi an affine function of x by layers, the outermost first.

    Where x ~ N(0, I), xi has the law of a *reference*: the prior (no layer), a normal posterior such as a Laplace approximation
    (one layer), and on top of it what a warm-up has learned.

    Attributes:
        prior: Prior of m.
        layers: xi = layers[0](layers[1](... x)).
    """

    prior: FieldPrior
    layers: tuple[Layer, ...] = ()

    @staticmethod
    def of(prior: FieldPrior, reference: nn.Module | WhitenedNormal | None) -> Coordinates:
        """The coordinates in which a reference is standard normal.

        Args:
            prior: Prior of m.
            reference: None for the prior, or a normal posterior relative to it.

        Raises:
            InvalidInput: Where it is something else.

        MPI: Collective.
        """
        if reference is None:
            return Coordinates(prior)
        with torch.no_grad():
            q: Any = reference() if isinstance(reference, nn.Module) else reference
        if not isinstance(q, WhitenedNormal):
            raise InvalidInput(
                f"reference is of {type(q).__name__}; it must be a normal posterior relative to the prior, such as a fitted "
                "FullRankNormal or LowRankNormal. To begin at draws of another family, pass it as start."
            )
        if q.prior is not prior:
            raise InvalidInput(f"reference is relative to {q.prior!r}; it must be made with the problem's prior, {prior!r}.")
        return Coordinates(prior, (Layer(q.mu.detach(), q.scale),))

    def whitened(self, x: Tensor) -> Tensor:
        """Whitened unknowns xi, `(*batch, n_owned)`; differentiable. Collective."""
        for layer in reversed(self.layers):
            x = layer.centre + layer.scale.apply(x)
        return x

    def of_whitened(self, xi: Tensor) -> Tensor:
        """The inverse of `whitened`. Collective."""
        for layer in self.layers:
            xi = layer.scale.solve(xi - layer.centre)
        return xi

    def logdet(self) -> Tensor:
        """Log |det dxi/dx|, scalar, replicated. Collective."""
        total = torch.zeros((), dtype=torch.float64)
        for layer in self.layers:
            total = total + layer.scale.logdet().detach()
        return total


def starting_points(prior: FieldPrior, start: nn.Module | Distribution | Tensor, total: int) -> Tensor:
    """Whitened unknowns to begin at, `(total, n_owned)`.

    Args:
        prior: Prior of m.
        start: Where: m, `(total, n_owned)`; or a posterior to draw from.
        total: Chains.

    Raises:
        InvalidInput: For another shape or type.

    MPI: Collective.
    """
    if isinstance(start, Tensor):
        if start.shape != (total, *prior.event_shape):
            raise InvalidInput(
                f"start has shape {tuple(start.shape)}; for {total} chains it must be {(total, *prior.event_shape)}: m of each."
            )
        return prior.whiten(start.detach().to(torch.float64))
    q: Any = start() if isinstance(start, nn.Module) else start
    if not isinstance(q, Distribution):
        raise InvalidInput(f"start is of {type(start).__name__}; it must be a tensor, a distribution, or a posterior's module.")
    rsample_whitened = getattr(q, "rsample_whitened", None)
    if rsample_whitened is not None and getattr(q, "prior", None) is prior:
        return rsample_whitened(torch.Size([total])).detach()  # type: ignore[no-any-return]
    return prior.whiten(q.sample(torch.Size([total])))
