"""A normal posterior with a dense covariance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fem_vi.errors import InvalidInput
from fem_vi.vi.posterior.scale import TriangularScale
from fem_vi.vi.posterior.whitened import WhitenedNormal
from fem_vi.vi.posterior.whitened_family import WhitenedFamily
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.start import Linearisation

MOST_BYTES = 2**31


class FullRankNormal(WhitenedFamily):
    """q(m): m = unwhiten(xi), xi ~ N(mu, L L') with L lower triangular, exp of a parameter on its diagonal.

    Starts as the prior. Contains the exact posterior of an affine map with Gaussian noise. It has n (n + 3) / 2 parameters, and
    products with L cost n^2 a sample: for latent vectors, and for fields of a few thousand unknowns; for larger ones take
    `LowRankNormal`. Where Adam moves all parameters by one step, `below` throws fits over many unknowns off: it wants a smaller
    one, `Adam(lr, pair_lr=lr / sqrt(n))`, as `fit` takes by default.

    Args:
        prior: Prior of m.

    Attributes:
        mu: Whitened mean, `(n_owned,)`.
        log_diagonal: Logarithm of the diagonal of L, `(n,)`, replicated, in the order of `prior.gather`.
        below: L below its diagonal, row by row, `(n (n - 1) / 2,)`, replicated.
        fields: Names of the parameters that are field tensors.
        pairs: Names of the parameters with an entry for each pair of unknowns.

    Raises:
        InvalidInput: Where `prior` is no prior, or has so many unknowns that the parameters exceed 2 GB (n = 23,000).

    MPI: Not collective; drawing samples is. L is replicated: results do not depend on the number of ranks, and time and memory
        for it do not shrink with it.

    Example:
        >>> q = FullRankNormal(prior)()
        >>> m = q.rsample((8,))
    """

    fields: tuple[str, ...] = ("mu",)
    pairs: tuple[str, ...] = ("below",)

    def __init__(self, prior: FieldPrior) -> None:
        super().__init__(prior)
        n = prior.num_global
        _check_memory(prior)
        self.log_diagonal = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        self.below = nn.Parameter(torch.zeros(n * (n - 1) // 2, dtype=torch.float64))

    def forward(self) -> WhitenedNormal:
        """The distribution at the present parameters."""
        return WhitenedNormal(self.prior, self.mu, TriangularScale(self.prior, self.tril()))

    def tril(self) -> Tensor:
        """L, `(n, n)`, replicated."""
        return unpacked(self.log_diagonal.exp(), self.below)

    @torch.no_grad()
    def start_at(self, linearisation: Linearisation) -> None:
        """Take a linearised posterior. Collective."""
        J = self.prior.gather(linearisation.jacobian)
        eye = torch.eye(self.prior.num_global, dtype=J.dtype)
        # With rows and columns in reverse, C C' is the precision reversed, and L = C^-T reversed is lower triangular.
        reverse = torch.linalg.cholesky((eye + J.T @ J).flip(0, 1))
        tril = torch.linalg.solve_triangular(reverse.T, eye, upper=True).flip(0, 1)
        self.mu.copy_(linearisation.mu)
        self.log_diagonal.copy_(tril.diagonal().log())
        self.below.copy_(packed(tril))


def packed(matrix: Tensor) -> Tensor:
    """What a square matrix has below its diagonal, row by row, `(n (n - 1) / 2,)`."""
    return matrix[_is_below(len(matrix))]


def unpacked(diagonal: Tensor, below: Tensor) -> Tensor:
    """The lower triangular matrix with this diagonal, `(n,)`, and what `packed` gave, `(n, n)`."""
    return torch.diag(diagonal).masked_scatter(_is_below(len(diagonal)), below)


def _is_below(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril(-1)


def _check_memory(prior: FieldPrior) -> None:
    """Refuse more unknowns than a dense factor can have, before it is allocated."""
    n = prior.num_global
    size = 8 * (n * (n + 3) // 2)
    if size > MOST_BYTES:
        raise InvalidInput(
            f"FullRankNormal: the {n} unknowns of a {type(prior).__name__} make {size / 1e9:.1f} GB of parameters on every rank, "
            f"and a step takes several times that; it allows {MOST_BYTES / 1e9:.1f} GB. Use LowRankNormal(prior, rank=...), or "
            "SparsePrecisionNormal(prior) for local data."
        )
