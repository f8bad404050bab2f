"""A batch of normal distributions whose precision is diagonal but for a few directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

# S = D^(-1/2) R, R = I - U L'^-1 (I + L)^-1 U' with L L' = I + U'U: see scale.py, where R R' = (I + U U')^-1 is derived. Here U
# is stored transposed, with batch axes in front.


class LowRankPrecision(Distribution):
    """N(mu, D^(-1/2) (I + U U')^-1 D^(-1/2)), with U thin: draws and densities cost O(n rank).

    Args:
        mu: Mean, `(*batch, n)`.
        log_precision: Logarithm of the diagonal of D, `(*batch, n)`.
        U: The directions, stored transposed, `(*batch, rank, n)`.

    MPI: Not collective.
    """

    arg_constraints = {}  # noqa: RUF012 - torch reads the attribute of the class
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mu: Tensor, log_precision: Tensor, U: Tensor) -> None:
        self.mu, self.log_precision, self.U = mu, log_precision, U
        eye = torch.eye(U.shape[-2], dtype=U.dtype)
        self._cholesky = torch.linalg.cholesky(eye + U @ U.mT)
        self._inner = eye + self._cholesky
        super().__init__(mu.shape[:-1], mu.shape[-1:], validate_args=False)

    def __repr__(self) -> str:
        return f"LowRankPrecision(batch={tuple(self.batch_shape)}, n={self.event_shape[0]}, rank={self.U.shape[-2]})"

    @property
    def mean(self) -> Tensor:
        """Mean, `(*batch, n)`."""
        return self.mu

    @property
    def variance(self) -> Tensor:
        """Pointwise variance, `(*batch, n)`."""
        removed = torch.linalg.solve_triangular(self._cholesky, self.U, upper=False)
        return (-self.log_precision).exp() * (1.0 - removed.square().sum(-2))

    @property
    def covariance_matrix(self) -> Tensor:
        """Dense covariance, `(*batch, n, n)`."""
        removed = torch.linalg.solve_triangular(self._cholesky, self.U, upper=False)
        half = (-0.5 * self.log_precision).exp()
        eye = torch.eye(self.mu.shape[-1], dtype=self.mu.dtype)
        return half[..., :, None] * (eye - removed.mT @ removed) * half[..., None, :]

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor of the covariance, `(*batch, n, n)`."""
        return torch.linalg.cholesky(self.covariance_matrix)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # type: ignore[override] # noqa: B008
        """Draws, `(*sample_shape, *batch, n)`."""
        return self.push(torch.randn(self._extended_shape(sample_shape), dtype=self.mu.dtype))

    def push(self, eps: Tensor) -> Tensor:
        """What becomes of white noise, mu + S eps, `(*sample_shape, *batch, n)`."""
        w = self.U @ eps[..., None]
        w = torch.linalg.solve_triangular(self._inner, w, upper=False)
        w = torch.linalg.solve_triangular(self._cholesky.mT, w, upper=True)
        return self.mu + (-0.5 * self.log_precision).exp() * (eps - (self.U.mT @ w)[..., 0])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, `(*batch,)`."""
        scaled = (0.5 * self.log_precision).exp() * (value - self.mu)
        inside = (self.U @ scaled[..., None])[..., 0]
        constant = 0.5 * self.mu.shape[-1] * math.log(2.0 * math.pi)
        return -0.5 * (scaled.square().sum(-1) + inside.square().sum(-1)) - constant - self.logdet()

    def logdet(self) -> Tensor:
        """Log |det S|, `(*batch,)`."""
        return -self._cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * self.log_precision.sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy, `(*batch,)`."""
        return 0.5 * self.mu.shape[-1] * (1.0 + math.log(2.0 * math.pi)) + self.logdet()
