"""Delayed acceptance: a cheap model proposes, the model that counts decides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from fem_vi.arguments import described, instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.mcmc.hmc import HMC
from fem_vi.vi.mcmc.kernel import Info, accept_or_stay
from fem_vi.vi.mcmc.mala import MALA
from fem_vi.vi.mcmc.pcn import PCN
from fem_vi.vi.mcmc.target import State, Target, check_exact
from fem_vi.vi.problem import InverseProblem


@dataclass(frozen=True)
class DelayedAcceptance:
    """Steps on a cheap problem, whose end is accepted or rejected by the problem that is sampled.

        x' from x by `subchain` steps of a kernel that leaves exp(T h_c(x)) N(x; 0, I) alone, h_c of the cheap problem,
        accepted with probability min(1, exp(T [h(x') - h(x) - h_c(x') + h_c(x)]))

    leaves exp(T h(x)) N(x; 0, I) alone, however wrong the cheap problem is: where it is good, nearly all is accepted, at one
    forward solve a step and no backward one. Where the cheap problem's tails are thinner than the posterior's, chains stay for
    long in what it takes for impossible, which R-hat tells; where its density is zero, they must not begin. So begin near the
    posterior: with `reference=`, or `start=` at draws of the cheap problem's posterior.

    Attributes:
        cheap: The same unknowns with a cheap model, such as a `ReducedSolve` or a coarser mesh. The prior must be the sampled
            problem's.
        kernel: `HMC()`, `MALA()` or `PCN()`, with the step size that the warm-up finds on the cheap problem.
        subchain: Steps of that kernel before the full model is asked.

    References:
        Liu (2001), Monte Carlo strategies in scientific computing, section 9.4.3, the surrogate transition method.
        Christen, Fox (2005), Markov chain Monte Carlo using an approximation.

    Example:
        >>> cheap = fem_vi.InverseProblem(prior, lambda theta: observe(reduced(theta)), likelihood, y)
        >>> samples = fem_vi.sample(problem, fem_vi.DelayedAcceptance(cheap, fem_vi.HMC()), chains=8)
        >>> samples.cost.solves, cheap.cost.solves
    """

    cheap: InverseProblem
    kernel: HMC | MALA | PCN = field(default_factory=HMC)
    subchain: int = 1

    def __post_init__(self) -> None:
        instance("DelayedAcceptance: cheap", self.cheap, InverseProblem)
        instance("DelayedAcceptance: kernel", self.kernel, HMC, MALA, PCN)
        whole("DelayedAcceptance: subchain", self.subchain, least=1)

    def __repr__(self) -> str:
        return f"DelayedAcceptance({self.kernel}, subchain={self.subchain})"

    @property
    def step_size(self) -> float | None:
        """That of the kernel."""
        return self.kernel.step_size

    @property
    def acceptance(self) -> float:
        """Mean acceptance probability on the cheap problem at which the warm-up aims."""
        return self.kernel.acceptance

    @property
    def uses_gradient(self) -> bool:
        """False: of the cheap problem only."""
        return False

    def check(self, problem: InverseProblem) -> None:
        """Refuse a problem with other unknowns than the cheap one, and a cheap one whose density is estimated.

        Raises:
            InvalidInput: Where they have not the same prior, or the cheap one is a `MinibatchProblem`.
        """
        check_exact(self.cheap)
        if self.cheap.prior is not problem.prior:
            raise InvalidInput(
                f"DelayedAcceptance: the prior of cheap is {described(self.cheap.prior)}, that of the problem "
                f"{described(problem.prior)}; they must be one object. Make cheap = InverseProblem(problem.prior, cheap_forward, "
                "problem.likelihood, problem.y)."
            )

    def begin(self, target: Target, state: State) -> None:
        """Refuse starting points at which the cheap problem's density is zero: chains would stay there. Collective.

        Raises:
            InvalidInput: Naming the chains.
            SolveFailed: Where the cheap forward map has no solution.
        """
        try:
            self._proposing(target).begin(state.x)
        except InvalidInput as error:
            raise InvalidInput(f"DelayedAcceptance, of cheap: {error}") from error

    def _proposing(self, target: Target) -> Target:
        return replace(target, problem=self.cheap, gradient=self.kernel.uses_gradient)

    def step(self, target: Target, state: State, size: float, *, temperature: float = 1.0) -> tuple[State, Info]:
        """Move every chain once: one forward solve of each, and what `subchain` steps take of the cheap problem. Collective."""
        proposing = self._proposing(target)
        first = at = proposing.attempt(state.x)
        rates = []
        for _ in range(self.subchain):
            at, info = self.kernel.step(proposing, at, size, temperature=temperature)
            rates.append(info.steering)
        proposal = target.attempt(at.x)
        log_ratio = temperature * ((proposal.excess - state.excess) - (at.excess - first.excess))
        state, info = accept_or_stay(target, state, proposal, log_ratio)
        return state, replace(info, steering=torch.stack(rates).mean(0))
