"""Decoders: what predicted data have wrong, whatever the state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fem_vi.arguments import whole


class AdditiveError(nn.Module):
    """A decoder: d(y) = y + b + W2 tanh(W1 y + b1), zero but for y when it is new. What all data sets have wrong in common.

    Args:
        num_data: Of a data set.
        hidden: Width of the hidden layer; 0 leaves the constant b.

    Example:
        >>> decoder = AdditiveError(num_data=12)
    """

    def __init__(self, num_data: int, *, hidden: int = 0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_data, dtype=torch.float64))
        self.layers: nn.Module | None = None
        if whole("hidden", hidden, least=0):
            last = nn.Linear(hidden, num_data, bias=False, dtype=torch.float64)
            nn.init.zeros_(last.weight)
            self.layers = nn.Sequential(nn.Linear(num_data, hidden, dtype=torch.float64), nn.Tanh(), last)

    def forward(self, y: Tensor) -> Tensor:
        """Corrected predictions, `(*batch, num_data)`."""
        return y + self.bias if self.layers is None else y + self.bias + self.layers(y)
