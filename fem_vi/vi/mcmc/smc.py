"""Tempered sequential Monte Carlo: particles from a reference to the posterior, and the evidence on the way.

With the reference N(0, I) in x and the posterior exp(h(x)) N(x; 0, I) / p(y) (`target.py`), the path is

    pi_b(x) = exp(b h(x)) N(x; 0, I) / Z_b,   b from 0 to 1,   Z_0 = 1,   Z_1 = p(y).

From one temperature to the next the particles are weighted by w = exp((b' - b) h), whose mean estimates Z_b' / Z_b; resampled;
and moved by a Markov kernel that leaves pi_b' alone. Where the reference is the prior, h = log p(y | m); where it is the
posterior, h is constant and one step is enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from fem_vi.arguments import instance, is_number, whole
from fem_vi.errors import InvalidInput, NotFinite
from fem_vi.parallel import ProcessGrid, raise_on_all
from fem_vi.vi.mcmc.chains import check_kernel_of
from fem_vi.vi.mcmc.coordinates import Coordinates
from fem_vi.vi.mcmc.crowd import Crowd
from fem_vi.vi.mcmc.hmc import HMC
from fem_vi.vi.mcmc.kernel import Kernel
from fem_vi.vi.mcmc.progress import sampling_bar
from fem_vi.vi.mcmc.rotation import QUARTER
from fem_vi.vi.mcmc.target import State, Target, check_exact
from fem_vi.vi.mcmc.tempered import Tempered
from fem_vi.vi.mcmc.warm_up import FIRST_SIZE
from fem_vi.vi.problem import Cost, InverseProblem
from fem_vi.vi.randomness import private_generator

GAIN = 1.0
BISECTIONS = 50


def smc(
    problem: InverseProblem,
    kernel: Kernel = HMC(),  # noqa: B008 - frozen
    *,
    particles: int = 500,
    islands: int = 4,
    moves: int = 3,
    ess: float = 0.7,
    most_temperatures: int = 500,
    reference: nn.Module | Distribution | None = None,
    seed: int = 0,
    grid: ProcessGrid | None = None,
) -> Tempered:
    """Move particles from a reference to the posterior through rising powers of the density, and estimate the evidence.

    Each next temperature is the one at which the weights are worth a fraction `ess` of the particles. Islands are repeats that
    share temperatures and step sizes and nothing else: their scatter is the standard error of the evidence. A path from the prior
    can cross a sharp transition, after which all particles descend from a few: where islands disagree, take more particles, or a
    reference closer to the posterior.

    Args:
        problem: Prior, forward map, likelihood, data.
        kernel: What moves particles: `HMC()`, `MALA()` or `PCN()`, or `DelayedAcceptance(cheap, ...)` of one. A step size of None
            adapts itself.
        particles: Particles of each island.
        islands: Independent repeats, at least 2.
        moves: Steps of the kernel at each temperature.
        ess: Fraction of particles that the weights of a step in temperature are worth.
        most_temperatures: Give up after so many.
        reference: A normal posterior or a flow relative to the prior to begin at; None for the prior.
        seed: Of all random numbers; rank 0's counts. The state of torch's generator is left as it was found.
        grid: Shares out islands over groups of ranks, where each group has a mesh of its own; None for one group.

    Returns:
        Particles of equal weight, the evidence with its standard error, and what it cost.

    Raises:
        InvalidInput: Where an argument is of the wrong type or out of range.
        NotFinite: Where the density is zero at every particle of an island, or the temperature does not reach one.

    MPI: Collective over the ranks of the prior, or of `grid.comm`.

    References:
        Del Moral, Doucet, Jasra (2006), Sequential Monte Carlo samplers.
        Beskos, Jasra, Muzaffer, Stuart (2015), Sequential Monte Carlo methods for Bayesian elliptic inverse problems.
        Jasra, Stephens, Doucet, Tsagaris (2011), Inference for Levy-driven stochastic volatility models via adaptive SMC.

    Example:
        >>> tempered = fem_vi.smc(problem, particles=500, reference=fem_vi.laplace(problem))
        >>> tempered.log_evidence, tempered.log_evidence_error
    """
    instance("problem", problem, InverseProblem)
    instance("grid", grid, ProcessGrid, NoneType)
    comm = problem.prior.comm if grid is None else grid.comm
    with raise_on_all(comm):
        check_exact(problem)
        plan = _checked(problem, kernel, Plan(particles, islands, moves, ess, most_temperatures))
        seed = whole("seed", seed)
    crowd = Crowd.create(problem.prior, plan.islands * plan.particles, grid, seed=seed, unit=plan.particles)
    before, began = Cost(problem.cost.forward, problem.cost.backward), time.monotonic()
    with private_generator(crowd.seed), sampling_bar(1.0, show=comm.rank == 0) as show:
        target = Target(problem, Coordinates.of(problem.prior, reference), crowd, kernel.uses_gradient)
        path = _Path(target, kernel, plan)
        state = path.run(show)
    spent = torch.tensor([problem.cost.forward - before.forward, problem.cost.backward - before.backward], dtype=torch.float64)
    forward, backward = crowd.together(spent).tolist()
    shape = (plan.islands, plan.particles)
    return Tempered(
        problem=problem,
        m=crowd.collect(state.m).reshape(*shape, -1),
        log_likelihood=crowd.collect(state.log_likelihood).reshape(shape),
        log_evidences=crowd.collect(path.log_evidence),
        temperatures=tuple(path.temperatures),
        acceptance=tuple(path.acceptance),
        ancestors=crowd.collect(path.ancestors()),
        kernel=kernel,
        step_size=path.size,
        cost=Cost(int(forward), int(backward)),
        seconds=time.monotonic() - began,
        seed=crowd.seed,
    )


@dataclass(frozen=True)
class Plan:
    """The checked settings of `smc`."""

    particles: int
    islands: int
    moves: int
    ess: float
    most_temperatures: int


def _checked(problem: InverseProblem, kernel: Kernel, plan: Plan) -> Plan:
    check_kernel_of(problem, kernel)
    if not (is_number(plan.ess) and 0.0 < plan.ess < 1.0):
        raise InvalidInput(f"ess is {plan.ess!r:.80}; it is a fraction of the particles, between 0 and 1.")
    return Plan(
        whole("particles", plan.particles, least=2),
        whole("islands", plan.islands, least=2),
        whole("moves", plan.moves, least=1),
        float(plan.ess),
        whole("most_temperatures", plan.most_temperatures, least=1),
    )


class _Path:
    """The particles of this group's islands on their way, and what is known of it."""

    def __init__(self, target: Target, kernel: Kernel, plan: Plan) -> None:
        self.target, self.kernel, self.plan = target, kernel, plan
        self.islands = target.crowd.size // plan.particles
        self.size = kernel.step_size or FIRST_SIZE
        self.temperatures, self.acceptance = [0.0], list[float]()
        self.log_evidence = torch.zeros(self.islands, dtype=torch.float64)
        self._origin = torch.arange(target.crowd.size)

    def run(self, show: Callable[[float], None]) -> State:
        """From the reference to the posterior. Collective over all groups."""
        state = self.target.attempt(self.target.crowd.noise())
        while self.temperatures[-1] < 1.0:
            if len(self.temperatures) > self.plan.most_temperatures:
                raise NotFinite(
                    f"smc: after {self.plan.most_temperatures} steps the temperature is {self.temperatures[-1]:.3g}, not yet 1. "
                    "Take a lower ess, more particles, or a reference closer to the posterior."
                )
            state = self._move(self._reweighted(state))
            show(self.temperatures[-1] - self.temperatures[-2])
        return state

    def ancestors(self) -> Tensor:
        """Particles at the start from which those of each island descend, `(islands,)`."""
        return torch.tensor([len(row.unique()) for row in self._origin.reshape(self.islands, -1)], dtype=torch.float64)

    def _reweighted(self, state: State) -> State:
        """Raise the temperature, and resample each island by its weights."""
        plan, now = self.plan, self.temperatures[-1]
        excess = state.excess.reshape(self.islands, plan.particles)
        empty = float(self.target.crowd.together((~torch.isfinite(excess).any(1)).sum().double()))
        if empty:
            raise NotFinite(
                f"smc: p(y | m) is zero, or the forward map fails, at every particle of {empty:.0f} islands. Take more "
                "particles, or a reference at which the forward map has solutions."
            )
        rise = self._rise(excess, 1.0 - now)
        log_weights = rise * excess
        self.log_evidence = self.log_evidence + log_weights.logsumexp(1) - math.log(plan.particles)
        self.temperatures.append(1.0 if rise == 1.0 - now else now + rise)
        offsets = self.target.crowd.uniform().reshape(self.islands, plan.particles)[:, 0]
        index = _systematic(log_weights.softmax(1), offsets)
        index = (index + plan.particles * torch.arange(self.islands)[:, None]).flatten()
        self._origin = self._origin[index]
        return state.rows(index)

    def _rise(self, excess: Tensor, most: float) -> float:
        """The largest rise of the temperature at which weights are worth the fraction wanted, in the mean over islands."""
        if self._worth(excess, most) >= self.plan.ess:
            return most
        low, high = 0.0, most
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self._worth(excess, middle) >= self.plan.ess else (low, middle)
        return max(low, 1e-12)

    def _worth(self, excess: Tensor, rise: float) -> float:
        """Effective fraction of particles after a rise, in the mean over the islands of all groups."""
        log_weights = rise * excess
        worth = (2.0 * log_weights.logsumexp(1) - (2.0 * log_weights).logsumexp(1)).exp() / self.plan.particles
        return float(self.target.crowd.together(worth.sum())) / self.plan.islands

    def _move(self, state: State) -> State:
        crowd, total = self.target.crowd, 0.0
        for _ in range(self.plan.moves):
            state, info = self.kernel.step(self.target, state, self.size, temperature=self.temperatures[-1])
            rates = torch.stack([info.acceptance.sum(), info.steering.sum()])
            acceptance, steering = (crowd.together(rates) / crowd.total).tolist()
            total += acceptance / self.plan.moves
            if self.kernel.step_size is None:
                self.size = min(self.size * math.exp(GAIN * (steering - self.kernel.acceptance)), QUARTER)
        self.acceptance.append(total)
        return state


def _systematic(weights: Tensor, offsets: Tensor) -> Tensor:
    """Systematic resampling.

    Args:
        weights: `(islands, particles)`, each row with sum one.
        offsets: Uniform numbers, `(islands,)`.

    Returns:
        Numbers of the particles that are kept, `(islands, particles)`.
    """
    particles = weights.shape[1]
    points = (torch.arange(particles, dtype=weights.dtype) + offsets[:, None]) / particles
    edges = weights.cumsum(1)
    return torch.searchsorted(edges / edges[:, -1:], points).clamp_max(particles - 1)
