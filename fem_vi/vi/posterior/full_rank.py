"""A normal posterior with a dense covariance, for a handful of parameters."""

from __future__ import annotations

import torch
from torch import nn

from fem_vi.errors import InvalidInput
from fem_vi.vi.posterior.scale import TriangularScale
from fem_vi.vi.posterior.whitened import WhitenedNormal
from fem_vi.vi.posterior.whitened_family import WhitenedFamily
from fem_vi.vi.prior import FieldPrior, GaussianVector
from fem_vi.vi.start import Linearisation


class FullRankNormal(WhitenedFamily):
    """q(m): m = unwhiten(xi), xi ~ N(mu, L L') with L lower triangular, exp of a parameter on its diagonal.

    Starts as the prior. Contains the exact posterior of an affine map with Gaussian noise. It has n (n + 3) / 2
    parameters: for fields take `LowRankNormal`.

    Args:
        prior: Prior of m; its unknowns must be replicated (`GaussianVector`).

    Attributes:
        mu: Whitened mean, `(n,)`, replicated.
        log_diagonal: Logarithm of the diagonal of L, `(n,)`, replicated.
        below: L below its diagonal, row by row, `(n (n - 1) / 2,)`, replicated.
        fields: Names of the parameters that are field tensors: none.

    Raises:
        InvalidInput: Where the unknowns are not replicated.

    MPI: Not collective; drawing samples is.
    """

    fields: tuple[str, ...] = ()

    def __init__(self, prior: FieldPrior) -> None:
        super().__init__(prior)
        if not isinstance(prior, GaussianVector):
            raise InvalidInput(
                f"FullRankNormal takes replicated unknowns (GaussianVector); it was given {type(prior).__name__}. "
                "For a field use LowRankNormal."
            )
        n = prior.num_global
        self.log_diagonal = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        self.below = nn.Parameter(torch.zeros(n * (n - 1) // 2, dtype=torch.float64))

    def forward(self) -> WhitenedNormal:
        """The distribution at the present parameters."""
        row, column = torch.tril_indices(len(self.mu), len(self.mu), offset=-1)
        tril = torch.diag(self.log_diagonal.exp()).index_put((row, column), self.below)
        return WhitenedNormal(self.prior, self.mu, TriangularScale(tril))

    @torch.no_grad()
    def start_at(self, linearisation: Linearisation) -> None:
        """Take a linearised posterior."""
        n = len(self.mu)
        precision = torch.eye(n, dtype=torch.float64) + linearisation.jacobian.T @ linearisation.jacobian
        tril = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))
        row, column = torch.tril_indices(n, n, offset=-1)
        self.mu.copy_(linearisation.mu)
        self.log_diagonal.copy_(tril.diagonal().log())
        self.below.copy_(tril[row, column])
