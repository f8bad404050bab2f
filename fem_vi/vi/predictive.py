"""Do the data look like what the model predicts? Posterior predictive checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all, shared_seed
from fem_vi.report import as_text
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.randomness import private_generator


@dataclass(frozen=True)
class PredictiveCheck:
    """Data against replicates drawn from the posterior predictive distribution; every number is replicated.

    Attributes:
        chi2: Squared residual of the mean prediction in units of the noise, per datum.
        p_value: Probability that replicated data fit worse than the data did.
        coverage: Fraction of the data inside their central 90 % predictive interval.
        low: 5 % quantile of replicated data, `(num_data,)`.
        median: 50 % quantile, `(num_data,)`.
        high: 95 % quantile, `(num_data,)`.
        outside: Numbers of the data outside, farthest first.
        verdict: What to make of it, in words.

    References:
        Gelman, Meng, Stern (1996), Posterior predictive assessment of model fitness via realized discrepancies.
    """

    chi2: float
    p_value: float
    coverage: float
    low: Tensor
    median: Tensor
    high: Tensor
    outside: tuple[int, ...]
    verdict: str

    def __rich__(self) -> Group:
        """A table, and the verdict below it."""
        table = Table("check", "value", "good", title="Do the data look like the model's own predictions?")
        table.add_row("chi2 per datum, mean prediction", f"{self.chi2:.3f}", "about 1 or a little less")
        table.add_row("predictive p-value", f"{self.p_value:.3f}", "0.01 to 0.99")
        table.add_row("data inside their 90 % interval", f"{100 * self.coverage:.0f} %", "about 90 % or more")
        table.add_row("data outside, farthest first", ", ".join(map(str, self.outside[:8])) or "none", "")
        return Group(table, Text(self.verdict))

    def __str__(self) -> str:
        return as_text(self)


def predictive_check(problem: InverseProblem, m: Tensor, *, batch: int = 50, seed: int = 0) -> PredictiveCheck:
    """Compare the data with replicates.

        y_rep ~ p(y | m_i),   m_i from the posterior

    Args:
        problem: Prior, forward map, likelihood, data.
        m: Draws from its posterior, `(..., n_owned)`: `posterior().sample((500,))`, or `samples.m`.
        batch: Draws solved at a time.
        seed: Of the replicates; rank 0's counts. The state of torch's generator is left as it was found.

    Returns:
        Where the data lie among the replicates.

    Raises:
        InvalidInput: Where there are fewer than 20 draws.

    MPI: Collective.

    Example:
        >>> print(fem_vi.predictive_check(problem, samples.m[:, ::10]))
    """
    instance("problem", problem, InverseProblem)
    comm = problem.prior.comm
    with raise_on_all(comm):
        instance("m", m, Tensor)
        batch, seed = whole("batch", batch, least=1), whole("seed", seed)
        rows = m.reshape(m.shape[:-1].numel(), m.shape[-1]) if m.ndim else m[None, None]
        if len(rows) < 20:
            raise InvalidInput(f"m holds {len(rows)} draws; quantiles of predictions take 20 at least.")
    with private_generator(shared_seed(comm, seed)), torch.no_grad():
        return check_predictions(problem, torch.cat([problem.predict(part) for part in rows.split(batch)]))


def check_predictions(problem: InverseProblem, prediction: Tensor) -> PredictiveCheck:
    """As `predictive_check`, for predictions `(draws, num_predicted)`; replicates come from torch's generator."""
    likelihood, y = problem.likelihood, problem.y
    replicated = likelihood.sample(prediction)
    worse = likelihood.log_prob(replicated, prediction) < likelihood.log_prob(y, prediction)
    p_value = float(worse.double().mean())
    low, median, high = torch.quantile(replicated, torch.tensor([0.05, 0.5, 0.95], dtype=replicated.dtype), dim=0)
    inside = (low <= y) & (y <= high)
    distance = (y - median).abs() / (high - low)
    outside = [k for k in distance.argsort(descending=True).tolist() if not bool(inside[k])]
    return PredictiveCheck(
        chi2=float(likelihood.standardise(y, prediction.mean(0)).square().mean()),
        p_value=p_value,
        coverage=float(inside.double().mean()),
        low=low,
        median=median,
        high=high,
        outside=tuple(outside),
        verdict=predictive_verdict(p_value),
    )


def predictive_verdict(p_value: float) -> str:
    """What to make of a predictive p-value."""
    if p_value < 0.01:
        return f"The data fit worse than the model allows (p = {p_value:.3f}): noise std too small, or PDE or prior wrong."
    if p_value > 0.99:
        return f"The data fit better than their noise allows (p = {p_value:.3f}): noise std probably too large."
    return f"The data look like the model's own predictions (p = {p_value:.2f})."
