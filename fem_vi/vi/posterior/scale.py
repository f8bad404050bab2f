"""Square roots S of a covariance in whitened coordinates: xi = mu + S eps, eps ~ N(0, I).

Only the product with S, the quadratic form of (S S')^-1, log det S and the trace of S S' are ever needed, so that no square
matrix over a field is formed but by the dense family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fem_vi.vi.prior import FieldPrior


class Scale(Protocol):
    """A square root S of a covariance, acting on `(*batch, n_owned)`; every method is collective and differentiable."""

    def apply(self, eps: Tensor) -> Tensor:
        """S eps, `(*batch, n_owned)`."""

    def solve(self, delta: Tensor) -> Tensor:
        """S^-1 delta, `(*batch, n_owned)`."""

    def quadratic(self, delta: Tensor) -> Tensor:
        """Delta' (S S')^-1 delta, `(*batch,)`, replicated."""

    def logdet(self) -> Tensor:
        """Log |det S|, scalar, replicated."""

    def trace(self) -> Tensor:
        """Trace of S S', scalar, replicated."""


@dataclass(frozen=True)
class DiagonalScale:
    """S = diag(exp(log_scale)).

    Attributes:
        prior: Knows how the unknowns are spread over ranks.
        log_scale: `(n_owned,)`.
    """

    prior: FieldPrior
    log_scale: Tensor

    def apply(self, eps: Tensor) -> Tensor:
        """S eps, `(*batch, n_owned)`."""
        return self.log_scale.exp() * eps

    def solve(self, delta: Tensor) -> Tensor:
        """S^-1 delta, `(*batch, n_owned)`."""
        return (-self.log_scale).exp() * delta

    def quadratic(self, delta: Tensor) -> Tensor:
        """|S^-1 delta|^2, `(*batch,)`, replicated."""
        return self.prior.all_sum(self.solve(delta).square().sum(-1))

    def logdet(self) -> Tensor:
        """Sum of the log scales, scalar, replicated."""
        return self.prior.all_sum(self.log_scale.sum())

    def trace(self) -> Tensor:
        """Sum of the variances, scalar, replicated."""
        return self.prior.all_sum((2.0 * self.log_scale).exp().sum())


@dataclass(frozen=True)
class TriangularScale:
    """S lower triangular and dense, over all unknowns in the order of `prior.gather`.

    Every rank holds the whole of S and does the same products with gathered vectors. So the gradient with respect to S is
    complete on every rank, what is sent are vectors, and S does not depend on the partition.

    Attributes:
        prior: Knows how the unknowns are spread over ranks.
        tril: S, `(n, n)`, lower triangular with positive diagonal, replicated.
    """

    prior: FieldPrior
    tril: Tensor

    def apply(self, eps: Tensor) -> Tensor:
        """S eps, `(*batch, n_owned)`."""
        return self.prior.scatter(self.prior.gather(eps) @ self.tril.T)

    def solve(self, delta: Tensor) -> Tensor:
        """S^-1 delta, `(*batch, n_owned)`."""
        return self.prior.scatter(self._solved(delta))

    def quadratic(self, delta: Tensor) -> Tensor:
        """|S^-1 delta|^2, `(*batch,)`, replicated."""
        return self._solved(delta).square().sum(-1)

    def logdet(self) -> Tensor:
        """Sum of the logarithms of the diagonal, scalar, replicated."""
        return self.tril.diagonal().log().sum()

    def trace(self) -> Tensor:
        """Squared Frobenius norm of S, scalar, replicated."""
        return self.tril.flatten().dot(self.tril.flatten())

    def columns(self) -> Tensor:
        """The columns of S as field tensors, `(n, n_owned)`."""
        return self.prior.scatter(self.tril.T)

    def _solved(self, delta: Tensor) -> Tensor:
        """S^-1 delta, `(*batch, n)`, replicated."""
        whole = self.prior.gather(delta)
        rows = whole.reshape(-1, whole.shape[-1])
        return torch.linalg.solve_triangular(self.tril, rows.T, upper=False).T.reshape(whole.shape)


# The square root of a low-rank update of the precision.
#
# Wanted: R with R R' = (I + U U')^-1, U thin (n x r), at O(n r) a product. With G = U'U and the Cholesky factor
# L L' = I + G, try R = I - U X U'. By Woodbury (I + U U')^-1 = I - U (L L')^-1 U', and
#
#     R R' = I - U (X + X' - X G X') U',  so it suffices that  X + X' - X G X' = (L L')^-1.
#
# Write G = L L' - I and X = L'^-1 Z; multiplied by L' from the left and L from the right the condition reads
#
#     Z L + L' Z' - Z L L' Z' + Z Z' = I,  that is  (I - Z L)(I - Z L)' = Z Z',
#
# which Z = (I + L)^-1 solves, for then I - Z L = Z. Hence
#
#     R = I - U L'^-1 (I + L)^-1 U'.
#
# Both factors are triangular with a diagonal of at least 1, so the solves are stable, and nothing in them is singular
# where eigenvalues of G coincide (as the derivative of an eigendecomposition is). In the same terms
#
#     R^-1 = I + U (X^-1 - G)^-1 U' = I + U (I + L')^-1 U',  because  X^-1 - G = (I + L) L' - L L' + I,
#     delta' (I + U U') delta = |delta|^2 + |U' delta|^2,  log det R = -log det L,
#     diag(R R') = 1 - (column norms of L^-1 U')^2.
#
# A diagonal D on top: S = D^(-1/2) R, S S' = D^(-1/2) (I + U U')^-1 D^(-1/2).


@dataclass(frozen=True)
class LowRankScale:
    """S = D^(-1/2) R with R R' = (I + U U')^-1: data have added precision in `rank` directions.

    Attributes:
        prior: Knows how the unknowns are spread over ranks.
        log_precision: Logarithm of the diagonal of D, `(n_owned,)`; None for D = I.
        U: The directions, stored transposed, `(rank, n_owned)`.
        cholesky: L of I + U'U, `(rank, rank)`, replicated.
    """

    prior: FieldPrior
    log_precision: Tensor | None
    U: Tensor
    cholesky: Tensor

    @staticmethod
    def create(prior: FieldPrior, log_precision: Tensor | None, U: Tensor) -> LowRankScale:
        """Factor I + U'U.

        Args:
            prior: Knows how the unknowns are spread over ranks.
            log_precision: `(n_owned,)`, or None for D = I.
            U: `(rank, n_owned)`.

        MPI: Collective.
        """
        gram = prior.all_sum(U @ U.T)
        return LowRankScale(prior, log_precision, U, torch.linalg.cholesky(torch.eye(len(U), dtype=U.dtype) + gram))

    def apply(self, eps: Tensor) -> Tensor:
        """S eps, `(*batch, n_owned)`."""
        rows = eps.reshape(eps.shape[:-1].numel(), eps.shape[-1])  # counted, since a rank may own no entries
        w = self.prior.all_sum(self.U @ rows.T)
        inner = torch.eye(len(w), dtype=w.dtype) + self.cholesky
        w = torch.linalg.solve_triangular(inner, w, upper=False)
        w = torch.linalg.solve_triangular(self.cholesky.T, w, upper=True)
        rooted = (rows - self.prior.localise(w).T @ self.U).reshape(eps.shape)
        return rooted if self.log_precision is None else (-0.5 * self.log_precision).exp() * rooted

    def solve(self, delta: Tensor) -> Tensor:
        """S^-1 delta, `(*batch, n_owned)`."""
        scaled = delta if self.log_precision is None else (0.5 * self.log_precision).exp() * delta
        rows = scaled.reshape(delta.shape[:-1].numel(), delta.shape[-1])
        w = self.prior.all_sum(self.U @ rows.T)
        w = torch.linalg.solve_triangular(torch.eye(len(w), dtype=w.dtype) + self.cholesky.T, w, upper=True)
        return (rows + self.prior.localise(w).T @ self.U).reshape(delta.shape)

    def quadratic(self, delta: Tensor) -> Tensor:
        """|D^(1/2) delta|^2 + |U' D^(1/2) delta|^2, `(*batch,)`, replicated."""
        scaled = delta if self.log_precision is None else (0.5 * self.log_precision).exp() * delta
        parts = torch.cat([scaled.square().sum(-1, keepdim=True), scaled @ self.U.T], dim=-1)
        total = self.prior.all_sum(parts)
        return total[..., 0] + total[..., 1:].square().sum(-1)

    def logdet(self) -> Tensor:
        """-log det L - (log det D) / 2, scalar, replicated."""
        root = -self.cholesky.diagonal().log().sum()
        return root if self.log_precision is None else root - 0.5 * self.prior.all_sum(self.log_precision.sum())

    def trace(self) -> Tensor:
        """Trace of S S', scalar, replicated."""
        diagonal = 1.0 - self.removed().square().sum(0)
        if self.log_precision is not None:
            diagonal = (-self.log_precision).exp() * diagonal
        return self.prior.all_sum(diagonal.sum())

    def removed(self) -> Tensor:
        """L^-1 U', `(rank, n_owned)`: R R' = I - removed' removed."""
        return torch.linalg.solve_triangular(self.prior.localise(self.cholesky), self.U, upper=False)
