"""The Laplace approximation: a normal posterior around the most probable parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from rich.table import Table

from fem_vi.arguments import instance, whole
from fem_vi.parallel import raise_on_all
from fem_vi.report import as_text
from fem_vi.vi.mode import Convergence
from fem_vi.vi.posterior.low_rank import LowRankNormal
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.start import GaussNewton, Linearisation, NewtonCG


@dataclass(frozen=True)
class LaplaceReport:
    """What a Laplace approximation rests on; every number is replicated.

    Attributes:
        search: How the most probable parameters were found.
        log_likelihood: log p(y | m) there.
        log_evidence: Laplace's estimate of log p(y).
        eigenvalues: Precision that data add to the prior's (whose is one) in each direction, largest first.
        neglected: Largest eigenvalue known to be left out; 0 where none was, to rounding.
        solves: Forward and backward solves that it took.
    """

    search: Convergence
    log_likelihood: float
    log_evidence: float
    eigenvalues: tuple[float, ...]
    neglected: float
    solves: int

    def __rich__(self) -> Table:
        """A table."""
        search = self.search
        table = Table("quantity", "value", title="Laplace approximation")
        table.add_row("most probable parameters", "found" if search.converged else f"NOT FOUND: {search.reason}")
        table.add_row("Newton steps, inner iterations", f"{search.iterations}, {search.inner_iterations}")
        table.add_row("gradient, from prior mean to end [nats]", f"{search.first_grad_norm:.3g} to {search.grad_norm:.3g}")
        table.add_row("left to gain [nats]", f"{search.gain:.2g}")
        table.add_row("log evidence", f"{self.log_evidence:.4f}")
        values = self.eigenvalues
        table.add_row("directions", f"{len(values)}, added precision {values[0]:.3g} to {values[-1]:.3g}")
        table.add_row("solves", f"{self.solves}")
        return table

    def __str__(self) -> str:
        return as_text(self)


class LaplaceNormal(LowRankNormal):
    """The normal posterior of the problem linearised at its most probable parameters; `laplace` makes it.

    A `LowRankNormal` like any other: a posterior of its own, and a start for `fit`.

    Args:
        problem: Whose posterior it approximates.
        linearisation: The problem, linearised.
        report: What it rests on.

    Attributes:
        report: That report.

    MPI: Collective.
    """

    def __init__(self, problem: InverseProblem, linearisation: Linearisation, report: LaplaceReport) -> None:
        super().__init__(problem.prior, len(report.eigenvalues))
        self.start_at(linearisation)
        self.report = report


def laplace(
    problem: InverseProblem,
    *,
    rank: int | None = None,
    mode: NewtonCG | GaussNewton = NewtonCG(),  # noqa: B008 - frozen
) -> LaplaceNormal:
    """The most probable parameters, and the normal distribution with the curvature of the linearised problem there.

        q(m): m = unwhiten(xi),  xi ~ N(xi*, (I + J'J)^-1),
        log p(y) ~ log p(y | m*) - |xi*|^2 / 2 - log det(I + J'J) / 2

    Exact for affine maps and Gaussian noise. Otherwise a point of departure: pass it to `fit`, and ask `diagnose`.

    Args:
        problem: Prior, forward map, likelihood, data.
        rank: Most directions in which the posterior may differ from the prior; None for all that matter (`NewtonCG.threshold`).
        mode: `NewtonCG()`, without matrices, or `GaussNewton()`, with one adjoint solve for each datum in every iteration.

    Returns:
        A posterior whose `report` says how the search went; a search that did not converge is told there and is no error.

    Raises:
        InvalidInput: Where an argument is of the wrong type.
        SolveFailed: Where the forward map has no solution at the prior mean.

    MPI: Collective.

    References:
        Bui-Thanh, Ghattas, Martin, Stadler (2013), A computational framework for infinite-dimensional Bayesian inverse
        problems, part I.

    Example:
        >>> posterior = fem_vi.laplace(problem)
        >>> posterior.report.log_evidence
        >>> fem_vi.fit(problem, posterior, fem_vi.ELBO(samples=8), steps=200)
    """
    instance("problem", problem, InverseProblem)
    with raise_on_all(problem.prior.comm):
        instance("mode", mode, NewtonCG, GaussNewton)
        rank = None if rank is None else whole("rank", rank, least=1)
    before = problem.cost.solves
    if isinstance(mode, NewtonCG) and rank is not None:
        mode = replace(mode, rank=rank)
    linearisation = mode.linearise(problem)
    return LaplaceNormal(problem, linearisation, _report(problem, linearisation, rank, problem.cost.solves - before))


def _report(problem: InverseProblem, linearisation: Linearisation, rank: int | None, solves: int) -> LaplaceReport:
    values = torch.linalg.eigvalsh(linearisation.gram).flip(0).clamp_min(0.0)
    kept = min(len(values) if rank is None else rank, len(values), problem.prior.num_global)
    length = float(problem.prior.all_sum(linearisation.mu.square().sum()))
    return LaplaceReport(
        search=linearisation.search,
        log_likelihood=linearisation.log_likelihood,
        log_evidence=linearisation.log_likelihood - 0.5 * length - 0.5 * float(values[:kept].log1p().sum()),
        eigenvalues=tuple(values[:kept].tolist()),
        neglected=max([linearisation.neglected, *values[kept:].tolist()]),
        solves=solves,
    )
