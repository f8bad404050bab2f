"""Features of a vector of data, by a dense network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fem_vi.arguments import whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.encoder.encoder import Encoder, dense, scales_of, widths_of
from fem_vi.vi.sensors import SensorData


class DenseEncoder(Encoder):
    """Standardised data, and a dense network's functions of them side by side.

        features(y) = [z, h(z)],   z = (y - mean) / std

    The first part lets a head with one linear layer be an affine function of the data, which is what the posterior mean of a
    linear problem is.

    Args:
        num_data: Length of y.
        hidden: Widths of the layers; none for z alone.

    Attributes:
        mean: Of the training data, `(num_data,)`; set once, by `scale_by`.
        std: Of the training data, `(num_data,)`.
        num_features: Last axis of what it returns.

    Raises:
        InvalidInput: Where a size is no whole number above zero.

    MPI: Not collective; parameters are replicated, in float64, drawn from torch's generator.

    Example:
        >>> encoder = DenseEncoder(60, hidden=(128, 128))
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_data: int, *, hidden: Sequence[int] = (64, 64)) -> None:
        num_data = whole("num_data", num_data, least=1)
        widths = widths_of(num_data, hidden)
        super().__init__(num_data + (widths[-1] if hidden else 0))
        self.num_data = num_data
        self.network = dense(widths)
        self.register_buffer("mean", torch.zeros(self.num_data, dtype=torch.float64))
        self.register_buffer("std", torch.ones(self.num_data, dtype=torch.float64))

    @torch.no_grad()
    def scale_by(self, y: Tensor) -> None:
        """Take mean and standard deviation of data sets `(count, num_data)`. What is constant keeps a deviation of one."""
        mean, std = scales_of(y)
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.is_scaled.fill_(True)

    def forward(self, y: Tensor | SensorData) -> Tensor:
        """Features, `(*batch, num_features)`, of data `(*batch, num_data)`."""
        if not isinstance(y, Tensor) or y.ndim == 0 or y.shape[-1] != self.num_data:
            given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise InvalidInput(f"DenseEncoder: y is {given}; it must be a tensor whose last axis has {self.num_data} entries.")
        z = (y - self.mean) / self.std
        return torch.cat([z, self.network(z)], dim=-1) if len(self.network) else z
