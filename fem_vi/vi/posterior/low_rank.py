"""A normal posterior in which data have added precision to the prior in a few directions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all
from fem_vi.vi.posterior.scale import LowRankScale
from fem_vi.vi.posterior.whitened import WhitenedNormal
from fem_vi.vi.posterior.whitened_family import WhitenedFamily
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.start import Linearisation


@dataclass(frozen=True)
class UnitDiagonal:
    """D = I: away from the `rank` directions the posterior is the prior."""


@dataclass(frozen=True)
class FreeDiagonal:
    """D = diag(exp(log_precision)), one parameter for each unknown, starting at D = I."""


class LowRankNormal(WhitenedFamily):
    """q(m): m = unwhiten(xi), xi ~ N(mu, D^(-1/2) (I + U U')^-1 D^(-1/2)), U with `rank` columns.

    A low-rank update of the *precision*, because data can only add precision: the posterior of an affine map with Gaussian
    noise belongs to the family, with D = I, once the rank is at least the number of data. Sampling, density and divergence
    cost O(n rank); no n x n matrix is formed. Starts close to the prior.

    Args:
        prior: Prior of m.
        rank: Number of directions, at least 1.
        diagonal: `UnitDiagonal()`, or `FreeDiagonal()` to let the other directions narrow as well.

    Attributes:
        mu: Whitened mean, `(n_owned,)`.
        U: The directions, stored transposed, `(rank, n_owned)`.
        log_precision: Logarithm of the diagonal of D, `(n_owned,)`; with `FreeDiagonal` only.
        fields: Names of the parameters that are field tensors.

    Raises:
        InvalidInput: Where the rank is no whole number between 1 and the number of unknowns, or an argument of the wrong type.

    MPI: Collective.

    References:
        Spantini, Solonen, Cui, Martin, Tenorio, Marzouk (2015), Optimal low-rank approximations of Bayesian linear
        inverse problems.

    Example:
        >>> posterior = LowRankNormal(prior, rank=20)
        >>> posterior().mean, posterior().variance
    """

    def __init__(self, prior: FieldPrior, rank: int, *, diagonal: UnitDiagonal | FreeDiagonal = UnitDiagonal()) -> None:
        super().__init__(prior)
        with raise_on_all(prior.comm):
            rank = whole("rank", rank, least=1)
            instance("diagonal", diagonal, UnitDiagonal, FreeDiagonal)
            if rank > prior.num_global:
                raise InvalidInput(f"rank is {rank}; it must lie between 1 and the {prior.num_global} unknowns.")
        self.U = nn.Parameter(_small_directions(prior, rank))
        self.fields: tuple[str, ...] = ("mu", "U")
        self.log_precision: nn.Parameter | None = None
        if isinstance(diagonal, FreeDiagonal):
            self.log_precision = nn.Parameter(torch.zeros(prior.event_shape, dtype=torch.float64))
            self.fields = ("mu", "U", "log_precision")

    def forward(self) -> WhitenedNormal:
        """The distribution at the present parameters."""
        return WhitenedNormal(self.prior, self.mu, LowRankScale.create(self.prior, self.log_precision, self.U))

    @torch.no_grad()
    def start_at(self, linearisation: Linearisation) -> None:
        """Take the mean of a linearised posterior and the `rank` directions in which its precision exceeds the prior's most.

        Directions beyond the number of data are small and random, and D = I.
        """
        self.mu.copy_(linearisation.mu)
        vectors = torch.linalg.eigh(linearisation.gram).eigenvectors.flip(-1)[:, : len(self.U)]
        self.U.copy_(_small_directions(self.prior, len(self.U)))
        self.U[: vectors.shape[1]] = vectors.T @ linearisation.jacobian
        if self.log_precision is not None:
            self.log_precision.zero_()


def _small_directions(prior: FieldPrior, rank: int) -> Tensor:
    """Random columns of norm about 0.1, `(rank, n_owned)`: at U = 0 the gradient with respect to U would vanish."""
    return prior.white_noise(torch.Size([rank])) * (0.1 / math.sqrt(prior.num_global))
