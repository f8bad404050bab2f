"""Simulation-based calibration: is an inference procedure right on average over the prior?

If m* ~ p(m), y* ~ p(y | m*) and m_1, ..., m_L are independent draws from p(m | y*), then m* and the m_i have one law given y*, so
that the rank of f(m*) among the f(m_i) is uniform on 0, ..., L for every function f. Where ranks are not uniform, it is wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Distribution

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all, shared_seed
from fem_vi.report import as_text
from fem_vi.vi.mcmc.samples import Samples
from fem_vi.vi.mcmc.tempered import Tempered
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.randomness import private_generator

Inference = Callable[[InverseProblem, int], "nn.Module | Distribution | Samples | Tempered | Tensor"]
LEVEL = 0.01
MOST_QUANTITIES = 8
EXPECTED = 5
LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Calibration:
    """Ranks of the truth among posterior draws, over many simulated data sets; every number is replicated.

    Attributes:
        names: Of the quantities.
        ranks: Of each truth among its draws, `(repeats, quantities)`, from 0 to `draws`.
        draws: Posterior draws in each repeat.
        bins: Of the chi-square tests.
        p_values: Of uniform ranks, one for each quantity.
        coverage: For each central interval of `levels`, the fraction of truths inside, over all quantities.
        levels: 0.5, 0.8, 0.9 and 0.95.
        verdict: What to make of it, in words.

    References:
        Cook, Gelman, Rubin (2006), Validation of software for Bayesian models using posterior quantiles.
        Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian inference algorithms with simulation-based
        calibration.
        Modrak et al. (2023), Simulation-based calibration checking for Bayesian computation: the choice of test quantities.
    """

    names: tuple[str, ...]
    ranks: Tensor
    draws: int
    bins: int
    p_values: tuple[float, ...]
    coverage: tuple[float, ...]
    levels: tuple[float, ...]
    verdict: str

    def __rich__(self) -> Group:
        """A table, and the verdict below it."""
        table = Table(
            "quantity", "mean rank [0, 1]", "spread of ranks", "p-value of uniform ranks", title="Is the inference calibrated?"
        )
        for k, name in enumerate(self.names):
            u = (self.ranks[:, k].double() + 0.5) / (self.draws + 1)
            spread = float(u.std()) * 12**0.5
            table.add_row(name, f"{float(u.mean()):.3f}", f"{spread:.2f} (1: right)", f"{self.p_values[k]:.3g}")
        covered = ", ".join(f"{100 * c:.0f} % in {100 * q:.0f} %" for c, q in zip(self.coverage, self.levels, strict=True))
        return Group(table, Text(f"Truths inside central intervals: {covered}."), Text(self.verdict))

    def __str__(self) -> str:
        return as_text(self)


def calibrate(
    problem: InverseProblem,
    infer: Inference,
    *,
    repeats: int = 200,
    draws: int = 99,
    quantities: Callable[[InverseProblem, Tensor], Tensor] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Calibration:
    """Run an inference on data simulated from the prior, again and again, and look at the ranks of the truth.

    Args:
        problem: Prior, forward map and likelihood; its data only give their number.
        infer: Takes a problem with new data and a seed, and returns its posterior: a module, a distribution, `Samples`,
            `Tempered`, or draws `(draws, n_owned)`: independent ones, so that chains must be thinned, or many.
        repeats: Data sets.
        draws: Posterior draws in each; one less than a number with many divisors.
        quantities: Numbers that depend on m, of a problem and `(batch, n_owned)` to `(batch, k)`, replicated; None takes up to
            eight unknowns and log p(y | m), which sees what single unknowns do not.
        names: Of the quantities.
        seed: Of truths, data and inferences; rank 0's counts. The state of torch's generator is left as it was found.

    Returns:
        Ranks, chi-square tests, coverage of central intervals, and a verdict.

    Raises:
        InvalidInput: Where an argument is of the wrong type or out of range, or `infer` returns something else.

    MPI: Collective.

    Example:
        >>> def infer(problem, seed):
        ...     return fem_vi.fit(problem, fem_vi.LowRankNormal(problem.prior, 20), fem_vi.ELBO(), steps=200, seed=seed).posterior
        >>> print(fem_vi.calibrate(problem, infer, repeats=100))
    """
    instance("problem", problem, InverseProblem)
    prior = problem.prior
    with raise_on_all(prior.comm):
        instance("infer", infer, Callable)  # type: ignore[arg-type]
        _check_takes_problem_and_seed(infer, problem)
        repeats, draws = whole("repeats", repeats, least=20), whole("draws", draws, least=9)
        seed = whole("seed", seed)
    seed = shared_seed(prior.comm, seed)
    measure, known = (quantities, names) if quantities is not None else _default_quantities(problem)
    rows = []
    for repeat in range(repeats):
        with private_generator(seed + 2 * repeat), torch.no_grad():
            truth = prior.rsample(torch.Size([1]))
            y = problem.likelihood.sample(problem.predict(truth))[0]
        simulated = InverseProblem(prior, problem.forward, problem.likelihood, y)
        result = infer(simulated, seed + 2 * repeat + 1)
        with private_generator(seed + 2 * repeat + 1), torch.no_grad():
            m = _draws_of(result, draws, prior.event_shape)
            values = measure(simulated, torch.cat([truth, m]))
        problem.cost.forward += simulated.cost.forward
        problem.cost.backward += simulated.cost.backward
        rows.append((values[1:] < values[:1]).sum(0))
    ranks = torch.stack(rows)
    found = tuple(known) if known is not None else tuple(f"quantity {k}" for k in range(ranks.shape[1]))
    if len(found) != ranks.shape[1]:
        raise InvalidInput(f"names has {len(found)} entries; quantities returned {ranks.shape[1]}.")
    return _judged(ranks, draws, found)


def _check_takes_problem_and_seed(infer: Inference, problem: InverseProblem) -> None:
    try:
        inspect.signature(infer).bind(problem, 0)
    except TypeError as error:
        raise InvalidInput(
            f"infer cannot be called as infer(problem, seed): {error}. For an inference without a seed pass "
            "lambda problem, seed: fem_vi.laplace(problem)."
        ) from error
    except ValueError:
        pass  # a function of C without a signature


def _default_quantities(problem: InverseProblem) -> tuple[Callable[[InverseProblem, Tensor], Tensor], list[str]]:
    """Unknowns evenly spread over the vector, and the log-likelihood."""
    count = problem.prior.num_global
    chosen = torch.linspace(0, count - 1, min(count, MOST_QUANTITIES)).round().long()

    def measure(problem: InverseProblem, m: Tensor) -> Tensor:
        return torch.cat([problem.prior.gather(m)[:, chosen], problem.log_likelihood(m)[:, None]], dim=1)

    return measure, [*(f"unknown {k}" for k in chosen.tolist()), "log p(y | m)"]


def _draws_of(result: Any, draws: int, event_shape: torch.Size) -> Tensor:
    """Draws `(draws, n_owned)` of whatever an inference returned."""
    if isinstance(result, Samples | Tempered):
        result = result.m.flatten(0, 1)
    if isinstance(result, nn.Module):
        result = result()
    if isinstance(result, Distribution):
        return result.sample(torch.Size([draws]))
    if not isinstance(result, Tensor) or result.ndim != 2 or result.shape[1:] != event_shape or len(result) < draws:
        given = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise InvalidInput(
            f"infer returned {given}; it must return a posterior, or at least {draws} draws, ({draws}, {event_shape[0]})."
        )
    return result[torch.linspace(0, len(result) - 1, draws).round().long()]


def _judged(ranks: Tensor, draws: int, names: tuple[str, ...]) -> Calibration:
    """Tests and words."""
    repeats = len(ranks)
    divisors = [k for k in range(2, draws + 2) if (draws + 1) % k == 0 and repeats / k >= EXPECTED and k <= 20]
    bins = max(divisors, default=2)
    p_values = []
    for column in ranks.T:
        counts = np.bincount((column.numpy() * bins) // (draws + 1), minlength=bins)
        p_values.append(float(stats.chisquare(counts, np.full(bins, repeats / bins)).pvalue))
    u = (ranks.double() + 0.5) / (draws + 1)
    coverage = tuple(float(((u - 0.5).abs() <= 0.5 * level).double().mean()) for level in LEVELS)
    return Calibration(names, ranks, draws, bins, tuple(p_values), coverage, LEVELS, _verdict(u, p_values, names))


def _verdict(u: Tensor, p_values: list[float], names: tuple[str, ...]) -> str:
    """What a reader who knows no chi-square should do. Bonferroni's correction for the number of quantities."""
    wrong = [k for k, p in enumerate(p_values) if p * len(p_values) <= LEVEL]
    if not wrong:
        return (
            f"No sign of a wrong posterior in {len(u)} simulated data sets: ranks are uniform (smallest p {min(p_values):.2g})."
        )
    worst = wrong[0]  # single unknowns come first, whose ranks are easier to read
    error = (12 * len(u)) ** -0.5  # of the mean rank, were ranks uniform
    shift = float(u[:, worst].mean()) - 0.5
    spread = float(u[:, worst].std()) * 12**0.5
    if abs(shift) > 4 * error:
        kind = f"biased {'low' if shift > 0 else 'high'}: truths lie {'above' if shift > 0 else 'below'} most draws"
    elif spread > 1.0:
        kind = "too narrow: truths fall outside the draws too often"
    else:
        kind = "too wide: truths lie near the middle of the draws"
    return f"The inference is not calibrated: for {names[worst]} posteriors are {kind} (p = {p_values[worst]:.2g})."
