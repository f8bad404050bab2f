"""Coordinates in which the density to be sampled is as close to a standard normal as is known beforehand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class Transport(Protocol):
    """A distribution of xi that is white noise seen through an invertible map: that of a `Flow`."""

    @property
    def prior(self) -> FieldPrior:
        """The prior it is relative to."""

    def push_weighed(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """xi, and log q - log p there, `(*batch,)`, replicated; both differentiable."""

    def pull(self, xi: Tensor) -> Tensor:
        """The inverse of the map."""


@dataclass(frozen=True)
class Coordinates:
    """x with m = unwhiten(xi), xi = f(z), z an affine function of x by layers, the outermost first.

    Where x ~ N(0, I), xi has the law of a *reference*: the prior (no layer), a normal posterior such as a Laplace approximation
    (one layer), a flow (f), and on top of it what a warm-up has learned.

    Attributes:
        prior: Prior of m.
        layers: z = layers[0](layers[1](... x)).
        transport: Has f; None for the identity.

    References:
        Hoffman, Sountsov, Dillon, Langmore, Tran, Vasudevan (2019), NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using
        neural transport.
    """

    prior: FieldPrior
    layers: tuple[Layer, ...] = ()
    transport: Transport | None = None

    @staticmethod
    def of(prior: FieldPrior, reference: nn.Module | Distribution | None) -> Coordinates:
        """The coordinates in which a reference is standard normal.

        Args:
            prior: Prior of m.
            reference: None for the prior, or a normal posterior or a flow relative to it; of a module the present parameters are
                meant.

        Raises:
            InvalidInput: Where it is something else.

        MPI: Collective.
        """
        if reference is None:
            return Coordinates(prior)
        with torch.no_grad():
            q: Any = copy.deepcopy(reference).requires_grad_(False)() if isinstance(reference, nn.Module) else reference
        if not isinstance(q, WhitenedNormal | Transport):
            raise InvalidInput(
                f"reference is of {type(q).__name__}; it must be a normal posterior relative to the prior, such as a fitted "
                "FullRankNormal or LowRankNormal, or a Flow. To begin at draws of another family, pass it as start."
            )
        if q.prior is not prior:
            raise InvalidInput(f"reference is relative to {q.prior!r}; it must be made with the problem's prior, {prior!r}.")
        if isinstance(q, WhitenedNormal):
            return Coordinates(prior, (Layer(q.mu.detach(), q.scale),))
        return Coordinates(prior, transport=q)

    def whitened(self, x: Tensor) -> Tensor:
        """Whitened unknowns xi, `(*batch, n_owned)`; differentiable. Collective."""
        return self.weighed(x)[0]

    def weighed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened unknowns xi, `(*batch, n_owned)`, and log |det dxi/dx|, `(*batch,)` or scalar; differentiable. Collective."""
        logdet = torch.zeros((), dtype=torch.float64)
        for layer in reversed(self.layers):
            x = layer.centre + layer.scale.apply(x)
            logdet = logdet + layer.scale.logdet().detach()
        if self.transport is None:
            return x, logdet
        xi, log_ratio = self.transport.push_weighed(x)  # log_ratio = log N(x) - log |det dxi/dx| - log N(xi)
        return xi, logdet - log_ratio + self.prior.all_sum(0.5 * (xi.square() - x.square()).sum(-1))

    def of_whitened(self, xi: Tensor) -> Tensor:
        """The inverse of `whitened`. Collective."""
        if self.transport is not None:
            with torch.no_grad():
                xi = self.transport.pull(xi)
        for layer in self.layers:
            xi = layer.scale.solve(xi - layer.centre)
        return xi


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
