"""What every encoder is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fem_vi.arguments import instance, whole
from fem_vi.vi.posterior.frame import Frame


class Encoder(nn.Module):
    """A network that makes features of data sets, with scales that are set once, before it is fitted.

    Args:
        num_features: Last axis of what `forward(y)` returns.

    Attributes:
        num_features: That.
        is_scaled: Whether the scales are set.

    MPI: Not collective; parameters are replicated.
    """

    is_scaled: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.register_buffer("is_scaled", torch.tensor(False))

    def scale_by(self, y: Any) -> None:
        """Take scales from many data sets."""
        raise NotImplementedError

    def forward(self, y: Any) -> Tensor:
        """Features, `(*batch, num_features)`."""
        raise NotImplementedError

    def read(self, y: Any) -> tuple[Tensor, Frame | None]:
        """Features, and coordinates of the unknowns that move with the data, where the encoder has any."""
        return self(y), None


def scales_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the first axis; one where that is zero."""
    std = values.std(0)
    return values.mean(0), torch.where(std > 0, std, torch.ones_like(std))


def widths_of(first: int, hidden: Sequence[int]) -> list[int]:
    """The widths of layers behind a first one.

    Raises:
        InvalidInput: Where `hidden` is no sequence of whole numbers above zero.
    """
    instance("hidden", hidden, Sequence)
    return [first, *(whole("hidden: an entry", width, least=1) for width in hidden)]


def dense(widths: list[int]) -> nn.Sequential:
    """Linear layers of these widths, each with a smooth nonlinearity behind it; in float64."""
    layers: list[nn.Module] = []
    for k in range(len(widths) - 1):
        layers += [nn.Linear(widths[k], widths[k + 1], dtype=torch.float64), nn.SiLU()]
    return nn.Sequential(*layers)
