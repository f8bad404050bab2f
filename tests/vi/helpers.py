"""Problems whose answers are known, the posterior families, and a prior spread over ranks that needs no mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal

from fem_vi.bridge import layout
from fem_vi.parallel import shared_seed
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.low_rank import FreeDiagonal, LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.posterior.whitened import WhitenedNormal
from fem_vi.vi.prior import FieldPrior, GaussianVector
from fem_vi.vi.problem import InverseProblem

F64 = torch.float64
FAMILIES: dict[str, Callable[[FieldPrior], nn.Module]] = {
    "mean-field": MeanFieldNormal,
    "full-rank": FullRankNormal,
    "low-rank": lambda prior: LowRankNormal(prior, 2),
    "low-rank, free diagonal": lambda prior: LowRankNormal(prior, 3, diagonal=FreeDiagonal()),
}


def numbers(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers that no other draw changes."""
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Affine:
    """G(m) = A m + b, m ~ N(mean, C0), y = G(m) + N(0, std^2): posterior and evidence by linear algebra."""

    prior: GaussianVector
    A: Tensor
    b: Tensor
    std: float
    y: Tensor

    @staticmethod
    def create(n: int = 5, num_data: int = 3, std: float = 0.3, *, seed: int = 1) -> Affine:
        """A problem with dense random matrices."""
        B = numbers(seed, n, n)
        prior = GaussianVector(numbers(seed + 1, n), covariance=B @ B.T / n + 0.1 * torch.eye(n, dtype=F64))
        A, b = numbers(seed + 2, num_data, n), numbers(seed + 3, num_data)
        y = A @ prior.unwhiten(numbers(seed + 4, n)) + b + std * numbers(seed + 5, num_data)
        return Affine(prior, A, b, std, y)

    def problem(self) -> InverseProblem:
        """As the package sees it."""
        return InverseProblem(self.prior, lambda m: m @ self.A.T + self.b, GaussianNoise(self.std), self.y)

    def posterior(self) -> MultivariateNormal:
        """The exact posterior."""
        precision = torch.linalg.inv(self.prior.covariance) + self.A.T @ self.A / self.std**2
        covariance = torch.linalg.inv(precision)
        gain = covariance @ self.A.T / self.std**2
        mean = self.prior.mean + gain @ (self.y - self.b - self.A @ self.prior.mean)
        return MultivariateNormal(mean, covariance)

    def whitened_precision(self) -> Tensor:
        """I + L' A' A L / std^2."""
        J = self.A @ torch.linalg.cholesky(self.prior.covariance) / self.std
        return torch.eye(len(self.prior.mean), dtype=F64) + J.T @ J

    def log_evidence(self) -> float:
        """Log N(y; A mean + b, A C0 A' + std^2)."""
        covariance = self.A @ self.prior.covariance @ self.A.T + self.std**2 * torch.eye(len(self.y), dtype=F64)
        return float(MultivariateNormal(self.A @ self.prior.mean + self.b, covariance).log_prob(self.y))


def perturb(posterior: nn.Module, *, seed: int = 10, size: float = 0.5) -> None:
    """Move every parameter by numbers that no partition changes."""
    with torch.no_grad():
        for k, (name, value) in enumerate(posterior.named_parameters()):
            if name in posterior.fields:
                value += posterior.prior.scatter(size * numbers(seed + k, *value.shape[:-1], posterior.prior.num_global))
            else:
                value += size * numbers(seed + k, *value.shape)


def gathered(posterior: nn.Module, values: Mapping[str, Tensor]) -> list[Tensor]:
    """Parameters, or their gradients, by name, as every rank sees them: field tensors gathered, replicated ones as they are."""
    return [posterior.prior.gather(value) if name in posterior.fields else value for name, value in values.items()]


def dense(posterior: nn.Module) -> MultivariateNormal:
    """What a family describes, from the textbook formula with dense matrices, in coordinates of m (one rank)."""
    prior = posterior.prior
    n = prior.num_global
    root = prior.unwhiten(torch.eye(n, dtype=F64)).T - prior.mean[:, None]
    if isinstance(posterior, MeanFieldNormal):
        covariance = torch.diag((2 * posterior.log_scale).exp())
    elif isinstance(posterior, FullRankNormal):
        factor = torch.diag(posterior.log_diagonal.exp())
        factor[tuple(torch.tril_indices(n, n, -1))] = posterior.below
        covariance = factor @ factor.T
    else:
        log_precision = torch.zeros(n, dtype=F64) if posterior.log_precision is None else posterior.log_precision
        half = torch.diag((-0.5 * log_precision).exp())
        covariance = half @ torch.linalg.inv(torch.eye(n, dtype=F64) + posterior.U.T @ posterior.U) @ half
    covariance = root @ covariance @ root.T
    return MultivariateNormal(prior.mean + root @ posterior.mu, 0.5 * (covariance + covariance.T))


class SplitGaussian(Distribution):
    """N(1 / 2, diag(std^2)) with the unknowns split over the ranks; std[i] = 1 + i / n by global position."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, n: int, comm: MPI.Comm) -> None:
        self.comm = comm
        self.num_global = n
        self.first, self.last = n * comm.rank // comm.size, n * (comm.rank + 1) // comm.size
        self.global_std = 1 + torch.arange(n, dtype=F64) / n
        self.std = self.global_std[self.first : self.last]
        super().__init__(event_shape=torch.Size([self.last - self.first]), validate_args=False)

    def __repr__(self) -> str:
        return f"SplitGaussian({self.num_global})"

    def alone(self) -> GaussianVector:
        """The same prior, with all unknowns on each rank."""
        return GaussianVector(torch.full((self.num_global,), 0.5, dtype=F64), scale_tril=torch.diag(self.global_std))

    @property
    def mean(self) -> Tensor:
        return torch.full_like(self.std, 0.5)

    @property
    def variance(self) -> Tensor:
        return self.std.square()

    @property
    def whitening_logdet(self) -> Tensor:
        return self.global_std.log().sum()

    def white_noise(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        key = shared_seed(self.comm, int(torch.randint(2**62, ())))
        generator = torch.Generator().manual_seed(key)
        return torch.randn((*sample_shape, self.num_global), dtype=F64, generator=generator)[..., self.first : self.last]

    def unwhiten(self, xi: Tensor) -> Tensor:
        return 0.5 + self.std * xi

    def whiten(self, m: Tensor) -> Tensor:
        return (m - 0.5) / self.std

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.unwhiten(self.white_noise(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        quadratic = self.all_sum(self.whiten(value).square().sum(-1))
        return -0.5 * (quadratic + self.num_global * math.log(2 * math.pi)) - self.whitening_logdet

    def all_sum(self, x: Tensor) -> Tensor:
        return layout.all_sum(x, self.comm)

    def localise(self, x: Tensor) -> Tensor:
        return layout.localise(x, self.comm)

    def gather(self, x: Tensor) -> Tensor:
        return self.all_sum(nn.functional.pad(x, (self.first, self.num_global - self.last)))

    def scatter(self, x: Tensor) -> Tensor:
        return self.localise(x)[..., self.first : self.last]


def split_pair(n: int = 13, num_data: int = 4) -> tuple[InverseProblem, InverseProblem]:
    """One nonlinear problem twice: unknowns split over the ranks of COMM_WORLD, and all of them on each rank."""
    prior = SplitGaussian(n, MPI.COMM_WORLD)
    A = numbers(3, num_data, n) / math.sqrt(n)
    y = torch.exp(0.3 * (0.5 + numbers(4, n))) @ A.T + 0.1 * numbers(5, num_data)
    owned = A[:, prior.first : prior.last]
    split = InverseProblem(prior, lambda m: prior.all_sum(torch.exp(0.3 * m) @ owned.T), GaussianNoise(0.1), y)
    alone = InverseProblem(prior.alone(), lambda m: torch.exp(0.3 * m) @ A.T, GaussianNoise(0.1), y)
    return split, alone


def with_noise(q: WhitenedNormal, eps: Tensor) -> Tensor:
    """What q makes of given white noise."""
    return q.prior.unwhiten(q.mu + q.scale.apply(eps))
