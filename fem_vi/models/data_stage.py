"""The second stage of a PDDLVM: recorded data y, an encoder q(z | y), and a decoder for what the model gets wrong.

Each recorded data set y = B u + noise belongs to a z and a u of its own. With an encoder q_c(z | y), a decoder d of the predicted
data, and p(u | z) from the first stage, it has the bound

    log p(y) >= E_{q_c(z | y) q_a(u | z)} [ log p(y | d(B u)) + log p(u | z) - log q_a(u | z) + log p(z) - log q_c(z | y) ],

and p(u | z) is either what the forward network says, so that two terms cancel, or what the residual says:

    p(u | z) = p(r = 0 | u, z) |det A(u, z)|,   A = dr/du,

which is normalised for a linear PDE, and for others in the limit eps -> 0. Without the determinant, where r = 0 comes with a flat
p(u), the posterior of z carries the factor 1 / |det A(z)|.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from fem_vi.arguments import instance
from fem_vi.bridge.layout import check_last_axis
from fem_vi.bridge.logdet import ExactLogdet, StochasticLogdet
from fem_vi.errors import InvalidInput
from fem_vi.models.measure import SolutionUnits
from fem_vi.models.model_file import read_model, write_model
from fem_vi.models.pddlvm import PDDLVM, check_network
from fem_vi.models.recorded_data import RecordedData
from fem_vi.parallel import raise_on_all
from fem_vi.vi.posterior.on_mesh import LivesOnMesh
from fem_vi.vi.problem import Likelihood
from fem_vi.vi.real_tensor import real_tensor


@dataclass(frozen=True)
class FromNetwork:
    """The forward network says what p(u | z) is; it is held constant, and neither residuals nor determinants are evaluated."""


@dataclass(frozen=True)
class FromResidual:
    """The residual says what p(u | z) is; the forward network, unless frozen, learns on, at the z that data point to.

    Attributes:
        correction: `Uncorrected()` or `WithLogdet(method)`.
    """

    correction: Uncorrected | WithLogdet

    def __post_init__(self) -> None:
        instance("FromResidual: correction", self.correction, Uncorrected, WithLogdet)


@dataclass(frozen=True)
class Uncorrected:
    """p(r = 0 | u, z) with a flat p(u), as in the literature: the posterior of z is off by the factor 1 / |det A(z)|.

    What that costs: -(e^z u')' = 1 on a rod, z ~ N(0, 1), one sensor in the middle with noise 0.05. The posterior mean is 0.015,
    and here it is -0.068 with 10 elements, -0.141 with 20, -0.255 with 40 and -0.413 with 80; the standard deviation is 0.102,
    and here it shrinks to 0.057. It gets worse with every refinement, and a preconditioner A0^-1 changes nothing.

    Right where A does not depend on z (unknown sources and boundary values), and for a model in `SolutionUnits()`.
    """


@dataclass(frozen=True)
class WithLogdet:
    """log |det A(u, z)| is added for each sample: the posterior of z is the Bayesian one on any mesh.

    The bound is then that of log p(y), up to the constant log |det A0| where the model is `Preconditioned`.

    Attributes:
        method: `ExactLogdet()`, a factorisation for each sample and 10 to 30 for its gradient, or `StochasticLogdet()`.
    """

    method: ExactLogdet | StochasticLogdet = ExactLogdet()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        instance("WithLogdet: method", self.method, ExactLogdet, StochasticLogdet)


class DataStage(LivesOnMesh):
    """A PDDLVM after virtual data, with an encoder and a decoder, for recorded data.

    Args:
        model: The `PDDLVM`; its parameters are part of this module.
        y: Recorded data sets, `(num_sets, num_data)`, replicated.
        encoder: y `(*batch, num_data)` to a `Distribution` over whitened z, with `event_shape == (num_z,)`, in float64.
        observe: B, fields `(*batch, n_owned)` to data `(*batch, num_data)`, differentiable and replicated.
        likelihood: How data scatter around predictions.
        decoder: Predicted data to corrected ones, `AdditiveError(num_data)` for example; None for no correction.
        state: What p(u | z) is: `FromNetwork()` or `FromResidual(correction)`.

    Attributes:
        problem: What `fit` takes.

    Raises:
        InvalidInput: Where an argument is of the wrong type or shape.

    MPI: Collective. Parameters are replicated: build the networks with the same seed on all ranks.

    References:
        Vadeboncoeur, Akyildiz, Kazlauskaite, Girolami, Cirak (2023), Fully probabilistic deep models for forward and inverse
        problems in parametric PDEs.

    Example:
        >>> stage = DataStage(model, y, encoder=encoder, observe=observe, likelihood=fem_vi.GaussianNoise(0.01))
        >>> run = fem_vi.fit(stage.problem, stage, RecordedELBO(samples=4), steps=1000, optimizer=fem_vi.Adam(1e-3))
        >>> q = stage.posterior(y[0])
    """

    fields: tuple[str, ...] = ()
    shared = ("problem", "observe", "likelihood", "state")

    def __init__(
        self,
        model: PDDLVM,
        y: Tensor,
        *,
        encoder: nn.Module,
        observe: Callable[[Tensor], Tensor],
        likelihood: Likelihood,
        decoder: nn.Module | None = None,
        state: FromNetwork | FromResidual = FromNetwork(),
    ) -> None:
        super().__init__()
        instance("model", model, PDDLVM)
        with raise_on_all(model.pde.comm):
            instance("encoder", encoder, nn.Module)
            instance("decoder", decoder, nn.Module, type(None))
            instance("likelihood", likelihood, Likelihood)
            instance("state", state, FromNetwork, FromResidual)
            if isinstance(model.measure, SolutionUnits) and isinstance(getattr(state, "correction", None), WithLogdet):
                raise InvalidInput(
                    "The model is in SolutionUnits(), where no determinant is left. Use FromResidual(Uncorrected())."
                )
            y = real_tensor("y", y)
            if y.ndim != 2 or len(y) == 0 or not bool(torch.isfinite(y).all()):
                raise InvalidInput(f"y has shape {tuple(y.shape)}; it must be finite data sets, (num_sets, num_data).")
            likelihood.check(y[0])
            check_network("encoder", encoder, y.shape[1], model.prior.num_global)
        self.model, self.encoder, self.decoder = model, encoder, decoder
        self.observe, self.likelihood, self.state = observe, likelihood, state
        about = {**model.problem.describe(), "model": type(self).__name__, "state": repr(state), "likelihood": repr(likelihood)}
        self.problem = RecordedData(model.prior, model.cost, y, about)

    def forward(self, y: Tensor) -> Distribution:
        """The distribution q(z | y), over whitened z; see `posterior`."""
        return self.encoder(y)

    def posterior(self, y: Tensor) -> Distribution:
        """The distribution q(z | y), over whitened z, for data that need not have been recorded.

        Args:
            y: `(*batch, num_data)`.

        Returns:
            A distribution over xi with `event_shape == (num_z,)`, replicated: z is `prior.unwhiten(prior.scatter(xi))`.

        Raises:
            InvalidInput: Where y has another length.
        """
        check_last_axis("y", y, self.problem.y.shape[1], "one for each recorded datum.")
        return self.encoder(y)

    def predict(self, u: Tensor) -> Tensor:
        """Data of fields `(*batch, n_owned)`, decoded: `(*batch, num_data)`, replicated. Collective."""
        y = self.observe(u)
        return y if self.decoder is None else self.decoder(y)

    @property
    def learns_states(self) -> bool:
        """Whether the forward network goes on learning, since p(u | z) is not what it says."""
        return isinstance(self.state, FromResidual)

    def log_ratio_of_states(self, c: Tensor, log_q: Tensor, u: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Log p(u | z) - log q(u | z), `(*batch,)`; zero where the network is p(u | z). Collective."""
        if isinstance(self.state, FromNetwork):
            return torch.zeros_like(log_q)
        log_p = self.model.log_virtual(u, *inputs)
        if isinstance(self.state.correction, WithLogdet):
            log_p = log_p + self.model.residual.logdet(u, *inputs, method=self.state.correction.method)
        return log_p - log_q

    def save(self, path: str | Path) -> None:
        """Write all parameters, those of the model too; see `PDDLVM.save`. Collective."""
        write_model(path, self, self._about(), self.model.pde.comm)

    def load(self, path: str | Path) -> None:
        """Take the parameters that `save` wrote; see `PDDLVM.load`. Collective."""
        read_model(path, self, self._about(), self.model.pde.comm)

    def _about(self) -> dict[str, Any]:
        return {**self.model.about(), "model": type(self).__name__, "data": self.problem.y.shape[1], "state": repr(self.state)}
