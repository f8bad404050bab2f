"""Chains of a Markov kernel: starting, warming up, drawing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.parallel import ProcessGrid, raise_on_all
from fem_vi.vi.mcmc.coordinates import Coordinates, starting_points
from fem_vi.vi.mcmc.crowd import Crowd
from fem_vi.vi.mcmc.delayed import DelayedAcceptance
from fem_vi.vi.mcmc.kernel import Kernel
from fem_vi.vi.mcmc.progress import sampling_bar
from fem_vi.vi.mcmc.samples import Samples
from fem_vi.vi.mcmc.target import State, Target, check_exact
from fem_vi.vi.mcmc.warm_up import Adaptation, KeepReference, LearnDense, LearnDiagonal, warm_up
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import Cost, InverseProblem
from fem_vi.vi.randomness import private_generator

MOST_LEARNED = 200
"""Unknowns up to which scales are learned where nothing is said."""


def sample(
    problem: InverseProblem,
    kernel: Kernel,
    *,
    chains: int = 4,
    draws: int = 1000,
    warmup: int = 500,
    thin: int = 1,
    reference: nn.Module | Distribution | None = None,
    start: nn.Module | Distribution | Tensor | None = None,
    adaptation: Adaptation | None = None,
    seed: int = 0,
    grid: ProcessGrid | None = None,
) -> Samples:
    """Draw from the posterior by Markov chains, all of them moved together in batched solves.

    The chains work in whitened coordinates, in which the prior, or the reference, is standard normal. A reference close to the
    posterior (`laplace(problem)`, a fitted `FullRankNormal` or `Flow`) is the best preconditioner there is; it makes nothing
    wrong where it is far. The same seed gives the same draws, on any number of ranks and groups up to rounding, until rounding
    flips a decision.

    Args:
        problem: Prior, forward map, likelihood, data.
        kernel: `HMC()`, `MALA()` or `PCN()`; or `DelayedAcceptance(cheap, ...)` of one.
        chains: Independent chains, a batch axis of the solves.
        draws: Steps of each chain after the warm-up.
        warmup: Steps in which the step size is found, which do not count.
        thin: Keep every so many-th draw, for large fields.
        reference: A normal posterior or a flow relative to the prior, in whose coordinates the chains work; None for the prior.
        start: Where chains begin: m, `(chains, n_owned)`, or a posterior to draw from; None for draws of the reference.
        adaptation: `KeepReference()`, `LearnDiagonal()` or `LearnDense()`; None takes the second for kernels with gradients, at
            most 200 unknowns and no reference, else the first: pCN is stuck for long where its reference has thinner tails.
        seed: Of all random numbers; rank 0's counts. The state of torch's generator is left as it was found.
        grid: Shares out chains over groups of ranks, where each group has a mesh of its own; None for one group.

    Returns:
        The draws, with what they cost and how well the chains mixed.

    Raises:
        InvalidInput: Where an argument is of the wrong type or out of range, or the density is zero at a starting point,
            also that of the cheap problem of a `DelayedAcceptance`.
        SolveFailed: Where the forward map has no solution at a starting point. Later, such a proposal is rejected.

    MPI: Collective over the ranks of the prior, or of `grid.comm`.

    References:
        Cotter, Roberts, Stuart, White (2013), MCMC methods for functions: modifying old algorithms to make them faster.
        Hoffman, Sountsov, Dillon, Langmore, Tran, Vasudevan (2019), NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using
        neural transport.

    Example:
        >>> samples = fem_vi.sample(problem, fem_vi.HMC(), chains=8, reference=fem_vi.laplace(problem))
        >>> print(samples.report())
    """
    instance("problem", problem, InverseProblem)
    instance("grid", grid, ProcessGrid, NoneType)
    comm = problem.prior.comm if grid is None else grid.comm
    with raise_on_all(comm):
        plan = _checked(problem, kernel, Plan(chains, draws, warmup, thin, adaptation), reference)
        seed = whole("seed", seed)
    crowd = Crowd.create(problem.prior, plan.chains, grid, seed=seed)
    before, began = Cost(problem.cost.forward, problem.cost.backward), time.monotonic()
    with private_generator(crowd.seed):
        target = Target(problem, Coordinates.of(problem.prior, reference), crowd, kernel.uses_gradient)
        state = target.begin(_first(target, start))
        if isinstance(kernel, DelayedAcceptance):
            kernel.begin(target, state)
        with sampling_bar(plan.warmup + plan.draws, show=comm.rank == 0) as show:
            target, state, size = warm_up(
                target, kernel, state, steps=plan.warmup, adaptation=plan.adaptation or KeepReference(), show=show
            )
            kept = _draws(target, kernel, state, size=size, plan=plan, show=show)
    spent = torch.tensor([problem.cost.forward - before.forward, problem.cost.backward - before.backward], dtype=torch.float64)
    forward, backward = crowd.together(spent).tolist()
    density = crowd.collect(torch.stack(kept.log_joint).movedim(-1, 0))
    return Samples(
        problem=problem,
        m=crowd.collect(torch.stack(kept.m, dim=1)),
        log_joint=density[..., 0],
        log_likelihood=density[..., 1],
        acceptance=crowd.collect(torch.stack(kept.acceptance, dim=1)),
        num_diverged=int(crowd.together(torch.stack(kept.diverged).sum().double())),
        kernel=kernel,
        step_size=size,
        cost=Cost(int(forward), int(backward)),
        seconds=time.monotonic() - began,
        seed=crowd.seed,
    )


@dataclass(frozen=True)
class Plan:
    """How many steps are taken, checked.

    Attributes:
        chains, draws, warmup, thin: As of `sample`.
        adaptation: What the warm-up learns.
    """

    chains: int
    draws: int
    warmup: int
    thin: int
    adaptation: Adaptation | None


@dataclass(frozen=True)
class _Kept:
    """What is kept of each draw."""

    m: list[Tensor]
    log_joint: list[Tensor]
    acceptance: list[Tensor]
    diverged: list[Tensor]


def _draws(target: Target, kernel: Kernel, state: State, *, size: float, plan: Plan, show: Callable[[float], None]) -> _Kept:
    """Take the steps that count. Collective over the mesh."""
    kept = _Kept([], [], [], [])
    for k in range(1, plan.draws + 1):
        state, info = kernel.step(target, state, size)
        kept.acceptance.append(info.acceptance)
        kept.diverged.append(info.diverged)
        if k % plan.thin == 0:
            kept.m.append(state.m)
            kept.log_joint.append(torch.stack([state.log_joint, state.log_likelihood]))
        show(1.0)
    return kept


def _checked(problem: InverseProblem, kernel: Kernel, plan: Plan, reference: object) -> Plan:
    check_kernel_of(problem, kernel)
    chains, draws = whole("chains", plan.chains, least=1), whole("draws", plan.draws, least=1)
    warmup, thin = whole("warmup", plan.warmup, least=0), whole("thin", plan.thin, least=1)
    if thin > draws:
        raise InvalidInput(f"thin is {thin} and draws {draws}: nothing would be kept.")
    if warmup == 0 and kernel.step_size is None:
        raise InvalidInput(f"warmup is 0: no step size would be found. Give one: {type(kernel).__name__}(step_size=0.2).")
    check_exact(problem)
    adaptation = plan.adaptation
    if adaptation is None:
        moving = kernel.kernel if isinstance(kernel, DelayedAcceptance) else kernel
        few = reference is None and moving.uses_gradient and problem.prior.num_global <= MOST_LEARNED
        adaptation = LearnDiagonal() if few else KeepReference()
    instance("adaptation", adaptation, LearnDiagonal, LearnDense, KeepReference)
    if isinstance(adaptation, LearnDense) and not isinstance(problem.prior, GaussianVector):
        raise InvalidInput(
            f"adaptation is LearnDense(), and the prior is a {type(problem.prior).__name__}: a dense matrix is learned "
            "for a GaussianVector only. Use LearnDiagonal(), or pass reference=laplace(problem)."
        )
    return Plan(chains, draws, warmup, thin, adaptation)


def check_kernel_of(problem: InverseProblem, kernel: object) -> None:
    """Refuse what is no kernel, such as its class, and a kernel of another problem.

    Raises:
        InvalidInput: Naming it.
    """
    if isinstance(kernel, type) or not all(hasattr(kernel, name) for name in ("step", "step_size", "uses_gradient")):
        raise InvalidInput(f"kernel is {kernel!r:.80}; it must be a kernel such as HMC(), MALA() or PCN().")
    if isinstance(kernel, DelayedAcceptance):
        kernel.check(problem)


def _first(target: Target, start: nn.Module | Distribution | Tensor | None) -> Tensor:
    """Where this group's chains begin, `(chains, n_owned)`. Collective."""
    crowd = target.crowd
    if start is None:
        return crowd.noise()
    with torch.no_grad():
        xi = starting_points(target.problem.prior, start, crowd.total)[crowd.first : crowd.last]
        return target.coordinates.of_whitened(xi)
