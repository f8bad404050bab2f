"""The density to be sampled, relative to a standard normal, and where chains stand in it.

In the coordinates x of a reference (`coordinates.py`) the posterior has the density exp(h(x)) N(x; 0, I) / p(y) with

    h(x) = log p(y | m) - |xi|^2 / 2 + |x|^2 / 2 + log |det dxi/dx|,

which is log p(y | m) where the reference is the prior, and constant where it is the posterior. Each kernel here leaves N(0, I)
alone exactly, at any step size and on any mesh; only h meets an accept-reject step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fem_vi.errors import FemViError, InvalidInput
from fem_vi.vi.mcmc.coordinates import Coordinates
from fem_vi.vi.mcmc.crowd import Crowd
from fem_vi.vi.minibatch import MinibatchProblem
from fem_vi.vi.problem import InverseProblem


def check_exact(problem: InverseProblem) -> None:
    """Refuse a problem whose density is estimated anew in each evaluation.

    Raises:
        InvalidInput: For a `MinibatchProblem`.
    """
    if isinstance(problem, MinibatchProblem):
        raise InvalidInput(
            "problem is a MinibatchProblem, whose density changes from call to call: a sampler would draw from no posterior. "
            "Pass problem.whole(), which uses all data."
        )


@dataclass(frozen=True)
class State:
    """Where the chains of this group stand.

    Attributes:
        x: `(chains, n_owned)`.
        m: Unknowns, `(chains, n_owned)`.
        log_likelihood: log p(y | m), `(chains,)`, replicated; minus infinity where the forward map failed.
        log_prior: log p(m), `(chains,)`, replicated.
        excess: h(x), `(chains,)`, replicated.
        slope: Gradient of h, `(chains, n_owned)`; zeros for kernels that need none, and where the forward map failed.
    """

    x: Tensor
    m: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    excess: Tensor
    slope: Tensor

    def where(self, accept: Tensor, other: State) -> State:
        """This state in the chains that accept, the other one in the rest; `accept` is `(chains,)`, replicated."""
        pick = {
            field.name: torch.where(
                accept if getattr(self, field.name).ndim == 1 else accept[:, None],
                getattr(self, field.name),
                getattr(other, field.name),
            )
            for field in fields(self)
        }
        return State(**pick)

    @property
    def log_joint(self) -> Tensor:
        """log p(y, m), `(chains,)`, replicated."""
        return self.log_likelihood + self.log_prior

    def rows(self, index: Tensor) -> State:
        """The chains of some numbers, repeated where a number is."""
        return State(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True)
class Target:
    """A density for a crowd of chains, evaluated for all of them in one batched solve.

    Attributes:
        problem: Prior, forward map, likelihood, data.
        coordinates: In which h is small.
        crowd: The chains.
        gradient: Whether states carry the gradient of h.
    """

    problem: InverseProblem
    coordinates: Coordinates
    crowd: Crowd
    gradient: bool

    def evaluate(self, x: Tensor) -> State:
        """The state at x; raises what the forward map raises. Collective over the mesh.

        Args:
            x: `(chains, n_owned)`.
        """
        with torch.set_grad_enabled(self.gradient):
            at = x.detach().requires_grad_(self.gradient)
            m, log_likelihood, log_prior, excess = self._densities(at)
            slope = torch.autograd.grad(excess.sum(), at)[0] if self.gradient else torch.zeros_like(at)
        x, m, log_likelihood, log_prior, excess = (each.detach() for each in (at, m, log_likelihood, log_prior, excess))
        return _without_failures(State(x, m, log_likelihood, log_prior, excess, slope))

    def excess_at(self, x: Tensor) -> Tensor:
        """h(x), `(chains,)`, replicated, differentiable by torch. Collective over the mesh."""
        return self._densities(x)[3]

    def _densities(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """m, log p(y | m), log p(m) and h(x)."""
        prior = self.problem.prior
        xi, logdet = self.coordinates.weighed(x)
        m = prior.unwhiten(xi)
        log_likelihood = self.problem.log_likelihood(m)
        here, there = prior.all_sum(0.5 * torch.stack([x.square().sum(-1), xi.square().sum(-1)]))
        log_prior = -there - 0.5 * prior.num_global * math.log(2.0 * math.pi) - prior.whitening_logdet
        return m, log_likelihood, log_prior, log_likelihood + (here - there) + logdet

    def attempt(self, x: Tensor) -> State:
        """As `evaluate`; but a chain at whose point the forward map fails gets a density of zero. Collective over the mesh."""
        try:
            return self.evaluate(x)
        except FemViError:
            if len(x) == 1:
                return self._nowhere(x)
        parts = [self.attempt(row) for row in x.split(1)]
        return State(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(State)))

    def begin(self, x: Tensor) -> State:
        """The state to start from, checked: a failure there is an error on every rank. Collective.

        Raises:
            InvalidInput: Where the density is zero or not finite at a starting point.
        """
        error, state = None, self._nowhere(x)
        try:
            state = self.evaluate(x)
            bad = torch.nonzero(~torch.isfinite(state.excess)).flatten().tolist()
            if bad:
                raise InvalidInput(
                    f"log p(y | m) is not finite at the starting points of chains {[self.crowd.first + k for k in bad[:10]]}. "
                    "Pass start: draws of a fitted posterior, for example."
                )
        except FemViError as failure:
            error = failure
        self.crowd.agree(error)
        return state

    def _nowhere(self, x: Tensor) -> State:
        never = torch.full((len(x),), -torch.inf, dtype=torch.float64)
        return State(x.detach(), x.detach(), never, never, never, torch.zeros_like(x))


def _without_failures(state: State) -> State:
    """With a density of zero where a number is not finite."""
    good = torch.isfinite(state.excess)
    if bool(good.all()):
        return state
    never = torch.full_like(state.excess, -torch.inf)
    return State(
        state.x,
        state.m,
        torch.where(good, state.log_likelihood, never),
        torch.where(good, state.log_prior, never),
        torch.where(good, state.excess, never),
        torch.where(good[:, None], state.slope, torch.zeros_like(state.slope)),
    )
