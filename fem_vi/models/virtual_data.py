"""The first stage of a model with residuals: virtual data r = 0, and the bound that its networks maximise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.draws import frozen
from fem_vi.vi.objective import PathDerivative, Terms, TotalDerivative
from fem_vi.vi.posterior.affine_noise import AffineNoise, affine_noise
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.problem import Cost
from fem_vi.vi.spherical_radial import OneDraw, SphericalRadial


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
    """The bound on log p(r = 0), by draws of z from the prior, and of u for each.

        E_{p(z) q(u | z)} [ log p(r = 0 | u, z) + log p_b(z | u) - log q(u | z) ] + log p(eps)

    For a linear PDE, a q that can be exact, and no p_b, it is the mean of -log |det A(z)|. In the history, `misfit` is minus the
    mean of log p(r = 0 | u, z), and `kl` the mean of log q(u | z) - log p_b(z | u).

    Attributes:
        samples: Draws of z, whose residuals are evaluated as one batch.
        gradient: `PathDerivative()`, without noise where q is exact, or `TotalDerivative()`, the cheaper one, which for normal q
            differs by that noise alone.
        states: How u is drawn for each z: `OneDraw()`, or `SphericalRadial()` for a normal q of few coordinates, which leaves no
            noise for a linear weak form, at the price of more residuals for each z.

    References:
        Vadeboncoeur, Akyildiz, Kazlauskaite, Girolami, Cirak (2023), Fully probabilistic deep models for forward and inverse
        problems in parametric PDEs.

    Example:
        >>> run = fem_vi.fit(model.problem, model, VirtualELBO(samples=64), steps=2000)
    """

    samples: int = 64
    gradient: PathDerivative | TotalDerivative = PathDerivative()  # noqa: RUF009 - frozen
    states: OneDraw | SphericalRadial = OneDraw()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        whole("VirtualELBO: samples", self.samples, least=1)
        instance("VirtualELBO: gradient", self.gradient, PathDerivative, TotalDerivative)
        instance("VirtualELBO: states", self.states, OneDraw, SphericalRadial)

    def __call__(self, problem: VirtualData, model: Any) -> Terms:
        """Estimate the bound.

        Args:
            problem: `model.problem`.
            model: A `PDDLVM`.

        Returns:
            The bound, its parts, and the loss, which is minus the bound.

        Raises:
            InvalidInput: Where the model is no `PDDLVM`, or the problem that of another; or its q(u | z) is not normal, and the
                states are not `OneDraw()`.

        MPI: Collective.
        """
        if not isinstance(problem, VirtualData) or getattr(model, "problem", None) is not problem:
            raise InvalidInput("VirtualELBO is fitted to a model's own virtual data: fit(model.problem, model, VirtualELBO()).")
        with torch.no_grad():
            noise = problem.prior.white_noise(torch.Size([self.samples]))
            z, xi = problem.prior.unwhiten(noise), problem.prior.gather(noise)
        path = isinstance(self.gradient, PathDerivative)
        if isinstance(self.states, OneDraw):
            (c, log_q), weights = draw_coordinates(model, xi, path=path), None
        else:
            c, log_q, weights = _spread_coordinates(model, xi, self.states, path=path)
        inputs = model.inputs(z)
        log_r = model.log_virtual(model.state.lift(c, *inputs), *inputs)
        log_inverse = torch.zeros((), dtype=torch.float64)
        if model.inverse_network is not None:
            log_inverse = model.inverse_network(c).log_prob(xi)
        log_ratio = log_q - log_inverse
        bound = _mean(log_r - log_ratio, weights) + model.log_eps_prior()
        if torch.is_grad_enabled():
            model.noise.advance()
        log_r, log_ratio = log_r.detach(), log_ratio.detach()
        elbo, kl = _mean(log_r - log_ratio, weights), _mean(log_ratio, weights)
        if weights is not None:
            weights = (weights[:, None] / self.samples).expand(log_r.shape).flatten()
        return Terms(-bound, elbo, kl, log_r.flatten(), log_ratio.flatten(), weights)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Over draws of z, `(samples,)`, and over weighted points before them, `(points, samples)`."""
    return values.mean() if weights is None else (weights @ values).mean()


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
    noise = affine_noise(q)
    if noise is not None:
        return _pushed(model, xi, q, noise, noise.draw(), path=path)
    c = q.rsample()
    weigh = frozen(model.forward_network, xi) if path else q
    return c, weigh.log_prob(c) - model.state.log_volume


def _spread_coordinates(model: Any, xi: Tensor, states: SphericalRadial, *, path: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Points `(points, samples, size)` for each whitened z, log q(u | z) there, and what they weigh, `(points,)`."""
    q = model.forward_network(xi)
    noise = affine_noise(q)
    if noise is None:
        raise InvalidInput(
            f"VirtualELBO: the forward network returned {type(q).__name__}, and SphericalRadial() is for normal distributions. "
            "Give it one of the heads for these, such as DiagonalHead or FullHead, or VirtualELBO states=OneDraw()."
        )
    points, weights = states.draw(noise.size)
    c, log_q = _pushed(model, xi, q, noise, points[:, None], path=path)
    return c, log_q, weights


def _pushed(model: Any, xi: Tensor, q: Distribution, noise: AffineNoise, eps: Tensor, *, path: bool) -> tuple[Tensor, Tensor]:
    """What becomes of noise, and log q(u | z) there."""
    c = noise.push(eps)
    if not path:
        log_q = noise.log_prob(q, eps, c)
    else:  # parameters are held, z is not: where it is differentiated, the network is asked again
        log_q = (frozen(model.forward_network, xi) if xi.requires_grad else noise.held()).log_prob(c)
    return c, log_q - model.state.log_volume
