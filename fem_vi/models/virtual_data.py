"""The first stage of a model with residuals: virtual data r = 0, and the bound that its networks maximise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.draws import frozen
from fem_vi.vi.objective import PathDerivative, Terms, TotalDerivative
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.problem import Cost


@dataclass
class VirtualData:
    """What `fit` needs to know of virtual data: that r(u, z) = 0 for all z of a prior.

    Attributes:
        prior: p(z).
        cost: Samples solved so far.
        about: What tells it from others, for config.json.
    """

    prior: FieldPrior
    cost: Cost
    about: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """What tells this problem from others."""
        return dict(self.about)


@dataclass(frozen=True)
class VirtualELBO:
    """The bound on log p(r = 0), by draws of z from the prior and one of u for each.

        E_{p(z) q(u | z)} [ log p(r = 0 | u, z) + log p_b(z | u) - log q(u | z) ] + log p(eps)

    For a linear PDE, a q that can be exact, and no p_b, it is the mean of -log |det A(z)|. In the history, `misfit` is minus the
    mean of log p(r = 0 | u, z), and `kl` the mean of log q(u | z) - log p_b(z | u).

    Attributes:
        samples: Draws of z, whose residuals are evaluated as one batch.
        gradient: `PathDerivative()`, without noise where q is exact, evaluates the forward network a second time;
            `TotalDerivative()` does not, and for normal q differs by that noise alone.

    References:
        Vadeboncoeur, Akyildiz, Kazlauskaite, Girolami, Cirak (2023), Fully probabilistic deep models for forward and inverse
        problems in parametric PDEs.

    Example:
        >>> run = fem_vi.fit(model.problem, model, VirtualELBO(samples=64), steps=2000)
    """

    samples: int = 64
    gradient: PathDerivative | TotalDerivative = PathDerivative()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        whole("VirtualELBO: samples", self.samples, least=1)
        instance("VirtualELBO: gradient", self.gradient, PathDerivative, TotalDerivative)

    def __call__(self, problem: VirtualData, model: Any) -> Terms:
        """Estimate the bound.

        Args:
            problem: `model.problem`.
            model: A `PDDLVM`.

        Returns:
            The bound, its parts, and the loss, which is minus the bound.

        Raises:
            InvalidInput: Where the model is no `PDDLVM`, or the problem that of another.

        MPI: Collective.
        """
        if not isinstance(problem, VirtualData) or getattr(model, "problem", None) is not problem:
            raise InvalidInput("VirtualELBO is fitted to a model's own virtual data: fit(model.problem, model, VirtualELBO()).")
        z = problem.prior.rsample(torch.Size([self.samples])).detach()
        xi = model.whitened(z)
        c, log_q = draw_coordinates(model, xi, path=isinstance(self.gradient, PathDerivative))
        inputs = model.inputs(z)
        log_r = model.log_virtual(model.state.lift(c, *inputs), *inputs)
        log_inverse = torch.zeros((), dtype=torch.float64)
        if model.inverse_network is not None:
            log_inverse = model.inverse_network(c).log_prob(xi)
        log_ratio = log_q - log_inverse
        bound = (log_r - log_ratio).mean() + model.log_eps_prior()
        if torch.is_grad_enabled():
            model.noise.advance()
        log_r, log_ratio = log_r.detach(), log_ratio.detach()
        return Terms(-bound, (log_r - log_ratio).mean(), log_ratio.mean(), log_r, log_ratio)


def draw_coordinates(model: Any, xi: Tensor, *, path: bool) -> tuple[Tensor, Tensor]:
    """One draw of the coordinates of u for each whitened z, and log q(u | z) there.

    Args:
        model: A `PDDLVM`.
        xi: `(*batch, num_z)`, replicated.
        path: Hold the density constant, so that the gradient flows through the draw only.

    Returns:
        `(*batch, size)` and `(*batch,)`, replicated.
    """
    q = model.forward_network(xi)
    c = q.rsample()
    weigh = frozen(model.forward_network, xi) if path else q
    return c, weigh.log_prob(c) - model.state.log_volume
