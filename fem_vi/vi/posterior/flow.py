"""Normalizing flows over a handful of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fem_vi.arguments import instance
from fem_vi.errors import InvalidInput
from fem_vi.parallel import all_values, raise_on_all, shared_seed
from fem_vi.vi.optimizer import Adam
from fem_vi.vi.posterior.flow_path import ForwardPath, follows
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.neural_spline import NeuralSpline, import_zuko
from fem_vi.vi.posterior.sampled import SampledDistribution
from fem_vi.vi.posterior.scale import Scale
from fem_vi.vi.posterior.whitened_family import FamilyOverPrior, WhitenedFamily
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.randomness import private_generator
from fem_vi.vi.start import Linearisation


@dataclass(frozen=True)
class FastSampling:
    """The networks map noise to samples: a draw and its density cost one pass (an inverse autoregressive flow).

    The density of a point that the flow did not draw costs a pass for each unknown. `PathDerivative` does without: along the
    map of autoregressive layers the slope of log q comes with the draw, for as much again as a draw and its gradient cost.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling (2016), Improved variational inference with inverse autoregressive
        flow.
    """


@dataclass(frozen=True)
class FastDensity:
    """The networks map samples to noise: the density of any point costs one pass (a masked autoregressive flow).

    A draw costs a pass for each unknown; of a coupling flow, both cost one. For `ForwardKL`, and for `PathDerivative`.

    References:
        Papamakarios, Pavlakou, Murray (2017), Masked autoregressive flow for density estimation.
    """


@dataclass(frozen=True)
class Affine:
    """xi = mu + S (shift + exp(log_scale) z).

    Attributes:
        mu: `(n,)`.
        scale: S.
        shift: `(n,)`.
        log_scale: `(n,)`.
    """

    mu: Tensor
    scale: Scale
    shift: Tensor
    log_scale: Tensor

    def moved(self, z: Tensor) -> Tensor:
        """Shift + exp(log_scale) z, `(*batch, n)`."""
        return self.shift + self.log_scale.exp() * z

    def apply(self, z: Tensor) -> Tensor:
        """Xi, `(*batch, n)`."""
        return self.mu + self.scale.apply(self.moved(z))

    def invert(self, xi: Tensor) -> Tensor:
        """Z, `(*batch, n)`."""
        return (self.scale.solve(xi - self.mu) - self.shift) * (-self.log_scale).exp()

    def logdet(self) -> Tensor:
        """Log |det d xi / d z|, scalar."""
        return self.scale.logdet() + self.log_scale.sum()


class Networks(nn.Module):
    """The map of a flow of zuko and its inverse.

    Args:
        flow: The flow; its base distribution is not used.
    """

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.transform = flow.transform

    def forward(self, x: Tensor, *, inverse: bool, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """T(x) or T^-1(x), `(*batch, n)`, and the log determinant of its derivative, `(*batch,)`; in a context, if any."""
        transform = self.transform(context)
        value, ladj = (transform.inv if inverse else transform).call_and_ladj(x)
        return value, ladj


class FlowDistribution(SampledDistribution):
    """The law of m = unwhiten(xi), xi = affine(f(eps)), eps ~ N(0, I).

    Args:
        prior: The prior it is relative to.
        affine: The last map.
        networks: f or its inverse.
        direction: Which of the two.

    Attributes:
        weighs_cheaply: Whether the density of a given point costs no more than that of a draw.
    """

    def __init__(self, prior: FieldPrior, affine: Affine, networks: Networks, direction: FastSampling | FastDensity) -> None:
        super().__init__(prior)
        self._affine, self._networks = affine, networks
        # What a flow of zuko returns reads the module's parameters when it is called. Those of now are meant.
        self._parameters: dict[str, Tensor] = dict(networks.named_parameters())
        self._samples_forward = isinstance(direction, FastSampling)
        self.weighs_cheaply = not self._samples_forward

    def _map(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        given: tuple[Tensor, Tensor] = torch.func.functional_call(  # type: ignore[attr-defined]
            self._networks, self._parameters, (x,), {"inverse": inverse}
        )
        return given

    def push(self, eps: Tensor) -> Tensor:
        """What becomes of white noise, `(*batch, n)`."""
        return self._affine.apply(self._map(eps, inverse=not self._samples_forward)[0])

    def push_weighed(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """What becomes of white noise, and log q - log p there: differentiable through the point and through the density."""
        z, ladj = self._map(eps, inverse=not self._samples_forward)
        xi = self._affine.apply(z)
        return xi, 0.5 * (xi.square().sum(-1) - eps.square().sum(-1)) - ladj - self._affine.logdet()

    @property
    def has_path(self) -> bool:
        """Whether `push_on_path` is to be had."""
        return self._samples_forward and follows(self._networks.transform)

    def push_on_path(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """As `push_weighed`, with the density held constant: differentiable through the point alone. `(count, n)`."""
        z, log_q, slope = torch.func.functional_call(ForwardPath(self._networks.transform), self._parameters, (eps,))  # type: ignore[attr-defined]
        moved = self._affine.moved(z)
        xi = self._affine.mu + self._affine.scale.apply(moved)
        value = log_q - self._affine.logdet() + 0.5 * xi.square().sum(-1)
        # A change of xi = mu + S u changes log q by <S^-T exp(-b) g, dxi> = <exp(-b) g, du>, and log p by -<xi, dxi>.
        along = (slope * (-self._affine.log_scale.detach()).exp() * moved).sum(-1) + 0.5 * xi.square().sum(-1)
        return xi, value.detach() + along - along.detach()

    def pull(self, xi: Tensor) -> Tensor:
        """The white noise that becomes xi, `(*batch, n)`."""
        return self._map(self._affine.invert(xi), inverse=self._samples_forward)[0]

    def rsample_whitened(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Draws of xi, `(*sample_shape, n)`."""
        return self.push(self.prior.white_noise(sample_shape))

    def log_ratio(self, xi: Tensor) -> Tensor:
        """Log q(m) - log p(m) at m = unwhiten(xi), `(*batch,)`."""
        eps, ladj = self._map(self._affine.invert(xi), inverse=self._samples_forward)
        return 0.5 * (xi.square().sum(-1) - eps.square().sum(-1)) + ladj - self._affine.logdet()


class Flow(FamilyOverPrior):
    """q(m): m = unwhiten(xi), xi = mu + S (a + exp(b) f(eps)) with f a normalizing flow, mu and S of a normal family.

    f starts as the identity, a and b at zero: the flow starts as that normal family, in `fit` as the linearised posterior.
    There the family stays, and f, a and b are fitted, in units of its standard deviations. The flow bends what is normal: skewed,
    curved and heavy-tailed posteriors, several modes with some bridge of mass between them.

    Args:
        prior: Prior of m; its unknowns must be replicated (`GaussianVector`, not a field).
        transform: Makes a flow of zuko over n unknowns: `NeuralSpline()`, `AffineSpline()`, `zuko.flows.MAF`, or
            `partial(zuko.flows.NICE, transforms=6)` for example.
        affine: The normal family of mu and S, of which a copy is taken; `FullRankNormal(prior)` where None.
        direction: `FastSampling()` or `FastDensity()`.

    Attributes:
        affine: That family; its parameters are not fitted.
        shift, log_scale: a and b, `(n,)`.
        networks: The flow's networks, in float64; their parameters are replicated.
        fields: Names of the parameters that are field tensors: none.

    Raises:
        InvalidInput: Where the unknowns are spread over ranks, `transform` makes no flow of zuko, or `affine` is of another
            prior.

    MPI: Collective when built: all ranks take rank 0's first parameters.

    References:
        Papamakarios, Nalisnick, Rezende, Mohamed, Lakshminarayanan (2021), Normalizing flows for probabilistic modeling and
        inference.

    Example:
        >>> posterior = Flow(prior, affine=laplace(problem))
        >>> run = fit(problem, posterior, ELBO(samples=32), steps=2000)
    """

    fields: tuple[str, ...] = ()

    def __init__(
        self,
        prior: FieldPrior,
        transform: Callable[[int], nn.Module] = NeuralSpline(),  # noqa: B008 - frozen
        *,
        affine: WhitenedFamily | None = None,
        direction: FastSampling | FastDensity = FastSampling(),
    ) -> None:
        super().__init__(prior)
        check_replicated("Flow", prior)
        with raise_on_all(prior.comm):
            instance("transform", transform, Callable)  # type: ignore[arg-type]
            instance("direction", direction, FastSampling, FastDensity)
            if affine is not None:
                instance("affine", affine, WhitenedFamily)
                if affine.prior is not prior:
                    raise InvalidInput("Flow: affine is a family over another prior; it must be over the flow's own.")
        self.affine = FullRankNormal(prior) if affine is None else copy.deepcopy(affine)
        self.affine.requires_grad_(False)
        self.shift = nn.Parameter(torch.zeros(prior.num_global, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(prior.num_global, dtype=torch.float64))
        self.direction = direction
        with private_generator(shared_seed(prior.comm, int(torch.randint(2**62, ())))):
            self.networks = Networks(starts_as_identity("Flow", transform(prior.num_global)))

    def __call__(self) -> FlowDistribution:
        """The distribution at the present parameters."""
        return super().__call__()  # type: ignore[no-any-return]

    def forward(self) -> FlowDistribution:
        """The distribution at the present parameters."""
        normal = self.affine()
        affine = Affine(normal.mu, normal.scale, self.shift, self.log_scale)
        return FlowDistribution(self.prior, affine, self.networks, self.direction)

    def start_at(self, linearisation: Linearisation) -> None:
        """Let the affine map take a linearised posterior."""
        self.affine.start_at(linearisation)

    def is_fresh(self) -> bool:
        """Whether it is still centred at the prior mean."""
        return self.affine.is_fresh() and not bool(self.shift.detach().any())

    def default_optimizer(self) -> Adam:
        """Adam with a step for networks, and for shifts in units of standard deviations."""
        return Adam(lr=3e-3)


def starts_as_identity(name: str, flow: nn.Module) -> nn.Module:
    """A flow, in float64, with the last layers of its networks at zero, where splines, shifts and scales are the identity.

    Args:
        name: Who asks.
        flow: What was made for it.

    Raises:
        InvalidInput: Where that is no flow of zuko.
    """
    zuko = import_zuko()
    if not isinstance(flow, zuko.flows.Flow):
        raise InvalidInput(
            f"{name}: transform made a {type(flow).__name__}; it must make a flow of zuko, such as zuko.flows.NSF."
        )
    kinds = (zuko.flows.MaskedAutoregressiveTransform, zuko.flows.GeneralCouplingTransform)
    for layer in flow.modules():
        if isinstance(layer, kinds) and isinstance(getattr(layer, "hyper", None), nn.Sequential):
            last = layer.hyper[-1]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
    return flow.double()


def check_replicated(name: str, prior: FieldPrior) -> None:
    """Refuse unknowns that are spread over ranks.

    Raises:
        InvalidInput: On all ranks.

    MPI: Collective.
    """
    owned = all_values(prior.comm, int(prior.event_shape[0]))
    if any(size != prior.num_global for size in owned):
        raise InvalidInput(
            f"{name} takes replicated unknowns (GaussianVector); {type(prior).__name__} spreads {prior.num_global} over "
            f"{prior.comm.size} ranks. For a field use LowRankNormal, or a flow over the coefficients of a few modes."
        )
