"""Features of scattered sensors of varying number and place, by attention among them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fem_vi.arguments import whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.encoder.encoder import Encoder, dense, scales_of
from fem_vi.vi.sensors import SensorData


class SetEncoder(Encoder):
    """A function of a set of (position, value) pairs, whatever their order and number.

        t_i = embed(x_i, sin(2^k x_i), cos(2^k x_i), y_i),   t <- t + attend(t),   t <- t + h(t),   features = mean_i g(t_i)

    with positions and values standardised, and the number of sensors as one more feature. Without layers of attention it is a
    deep set, quicker and less able to compare sensors with their neighbours.

    Args:
        dim: Coordinates of a position.
        width: Of the embedding and of the features.
        layers: Of attention.
        heads: Of attention in each layer; must divide the width.
        frequencies: Octaves of sines and cosines of the positions.

    Attributes:
        origin, extent: Of the positions in the training data, `(dim,)`; set once, by `scale_by`.
        mean, std: Of the values there, scalars.

    Raises:
        InvalidInput: Where a size is no whole number, or the heads do not divide the width.

    MPI: Not collective; parameters are replicated, in float64, drawn from torch's generator.

    References:
        Zaheer, Kottur, Ravanbakhsh, Poczos, Salakhutdinov, Smola (2017), Deep sets.
        Lee, Lee, Kim, Kosiorek, Choi, Teh (2019), Set transformer.

    Example:
        >>> encoder = SetEncoder(2)
    """

    origin: Tensor
    extent: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, *, width: int = 64, layers: int = 1, heads: int = 4, frequencies: int = 3) -> None:
        super().__init__(whole("width", width, least=1) + 1)
        self.dim, self.frequencies = whole("dim", dim, least=1), whole("frequencies", frequencies, least=0)
        whole("layers", layers, least=0)
        if layers and width % whole("heads", heads, least=1):
            raise InvalidInput(f"heads is {heads}; it must divide the width, {width}.")
        self.embed = dense([self.dim * (1 + 2 * self.frequencies) + 1, width, width])
        self.blocks = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.last = dense([width, width])
        self.register_buffer("origin", torch.zeros(self.dim, dtype=torch.float64))
        self.register_buffer("extent", torch.ones(self.dim, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("std", torch.ones((), dtype=torch.float64))

    @torch.no_grad()
    def scale_by(self, y: Any) -> None:
        """Take the range of positions, and mean and standard deviation of values."""
        checked = self._checked(y)
        origin, extent = scales_of(checked.points[checked.present])
        mean, std = scales_of(checked.values[checked.present])
        for buffer, value in ((self.origin, origin), (self.extent, extent), (self.mean, mean), (self.std, std)):
            buffer.copy_(value)
        self.is_scaled.fill_(True)

    def forward(self, y: Any) -> Tensor:
        """Features, `(*batch, num_features)`."""
        y = self._checked(y)
        x = (y.points - self.origin) / self.extent
        waves = [wave(2.0**k * x) for k in range(self.frequencies) for wave in (torch.sin, torch.cos)]
        values = ((y.values - self.mean) / self.std)[..., None]
        tokens = self.embed(torch.cat([x, *waves, values], dim=-1))
        for block in self.blocks:
            tokens = block(tokens, y.present)
        count = y.present.sum(-1, keepdim=True).clamp_min(1).to(tokens.dtype)
        pooled = (self.last(tokens) * y.present[..., None]).sum(-2) / count
        return torch.cat([pooled, count.log() - 3.0], dim=-1)

    def _checked(self, y: Any) -> SensorData:
        if not isinstance(y, SensorData) or y.points.shape[-1] != self.dim:
            given = f"points {tuple(y.points.shape)}" if isinstance(y, SensorData) else type(y).__name__
            raise InvalidInput(f"SetEncoder: y has {given}; it must be SensorData with points (*batch, most, {self.dim}).")
        return y


class Attention(nn.Module):
    """Each sensor looks at all others, then thinks for itself; residual, normalised before.

    Args:
        width: Of the tokens.
        heads: That look.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, dtype=torch.float64) for _ in range(2))
        self.project = nn.Linear(width, 3 * width, dtype=torch.float64)
        self.mix = nn.Linear(width, width, dtype=torch.float64)
        self.think = nn.Sequential(dense([width, 2 * width]), nn.Linear(2 * width, width, dtype=torch.float64))

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Tokens, `(*batch, most, width)`; those that are not present are not looked at."""
        parts = self.project(self.norms[0](tokens)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0)
        query, key, value = (part.movedim(-2, -3) for part in parts)  # (*batch, heads, most, width / heads)
        weights = query @ key.mT / math.sqrt(key.shape[-1])
        weights = weights.masked_fill(~present[..., None, None, :], -torch.inf).softmax(-1)
        tokens = tokens + self.mix((weights @ value).movedim(-3, -2).flatten(-2))
        return tokens + self.think(self.norms[1](tokens))
