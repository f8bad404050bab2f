"""The No-U-Turn Sampler of Pyro, over the same log density, for comparison."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from fem_vi.arguments import instance, is_number, whole
from fem_vi.errors import FemViError, InvalidInput
from fem_vi.parallel import any_rank, raise_on_all
from fem_vi.vi.mcmc.coordinates import Coordinates
from fem_vi.vi.mcmc.crowd import Crowd
from fem_vi.vi.mcmc.samples import Samples
from fem_vi.vi.mcmc.target import Target, check_exact
from fem_vi.vi.problem import Cost, InverseProblem
from fem_vi.vi.randomness import private_generator


def pyro_nuts(
    problem: InverseProblem,
    *,
    chains: int = 4,
    draws: int = 1000,
    warmup: int = 500,
    reference: nn.Module | Distribution | None = None,
    target_acceptance: float = 0.8,
    seed: int = 0,
) -> Samples:
    """Draw from the posterior by Pyro's NUTS, one chain after the other.

    `sample(problem, HMC())` moves all chains in one batched solve and runs on fields over several ranks; this is here to compare
    with. Needs `pip install pyro-ppl`.

    Args:
        problem: Prior, forward map, likelihood, data.
        chains: Independent chains, one after the other.
        draws: Draws of each after the warm-up.
        warmup: Steps in which Pyro finds step size and mass matrix.
        reference: A normal posterior or a flow relative to the prior, in whose coordinates the chains work; None for the prior.
        target_acceptance: Mean acceptance probability at which the warm-up aims.
        seed: Of all random numbers. The state of torch's generator is left as it was found.

    Returns:
        The draws, as `sample` returns them.

    Raises:
        InvalidInput: Where Pyro is not installed, unknowns are spread over several ranks, or an argument is out of range.

    MPI: Collective; replicated unknowns, or fields on one rank.

    References:
        Hoffman, Gelman (2014), The No-U-Turn Sampler: adaptively setting path lengths in Hamiltonian Monte Carlo.
        Bingham et al. (2019), Pyro: deep universal probabilistic programming.

    Example:
        >>> samples = fem_vi.pyro_nuts(problem, chains=4, draws=1000)
    """
    instance("problem", problem, InverseProblem)
    prior = problem.prior
    with raise_on_all(prior.comm):
        check_exact(problem)
        chains, draws = whole("chains", chains, least=1), whole("draws", draws, least=1)
        warmup, seed = whole("warmup", warmup, least=1), whole("seed", seed)
        if not (is_number(target_acceptance) and 0.0 < target_acceptance < 1.0):
            raise InvalidInput(f"target_acceptance is {target_acceptance!r:.80}; it is a probability, between 0 and 1.")
        infer = _pyro()
    if any_rank(prior.comm, prior.event_shape[0] != prior.num_global):
        raise InvalidInput(
            f"pyro_nuts: the unknowns of {prior!r} are spread over {prior.comm.size} ranks, and Pyro sums over those of one rank "
            "only. Use sample(problem, HMC())."
        )
    crowd = Crowd.create(prior, 1, None, seed=seed)
    before, began = Cost(problem.cost.forward, problem.cost.backward), time.monotonic()
    with private_generator(crowd.seed):
        target = Target(problem, Coordinates.of(prior, reference), crowd, gradient=False)
        runs = [_chain(infer, target, draws, warmup, target_acceptance) for _ in range(chains)]
    x = torch.stack([run[0] for run in runs])
    with torch.no_grad():
        states = [target.evaluate(part) for part in x]
    spent = Cost(problem.cost.forward - before.forward, problem.cost.backward - before.backward)
    return Samples(
        problem=problem,
        m=torch.stack([state.m for state in states]),
        log_joint=torch.stack([state.log_joint for state in states]),
        log_likelihood=torch.stack([state.log_likelihood for state in states]),
        acceptance=torch.tensor([[run[1]] * draws for run in runs], dtype=torch.float64),
        num_diverged=sum(run[3] for run in runs),
        kernel="pyro.infer.NUTS",
        step_size=sum(run[2] for run in runs) / chains,
        cost=spent,
        seconds=time.monotonic() - began,
        seed=crowd.seed,
    )


def _pyro() -> Any:
    """pyro.infer, with the process's settings as they were."""
    validation = torch.distributions.Distribution._validate_args  # type: ignore[attr-defined]
    try:
        from pyro import infer
    except ImportError as error:
        raise InvalidInput(
            f"pyro_nuts needs Pyro, which cannot be imported ({error}). Install it with: pip install pyro-ppl. "
            "sample(problem, HMC()) needs nothing."
        ) from error
    finally:
        torch.distributions.Distribution.set_default_validate_args(validation)
    return infer


def _chain(infer: Any, target: Target, draws: int, warmup: int, acceptance: float) -> tuple[Tensor, float, float, int]:
    """Draws `(draws, n)`, acceptance, step size and number of divergences of one chain."""

    def potential(parameters: dict[str, Tensor]) -> Tensor:
        x = parameters["x"]
        try:
            return 0.5 * x.square().sum() - target.excess_at(x[None])[0]
        except FemViError:  # nowhere the chain may go
            return torch.inf + 0.0 * x.sum()

    kernel = infer.NUTS(potential_fn=potential, target_accept_prob=acceptance)
    first = {"x": target.begin(target.crowd.noise()).x[0]}
    run = infer.MCMC(kernel, num_samples=draws, warmup_steps=warmup, initial_params=first, disable_progbar=True)
    with torch.enable_grad():
        run.run()
    told = run.diagnostics()
    rate = float(told["acceptance rate"]["chain 0"])
    return run.get_samples()["x"].detach(), rate, float(kernel.step_size), len(told["divergences"]["chain 0"])
