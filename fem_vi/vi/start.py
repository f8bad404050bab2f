"""Where to start a fit: the linearised (Laplace) posterior around the most probable parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from fem_vi.arguments import is_number, positive, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.mode import Convergence, conjugate_gradients, direct_step, find_mode
from fem_vi.vi.problem import InverseProblem, Problem
from fem_vi.vi.products import GaussNewtonProducts, JacobianRows
from fem_vi.vi.spectrum import dominant_directions

MOST_DATA = 1000


@dataclass(frozen=True)
class Linearisation:
    """The posterior of the problem linearised at its most probable whitened parameters: N(mu, (I + J'J)^-1).

    Attributes:
        mu: Most probable xi, `(n_owned,)`.
        jacobian: J, derivative of the predictions in units of the noise with respect to xi, `(num_data, n_owned)`; or its
            dominant right singular vectors times singular values, `(rank, n_owned)`.
        gram: J J', replicated.
        log_likelihood: log p(y | m) at the most probable m.
        search: How it was found.
        neglected: Largest eigenvalue of J'J that the stored directions leave out; 0 for none.
    """

    mu: Tensor
    jacobian: Tensor
    gram: Tensor
    log_likelihood: float
    search: Convergence
    neglected: float = 0.0

    @property
    def iterations(self) -> int:
        """Newton steps taken."""
        return self.search.iterations

    @property
    def converged(self) -> bool:
        """Whether the last step was below the tolerance."""
        return self.search.converged


@runtime_checkable
class Startable(Protocol):
    """A posterior that can take the linearised posterior as its parameters."""

    def is_fresh(self) -> bool:
        """Whether it is still centred at the prior mean, as a new one is. Collective."""

    def start_at(self, linearisation: Linearisation) -> None:
        """Set the parameters. Collective."""


@dataclass(frozen=True)
class PresentParameters:
    """Start at the parameters that the posterior has: the prior for a new one, the last fit's for one fitted before.

    From the prior, precise data (a signal-to-noise ratio of 100) take first-order optimisers many thousands of steps.
    """

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> None:
        """Leave the parameters alone."""


@dataclass(frozen=True)
class GaussNewton:
    """Start at the linearised posterior around the most probable parameters, found by Gauss-Newton.

    Costs one forward solve and `num_data` adjoint solves an iteration, and a few forward solves for the line search.

    Attributes:
        iterations: Most Gauss-Newton steps.
        rtol: Stop where a step is shorter than this fraction of |xi| + 1.

    References:
        Bui-Thanh, Ghattas, Martin, Stadler (2013), A computational framework for infinite-dimensional Bayesian inverse
        problems, part I.
    """

    iterations: int = 20
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        whole("GaussNewton: iterations", self.iterations, least=1)
        positive("GaussNewton: rtol", self.rtol)

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Linearisation:
        """Set the parameters of `posterior`.

        Args:
            problem: Prior, forward map, likelihood, data.
            posterior: A posterior with a method `start_at`.

        Returns:
            The linearised posterior it was set to.

        Raises:
            InvalidInput: Where the posterior cannot take a linearised posterior.

        MPI: Collective.
        """
        target = startable("GaussNewton", posterior)
        linearisation = self.linearise(problem)
        target.start_at(linearisation)
        return linearisation

    def linearise(self, problem: InverseProblem) -> Linearisation:
        """The most probable whitened parameters, and the linearised posterior around them. Collective."""
        at, search = find_mode(problem, JacobianRows, direct_step, iterations=self.iterations, rtol=self.rtol)
        return Linearisation(at.xi, at.jacobian, at.gram, at.log_likelihood, search)


@dataclass(frozen=True)
class NewtonCG:
    """Start at the linearised posterior, found without any matrix: Newton's method by conjugate gradients, then random probes.

    Each iteration of conjugate gradients is a product with J and one with J', two linear solves with the kept factorisation. At
    the most probable parameters the dominant eigenpairs of J'J are found from blocks of random vectors. For any number of data,
    and for forward maps that are twice differentiable (`Solve` is, `Evolve` is not); where they are not, and data are few, take
    `GaussNewton`.

    Attributes:
        iterations: Most Newton steps.
        rtol: Stop where a step is shorter than this fraction of |xi| + 1.
        inner: Most iterations of conjugate gradients in a step.
        threshold: Leave out directions in which data add less than this fraction of the prior's precision.
        rank: Most directions; None for as many as the threshold asks for.
        gain: Stop where a step promises to gain fewer nats of log p(y, m). The last tenth of a nat can cost more solves than all
            before; for the start of a fit 0.5 is near enough.

    References:
        Bui-Thanh, Ghattas, Martin, Stadler (2013), A computational framework for infinite-dimensional Bayesian inverse
        problems, part I.
        Villa, Petra, Ghattas (2021), hIPPYlib: an extensible software framework for large-scale inverse problems.
    """

    iterations: int = 50
    rtol: float = 1e-6
    inner: int = 300
    threshold: float = 1e-3
    rank: int | None = None
    gain: float = 0.0

    def __post_init__(self) -> None:
        whole("NewtonCG: iterations", self.iterations, least=1)
        positive("NewtonCG: rtol", self.rtol)
        whole("NewtonCG: inner", self.inner, least=1)
        positive("NewtonCG: threshold", self.threshold)
        if self.rank is not None:
            whole("NewtonCG: rank", self.rank, least=1)
        if not (is_number(self.gain) and self.gain >= 0):
            raise InvalidInput(f"NewtonCG: gain is {self.gain!r:.80}; it must be a number of nats, not negative.")

    def __call__(self, problem: InverseProblem, posterior: nn.Module) -> Linearisation:
        """Set the parameters of `posterior`; see `GaussNewton`. Collective."""
        target = startable("NewtonCG", posterior)
        linearisation = self.linearise(problem)
        target.start_at(linearisation)
        return linearisation

    def linearise(self, problem: InverseProblem) -> Linearisation:
        """The most probable whitened parameters, and the linearised posterior around them. Collective."""

        def solve(problem: InverseProblem, at: GaussNewtonProducts, fraction: float) -> tuple[Tensor, int]:
            return conjugate_gradients(problem, at, fraction, most=self.inner)

        at, search = find_mode(problem, GaussNewtonProducts, solve, iterations=self.iterations, rtol=self.rtol, gain=self.gain)
        jacobian, neglected = dominant_directions(problem.prior, at, threshold=self.threshold, rank=self.rank)
        gram = problem.prior.all_sum(jacobian @ jacobian.T)
        return Linearisation(at.xi, jacobian, gram, at.log_likelihood, search, neglected)


def startable(name: str, posterior: nn.Module) -> Startable:
    """The posterior, where it can take a linearised one.

    Raises:
        InvalidInput: Where it cannot.
    """
    if not isinstance(posterior, Startable):
        raise InvalidInput(f"{name}: {type(posterior).__name__} has no start_at(linearisation). Use start=None.")
    return posterior


def starts_linearised(start: GaussNewton | NewtonCG | PresentParameters, posterior: nn.Module) -> bool:
    """Whether a fit begins at a linearised posterior, and so near its end: after a search, or with what `laplace` made."""
    return not isinstance(start, PresentParameters) or getattr(posterior, "report", None) is not None


def default_start(problem: Problem, posterior: nn.Module) -> GaussNewton | PresentParameters:
    """`GaussNewton()` for a new posterior that can use it, of at most 1,000 data; else `PresentParameters()`.

    MPI: Collective.
    """
    few = isinstance(problem, InverseProblem) and len(problem.y) <= MOST_DATA
    if few and isinstance(posterior, Startable) and posterior.is_fresh():
        return GaussNewton()
    return PresentParameters()
