"""Normal noise that is correlated between data: a full covariance, or a diagonal and a few common causes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fem_vi.errors import InvalidInput
from fem_vi.vi.likelihood import check_last_axes, checked_scale
from fem_vi.vi.real_tensor import real_tensor


class CorrelatedNoise:
    """Normal noise with a full covariance, y = prediction + N(0, R).

    Args:
        covariance: R, `(num_data, num_data)`, symmetric positive definite, in the squared unit of the data, replicated.

    Attributes:
        covariance: R.
        std: Standard deviation of each datum, `(num_data,)`.

    Raises:
        InvalidInput: Where the matrix is not square, symmetric and positive definite.

    MPI: Not collective; every tensor is replicated.

    Example:
        >>> lag = (times[:, None] - times).abs()
        >>> noise = CorrelatedNoise(0.01**2 * torch.exp(-lag / 3600))
    """

    additive = True

    def __init__(self, covariance: Tensor) -> None:
        self.covariance = real_tensor("covariance", covariance)
        R = self.covariance
        if R.ndim != 2 or R.shape[0] != R.shape[1] or not bool(torch.isfinite(R).all()):
            raise InvalidInput(f"covariance has shape {tuple(R.shape)}; it must be finite, of shape (num_data, num_data).")
        if not torch.allclose(R, R.T, rtol=1e-10, atol=1e-12 * float(R.abs().max())):
            raise InvalidInput("covariance is not symmetric.")
        self._tril, failed = torch.linalg.cholesky_ex(R)
        if bool(failed):
            raise InvalidInput(f"covariance is not positive definite: its leading minor of order {int(failed)} is not positive.")
        self.std = R.diagonal().sqrt()

    def __repr__(self) -> str:
        return f"CorrelatedNoise({len(self.std)} data)"

    def check(self, y: Tensor) -> None:
        """Refuse data of another number; see `GaussianNoise.check`."""
        if self.std.shape != y.shape[-1:]:
            raise InvalidInput(f"covariance is of {len(self.std)} data; y has {y.shape[-1]}.")

    def standardise(self, y: Tensor, prediction: Tensor) -> Tensor:
        """L^-1 (y - prediction) with R = L L', `(*batch, num_data)`: independent, of variance one under the model."""
        check_last_axes(y, prediction)
        self.check(y)
        residual = y - prediction
        rows = residual.reshape(-1, residual.shape[-1])
        return torch.linalg.solve_triangular(self._tril, rows.T, upper=False).T.reshape(residual.shape)

    def log_prob(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Log p(y | prediction), `(*batch,)`, replicated."""
        z = self.standardise(y, prediction)
        constant = self._tril.diagonal().log().sum() + 0.5 * y.shape[-1] * math.log(2.0 * math.pi)
        return -0.5 * z.square().sum(-1) - constant

    def sample(self, prediction: Tensor) -> Tensor:
        """Noisy data around `prediction`, `(*batch, num_data)`, from torch's generator; see `GaussianNoise.sample`."""
        return prediction + torch.randn_like(prediction) @ self._tril.T


# With W = D^(-1/2) F and its thin singular value decomposition W = P diag(s) Q', the covariance is
#
#     R = D + F F' = D^(1/2) (I + W W') D^(1/2),   (I + W W')^(-1/2) = I + P diag((1 + s^2)^(-1/2) - 1) P',
#
# so that a residual is made white by two thin products, and log det R = log det D + sum log(1 + s^2).


class LowRankNoise:
    """Independent normal noise and a few common causes, y = prediction + N(0, diag(std^2) + F F').

    A drift of all sensors of one logger, an error of the PDE in a few known shapes: each is a column of F.

    Args:
        std: Standard deviation of the independent part: one number, or `(num_data,)`.
        factor: F, `(num_data, rank)`, in the unit of the data, replicated.

    Attributes:
        std: Standard deviation of each datum, both parts together, `(num_data,)`.
        factor: F.

    Raises:
        InvalidInput: Where `std` is not positive and finite, or shapes disagree.

    MPI: Not collective; every tensor is replicated.

    Example:
        >>> noise = LowRankNoise(std=0.01, factor=0.05 * torch.ones(num_data, 1))  # a common offset
    """

    additive = True

    def __init__(self, std: float | Tensor, factor: Tensor) -> None:
        self.factor = real_tensor("factor", factor)
        independent = checked_scale("std", "LowRankNoise", std)
        if self.factor.ndim != 2 or not bool(torch.isfinite(self.factor).all()):
            raise InvalidInput(f"factor has shape {tuple(self.factor.shape)}; it must be finite, of shape (num_data, rank).")
        if independent.ndim == 1 and len(independent) != len(self.factor):
            raise InvalidInput(
                f"std has {len(independent)} entries and factor {len(self.factor)} rows: both are one for each datum."
            )
        self._independent = independent.expand(len(self.factor))
        self.std = (self._independent.square() + self.factor.square().sum(1)).sqrt()
        self._directions, values, _ = torch.linalg.svd(self.factor / self._independent[:, None], full_matrices=False)
        self._shrink = (1.0 + values.square()).rsqrt() - 1.0
        self._log_det_root = self._independent.log().sum() + 0.5 * values.square().log1p().sum()

    def __repr__(self) -> str:
        return f"LowRankNoise({len(self.std)} data, rank {self.factor.shape[1]})"

    def check(self, y: Tensor) -> None:
        """Refuse data of another number; see `GaussianNoise.check`."""
        if self.std.shape != y.shape[-1:]:
            raise InvalidInput(f"factor is of {len(self.std)} data; y has {y.shape[-1]}.")

    def standardise(self, y: Tensor, prediction: Tensor) -> Tensor:
        """(I + W W')^(-1/2) D^(-1/2) (y - prediction), `(*batch, num_data)`: independent, of variance one under the model."""
        check_last_axes(y, prediction)
        self.check(y)
        residual = (y - prediction) / self._independent
        return residual + ((residual @ self._directions) * self._shrink) @ self._directions.T

    def log_prob(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Log p(y | prediction), `(*batch,)`, replicated."""
        z = self.standardise(y, prediction)
        return -0.5 * z.square().sum(-1) - self._log_det_root - 0.5 * y.shape[-1] * math.log(2.0 * math.pi)

    def sample(self, prediction: Tensor) -> Tensor:
        """Noisy data around `prediction`, `(*batch, num_data)`, from torch's generator; see `GaussianNoise.sample`."""
        common = torch.randn((*prediction.shape[:-1], self.factor.shape[1]), dtype=prediction.dtype)
        return prediction + self._independent * torch.randn_like(prediction) + common @ self.factor.T
