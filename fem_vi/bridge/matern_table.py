"""What a Matern root needs to know of itself and cannot see in one product: pointwise deviations, and its determinant.

At one length they are computed when first asked for. For lengths that are differentiated or change they are interpolated: both
are analytic functions of log kappa with their nearest singularities at a distance of pi / 2 from the real axis (where an
eigenvalue of K vanishes), so that a polynomial through Chebyshev points converges geometrically, and its derivative is that of
the function.

References:
    Trefethen (2013), Approximation theory and approximation practice, theorem 8.2.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from fem_vi.bridge.layout import localise
from fem_vi.bridge.matern_root import MaternRoot
from fem_vi.bridge.pointwise import Layout, squared_diagonal

ACCURACY = 1e-7


class Statistics(Protocol):
    """Functions of kappa, a scalar."""

    def log_sd(self, kappa: Tensor) -> Tensor:
        """Logarithm of the standard deviation of R xi at each node, `(n_owned,)`. Collective."""

    def logdet(self, kappa: Tensor) -> Tensor:
        """log |det R|, scalar, replicated. Collective."""


class AtOneLength:
    """Statistics for one kappa, each computed when first asked for, and then kept."""

    def __init__(self, root: MaternRoot, layout: Layout, tolerance: float) -> None:
        self.root, self.layout, self.tolerance = root, layout, tolerance
        self._log_sd: Tensor | None = None
        self._logdet: Tensor | None = None

    def log_sd(self, kappa: Tensor) -> Tensor:
        """Logarithm of the standard deviation of R xi at each node, `(n_owned,)`. Collective."""
        if self._log_sd is None:
            self._log_sd, _ = log_deviation(self.root, self.layout, float(kappa.detach()), self.tolerance)
        return self._log_sd

    def logdet(self, kappa: Tensor) -> Tensor:
        """log |det R|, scalar, replicated. Collective."""
        if self._logdet is None:
            self._logdet = torch.tensor(self.root.logdet(float(kappa.detach())), dtype=torch.float64)
        return self._logdet


class AtAnyLength:
    """Statistics interpolated between kappas, to a relative accuracy of 1e-7; what is not asked for is not tabulated.

    Args:
        base: Statistics of the same root.
        kappas: The smallest and the largest kappa.
    """

    def __init__(self, base: AtOneLength, kappas: tuple[float, float]) -> None:
        self._root, self._layout, self._tolerance = base.root, base.layout, base.tolerance
        low, high = (math.log(kappa) for kappa in kappas)
        self._middle, self._half = 0.5 * (low + high), 0.5 * (high - low)
        height = 0.5 * math.pi / self._half
        degree = max(4, math.ceil(-math.log(ACCURACY) / math.log(height + math.hypot(1.0, height))))
        self._nodes = torch.cos(torch.pi * torch.arange(degree + 1, dtype=torch.float64) / degree)
        self._weights = torch.tensor([(-1.0) ** k for k in range(degree + 1)], dtype=torch.float64)
        self._weights[[0, -1]] *= 0.5
        self._log_sd: Tensor | None = None
        self._logdet: Tensor | None = None

    def log_sd(self, kappa: Tensor) -> Tensor:
        """Logarithm of the standard deviation of R xi at each node, `(n_owned,)`. Collective."""
        if self._log_sd is None:
            rows, draws = [], 0
            for node in self._kappas():
                row, draws = log_deviation(self._root, self._layout, node, self._tolerance, draws)
                rows.append(row)
            self._log_sd = torch.stack(rows)
        return localise(self._basis(kappa), self._root.comm) @ self._log_sd

    def logdet(self, kappa: Tensor) -> Tensor:
        """log |det R|, scalar, replicated. Collective."""
        if self._logdet is None:
            self._logdet = torch.tensor([self._root.logdet(node) for node in self._kappas()], dtype=torch.float64)
        return self._basis(kappa) @ self._logdet

    def _kappas(self) -> list[float]:
        return [math.exp(self._middle + self._half * float(node)) for node in self._nodes]

    def _basis(self, kappa: Tensor) -> Tensor:
        """The values at kappa of the polynomials that are one at a node and zero at the others, by products."""
        x = (kappa.log() - self._middle) / self._half
        gaps = x - self._nodes
        others = torch.stack([torch.cat([gaps[:k], gaps[k + 1 :]]).prod() for k in range(len(gaps))])
        size = 2.0 ** (len(gaps) - 2) / (len(gaps) - 1)  # one over the product of a node's distances, by its weight
        return size * self._weights * others


def log_deviation(root: MaternRoot, layout: Layout, kappa: float, tolerance: float, draws: int = 0) -> tuple[Tensor, int]:
    """Logarithm of the standard deviation of R xi at each node, `(n_owned,)`, and the draws behind it. Collective."""
    square, draws = squared_diagonal(lambda xi: root.symmetric(kappa, xi), layout, tolerance, draws)
    return root.spread.log() + 0.5 * square.log(), draws
