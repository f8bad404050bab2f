"""`KarhunenLoeveField`: a Gaussian field as a sum of a few modes of its covariance, with independent normal coefficients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from fem_vi.arguments import instance, is_number, positive, whole
from fem_vi.bridge.field_prior import MaternField
from fem_vi.bridge.layout import all_sum, as_numpy, check_last_axis, gather, localise, num_global, num_owned
from fem_vi.bridge.modes import combine
from fem_vi.errors import InvalidInput
from fem_vi.noise import standard_normal
from fem_vi.parallel import raise_on_all
from fem_vi.pde.fields import check_vertex_space, lumped_mass, node_names
from fem_vi.pde.inputs import Array
from fem_vi.pde.modes import align_modes, dominant_modes
from fem_vi.vi.prior import GaussianVector

Kernel = Callable[[Array, Array], Array]
DENSE_LIMIT = 10_000
KEY = 0x1CE
EXTRA = 4
"""Modes beyond the last, so that a space of equal eigenvalues is not cut in two before its basis is chosen."""


@dataclass(frozen=True)
class Exponential:
    """c(x, y) = std^2 exp(-|x - y| / length).

    Attributes:
        std: Standard deviation, unit of the field.
        length: Correlation length, mesh units.
    """

    std: float
    length: float

    def __post_init__(self) -> None:
        positive("Exponential: std", self.std)
        positive("Exponential: length", self.length)

    def __call__(self, x: Array, y: Array) -> Array:
        """Covariances, `(n, m)`, of points `(n, 3)` and `(m, 3)`."""
        return self.std**2 * np.exp(-_distances(x, y) / self.length)


@dataclass(frozen=True)
class SquaredExponential:
    """c(x, y) = std^2 exp(-|x - y|^2 / (2 length^2)).

    Attributes:
        std: Standard deviation, unit of the field.
        length: Correlation length, mesh units.
    """

    std: float
    length: float

    def __post_init__(self) -> None:
        positive("SquaredExponential: std", self.std)
        positive("SquaredExponential: length", self.length)

    def __call__(self, x: Array, y: Array) -> Array:
        """Covariances, `(n, m)`, of points `(n, 3)` and `(m, 3)`."""
        return self.std**2 * np.exp(-0.5 * (_distances(x, y) / self.length) ** 2)


@dataclass(frozen=True)
class Modes:
    """So many modes.

    Attributes:
        count: At least 1.
    """

    count: int

    def __post_init__(self) -> None:
        whole("Modes: count", self.count, least=1)


@dataclass(frozen=True)
class Energy:
    """As many modes as it takes to have a share of the field's variance, integrated over the mesh.

    Attributes:
        share: Between 0 and 1.
    """

    share: float

    def __post_init__(self) -> None:
        if not (is_number(self.share) and 0.0 < self.share < 1.0):
            raise InvalidInput(f"Energy: share is {self.share!r}; it must be a number between 0 and 1, such as 0.95.")


class KarhunenLoeveField(GaussianVector):
    """A Gaussian field with few unknowns: xi ~ N(0, I), replicated, and the field of each xi.

        field(xi) = mean + sum_k sqrt(lambda_k) phi_k xi_k,      integral C(x, y) phi_k(y) dy = lambda_k phi_k(x),

    with modes that are orthonormal in the lumped inner product of L2. It is the prior of the vector xi, `(num_modes,)`, and as
    such takes every posterior family for vectors; the forward map begins with `prior.field`.

    Args:
        V: Scalar continuous Lagrange space of degree 1.
        covariance: A `MaternField` on V, whose mean the field takes too; or a function of two sets of points, NumPy `(n, 3)` and
            `(m, 3)`, that returns their covariances `(n, m)`, such as `Exponential(std, length)`. The latter needs a dense
            matrix, of n_global columns and n_owned rows on each rank, and at most 10,000 unknowns.
        truncation: `Energy(share)` or `Modes(count)`.
        mean: Number, or field tensor `(n_owned,)`, with a function.

    Attributes:
        eigenvalues: lambda_k, descending, `(num_modes,)`, replicated.
        modes: phi_k, `(num_modes, n_owned)`; the same, signs included, on any number of ranks.
        energy: The share of the integrated variance that the modes have.
        field_mean: Mean of the field, `(n_owned,)`.

    Raises:
        InvalidInput: Where V is another space, an argument is of another type, or a dense matrix would be too large.
        SolveFailed: Where SLEPc does not find the modes.

    MPI: Collective.

    References:
        Ghanem, Spanos (1991), Stochastic finite elements: a spectral approach.

    Example:
        >>> prior = KarhunenLoeveField(V, MaternField(V, std=1.0, length=0.5), truncation=Energy(0.9))
        >>> problem = InverseProblem(prior, lambda xi: observe(solve(prior.field(xi))), GaussianNoise(0.01), y)
    """

    def __init__(
        self, V: Any, covariance: MaternField | Kernel, *, truncation: Modes | Energy = Energy(0.95), mean: float | Tensor = 0.0
    ) -> None:
        check_vertex_space(V)
        comm = V.mesh.comm
        with raise_on_all(comm):
            instance("KarhunenLoeveField: truncation", truncation, Modes, Energy)
            _check(V, covariance, mean)
        self.V = V
        self.mass = torch.from_numpy(lumped_mass(V))
        names = node_names(V)
        if isinstance(covariance, MaternField):
            self.field_mean = covariance.mean
            multiply: Callable[[Tensor], Tensor] = covariance.multiply_covariance
            variance = covariance.variance.detach()
        else:
            self.field_mean = torch.as_tensor(mean, dtype=torch.float64).expand(num_owned(V))
            multiply, variance = _dense(V, covariance)
        root = self.mass.sqrt()
        trace = float(all_sum((self.mass * variance).sum(), comm))

        def operator(x: Array) -> Array:
            with torch.no_grad():
                return as_numpy(root * multiply(root * torch.from_numpy(np.array(x))))

        values, vectors = _truncated(operator, names, truncation, trace, comm)
        self.eigenvalues = torch.from_numpy(values)
        self.modes = torch.from_numpy(vectors) / root
        self.energy = float(self.eigenvalues.sum()) / trace
        super().__init__(torch.zeros(len(values), dtype=torch.float64), comm=comm)

    def __repr__(self) -> str:
        return f"KarhunenLoeveField({self.num_global} modes with {100 * self.energy:.3g} % of the variance)"

    def field(self, xi: Tensor) -> Tensor:
        """The field of each vector of coefficients; differentiable.

        Args:
            xi: `(*batch, num_modes)`, replicated.

        Returns:
            Field tensor, `(*batch, n_owned)`.

        Raises:
            InvalidInput: Where the last axis of xi is another.

        MPI: Not collective forward, but for the check; collective backward.
        """
        with raise_on_all(self.comm):
            check_last_axis("KarhunenLoeveField: xi", xi, self.num_global, "one for each mode.")
        c = localise(xi * self.eigenvalues.sqrt(), self.comm)
        return combine(c, self.modes, self.field_mean)

    def coefficients(self, m: Tensor) -> Tensor:
        """The coefficients of the projection of fields onto the modes: of `field(xi)`, xi.

        Args:
            m: Field tensor, `(*batch, n_owned)`.

        Returns:
            `(*batch, num_modes)`, replicated; differentiable.

        MPI: Collective.
        """
        return all_sum(((m - self.field_mean) * self.mass) @ self.modes.T, self.comm) / self.eigenvalues.sqrt()

    @property
    def field_variance(self) -> Tensor:
        """Pointwise variance of the field, `(n_owned,)`: what the modes have of it."""
        return self.eigenvalues @ self.modes.square()


def _truncated(
    operator: Callable[[Array], Array], names: Any, truncation: Modes | Energy, trace: float, comm: Any
) -> tuple[Array, Array]:
    """Eigenvalues, and aligned orthonormal eigenvectors, as many as asked for."""
    count = truncation.count if isinstance(truncation, Modes) else 16
    total = int(all_sum(torch.tensor(len(names)), comm))
    if count > total:
        raise InvalidInput(f"KarhunenLoeveField: {count} modes were asked for; the space has {total} unknowns.")
    start = standard_normal(KEY, 1, names)[0]
    while True:
        values, vectors = dominant_modes(operator, start, count + EXTRA, comm)
        if isinstance(truncation, Modes):
            kept = count
            break
        shares = np.cumsum(values) / trace
        if shares[min(count, len(values)) - 1] >= truncation.share or count >= total:
            kept = min(int(np.searchsorted(shares, truncation.share)) + 1, len(values))
            break
        count *= 2
    aligned = align_modes(values, vectors, standard_normal(KEY + 1, len(values), names), comm)
    return values[:kept], aligned[:kept]


def _dense(V: Any, kernel: Kernel) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The product with the covariance matrix of the nodes, and its diagonal."""
    x = V.tabulate_dof_coordinates()[: num_owned(V)]
    everywhere = as_numpy(gather(torch.from_numpy(x.T.copy()), V)).T
    rows = torch.from_numpy(np.asarray(kernel(x, everywhere), dtype=np.float64))
    with raise_on_all(V.mesh.comm):
        if tuple(rows.shape) != (len(x), len(everywhere)):
            raise InvalidInput(
                f"KarhunenLoeveField: covariance returned shape {tuple(rows.shape)} for {len(x)} and {len(everywhere)} points; "
                f"expected {(len(x), len(everywhere))}."
            )
    own = torch.from_numpy(np.array([float(kernel(point, point)[0, 0]) for point in x[:, None]]))
    return lambda values: rows @ gather(values, V), own


def _check(V: Any, covariance: object, mean: object) -> None:
    if isinstance(covariance, MaternField):
        if covariance.V is not V:
            raise InvalidInput(
                "KarhunenLoeveField: the MaternField lives on another space than V. Pass KarhunenLoeveField(prior.V, prior)."
            )
        if not (is_number(mean) and mean == 0.0):
            raise InvalidInput("KarhunenLoeveField: the mean is that of the MaternField; build that with mean=...")
        return
    if isinstance(covariance, type) or not callable(covariance):
        raise InvalidInput(
            f"KarhunenLoeveField: covariance is {covariance!r:.80}; it must be a MaternField or a function such as "
            "Exponential(1.0, 0.3)."
        )
    if num_global(V) > DENSE_LIMIT:
        raise InvalidInput(
            f"KarhunenLoeveField: a function as covariance needs a dense matrix, and V has {num_global(V)} unknowns, more than "
            f"{DENSE_LIMIT}. Pass a MaternField, which needs none."
        )
    fits = tuple(mean.shape) in ((), (num_owned(V),)) if isinstance(mean, Tensor) else is_number(mean)
    if not fits:
        raise InvalidInput(f"KarhunenLoeveField: mean must be a number or have shape {(num_owned(V),)} (owned).")


def _distances(x: Array, y: Array) -> Array:
    return np.asarray(cdist(x, y))
