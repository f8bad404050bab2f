"""How data scatter around predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fem_vi.errors import InvalidInput
from fem_vi.vi.real_tensor import real_tensor


def check_last_axes(y: Tensor, prediction: Tensor) -> None:
    """Refuse data and predictions of different lengths.

    Raises:
        InvalidInput: Where the last axes differ.
    """
    if prediction.ndim == 0 or y.ndim == 0 or prediction.shape[-1] != y.shape[-1]:
        raise InvalidInput(f"prediction has shape {tuple(prediction.shape)}; y has shape {tuple(y.shape)}: last axes must agree.")


def checked_scale(name: str, kind: str, value: object) -> Tensor:
    """A positive number, or one for each datum.

    Args:
        name: How the error calls it.
        kind: The class that takes it.
        value: What the user passed.

    Returns:
        `()` or `(num_data,)`.

    Raises:
        InvalidInput: Where it is no number or vector of numbers, or not positive and finite.
    """
    scale = real_tensor(name, value)
    if scale.ndim > 1:
        raise InvalidInput(f"{name} has shape {tuple(scale.shape)}; {kind} takes a number or shape (num_data,).")
    wrong = torch.nonzero(~(torch.isfinite(scale) & (scale > 0)).reshape(-1)).flatten().tolist()
    if wrong:
        where = f" at {wrong[:10]} ({len(wrong)} of {len(scale)} data)" if scale.ndim else ""
        raise InvalidInput(
            f"{name} is {float(scale.reshape(-1)[wrong[0]])}{where}; it must be positive and finite. A datum without noise "
            "is a constraint, not a likelihood."
        )
    return scale


def check_count(name: str, scale: Tensor, y: Tensor) -> None:
    """Refuse more or fewer scales than data.

    Raises:
        InvalidInput: Where there is not one, nor one for each datum.
    """
    if scale.ndim == 1 and scale.shape != y.shape[-1:]:
        raise InvalidInput(f"{name} has {len(scale)} entries; y has {y.shape[-1]}. Give one number, or one for each datum.")


class GaussianNoise:
    """Independent normal noise, y = prediction + N(0, std^2).

    Args:
        std: Noise standard deviation, in the unit of the data: one for all data, or one for each, `(num_data,)`, replicated.

    Raises:
        InvalidInput: Where `std` is no number or vector of numbers, or not positive and finite.

    MPI: Not collective; every tensor is replicated.

    Example:
        >>> GaussianNoise(std=0.01).log_prob(y, prediction)
    """

    additive = True

    def __init__(self, std: float | Tensor) -> None:
        self.std = checked_scale("std", "GaussianNoise", std)

    def __repr__(self) -> str:
        return f"GaussianNoise(std={self.std.item()!r})" if self.std.ndim == 0 else f"GaussianNoise(std={len(self.std)} values)"

    def check(self, y: Tensor) -> None:
        """Say whether the noise fits the data.

        Args:
            y: Data, `(num_data,)`, replicated.

        Raises:
            InvalidInput: Where there are more or fewer standard deviations than data.
        """
        check_count("std", self.std, y)

    def at(self, index: Tensor) -> GaussianNoise:
        """The noise of some of the data, `(batch,)`."""
        return self if self.std.ndim == 0 else GaussianNoise(self.std[index])

    def standardise(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Residuals in units of the noise, `(y - prediction) / std`.

        Args:
            y: Data, `(num_data,)` or `(*batch, num_data)`.
            prediction: `(*batch, num_data)`, replicated.

        Returns:
            `(*batch, num_data)`.

        Raises:
            InvalidInput: Where the last axes differ.
        """
        check_last_axes(y, prediction)
        self.check(y)
        return (y - prediction) / self.std

    def log_prob(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Log p(y | prediction), summed over the data.

        Args:
            y: Data, `(num_data,)` or `(*batch, num_data)`, replicated.
            prediction: `(*batch, num_data)`, replicated.

        Returns:
            `(*batch,)`, replicated.

        Raises:
            InvalidInput: Where the last axes differ.
        """
        z = self.standardise(y, prediction)
        log_std = self.std.log().expand(y.shape[-1:])
        return -0.5 * z.square().sum(-1) - log_std.sum() - 0.5 * y.shape[-1] * math.log(2.0 * math.pi)

    def sample(self, prediction: Tensor) -> Tensor:
        """Noisy data around `prediction`, `(*batch, num_data)`, from torch's generator.

        MPI: Not collective; the ranks agree where their generators do (`torch.manual_seed` with one seed).
        """
        return prediction + self.std * torch.randn_like(prediction)
