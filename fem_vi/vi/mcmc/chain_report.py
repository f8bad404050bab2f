"""Have the chains mixed? Rank-normalised R-hat and effective sample sizes, by ArviZ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from arviz_stats.base import array_stats
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fem_vi.parallel import max_over_ranks
from fem_vi.report import as_text

if TYPE_CHECKING:
    from fem_vi.vi.mcmc.samples import Samples

RHAT_LIMIT = 1.01
ESS_PER_CHAIN = 100
MOST_CHECKED = 400


@dataclass(frozen=True)
class ChainReport:
    """How well chains mixed; every number is replicated.

    Attributes:
        checked: Unknowns looked at: all up to 400, evenly spread ones beyond; and log p(y, m) besides.
        rhat: The largest rank-normalised R-hat; NaN for a single draw.
        ess_bulk: The smallest effective number of draws for means.
        ess_tail: The smallest for the 5 % and 95 % quantiles.
        draws: Draws of all chains together.
        acceptance: Mean acceptance probability.
        step_size: Angle of a step.
        diverged: Steps whose proposal diverged.
        solves: Forward and backward solves, warm-up included.
        seconds: Wall time, warm-up included.
        verdict: What to make of it, in words.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), Rank-normalization, folding, and localization: an improved R-hat.
    """

    checked: int
    rhat: float
    ess_bulk: float
    ess_tail: float
    draws: int
    acceptance: float
    step_size: float
    diverged: int
    solves: int
    seconds: float
    verdict: str

    def __rich__(self) -> Group:
        """A table, and the verdict below it."""
        table = Table("quantity", "value", "good", title="Have the chains mixed?")
        table.add_row(f"R-hat, largest of {self.checked + 1}", f"{self.rhat:.4f}", f"below {RHAT_LIMIT}")
        table.add_row("effective draws, bulk, smallest", f"{self.ess_bulk:.0f} of {self.draws}", f"{ESS_PER_CHAIN} a chain")
        table.add_row("effective draws, tails, smallest", f"{self.ess_tail:.0f} of {self.draws}", f"{ESS_PER_CHAIN} a chain")
        table.add_row("acceptance", f"{self.acceptance:.2f}", "")
        table.add_row("step size [radians]", f"{self.step_size:.3g}", "")
        table.add_row("diverged steps", f"{self.diverged}", "few")
        table.add_row("solves, forward and backward", f"{self.solves}", "")
        table.add_row("solves for an effective draw", f"{self.solves / max(self.ess_bulk, 1e-9):.3g}", "")
        return Group(table, Text(self.verdict))

    def __str__(self) -> str:
        return as_text(self)


def chain_report(samples: Samples) -> ChainReport:
    """Judge chains by their worst unknown.

    Args:
        samples: Draws of several chains.

    MPI: Collective.
    """
    prior = samples.problem.prior
    stride = -(-prior.num_global // MOST_CHECKED)
    spread = (torch.arange(prior.num_global) % stride == 0).to(torch.float64)
    owned = samples.m[..., prior.scatter(spread) > 0.5].movedim(-1, 0).numpy()
    values = np.concatenate([owned, samples.log_joint[None].numpy()])
    rhat = max_over_ranks(prior.comm, max(_rhat(each) for each in values))
    bulk = -max_over_ranks(prior.comm, -min(_ess(each, "bulk") for each in values))
    tail = -max_over_ranks(prior.comm, -min(_ess(each, "tail") for each in values))
    chains, draws = samples.log_joint.shape
    diverged, steps = samples.num_diverged, samples.acceptance.numel()
    return ChainReport(
        checked=int(spread.sum()),
        rhat=rhat,
        ess_bulk=bulk,
        ess_tail=tail,
        draws=chains * draws,
        acceptance=float(samples.acceptance.mean()),
        step_size=samples.step_size,
        diverged=diverged,
        solves=samples.cost.solves,
        seconds=samples.seconds,
        verdict=_verdict(rhat, min(bulk, tail), chains, diverged / steps),
    )


def _rhat(x: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """Rank-normalised R-hat of `(chains, draws)`; infinity for a chain that never moved."""
    if x.shape[1] < 4:
        return float("nan")
    if bool((np.ptp(x, axis=1) == 0.0).any()):
        return float("inf")
    return float(array_stats.rhat(x, chain_axis=0, draw_axis=1))


def _ess(x: np.ndarray[tuple[int, ...], np.dtype[np.float64]], kind: str) -> float:
    """Effective number of `(chains, draws)`; one a chain where a chain never moved."""
    if x.shape[1] < 4 or bool((np.ptp(x, axis=1) == 0.0).any()):
        return float(len(x))
    return float(array_stats.ess(x, chain_axis=0, draw_axis=1, method=kind, prob=(0.05, 0.95) if kind == "tail" else None))


def _verdict(rhat: float, ess: float, chains: int, diverged: float) -> str:
    """What a reader who knows neither number should do."""
    if not rhat < RHAT_LIMIT:
        text = (
            f"Do not use these draws yet: R-hat {rhat:.3f} says that chains differ from each other. Take a longer warm-up and "
            "more draws, or a reference closer to the posterior; where R-hat stays large there may be several modes: try smc."
        )
    elif ess < ESS_PER_CHAIN * chains:
        text = (
            f"The chains agree, but are worth {ess:.0f} independent draws only: means are good to "
            f"{100 / max(ess, 1.0) ** 0.5:.0f} % of a standard deviation. Take more draws for quantiles."
        )
    else:
        text = f"The chains agree, and are worth {ess:.0f} independent draws in their worst unknown."
        if chains > 1:
            text += " Had all of them begun near one mode, they would agree as well: begin at draws of the prior, or try smc."
    if chains == 1:
        text += " One chain alone cannot tell whether it missed a mode: run four or more."
    if diverged > 0.01:
        text += (
            f" {100 * diverged:.0f} % of the steps diverged: aim at a higher acceptance, or check where the forward map fails."
        )
    return text
