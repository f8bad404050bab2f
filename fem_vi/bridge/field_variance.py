"""What the variance of a field prior is near the boundary."""

from __future__ import annotations

from dataclasses import dataclass

from fem_vi.arguments import positive


@dataclass(frozen=True)
class UniformVariance:
    """Divide by the pointwise standard deviation: it is `std` everywhere, on the boundary and in corners too.

    Exact up to 5,000 unknowns. Beyond, the deviations come from 256 dominant directions and as many draws as the tolerance takes,
    at most 1,024: some 600 to 1,500 solves with a kept factorisation, once for each prior, when it is first used. With an
    iterative solver, where a solve may take seconds, `PlainVariance` may be the better choice.

    Attributes:
        tolerance: Root mean square, over the unknowns, of the relative standard error of the standard deviation. The 1,024 draws
            reach it where the length is not short: on a square with 4,225 unknowns 0.002 (0.01 at the worst of them) at a
            length of 0.15 sides, 0.01 (0.04) at 0.05.

    References:
        Daon, Stadler (2018), Mitigating the influence of the boundary on PDE-based covariance operators.
    """

    tolerance: float = 0.002

    def __post_init__(self) -> None:
        positive("UniformVariance: tolerance", self.tolerance)


@dataclass(frozen=True)
class PlainVariance:
    """Take the field as the Robin condition leaves it.

    On the unit square with `length` 0.15 the pointwise standard deviation is within 8 % of `std` everywhere on a mesh of 40 x 40
    cells with alpha = 2; on coarser ones, in three dimensions and for other alpha it is less exact: on a cube of 16 cells a side
    it is 1.03 times `std` or more at a length of 0.2, and 1.7 times in corners.

    References:
        Roininen, Huttunen, Lasanen (2014), Whittle-Matern priors for Bayesian statistical inversion.
    """
