"""Expectations under a normal distribution, exact for quadratic functions: points on a sphere of random size and orientation.

For eps ~ N(0, I) with p entries, orthonormal q_1, ..., q_k drawn uniformly and rho^2 ~ chi^2 with p + 2 degrees of freedom,

    E f(eps) = E [ (1 - p / rho^2) f(0) + p / rho^2  1/(2k) sum_j (f(rho q_j) + f(-rho q_j)) ]

for every f. Where f is a polynomial of degree three at most and k = p, the sum is its expectation already, whatever rho and q_j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fem_vi.arguments import whole
from fem_vi.errors import InvalidInput


@dataclass(frozen=True)
class OneDraw:
    """One independent draw for each z."""


@dataclass(frozen=True)
class SphericalRadial:
    """The stochastic spherical-radial rule of degree three: 2 directions + 1 points for each z, made of one noise for all z.

    It has no noise where log p(r = 0 | u, z), and the rest, are quadratic in u: for a linear weak form and a normal q(u | z),
    whose variances are then found as precisely as its mean. It is unbiased in any case. With one direction for each entry of the
    noise it is exact for quadratics; with fewer, for many unknowns, it is not.

    Attributes:
        directions: How many; None for one for each entry of the noise.

    References:
        Genz, Monahan (1998), Stochastic integration rules for infinite regions.
    """

    directions: int | None = None

    def __post_init__(self) -> None:
        if self.directions is not None:
            whole("SphericalRadial: directions", self.directions, least=1)

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        """Points and what they weigh, by torch's generator.

        Args:
            size: Entries of the noise, p.

        Returns:
            `(2 directions + 1, size)`, and their weights, which sum to one and may be negative, `(2 directions + 1,)`.

        Raises:
            InvalidInput: Where there are more directions than entries.

        MPI: Not collective; replicated where torch's generators agree.
        """
        k = size if self.directions is None else self.directions
        if k > size:
            raise InvalidInput(f"SphericalRadial: {k} directions; the noise has {size} entries. Give at most as many, or None.")
        given, triangle = torch.linalg.qr(torch.randn(size, k, dtype=torch.float64))
        q = (given * triangle.diagonal().sign()).T  # uniform among all rotations, as of a QR whose diagonal is positive
        square = torch.randn(size + 2, dtype=torch.float64).square().sum()
        points = square.sqrt() * torch.cat([q, -q])
        outer = (size / square).expand(2 * k) / (2 * k)
        return torch.cat([points.new_zeros(1, size), points]), torch.cat([1.0 - outer.sum()[None], outer])
