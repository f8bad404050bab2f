"""What tempered sequential Monte Carlo returns: particles and the evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fem_vi.report import as_text
from fem_vi.vi.problem import Cost, InverseProblem

if TYPE_CHECKING:
    import xarray

AGREE = 0.5
FEW_ANCESTORS = 20


@dataclass(frozen=True, repr=False)
class Tempered:
    """Particles of equal weight from a posterior, of several islands, and the evidence.

    Attributes:
        problem: Whose posterior.
        m: Unknowns, `(islands, particles, n_owned)`.
        log_likelihood: log p(y | m), `(islands, particles)`, replicated.
        log_evidences: log p(y) as each island estimates it, `(islands,)`, replicated.
        temperatures: From 0 to 1.
        acceptance: Mean acceptance probability at each temperature after the first.
        ancestors: Particles at the start from which those of each island descend, `(islands,)`, replicated.
        kernel: What moved the particles.
        step_size: Its angle at the end.
        cost: Samples solved, over all groups of ranks.
        seconds: Wall time.
        seed: Of the random numbers.
    """

    problem: InverseProblem
    m: Tensor
    log_likelihood: Tensor
    log_evidences: Tensor
    temperatures: tuple[float, ...]
    acceptance: tuple[float, ...]
    ancestors: Tensor
    kernel: Any
    step_size: float
    cost: Cost
    seconds: float
    seed: int

    def __repr__(self) -> str:
        islands, particles = self.log_likelihood.shape
        evidence = f"log p(y) = {self.log_evidence:.4g} +- {self.log_evidence_error:.2g}"
        return f"Tempered({islands} islands, {particles} particles, {evidence}, {self.cost.solves} solves)"

    @property
    def log_evidence(self) -> float:
        """Log of the mean over islands of the estimates of p(y)."""
        return float(self.log_evidences.logsumexp(0)) - math.log(len(self.log_evidences))

    @property
    def log_evidence_error(self) -> float:
        """Its standard error, from the scatter of the islands."""
        ratios = (self.log_evidences - self.log_evidences.max()).exp()
        return float(ratios.std() / ratios.mean()) / math.sqrt(len(ratios))

    @property
    def mean(self) -> Tensor:
        """Posterior mean, `(n_owned,)`; islands count by their evidence."""
        return (self._shares[:, None] * self.m.mean(1)).sum(0)

    @property
    def variance(self) -> Tensor:
        """Posterior variance, `(n_owned,)`; islands count by their evidence."""
        return (self._shares[:, None] * (self.m - self.mean).square().mean(1)).sum(0)

    @property
    def mean_error(self) -> Tensor:
        """Standard error of `mean`, from the scatter of the islands, `(n_owned,)`."""
        spread = (self._shares[:, None] * (self.m.mean(1) - self.mean)).square().sum(0)
        return (spread * len(self.m) / (len(self.m) - 1)).sqrt()

    @property
    def _shares(self) -> Tensor:
        return self.log_evidences.softmax(0)

    @property
    def verdict(self) -> str:
        """What to make of it, in words."""
        scatter, fewest = float(self.log_evidences.max() - self.log_evidences.min()), int(self.ancestors.min())
        if self.log_evidence_error > AGREE or scatter > 4 * AGREE:
            return (
                f"Do not trust these particles: islands put log p(y) {scatter:.2g} apart. The path may cross a sharp transition. "
                "Take more particles or moves, or pass reference=laplace(problem)."
            )
        if fewest < FEW_ANCESTORS and len(self.temperatures) > 2:
            return (
                f"Usable with care: islands agree on log p(y) to {scatter:.2g}, but all particles of one descend from {fewest}. "
                "Take more moves at each temperature, or a larger ess."
            )
        return f"Islands agree: log p(y) = {self.log_evidence:.3f} +- {self.log_evidence_error:.2g}."

    def __rich__(self) -> Group:
        """A table, and the verdict below it."""
        islands, particles = self.log_likelihood.shape
        table = Table("quantity", "value", "good", title="Tempered sequential Monte Carlo")
        table.add_row("log evidence", f"{self.log_evidence:.4f} +- {self.log_evidence_error:.2g}", f"error below {AGREE}")
        table.add_row(
            "its range over islands", f"{float(self.log_evidences.min()):.4f} to {float(self.log_evidences.max()):.4f}", ""
        )
        table.add_row("islands, particles of each", f"{islands}, {particles}", "")
        table.add_row("steps in temperature", f"{len(self.temperatures) - 1}", "")
        table.add_row("fewest ancestors of an island", f"{int(self.ancestors.min())}", f"{FEW_ANCESTORS} or more")
        table.add_row("acceptance, least", f"{min(self.acceptance):.2f}", "above 0.1")
        table.add_row("solves, forward and backward", f"{self.cost.solves}", "")
        return Group(table, Text(self.verdict))

    def __str__(self) -> str:
        return as_text(self)

    def to_arviz(self, name: str = "m") -> xarray.DataTree:
        """The particles as ArviZ 1.x takes them, islands as chains; see `Samples.to_arviz`. Collective."""
        import arviz_base

        groups = {
            "posterior": {name: self.problem.prior.gather(self.m).numpy()},
            "sample_stats": {"log_likelihood": self.log_likelihood.numpy()},
            "observed_data": {"y": self.problem.y.numpy()},
        }
        tree: xarray.DataTree = arviz_base.from_dict(groups)
        tree.attrs.update({"sampler": f"smc, {self.kernel!r}", "log_evidence": self.log_evidence, "seed": self.seed})
        return tree
