"""`MaternField`: a Gaussian field with Matern covariance, by way of a stochastic PDE on the mesh.

A Matern field with smoothness nu = alpha - d/2 solves (kappa^2 - Laplacian)^(alpha/2) x = W with white noise W. On the mesh

    m = mean + std diag(1 / s) R(kappa) xi,      xi ~ N(0, I),

where R (`fem_vi.bridge.matern_root`) takes a few sparse solves and so does its inverse, and s is the standard deviation of R xi
at each node, which differs from one near the boundary. Distances in xi keep their meaning as the mesh is refined.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
import ufl
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution

from fem_vi.arguments import instance, positive
from fem_vi.bridge.field_file import write_fields
from fem_vi.bridge.field_variance import PlainVariance, UniformVariance
from fem_vi.bridge.layout import OWNED, all_sum, check_last_axis, gather, localise, num_global, num_owned, owned_range
from fem_vi.bridge.matern_arguments import (
    check_mean,
    checked_metric,
    checked_range,
    detached,
    hyperparameter,
    initial_number,
    smoothness,
)
from fem_vi.bridge.matern_root import MaternRoot
from fem_vi.bridge.matern_table import AtAnyLength, AtOneLength, Statistics
from fem_vi.errors import InvalidInput
from fem_vi.noise import standard_normal
from fem_vi.parallel import all_values, raise_on_all, shared_seed
from fem_vi.pde.fields import check_vertex_space, node_names
from fem_vi.pde.petsc_options import Option, check_options
from fem_vi.pde.rational import LEAST_TOLERANCE


@dataclass(frozen=True)
class _Layout:
    comm: MPI.Comm
    names: NDArray[np.int64]
    first: int
    num_global: int


class MaternField(Distribution):
    """A Gaussian field whose covariance is that of Matern; near the boundary, about that, with the same variance.

        C(r) = std^2 2^(1 - nu) / Gamma(nu) (kappa r)^nu K_nu(kappa r),    kappa = sqrt(2 nu) / length,    nu = alpha - d / 2,

    where r^2 = (x - y)' H^-1 (x - y) with a constant metric H. Fields have almost nu derivatives (in the mean square sense).

    A `torch.distributions.Distribution` over field tensors `(*batch, n_owned)`; log_prob is the global number on every
    rank. `prior.at(std=..., length=...)` is the prior for other hyperparameters, differentiable in them.

    Where alpha is 2, 4, ... the operator's power is exact. Any other alpha > d / 2 takes a rational function of the operator,
    with some 3 to 8 factorisations, that changes the standard deviation of no mode by more than `tolerance`, relatively; draws,
    densities and whitening are exact for the field that this defines.

    Args:
        V: Scalar continuous Lagrange space of degree 1; the mesh should resolve `length` with several cells.
        std: Marginal standard deviation, unit of the field.
        length: Correlation length, mesh units, in the convention above (that of Rasmussen, Williams 2006).
        mean: Number, or field tensor `(n_owned,)`.
        alpha: Power of the operator; nu = alpha - d / 2 must be positive.
        metric: H, `(d, d)`, symmetric positive definite: an array, or a UFL expression that varies in space. The correlation
            length along a unit vector e is length sqrt(e' H e): numpy.diag([1, 0.01]) makes it a tenth along the second axis.
        variance: What to do near the boundary: `UniformVariance()` or `PlainVariance()`.
        lengths: The range of lengths that `at` is to serve; a fourth to four times `length`, where it is None.
        tolerance: For an alpha that is no even number; at least 5e-4.
        petsc_options: Options of the solvers, without prefix; the default is Cholesky by MUMPS, and CG with algebraic multigrid
            beyond 90,000 unknowns in three dimensions, with which draws and whitening work (inverse to each other to 1e-8), and
            log_prob does not.

    Raises:
        InvalidInput: Where V is another space, or a parameter is of the wrong type or out of range.
        SolveFailed: Where a solver fails, or log_prob is asked for without a factorisation by MUMPS.

    Warns:
        UserWarning: On rank 0, where `length` is below the mean distance of nodes, which makes the field noise of the mesh.

    MPI: Collective; every method except `all_sum`'s adjoint is too.

    References:
        Lindgren, Rue, Lindstrom (2011), An explicit link between Gaussian fields and Gaussian Markov random fields.
        Bolin, Kirchner, Kovacs (2018), Weak convergence of Galerkin approximations for fractional elliptic stochastic PDEs.

    Example:
        >>> prior = fem_vi.MaternField(V, std=1.0, length=0.25)
        >>> m = prior.rsample((8,))
        >>> prior.log_prob(m)
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        V: Any,
        *,
        std: float,
        length: float,
        mean: float | Tensor = 0.0,
        alpha: float = 2.0,
        metric: Any = None,
        variance: UniformVariance | PlainVariance = UniformVariance(),  # noqa: B008 - frozen
        lengths: tuple[float, float] | None = None,
        tolerance: float = 1e-3,
        petsc_options: Mapping[str, Option] | None = None,
    ) -> None:
        check_vertex_space(V)
        self.comm = V.mesh.comm
        with raise_on_all(self.comm):
            check_options(petsc_options)
            self.std: float | Tensor = initial_number("std", std)
            self.length: float | Tensor = initial_number("length", length)
            check_mean(mean, num_owned(V))
            self.nu = smoothness(alpha, V.mesh.topology.dim)
            instance("MaternField: variance", variance, UniformVariance, PlainVariance)
            tensor = checked_metric(metric, V.mesh)
            self.lengths = checked_range(lengths, length)
            if positive("MaternField: tolerance", tolerance) < LEAST_TOLERANCE:
                raise InvalidInput(f"MaternField: tolerance is {tolerance:g}; it must be at least {LEAST_TOLERANCE:g}.")
        given = all_values(self.comm, (float(std), float(length), float(alpha)))
        if any(other != given[0] for other in given):
            raise InvalidInput(f"MaternField: (std, length, alpha) differ between ranks: {given}; they must be the same.")
        self.V, self.alpha = V, float(alpha)
        self.num_global = num_global(V)
        self._boundary = variance
        self._root = MaternRoot(
            V,
            alpha=self.alpha,
            metric=tensor,
            least_kappa=math.sqrt(2 * self.nu) / self.lengths[1],
            tolerance=tolerance,
            petsc_options=petsc_options or {},
        )
        self._warn_of_short_length(metric)
        self._names = node_names(V)
        layout = _Layout(self.comm, self._names, owned_range(V)[0], self.num_global)
        sampling = variance.tolerance if isinstance(variance, UniformVariance) else UniformVariance.tolerance
        self._base = AtOneLength(self._root, layout, sampling)
        self._table: AtAnyLength | None = None
        self._statistics: Statistics = self._base
        self._order: Tensor | None = None
        super().__init__(torch.Size(), torch.Size([num_owned(V)]), validate_args=False)
        self._level = None if isinstance(mean, Tensor) and mean.ndim > 0 else float(mean)
        level = torch.as_tensor(mean, dtype=torch.float64)
        self._mean = (localise(level, self.comm) if level.ndim == 0 else level).expand(self.event_shape)

    def __repr__(self) -> str:
        mean = f", mean={self._level:g}" if self._level is not None else ", mean=<field>"
        std, length = float(detached(self.std)), float(detached(self.length))
        alpha = "" if self.alpha == 2.0 else f", alpha={self.alpha:g}"
        return f"MaternField({self.num_global} unknowns, std={std:g}, length={length:g}{mean}{alpha})"

    def _warn_of_short_length(self, metric: Any) -> None:
        """Say what a length below the distance of nodes does to the field. Collective."""
        d = self.V.mesh.topology.dim
        distance = (float(all_sum(self._root.mass.sum(), self.comm)) / self.num_global) ** (1 / d)
        constant = metric is not None and not isinstance(metric, ufl.core.expr.Expr)
        shortest = float(self.length) * (math.sqrt(np.linalg.eigvalsh(metric)[0]) if constant else 1.0)
        if shortest < distance and self.comm.rank == 0:
            warnings.warn(
                f"MaternField: a length of {shortest:g} is below the mean distance of the mesh's nodes, {distance:.3g}. "
                "Neighbouring nodes are all but independent: the field is noise, another on every mesh (and with PlainVariance, "
                "below std). Refine the mesh, or take a length of several such distances.",
                stacklevel=3,
            )

    @property
    def kappa(self) -> float | Tensor:
        """sqrt(2 nu) / length."""
        return math.sqrt(2 * self.nu) / self.length

    @property
    def mean(self) -> Tensor:
        """Mean, `(n_owned,)`."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Pointwise variance, `(n_owned,)`: the square of `std`, or what the boundary leaves with `PlainVariance`. Collective.

        With `PlainVariance` it is computed once, as `UniformVariance` describes.
        """
        square = localise(torch.as_tensor(self.std, dtype=torch.float64), self.comm).square()
        if isinstance(self._boundary, UniformVariance):
            return square.expand(self.event_shape)
        return square * (2.0 * self._statistics.log_sd(self._kappa)).exp()

    def expand(self, batch_shape: Any, _instance: Any = None) -> MaternField:
        """Refused: draw batches with `rsample(sample_shape)`."""
        raise InvalidInput("A MaternField cannot be expanded; draw batches with rsample(sample_shape).")

    def at(self, *, std: float | Tensor | None = None, length: float | Tensor | None = None) -> MaternField:
        """The prior with other hyperparameters, on the same mesh, with the same mean; what it gives is differentiable in them.

        A new length costs a factorisation with a known structure, of which the last few are kept. The first call with a length
        also tabulates the deviations and the determinant, each when first needed, at some 18 lengths in `lengths`, from which
        they are interpolated to a relative accuracy of 1e-7.

        Args:
            std: Number or tensor without axes, replicated; as it was where it is None.
            length: Likewise, within `lengths`.

        Returns:
            A prior that shares solvers and tables with this one.

        Raises:
            InvalidInput: Where a hyperparameter is not positive, out of range, or differs between ranks.

        MPI: Collective.

        Example:
            >>> length = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
            >>> prior.at(length=length).log_prob(m).backward()
        """
        new = copy.copy(self)
        with raise_on_all(self.comm):
            if std is not None:
                new.std = hyperparameter("std", std)
            if length is not None:
                new.length = hyperparameter("length", length)
                low, high = self.lengths
                asked = positive("MaternField.at: length", detached(length))
                if not low * (1 - 1e-12) <= asked <= high * (1 + 1e-12):
                    raise InvalidInput(
                        f"MaternField.at: length is {asked:g}; this prior serves {low:g} to {high:g}. Build it with "
                        "lengths=(shortest, longest)."
                    )
        given = all_values(self.comm, (float(detached(new.std)), float(detached(new.length))))
        if any(other != given[0] for other in given):
            raise InvalidInput(f"MaternField.at: (std, length) differ between ranks: {given}; they must be replicated.")
        if length is not None:
            if self._table is None:
                self._table = new._table = AtAnyLength(self._base, self._kappas())
            new._statistics = self._table
        return new

    def white_noise(self, sample_shape: Any = ()) -> Tensor:
        """Standard normal field tensors `(*sample_shape, n_owned)` that do not depend on the partition.

        The key comes from torch's default generator on rank 0. Collective.
        """
        key = shared_seed(self.comm, int(torch.randint(1, 2**62, ())))
        shape = torch.Size(sample_shape)
        return torch.from_numpy(standard_normal(key, shape.numel(), self._names)).reshape(shape + self.event_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, `(*sample_shape, n_owned)`; the same on any number of ranks. Collective."""
        return self.unwhiten(self.white_noise(sample_shape))

    def unwhiten(self, xi: Tensor) -> Tensor:
        """m = mean + C^(1/2) xi for field tensors xi `(*batch, n_owned)`; differentiable. Collective."""
        self._check(xi, "xi")
        return self._mean + self._factor() * self._root.apply(self._kappa, xi)

    def whiten(self, m: Tensor) -> Tensor:
        """xi = C^(-1/2) (m - mean), the inverse of `unwhiten`; differentiable. Collective."""
        self._check(m, "m")
        return self._root.invert(self._kappa, (m - self._mean) / self._factor())

    def multiply_covariance(self, x: Tensor) -> Tensor:
        """C x for field tensors x `(*batch, n_owned)`; differentiable. Collective."""
        self._check(x, "x")
        spread = self._root.spread
        half = self._root.apply(self._kappa, spread * self._factor() * x) / spread
        return self._factor() * self._root.apply(self._kappa, half)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to the coefficients, `(*batch,)`, replicated; differentiable. Collective."""
        xi = self.whiten(value)
        quadratic = self.all_sum(xi.square().sum(-1))
        return -0.5 * quadratic - 0.5 * self.num_global * math.log(2 * math.pi) - self.whitening_logdet

    @property
    def whitening_logdet(self) -> Tensor:
        """log |det C^(1/2)|, replicated; differentiable in the hyperparameters. Collective.

        Raises:
            SolveFailed: Where the solver is no factorisation by MUMPS.
        """
        factor = torch.as_tensor(self._factor(), dtype=torch.float64).log().expand(self.event_shape)
        return self._statistics.logdet(self._kappa) + self.all_sum(factor.sum())

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum over ranks; see `fem_vi.all_sum`."""
        return all_sum(x, self.comm)

    def localise(self, x: Tensor) -> Tensor:
        """A replicated tensor for use with field tensors; see `fem_vi.localise`."""
        return localise(x, self.comm)

    def gather(self, x: Tensor) -> Tensor:
        """Field tensors `(*batch, n_owned)` as `(*batch, n_global)` on every rank, in the order of the mesh file. Collective."""
        return gather(x, self.V)[..., self._file_order()]

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of `gather`: the owned part of what is replicated; differentiable. Collective."""
        with raise_on_all(self.comm):
            check_last_axis("scatter: x", x, self.num_global, "the coefficients that all ranks own together.")
        first, last = owned_range(self.V)
        return self.localise(x)[..., torch.argsort(self._file_order())[first:last]]

    def write_fields(self, path: str | Path, fields: Mapping[str, Tensor]) -> None:
        """Write field tensors `(n_owned,)` to an XDMF file; see `fem_vi.write_fields`. Collective."""
        write_fields(path, self.V, fields)

    def precision(self, rings: int) -> scipy.sparse.csc_matrix:
        """A sparse precision matrix over the nodes, replicated, in the order of `gather`; for alpha = 2, without gradients.

        Args:
            rings: 2 for this field's own, W K D^-1 K W with a diagonal W, whose entries reach from each node to the neighbours of
                its neighbours; 1 for c W K W on the neighbours, with c such that the determinants agree: a rougher field.

        Raises:
            InvalidInput: For any other alpha, whose precision is not sparse or reaches further.

        MPI: Collective.
        """
        if self.alpha != 2.0:
            raise InvalidInput(
                f"MaternField.precision: alpha is {self.alpha:g}; the precision is sparse where it is 2. Give the family one."
            )
        own, w = self._root.sparse_root(float(detached(self.kappa)))
        parts = all_values(self.comm, own)
        blocks = [
            scipy.sparse.csr_matrix((values, columns, starts), shape=(len(starts) - 1, self.num_global))
            for starts, columns, values in parts
        ]
        order = self._file_order().numpy()
        weights = self.gather((w / self._factor()).detach()).numpy()
        K = scipy.sparse.vstack(blocks, format="csr")[order][:, order] @ scipy.sparse.diags(weights)
        mass = self.gather(self._root.mass).numpy()
        exact = (K.T @ scipy.sparse.diags(1.0 / mass) @ K).tocsc()
        if rings == 2:
            return exact
        rough = (scipy.sparse.diags(weights) @ K).tocsc()
        # 2 log det(D^-1/2 K W) is that of the precision, and log det(W K W) = log det(D^-1/2 K W) + (log det D) / 2 + log det W.
        logdet = -float(self.whitening_logdet) + 0.5 * np.log(mass).sum() + np.log(weights).sum()
        return rough * math.exp((-2.0 * float(self.whitening_logdet) - logdet) / self.num_global)

    @property
    def _kappa(self) -> Tensor:
        return torch.as_tensor(self.kappa, dtype=torch.float64)

    def _kappas(self) -> tuple[float, float]:
        low, high = (math.sqrt(2 * self.nu) / length for length in self.lengths)
        return high, low

    def _factor(self) -> Tensor:
        """What R xi is multiplied by at each node: std / s, or std."""
        std = self.localise(torch.as_tensor(self.std, dtype=torch.float64))
        return std * (-self._statistics.log_sd(self._kappa)).exp() if isinstance(self._boundary, UniformVariance) else std

    def _file_order(self) -> Tensor:
        if self._order is None:
            self._order = torch.argsort(gather(torch.from_numpy(self._names.astype(np.float64)), self.V))
        return self._order

    def _check(self, x: Tensor, name: str) -> None:
        with raise_on_all(self.comm):
            check_last_axis(f"MaternField: {name}", x, self.event_shape[0], OWNED)
        batches = all_values(self.comm, tuple(x.shape[:-1]))
        if any(batch != batches[0] for batch in batches):
            raise InvalidInput(f"MaternField: the batch axes of {name} differ between ranks: {batches}.")
