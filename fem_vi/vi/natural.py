"""Natural gradients: steps of one length in the geometry of the normal families, whatever their parameters.

The Fisher matrix F of N(mu, S S') in mu is (S S')^-1. In a scale it follows from ds^2 = tr(Sigma dP Sigma dP) / 2 with P the
precision:

    diagonal      P = diag(e^(-2 s)):  ds^2 = 2 |ds|^2
    triangular    S + dS = S (1 + A), A lower triangular:  ds^2 = |A below the diagonal|^2 + 2 |A on it|^2
    low rank      P = 1 + U U'.  With G = U'U and dU = U A + B, U'B = 0, C = A + A':
                  Sigma U = U (1 + G)^-1, Sigma B = B, and with K = G (1 + G)^-1
                  ds^2 = tr(K C K C) / 2 + tr(K B'B)

so that the steps F^-1 g are products and solves with triangular or rank x rank matrices. A rotation of U leaves P alone; C is
symmetric, and takes the symmetric half of U'g. Of all A with A + A' = C the one with the shortest dU is taken, in the eigenbasis
of G with eigenvalues g: A_ij = C_ij g_j / (g_i + g_j). Others, A = C / 2 among them, add strong directions to weak columns, and
the term dU dU' of the change in P, which is of second order in the step, becomes the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fem_vi.arguments import positive
from fem_vi.errors import InvalidInput
from fem_vi.vi.posterior.full_rank import FullRankNormal, packed, unpacked
from fem_vi.vi.posterior.low_rank import LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.state import is_field

WEAKEST = 0.1
BLOCK = 256


@dataclass(frozen=True)
class NaturalGradient:
    """Steps along the natural gradient, for `MeanFieldNormal`, `FullRankNormal`, `LowRankNormal` (`UnitDiagonal()`).

        phi <- phi - lr F^-1 grad

    On a quadratic target a step of lr = 1 takes the mean to where the present covariance says the optimum is; noise asks for
    less. A step is shortened where it would move the distribution by more than `most` nats.

    Errors of a dense or low-rank scale feed their own noise: `lr` must be below 2 samples / unknowns, or they grow. An error of
    the mean is noise in the scale as well, of which pairs of draws (`Antithetic()`) leave nothing. Of a mean-field family, `lr`
    must be below two over the largest eigenvalue of the precision in units of its diagonal, which correlated unknowns make
    large; there Adam is the better choice.

    Attributes:
        lr: Fraction of the full step.
        most: KL divergence from one step to the next, to second order, in nats.

    References:
        Amari (1998), Natural gradient works efficiently in learning.
        Khan, Rue (2023), The Bayesian learning rule.
    """

    lr: float = 0.1
    most: float = 0.2

    def __post_init__(self) -> None:
        positive("NaturalGradient: lr", self.lr)
        positive("NaturalGradient: most", self.most)

    def create(self, posterior: nn.Module) -> NaturalSteps:
        """The optimiser of a posterior.

        Raises:
            InvalidInput: Where the family has no natural gradient here.
        """
        return NaturalSteps(posterior, self.lr, self.most)


class NaturalSteps(torch.optim.Optimizer):
    """Natural-gradient steps of one posterior; no state is kept between steps.

    Args:
        posterior: A normal family.
        lr: Fraction of the full step.
        most: KL divergence of a step, in nats.

    MPI: Steps are collective.
    """

    def __init__(self, posterior: nn.Module, lr: float, most: float) -> None:
        self._direct = _direction_of(posterior)
        self._posterior = posterior
        self._prior: FieldPrior = posterior.prior  # type: ignore[assignment]
        self._most = most
        super().__init__(posterior.parameters(), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the parameters along minus the natural gradient of the gradients that they hold."""
        steps = self._direct(self._posterior)
        lr = self.param_groups[0]["lr"]
        named = dict(self._posterior.named_parameters())
        zero = torch.zeros((), dtype=torch.float64)
        products = {name: (_gradient(value) * steps[name]).sum() for name, value in named.items()}
        owned = sum((product for name, product in products.items() if is_field(self._posterior, name)), zero)
        shared = sum((product for name, product in products.items() if not is_field(self._posterior, name)), zero)
        length = float(self._prior.all_sum(owned) + shared)
        if length > 0:
            lr = min(lr, (2.0 * self._most / length) ** 0.5)
        for name, value in named.items():
            value.sub_(lr * steps[name])


def _direction_of(posterior: nn.Module) -> Callable[[Any], dict[str, Tensor]]:
    """What makes the natural gradient of a family from the gradients that its parameters hold."""
    if isinstance(posterior, MeanFieldNormal):
        return _mean_field
    if isinstance(posterior, FullRankNormal):
        return _full_rank
    if isinstance(posterior, LowRankNormal) and posterior.log_precision is None:
        return _low_rank
    raise InvalidInput(
        f"NaturalGradient: {type(posterior).__name__} is no family whose natural gradient is known here; take MeanFieldNormal, "
        "FullRankNormal or LowRankNormal with UnitDiagonal(), or another optimizer."
    )


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _mean_field(posterior: MeanFieldNormal) -> dict[str, Tensor]:
    variance = (2.0 * posterior.log_scale).exp()
    return {"mu": variance * _gradient(posterior.mu), "log_scale": 0.5 * _gradient(posterior.log_scale)}


def _full_rank(posterior: FullRankNormal) -> dict[str, Tensor]:
    prior, L = posterior.prior, posterior.tril()
    A = _lower_of_product(L, unpacked(_gradient(posterior.log_diagonal) / L.diagonal(), _gradient(posterior.below)))
    A.diagonal().mul_(0.5)
    step = _lower_product(L, A)
    gradient = prior.gather(_gradient(posterior.mu))
    return {
        "mu": prior.scatter(L @ (L.T @ gradient)),
        "log_diagonal": step.diagonal() / L.diagonal(),
        "below": packed(step),
    }


def _lower_of_product(L: Tensor, G: Tensor) -> Tensor:
    """The lower triangle of L' G, both lower triangular: by blocks of rows, at a sixth of the cost of all of it."""
    result = torch.zeros_like(L)
    for first, last in _blocks(len(L)):
        result[first:last, :last] = L[first:, first:last].T @ G[first:, :last]
    return result.tril_()


def _lower_product(L: Tensor, A: Tensor) -> Tensor:
    """L A, both lower triangular: by blocks of rows, at a third of the cost of a full product."""
    result = torch.zeros_like(L)
    for first, last in _blocks(len(L)):
        result[first:last, :last] = L[first:last, :last] @ A[:last, :last]
    return result


def _blocks(n: int) -> list[tuple[int, int]]:
    return [(first, min(first + BLOCK, n)) for first in range(0, n, BLOCK)]


def _low_rank(posterior: LowRankNormal) -> dict[str, Tensor]:
    """Directions in which U adds less than 0.1 to the precision move as if it were 0.1: near U = 0 steps have no bound."""
    prior, U, g = posterior.prior, posterior.U, _gradient(posterior.U)
    parts = prior.all_sum(torch.cat([U @ U.T, U @ g.T], dim=1))  # here U is stored transposed, (rank, n_owned)
    rank = len(U)
    G = parts[:, :rank]
    values, vectors = torch.linalg.eigh(G)
    size = values.clamp_min(WEAKEST)
    inverse_K = (1.0 + size) / size
    seen = vectors.T @ parts[:, rank:] @ vectors  # U'g in the eigenbasis of G
    C = inverse_K[:, None] * (0.5 * (seen + seen.T)) * inverse_K
    positive = values.clamp_min(torch.finfo(values.dtype).tiny)
    A = vectors @ (C * positive / (positive[:, None] + positive)) @ vectors.T
    along = (vectors / size) @ seen @ vectors.T
    across = g - prior.localise(along).T @ U
    step = prior.localise(A).T @ U + prior.localise((vectors * inverse_K) @ vectors.T) @ across
    gradient = _gradient(posterior.mu)
    w = prior.localise(torch.linalg.solve(torch.eye(rank, dtype=G.dtype) + G, prior.all_sum(U @ gradient)))
    return {"mu": gradient - w @ U, "U": step}
