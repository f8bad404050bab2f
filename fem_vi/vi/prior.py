"""What variational families need of a prior, and the Gaussian prior of a handful of parameters."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from mpi4py import MPI
from torch import Tensor
from torch.distributions import Distribution, constraints

from fem_vi.arguments import described
from fem_vi.errors import InvalidInput
from fem_vi.parallel import shared_seed
from fem_vi.vi.real_tensor import real_tensor


@runtime_checkable
class FieldPrior(Protocol):
    """A Gaussian prior over vectors of unknowns that may be spread over the ranks of `comm`.

    The unknowns m are white noise seen through an invertible affine map, the *whitening*:

        m = mean + C0^(1/2) xi,   xi ~ N(0, I)

    An implementation is a `torch.distributions.Distribution` with `event_shape == (n_owned,)`. On a mesh the tensors are
    field tensors, of which each rank owns a part; for replicated unknowns every rank holds all of them (`n_owned ==
    num_global`) and `all_sum` and `localise` do nothing.

    A prior may also have `write_fields(path, fields)`: write tensors `{"name": (n_owned,)}` to an XDMF file that ParaView
    opens. Collective; `fit` calls it where it exists.
    """

    @property
    def comm(self) -> MPI.Comm:
        """The ranks that work on the same unknowns."""

    @property
    def event_shape(self) -> torch.Size:
        """`(n_owned,)`."""

    @property
    def num_global(self) -> int:
        """Number of unknowns on all ranks together."""

    @property
    def mean(self) -> Tensor:
        """Prior mean, `(n_owned,)`."""

    @property
    def variance(self) -> Tensor:
        """The diagonal of C0, `(n_owned,)`."""

    @property
    def whitening_logdet(self) -> Tensor:
        """Log |det C0^(1/2)|, scalar, replicated."""

    def rsample(self, sample_shape: torch.Size = ...) -> Tensor:
        """Draws of m, `(*sample_shape, n_owned)`. Collective."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Global log density of m, `(*batch,)`, replicated. Collective."""

    def white_noise(self, sample_shape: torch.Size = ...) -> Tensor:
        """Standard normal draws, `(*sample_shape, n_owned)`, the same numbers on any number of ranks. Collective."""

    def unwhiten(self, xi: Tensor) -> Tensor:
        """`mean + C0^(1/2) xi`, `(*batch, n_owned)` to the same shape, differentiable. Collective."""

    def whiten(self, m: Tensor) -> Tensor:
        """The inverse of `unwhiten`, differentiable. Collective."""

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum of rank-local parts over the ranks that share the unknowns; gradient passes unchanged. Collective."""

    def localise(self, x: Tensor) -> Tensor:
        """A replicated tensor about to meet field tensors: identity, its gradient summed over ranks."""

    def gather(self, x: Tensor) -> Tensor:
        """`(*batch, n_owned)` to replicated `(*batch, num_global)`, in an order no partition changes. Collective."""

    def scatter(self, x: Tensor) -> Tensor:
        """The reverse of `gather`. Collective."""


def check_prior(prior: object) -> None:
    """Refuse what is no prior of unknowns that may be spread over ranks. Not collective.

    Raises:
        InvalidInput: Naming it.
    """
    # isinstance would evaluate the protocol's properties, some of them costly
    if isinstance(prior, type) or not hasattr(prior, "white_noise"):
        raise InvalidInput(f"prior is {described(prior)}; it must be a prior such as MaternField or GaussianVector.")


class GaussianVector(Distribution):
    """Normal prior over replicated unknowns, N(mean, C0), the same vector on every rank of `comm`.

    Its whitening uses the Cholesky factor of the covariance: m = mean + L xi, C0 = L L'.

    Args:
        mean: Prior mean, `(n,)`, replicated.
        covariance: C0, `(n, n)`, symmetric positive definite. The unit matrix where neither matrix is given.
        scale_tril: L, `(n, n)`, lower triangular with positive diagonal; in place of `covariance`.
        comm: The ranks that work on the same unknowns: the communicator of the mesh, where the forward map solves on one.

    Raises:
        InvalidInput: Where an argument holds no real numbers, shapes disagree, both matrices are given, or the covariance is not
            positive definite.

    MPI: Not collective; `white_noise` and `rsample` are. All tensors are replicated.

    Example:
        >>> prior = GaussianVector(torch.zeros(2), covariance=torch.diag(torch.tensor([1.0, 4.0])))
    """

    arg_constraints = {}  # noqa: RUF012 - torch reads the attribute of the class
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        mean: Tensor,
        *,
        covariance: Tensor | None = None,
        scale_tril: Tensor | None = None,
        comm: MPI.Comm = MPI.COMM_SELF,
    ) -> None:
        self._mean = real_tensor("mean", mean)
        if self._mean.ndim != 1 or not torch.isfinite(self._mean).all():
            raise InvalidInput(f"mean has shape {tuple(self._mean.shape)}; GaussianVector needs a finite vector of shape (n,).")
        self._scale_tril = _scale_tril(len(self._mean), covariance, scale_tril)
        self.comm = comm
        super().__init__(event_shape=self._mean.shape, validate_args=False)

    def __repr__(self) -> str:
        return f"GaussianVector(n={self.num_global})"

    @property
    def num_global(self) -> int:
        """Number of unknowns."""
        return len(self._mean)

    @property
    def mean(self) -> Tensor:
        """Prior mean, `(n,)`, replicated."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """The diagonal of C0, `(n,)`, replicated."""
        return self._scale_tril.square().sum(-1)

    @property
    def covariance(self) -> Tensor:
        """C0, `(n, n)`, replicated."""
        return self._scale_tril @ self._scale_tril.T

    @property
    def whitening_logdet(self) -> Tensor:
        """Log det L, scalar."""
        return self._scale_tril.diagonal().log().sum()

    def white_noise(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Standard normal draws, `(*sample_shape, n)`, replicated, under a key from torch's generator on rank 0.

        MPI: Collective.
        """
        key = shared_seed(self.comm, int(torch.randint(2**62, ())))
        generator = torch.Generator().manual_seed(key)
        return torch.randn((*sample_shape, self.num_global), dtype=torch.float64, generator=generator)

    def unwhiten(self, xi: Tensor) -> Tensor:
        """`mean + L xi`, `(*batch, n)`, replicated."""
        return self._mean + xi @ self._scale_tril.T

    def whiten(self, m: Tensor) -> Tensor:
        """`L^-1 (m - mean)`, `(*batch, n)`, replicated."""
        rows = (m - self._mean).reshape(-1, self.num_global)
        return torch.linalg.solve_triangular(self._scale_tril, rows.T, upper=False).T.reshape(m.shape)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # type: ignore[override] # noqa: B008
        """Draws of m, `(*sample_shape, n)`, replicated.

        MPI: Collective.
        """
        return self.unwhiten(self.white_noise(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log N(m; mean, C0), `(*batch,)`, replicated."""
        xi = self.whiten(value)
        return -0.5 * (xi.square().sum(-1) + self.num_global * math.log(2.0 * math.pi)) - self.whitening_logdet

    def entropy(self) -> Tensor:
        """Differential entropy, scalar."""
        return 0.5 * self.num_global * (1.0 + math.log(2.0 * math.pi)) + self.whitening_logdet

    def all_sum(self, x: Tensor) -> Tensor:
        """The same tensor: every rank holds all unknowns."""
        return x

    def localise(self, x: Tensor) -> Tensor:
        """The same tensor: no arithmetic is local to a rank."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The same tensor: it is replicated already."""
        return x

    def scatter(self, x: Tensor) -> Tensor:
        """The same tensor: every rank holds all unknowns."""
        return x


def _scale_tril(n: int, covariance: object, scale_tril: object) -> Tensor:
    """The Cholesky factor, `(n, n)`, from whichever matrix was given, checked."""
    if covariance is not None and scale_tril is not None:
        raise InvalidInput("GaussianVector was given covariance and scale_tril; give one of them.")
    name, given = ("covariance", covariance) if covariance is not None else ("scale_tril", scale_tril)
    if given is None:
        return torch.eye(n, dtype=torch.float64)
    matrix = real_tensor(name, given)
    if matrix.shape != (n, n):
        raise InvalidInput(f"{name} has shape {tuple(matrix.shape)}; mean has {n} entries, so it must be ({n}, {n}).")
    if covariance is None:
        if not (matrix.diagonal() > 0).all() or matrix.triu(1).any():
            raise InvalidInput("scale_tril must be lower triangular with a positive diagonal.")
        return matrix
    if not torch.allclose(matrix, matrix.T, rtol=1e-10, atol=1e-12):
        raise InvalidInput("covariance is not symmetric.")
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        raise InvalidInput(f"covariance is not positive definite: its leading minor of order {int(failed)} is not positive.")
    return factor
