"""Conditional normal distributions: a network's features become a distribution over vectors.

Each head is one linear layer from features to the numbers that describe a distribution (`raw`), and the distribution that these
numbers describe (`at`). Batch axes of the features become the `batch_shape`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from fem_vi.arguments import positive, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.optimizer import Adam
from fem_vi.vi.posterior.low_rank_precision import LowRankPrecision

SMALL = 0.1
# Where D and U can stand in for each other, D would rise first, and then come back at a creep while U takes over.
SLOW = 0.3


class Head(nn.Module):
    """Features, `(*batch, num_features)`, to a distribution over vectors, `batch_shape == batch`, `event_shape == (size,)`.

    A new head gives the same distribution for all features: mean zero, standard deviation `std`.

    Args:
        num_features: Last axis of what it is given.
        size: Entries of the vectors.
        num_raw: Numbers that describe one distribution; None where the head has other layers for them.
        std: Standard deviation that it starts with.

    Attributes:
        linear: From features to raw numbers; in float64.
        refining: Optimiser of the raw numbers of one data set, from those of a network.

    Raises:
        InvalidInput: Where a size is no whole number above zero, or `std` not positive.

    MPI: Not collective; parameters are replicated, drawn from torch's generator.
    """

    refining = Adam(lr=0.03)

    def __init__(self, num_features: int, size: int, num_raw: int | None, *, std: float) -> None:
        super().__init__()
        self.num_features = whole("num_features", num_features, least=1)
        self.size = whole("size", size, least=1)
        self.log_std = math.log(positive("std", std))
        if num_raw is not None:
            self.linear = nn.Linear(num_features, num_raw, dtype=torch.float64)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def __call__(self, features: Tensor) -> Distribution:
        """The distribution of each row of features."""
        return super().__call__(features)

    def forward(self, features: Tensor) -> Distribution:
        """The distribution of each row of features, `(*batch, num_features)`."""
        return self.at(self.raw(features))

    def raw(self, features: Tensor) -> Tensor:
        """The numbers that describe the distributions, `(*batch, num_raw)`."""
        self.check(features)
        return self.linear(features)

    def check(self, features: Tensor) -> None:
        """Refuse features whose last axis is another.

        Raises:
            InvalidInput: Naming their shape.
        """
        if features.ndim == 0 or features.shape[-1] != self.num_features:
            raise InvalidInput(
                f"{type(self).__name__}: features have shape {tuple(features.shape)}; the last axis must be {self.num_features}."
            )

    def at(self, raw: Tensor) -> Distribution:
        """The distribution that raw numbers describe."""
        raise NotImplementedError

    def hold_raw(self) -> None:
        """Keep the layer that makes raw numbers out of a fit to one data set, which has such numbers of its own."""
        self.linear.requires_grad_(False)


class DiagonalHead(Head):
    """N(mu, diag(sigma^2)), as `Independent(Normal)`.

    Args:
        num_features: Last axis of the features.
        size: Entries of the vectors.
        std: Standard deviation that it starts with.

    Example:
        >>> q = DiagonalHead(64, 16)(features)
    """

    def __init__(self, num_features: int, size: int, *, std: float = 1.0) -> None:
        super().__init__(num_features, size, 2 * size, std=std)

    def raw(self, features: Tensor) -> Tensor:
        """The numbers that describe the distributions, `(*batch, 2 size)`.

        With one batch axis they are the transpose of what lies in memory, and so is all that is made of them, draws included: the
        samples of each entry follow each other, as kernels want the coefficients of fields.
        """
        self.check(features)
        if features.ndim != 2:
            return self.linear(features)
        return torch.addmm(self.linear.bias[:, None], self.linear.weight, features.T).T

    def at(self, raw: Tensor) -> Distribution:
        """The distribution that raw numbers describe."""
        if raw.ndim == 2:  # the gradients of both halves then come together as they lie
            mu, log_sigma = (half.T for half in raw.T.split(self.size))
        else:
            mu, log_sigma = raw.split(self.size, dim=-1)
        return Independent(Normal(mu, (self.log_std + log_sigma).exp(), validate_args=False), 1, validate_args=False)


class FullHead(Head):
    """N(mu, L L') with L lower triangular, as `MultivariateNormal`: size (size + 3) / 2 numbers.

    Args:
        num_features: Last axis of the features.
        size: Entries of the vectors.
        std: Standard deviation that it starts with.

    Example:
        >>> q = FullHead(64, 16)(features)
    """

    def __init__(self, num_features: int, size: int, *, std: float = 1.0) -> None:
        super().__init__(num_features, size, size * (size + 3) // 2, std=std)
        self.register_buffer("below", torch.tril_indices(size, size, offset=-1), persistent=False)

    def at(self, raw: Tensor) -> Distribution:
        """The distribution that raw numbers describe."""
        n = self.size
        mu, log_diagonal, below = raw.split([n, n, n * (n - 1) // 2], dim=-1)
        tril = torch.diag_embed((self.log_std + log_diagonal).exp())
        row, column = self.get_buffer("below")
        return MultivariateNormal(mu, scale_tril=_put(tril, row, column, below), validate_args=False)


class LowRankHead(Head):
    """A mean, a diagonal and `rank` directions, each with a length of its own: what both low-rank heads have in common.

    Lengths are exponentials, so that an optimiser whose steps are of one size makes a direction a hundred times as long in a few
    steps and then sets it to per cents. A new head has small directions, drawn at random: at zero their gradient would vanish.

    Args:
        num_features: Last axis of the features.
        size: Entries of the vectors.
        rank: Directions.
        std: Standard deviation that it starts with, nearly.

    Attributes:
        rank: That number.
    """

    def __init__(self, num_features: int, size: int, *, rank: int, std: float = 1.0) -> None:
        if whole("rank", rank, least=1) > whole("size", size, least=1):
            raise InvalidInput(f"rank is {rank}; it must lie between 1 and the {size} entries of the vectors.")
        super().__init__(num_features, size, 2 * size + rank + rank * size, std=std)
        self.rank = rank
        with torch.no_grad():
            self.linear.bias[-rank * size :] = SMALL / math.sqrt(size) * torch.randn(rank * size, dtype=torch.float64)

    def parts(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of raw numbers: the mean, `(*batch, size)`, the diagonal, and the directions, `(*batch, rank, size)`."""
        mu, diagonal, log_length, flat = raw.split([self.size, self.size, self.rank, self.rank * self.size], dim=-1)
        return mu, diagonal, log_length.exp()[..., None] * flat.unflatten(-1, (self.rank, self.size))


class LowRankCovarianceHead(LowRankHead):
    """N(mu, W W' + D) with W of `rank` columns and D diagonal, as `LowRankMultivariateNormal`.

    For what varies most along a few directions, such as the solution of a PDE. For posteriors take `LowRankPrecisionHead`: data
    add precision in a few directions, which this family does not contain.

    Args:
        num_features: Last axis of the features.
        size: Entries of the vectors.
        rank: Columns of W.
        std: Standard deviation that it starts with, nearly all of it from D.

    Example:
        >>> q = LowRankCovarianceHead(64, 400, rank=8)(features)
    """

    def at(self, raw: Tensor) -> Distribution:
        """The distribution that raw numbers describe."""
        mu, log_sigma, W = self.parts(raw)
        variance = (2.0 * (self.log_std + log_sigma)).exp()
        return LowRankMultivariateNormal(mu, math.exp(self.log_std) * W.mT, variance, validate_args=False)


class LowRankPrecisionHead(LowRankHead):
    """N(mu, (D^(1/2) (I + U U') D^(1/2))^-1) with U of `rank` columns and D diagonal, as `LowRankPrecision`.

    In whitened coordinates it contains the posterior of an affine map with Gaussian noise once the rank is at least the number of
    data, with D = I. For what is fixed up to a few directions, take `LowRankCovarianceHead`.

    Args:
        num_features: Last axis of the features.
        size: Entries of the vectors.
        rank: Columns of U.
        std: Standard deviation that it starts with, nearly.

    Example:
        >>> q = LowRankPrecisionHead(64, 400, rank=20)(features)
    """

    def at(self, raw: Tensor) -> Distribution:
        """The distribution that raw numbers describe."""
        mu, log_precision, U = self.parts(raw)
        return LowRankPrecision(mu, SLOW * log_precision - 2.0 * self.log_std, U)


def _put(tril: Tensor, row: Tensor, column: Tensor, values: Tensor) -> Tensor:
    """Matrices `(*batch, n, n)` with entries below the diagonal; differentiable."""
    flat = torch.zeros_like(tril).flatten(-2)
    index = (row * tril.shape[-1] + column).expand(values.shape)
    return tril + flat.scatter(-1, index, values).unflatten(-1, tril.shape[-2:])
