"""The pointwise variance of a field from its root: exactly, or from the dominant directions and draws for the rest.

With a symmetric G wanted is the diagonal of G^2. For orthonormal rows Q that nearly span the dominant directions of G,

    diag(G^2) = diag(G Q'Q G) + E[(G (I - Q'Q) w)^2],     w ~ N(0, I),

where the first part is a sum of squares of a few fields, and the second, small already, is estimated from draws.

References:
    Meyer, Musco, Musco, Woodruff (2021), Hutch++: optimal stochastic trace estimation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor

from fem_vi.bridge.layout import all_sum
from fem_vi.noise import standard_normal

EXACT_LIMIT = 5_000
"""Unknowns up to which there is one solve for each, and no error."""
DIRECTIONS = 256
DRAWS = 32
MOST_DRAWS = 1_024
KEY = 0x5EED


class Layout(Protocol):
    """How unknowns are spread over ranks."""

    @property
    def comm(self) -> MPI.Comm: ...  # noqa: D102
    @property
    def names(self) -> NDArray[np.int64]: ...  # noqa: D102
    @property
    def first(self) -> int: ...  # noqa: D102
    @property
    def num_global(self) -> int: ...  # noqa: D102


@torch.no_grad()
def squared_diagonal(G: Callable[[Tensor], Tensor], layout: Layout, tolerance: float, draws: int = 0) -> tuple[Tensor, int]:
    """The diagonal of G^2.

    Args:
        G: A symmetric matrix, on field tensors `(rows, n_owned)`.
        layout: How they are spread over ranks.
        tolerance: Root mean square, over the unknowns, of the relative standard error of the square roots; not used up to
            `EXACT_LIMIT` unknowns, where the answer is exact. At most 1,024 draws are made for it.
        draws: So many, whatever the tolerance; 0 to go by the tolerance.

    Returns:
        `(n_owned,)`, the same numbers, up to rounding, on any number of ranks; and the number of draws.

    MPI: Collective.
    """
    if layout.num_global <= EXACT_LIMIT:
        return _exact(G, layout), 0
    noise = _noise(layout, 0, DIRECTIONS)
    Q = _orthonormal(_orthonormal(G(noise), layout), layout)
    known = G(Q).square().sum(0)
    first, second = torch.zeros_like(known), torch.zeros_like(known)
    for drawn in range(DRAWS, (draws or MOST_DRAWS) + 1, DRAWS):
        w = _noise(layout, drawn, DRAWS)
        squares = G(w - all_sum(w @ Q.T, layout.comm) @ Q).square()
        first += squares.sum(0)
        second += squares.square().sum(0)
        mean = first / drawn
        spread = (second / drawn - mean.square()).clamp_min(0.0) / drawn
        relative = spread / (2.0 * (known + mean)).square()  # of the square root: half that of the variance
        if not draws and float(all_sum(relative.sum(), layout.comm)) <= layout.num_global * tolerance**2:
            break
    return known + mean, drawn


def _exact(G: Callable[[Tensor], Tensor], layout: Layout) -> Tensor:
    """Unit vectors of all ranks, a block at a time."""
    own = torch.arange(len(layout.names)) + layout.first
    total = torch.zeros(len(own), dtype=torch.float64)
    for start in range(0, layout.num_global, 256):
        columns = torch.arange(start, min(start + 256, layout.num_global))
        total += G((columns[:, None] == own[None, :]).to(torch.float64)).square().sum(0)
    return total


def _noise(layout: Layout, part: int, rows: int) -> Tensor:
    return torch.from_numpy(standard_normal(KEY + part, rows, layout.names))


def _orthonormal(rows: Tensor, layout: Layout) -> Tensor:
    """Rows with the same span, orthonormal up to the square of the condition; once more makes that rounding."""
    gram = all_sum(rows @ rows.T, layout.comm)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-12 * values[-1]
    return (vectors[:, kept] / values[kept].sqrt()).T @ rows
