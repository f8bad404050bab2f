"""Conditional normalizing flows: a network's features become a distribution over vectors that need not be normal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from fem_vi.arguments import instance
from fem_vi.errors import InvalidInput
from fem_vi.vi.optimizer import Adam
from fem_vi.vi.posterior.flow import Networks, starts_as_identity
from fem_vi.vi.posterior.heads import DiagonalHead, FullHead, Head
from fem_vi.vi.posterior.neural_spline import NeuralSpline
from fem_vi.vi.randomness import private_generator

MOMENT_SAMPLES = 2048
COUPLING = NeuralSpline(transforms=4, bins=8, hidden=(64, 64), passes=2)


class ConditionalFlow(Distribution):
    """The law of mu + S f(eps; c), eps ~ N(0, I): a flow f with context c inside the affine map of a normal distribution.

    Its `mean` and `variance` are those of 2,048 draws under a fixed key, and carry no gradient.

    Args:
        networks: The inverse of f.
        context: c, `(*batch, num_context)`.
        normal: N(mu, S S'), S diagonal or lower triangular.
        base: Mean and log standard deviation of eps, `(n,)` each, where they are not 0 and 0.

    MPI: Not collective.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch reads the attribute of the class
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, networks: Networks, context: Tensor, normal: Distribution, *, base: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self._networks, self._context, self._normal = networks, context, normal
        self._mu = normal.mean
        self._tril: Tensor | None = getattr(normal, "scale_tril", None)
        self._diagonal = normal.stddev if self._tril is None else self._tril.diagonal(dim1=-2, dim2=-1)
        # What a flow of zuko returns reads the module's parameters when it is called. Those of now are meant.
        self._parameters: dict[str, Tensor] = dict(networks.named_parameters())
        self._base = base
        self._moments: tuple[Tensor, Tensor] | None = None
        super().__init__(normal.batch_shape, normal.event_shape, validate_args=False)

    def __repr__(self) -> str:
        return f"ConditionalFlow(batch={tuple(self.batch_shape)}, n={self.event_shape[0]})"

    def with_base(self, mean: Tensor, log_std: Tensor) -> ConditionalFlow:
        """The same map of other noise, eps ~ N(mean, diag(std^2)); `(n,)` each."""
        return ConditionalFlow(self._networks, self._context, self._normal, base=(mean, log_std))

    def _map(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        given: tuple[Tensor, Tensor] = torch.func.functional_call(  # type: ignore[attr-defined]
            self._networks, self._parameters, (x,), {"inverse": inverse, "context": self._context}
        )
        return given

    @property
    def mean(self) -> Tensor:
        """Mean, `(*batch, n)`, estimated."""
        return self._sampled_moments()[0]

    @property
    def variance(self) -> Tensor:
        """Pointwise variance, `(*batch, n)`, estimated."""
        return self._sampled_moments()[1]

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # type: ignore[override] # noqa: B008
        """Draws, `(*sample_shape, *batch, n)`."""
        eps = torch.randn(self._extended_shape(sample_shape), dtype=self._mu.dtype)
        if self._base is not None:
            eps = self._base[0] + self._base[1].exp() * eps
        z = self._map(eps, inverse=True)[0]
        return self._mu + (self._diagonal * z if self._tril is None else (self._tril @ z[..., None])[..., 0])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, `(*batch,)`."""
        eps, ladj = self._map(self._standardise(value), inverse=False)
        constant = 0.5 * self.event_shape[0] * math.log(2.0 * math.pi)
        if self._base is not None:
            eps = (eps - self._base[0]) * (-self._base[1]).exp()
            ladj = ladj - self._base[1].sum(-1)
        return ladj - 0.5 * eps.square().sum(-1) - constant - self._diagonal.log().sum(-1)

    def _standardise(self, value: Tensor) -> Tensor:
        """S^-1 (value - mu)."""
        shifted = value - self._mu
        if self._tril is None:
            return shifted / self._diagonal
        tril = self._tril.expand(*shifted.shape[:-1], -1, -1)
        return torch.linalg.solve_triangular(tril, shifted[..., None], upper=False)[..., 0]

    @torch.no_grad()
    def _sampled_moments(self) -> tuple[Tensor, Tensor]:
        if self._moments is None:
            with private_generator(0):
                draws = self.rsample(torch.Size([MOMENT_SAMPLES]))
            self._moments = draws.mean(0), draws.var(0)
        return self._moments


class FlowHead(Head):
    """mu + S f(eps; c) with f a normalizing flow whose context c are the features: skewed, curved, with several modes.

    Starts as N(0, std^2 I): f as the identity. By default f is a coupling flow, where a draw costs as much as a density. A normal
    head that was trained before can be the affine map, so that the flow learns what is left:

        >>> head = partial(FlowHead, affine=lambda *sizes, std: trained.head)
        >>> model = AmortisedInversion(problem, trained.encoder, head=head)

    Args:
        num_features: Last axis of the features.
        size: Entries of the vectors.
        transform: Makes a flow of zuko over n unknowns with a context: `NeuralSpline()`, or
            `lambda n, context: zuko.flows.MAF(n, context)`.
        affine: Makes the head of mu and S: `FullHead`, of n (n + 3) / 2 numbers, or `DiagonalHead` for many unknowns.
        std: Standard deviation that it starts with.

    Attributes:
        affine: The head of mu and S.
        networks: The flow's networks, in float64.

    Raises:
        InvalidInput: Where `transform` makes no flow of zuko, or `affine` another head or one of other sizes.

    References:
        Papamakarios, Nalisnick, Rezende, Mohamed, Lakshminarayanan (2021), Normalizing flows for probabilistic modeling and
        inference.
        Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows.

    Example:
        >>> q = FlowHead(64, 16)(features)
    """

    refining = Adam(lr=0.01)

    def __init__(
        self,
        num_features: int,
        size: int,
        *,
        transform: Callable[[int, int], nn.Module] = COUPLING,
        affine: Callable[..., Head] = FullHead,
        std: float = 1.0,
    ) -> None:
        made = affine(num_features, size, std=std)
        instance("FlowHead: affine", made, DiagonalHead, FullHead)
        super().__init__(num_features, size, None, std=std)
        if (made.num_features, made.size) != (self.num_features, self.size):
            raise InvalidInput(
                f"FlowHead: affine made a head of {made.num_features} features and {made.size} entries; it must be of "
                f"{num_features} and {size}."
            )
        self.affine = made
        self.networks = Networks(starts_as_identity("FlowHead", transform(size, num_features)))

    def raw(self, features: Tensor) -> Tensor:
        """The features, and behind them the numbers of mu and S."""
        return torch.cat([features, self.affine.raw(features)], dim=-1)

    def hold_raw(self) -> None:
        """As of the head of mu and S."""
        self.affine.hold_raw()

    def at(self, raw: Tensor) -> ConditionalFlow:
        """The distribution that raw numbers describe."""
        context, affine = raw.split([self.num_features, raw.shape[-1] - self.num_features], dim=-1)
        return ConditionalFlow(self.networks, context, self.affine.at(affine))
