"""One network for the posteriors of all data: q(m | y)."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from fem_vi.arguments import described, instance
from fem_vi.bridge.layout import all_sum
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all, shared_seed
from fem_vi.vi.encoder.encoder import Encoder
from fem_vi.vi.optimizer import Adam
from fem_vi.vi.posterior.frame import NORMAL, Frame, of_other_noise, scale_tril
from fem_vi.vi.posterior.heads import FullHead, Head
from fem_vi.vi.posterior.whitened_family import FamilyOverPrior
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.randomness import private_generator
from fem_vi.vi.sensors import AllSensors, Sensors

EXACT_SIZE = 512
VARIANCE_SAMPLES = 2048


class AmortisedDistribution(Distribution):
    """The laws of m = mean_p + C0^(1/2) xi with xi ~ q(xi | y), one for each data set of a batch.

    Args:
        prior: The prior it is relative to.
        whitened: q(xi | y), over all unknowns, in the prior's partition-independent order; replicated.

    MPI: Every method is collective. Samples are field tensors, densities replicated.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch reads the attribute of the class
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, prior: FieldPrior, whitened: Distribution) -> None:
        self.prior = prior
        self.whitened = whitened
        super().__init__(whitened.batch_shape, prior.event_shape, validate_args=False)

    def __repr__(self) -> str:
        return (
            f"AmortisedDistribution({type(self.whitened).__name__}, batch={tuple(self.batch_shape)}, n={self.prior.num_global})"
        )

    @property
    def mean(self) -> Tensor:
        """Mean of m, `(*batch, n_owned)`."""
        return self.prior.unwhiten(self.prior.scatter(self.whitened.mean))

    @property
    def variance(self) -> Tensor:
        """Pointwise variance of m, `(*batch, n_owned)`.

        Exact for normal distributions over at most 512 unknowns; otherwise that of 2,048 draws under a fixed key, to 3 %.
        """
        if self.prior.num_global > EXACT_SIZE or not isinstance(self.whitened, NORMAL):
            return self._sampled_variance()
        root = scale_tril(self.whitened).movedim(-1, 0)  # columns of S
        return (self.prior.unwhiten(self.prior.scatter(root)) - self.prior.mean).square().sum(0)

    @torch.no_grad()
    def _sampled_variance(self) -> Tensor:
        with private_generator(0):
            return self.rsample(torch.Size([VARIANCE_SAMPLES])).var(0)

    def rsample_whitened(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Draws of xi, `(*sample_shape, *batch, n_owned)`."""
        with private_generator(shared_seed(self.prior.comm, int(torch.randint(2**31, ())))):
            xi = self.whitened.rsample(torch.Size(sample_shape))
        return self.prior.scatter(xi)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # type: ignore[override] # noqa: B008
        """Draws of m, `(*sample_shape, *batch, n_owned)`."""
        return self.prior.unwhiten(self.rsample_whitened(sample_shape))

    def log_ratio(self, xi: Tensor) -> Tensor:
        """Log q(m | y) - log p(m) at m = unwhiten(xi), `(*sample_shape, *batch)`, replicated."""
        whole = self.prior.gather(xi)
        constant = 0.5 * self.prior.num_global * math.log(2.0 * math.pi)
        return self.whitened.log_prob(whole) + 0.5 * whole.square().sum(-1) + constant

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q(m | y), `(*sample_shape, *batch)`, replicated."""
        return self.log_ratio(self.prior.whiten(value)) + self.prior.log_prob(value)


class Amortised(FamilyOverPrior):
    """q(m | y): m = unwhiten(xi), xi ~ head(encoder(y)), in the encoder's frame.

    `posterior(y)` is a distribution. It is fitted to many data sets at once.

    Starts as the prior, whatever the data; with a `KalmanEncoder` as the linear posterior.

    Args:
        prior: Prior of m. The network is replicated; a field's unknowns are cut out of what it returns.
        encoder: Makes features of data: `DenseEncoder(num_data)`, `SetEncoder(dim)`, `GraphEncoder(...)`.
        head: Makes the head of features and unknowns: `FullHead`, `DiagonalHead`, `FlowHead`, or
            `partial(LowRankPrecisionHead, rank=20)`.

    Attributes:
        encoder: That encoder.
        head: The head.
        sensors: Which data there are; those of a model may fail and move.
        fields: Names of the parameters that are field tensors: none.

    Raises:
        InvalidInput: Where an argument is of another kind.

    MPI: Collective when built: all ranks take rank 0's first parameters.

    References:
        Kingma, Welling (2014), Auto-encoding variational Bayes.
        Cranmer, Brehmer, Louppe (2020), The frontier of simulation-based inference.

    Example:
        >>> posterior = Amortised(prior, DenseEncoder(60), head=FlowHead)
        >>> posterior(y).mean
    """

    fields: tuple[str, ...] = ()
    is_conditional = True
    sensors: Sensors = AllSensors()

    def __init__(self, prior: FieldPrior, encoder: Encoder, *, head: Callable[[int, int], Head] = FullHead) -> None:
        super().__init__(prior)
        with raise_on_all(prior.comm):
            instance("encoder", encoder, Encoder)
            instance("head", head, Callable)  # type: ignore[arg-type]
            made = _made(head, encoder.num_features, prior.num_global)
            instance("head: what it makes", made, Head)
        self.encoder = encoder
        self.head = made
        share_parameters(self, prior)

    def __call__(self, y: Any) -> AmortisedDistribution:
        """The posterior of each data set."""
        return super().__call__(y)

    def forward(self, y: Any) -> AmortisedDistribution:
        """The posterior of each data set."""
        features, frame = self.encoder.read(y)
        return AmortisedDistribution(self.prior, in_frame(frame, self.head(features)))

    def default_optimizer(self) -> Adam:
        """Adam with a step for networks."""
        return Adam(lr=2e-3)


class Refined(FamilyOverPrior):
    """The member of an amortised family for one data set, with parameters of its own, to be fitted further.

    Args:
        amortised: The family.
        y: One data set.

    Attributes:
        raw: The numbers that describe the distribution, `(num_raw,)`, at first those of the network.
        head: A copy of the head, of which a flow's networks are fitted too.

    MPI: Not collective.
    """

    fields: tuple[str, ...] = ()

    def __init__(self, amortised: Amortised, y: Any) -> None:
        super().__init__(amortised.prior)
        self.head = copy.deepcopy(amortised.head)
        self.head.hold_raw()
        raw, self.frame = encoded(amortised, y)
        self.raw = nn.Parameter(raw)

    def forward(self) -> AmortisedDistribution:
        """The distribution at the present parameters."""
        return AmortisedDistribution(self.prior, in_frame(self.frame, self.head.at(self.raw)))

    def default_optimizer(self) -> Adam:
        """Adam with the steps of the head."""
        return self.head.refining


class LatentCorrection(FamilyOverPrior):
    """The network's map from noise to unknowns for one data set, of other noise: eps ~ N(shift, diag(exp(log_scale))^2).

    Two numbers for each unknown, and the network stays as it is: for data unlike those it was trained on.

    Args:
        amortised: The family.
        y: One data set.

    Attributes:
        shift: `(n,)`, replicated, at first zero.
        log_scale: `(n,)`, replicated, at first zero.

    MPI: Not collective.

    References:
        Siahkoohi, Rizzuti, Orozco, Herrmann (2023), Reliable amortized variational inference with physics-based latent
        distribution correction.
    """

    fields: tuple[str, ...] = ()

    def __init__(self, amortised: Amortised, y: Any) -> None:
        super().__init__(amortised.prior)
        self.head = copy.deepcopy(amortised.head)
        self.head.requires_grad_(False)
        raw, self.frame = encoded(amortised, y)
        self.register_buffer("raw", raw)
        self.shift = nn.Parameter(torch.zeros(self.head.size, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(self.head.size, dtype=torch.float64))

    def forward(self) -> AmortisedDistribution:
        """The distribution at the present parameters."""
        q = of_other_noise(self.head.at(self.get_buffer("raw")), self.shift, self.log_scale)
        return AmortisedDistribution(self.prior, in_frame(self.frame, q))

    def default_optimizer(self) -> Adam:
        """Adam with steps in units of the network's standard deviations."""
        return Adam(lr=0.02)


def _made(head: Callable[[int, int], Head], num_features: int, size: int) -> Head:
    try:
        inspect.signature(head).bind(num_features, size)
    except TypeError as error:
        raise InvalidInput(
            f"head is {described(head)}; it must be a head, or make one of (num_features, size): {error}."
        ) from error
    return head(num_features, size)


def in_frame(frame: Frame | None, q: Distribution) -> Distribution:
    """The law of xi where its coordinates have the law q."""
    return q if frame is None else frame.of(q)


@torch.no_grad()
def encoded(amortised: Amortised, y: Any) -> tuple[Tensor, Frame | None]:
    """The numbers that describe the posterior of one data set, `(num_raw,)`, and its frame.

    Raises:
        InvalidInput: Where y holds several data sets.
    """
    features, frame = amortised.encoder.read(y)
    raw = amortised.head.raw(features).clone()
    if raw.ndim != 1:
        raise InvalidInput(f"y holds {tuple(raw.shape[:-1])} data sets; a posterior is refined for one at a time.")
    return raw, frame


@torch.no_grad()
def share_parameters(module: nn.Module, prior: FieldPrior) -> None:
    """Give all ranks rank 0's parameters and buffers. Collective."""
    if prior.comm.size == 1:
        return
    for value in module.state_dict().values():
        own = value.to(torch.float64)
        value.copy_(all_sum(own if prior.comm.rank == 0 else torch.zeros_like(own), prior.comm))
