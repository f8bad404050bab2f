"""Can a fitted posterior be trusted? Importance weights, and a check against the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fem_vi.report import as_text
from fem_vi.vi.importance import (
    checked_draws,
    effective,
    khat_limit,
    moments,
    pareto_smoothed,
    weighted_draws,
)
from fem_vi.vi.posterior.member import distribution_of
from fem_vi.vi.posterior.whitened import closed_form_kl
from fem_vi.vi.predictive import check_predictions, predictive_verdict
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.randomness import private_generator

UNSEEN = "Draws see no mode that none of them comes near: where there may be another, compare the log evidence with smc(problem)."
EQUAL_WEIGHTS = 0.02
"""Mean log weight less log mean weight, in nats, below which k-hat says nothing: the weights are all but equal."""
GOOD_KHAT = 0.5
"""Where the weights have a variance."""
GOOD_SHIFT, GOOD_RATIO, GOOD_SHARE = 0.1, (0.9, 1.1), 0.1
"""Of `mean_shift` beyond chance, of `sd_ratio`, and of `ess` among the samples."""


@dataclass(frozen=True)
class _Row:
    """One of the table; `is_good` is None where it has no bound."""

    name: str
    value: str
    good: str = ""
    is_good: bool | None = None


@dataclass(frozen=True)
class Diagnosis:
    """How well a posterior fits its problem; every number is replicated.

    Attributes:
        samples: Draws from the posterior that the numbers rest on.
        elbo: Evidence lower bound.
        elbo_error: Its standard error.
        log_evidence: Importance-sampling estimate of log p(y), with smoothed weights.
        kl: KL(q || prior).
        kl_error: Its standard error; 0 where it is known in closed form.
        khat: Tail index of the importance weights p(m | y) / q(m); below `khat_limit` importance sampling converges.
        khat_limit: min(1 - 1 / log10(samples), 0.7).
        ess: Effective number of posterior draws after importance weighting, of `samples`.
        mean_shift: How far importance weights move the mean, root mean square over unknowns, in standard deviations.
        chance_shift: How far weights like these move it by chance alone: what is expected where the mean is right.
        sd_ratio: Standard deviations after weighting over those before, root mean square over unknowns.
        chi2: Squared residual of the mean prediction in units of the noise, per datum.
        predictive_p: Probability that replicated data fit worse than the data did.
        coverage: Fraction of the data inside their central 90 % predictive interval.

    References:
        Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work? Evaluating variational inference.
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.
        Gelman, Meng, Stern (1996), Posterior predictive assessment of model fitness via realized discrepancies.
    """

    samples: int
    elbo: float
    elbo_error: float
    log_evidence: float
    kl: float
    kl_error: float
    khat: float
    khat_limit: float
    ess: float
    mean_shift: float
    chance_shift: float
    sd_ratio: float
    chi2: float
    predictive_p: float
    coverage: float

    def __rich__(self) -> Group:
        """A table, and the verdict below it."""
        table = Table("diagnostic", "value", "good", "", title="Is the posterior to be trusted?")
        for row in self._rows():
            table.add_row(row.name, row.value, row.good, "" if row.is_good is None else "yes" if row.is_good else "no")
        return Group(table, Text(self.verdict))

    @property
    def verdict(self) -> str:
        """What to make of it, in words: what a reader who knows none of these numbers should do."""
        return f"{self._trust()} {predictive_verdict(self.predictive_p)}"

    def _trust(self) -> str:
        gap = max(self.log_evidence - self.elbo, 0.0)
        if self.weights_are_equal:
            equal = f"importance weights are all but equal, {gap:.2g} nats from it"
            return f"Where its draws go, the posterior is close to the exact one: {equal}. {UNSEEN}"
        if not self.khat < self.khat_limit:
            return (
                f"Do not trust this posterior: k-hat {self.khat:.2f} is above {self.khat_limit:.2f}, so it misses part of where "
                "the exact one has mass. Its spread is likely too small. Take more steps, a higher rank or a richer family."
            )
        good = {
            f"k-hat {self.khat:.2f}": self.khat < GOOD_KHAT,
            "few effective samples": self._has_effective_samples(),
            "means that importance weights move": self._keeps_means(),
            "spreads that importance weights change": self._keeps_deviations(),
        }
        doubts = [words for words, is_good in good.items() if not is_good]
        if doubts:
            return f"Usable with care: {', '.join(doubts)}. Take what fem_vi.corrected_moments makes of it by importance weights."
        return f"Where its draws go, the posterior is close to the exact one: k-hat {self.khat:.2f}. {UNSEEN}"

    @property
    def weights_are_equal(self) -> bool:
        """Whether the posterior is so close to the exact one that k-hat, the tail of equal weights, says nothing."""
        return self.log_evidence - self.elbo < EQUAL_WEIGHTS and self.ess > 0.95 * self.samples

    def _rows(self) -> list[_Row]:
        usable = self.weights_are_equal or self.khat < self.khat_limit
        kl = f"{self.kl:.4f}" + (f" +- {self.kl_error:.4f}" if self.kl_error else "")
        shift = f"{self.mean_shift:.3f} sd, {self.chance_shift:.3f} by chance"
        return [
            _Row("ELBO", f"{self.elbo:.4f} +- {self.elbo_error:.4f}", "close to the log evidence"),
            _Row("log evidence (importance)", f"{self.log_evidence:.4f}" if usable else "not known: see k-hat"),
            _Row("KL from the prior", kl),
            _Row("Pareto k-hat", f"{self.khat:.2f}", *self._good_khat()),
            _Row("effective samples", f"{self.ess:.0f} of {self.samples}", "a tenth or more", self._has_effective_samples()),
            _Row("importance weights move means by", shift, f"below {GOOD_SHIFT:g} beyond chance", self._keeps_means()),
            _Row("and standard deviations by", f"a factor of {self.sd_ratio:.3f}", "0.9 to 1.1", self._keeps_deviations()),
            _Row("chi2 per datum, mean prediction", f"{self.chi2:.3f}", "about 1 or less"),
            _Row("predictive p-value", f"{self.predictive_p:.3f}", "0.01 to 0.99", 0.01 <= self.predictive_p <= 0.99),
            _Row("data inside their 90 % interval", f"{100 * self.coverage:.0f} %", "about 90 % or more"),
        ]

    def _good_khat(self) -> tuple[str, bool]:
        good = f"below {min(GOOD_KHAT, self.khat_limit):.2f}; usable below {self.khat_limit:.2f}"
        return good, self.weights_are_equal or self.khat < min(GOOD_KHAT, self.khat_limit)

    def _has_effective_samples(self) -> bool:
        return self.ess >= GOOD_SHARE * self.samples

    def _keeps_means(self) -> bool:
        return self.mean_shift**2 - self.chance_shift**2 < GOOD_SHIFT**2

    def _keeps_deviations(self) -> bool:
        return GOOD_RATIO[0] <= self.sd_ratio <= GOOD_RATIO[1]

    def __str__(self) -> str:
        return as_text(self)


def diagnose(problem: InverseProblem, posterior: nn.Module, *, samples: int = 1000, seed: int = 0, batch: int = 50) -> Diagnosis:
    """Judge a fitted posterior by its importance weights and its predictions.

        log w = log p(y, m) - log q(m),  m ~ q

    Weights are those of draws from the posterior that is judged. A mode of the exact one that no draw comes near, half of the
    mass perhaps, leaves no trace in any of the numbers but the log evidence, which is too small then: that of `smc` shows it.

    Args:
        problem: Prior, forward map, likelihood, data.
        posterior: Module whose `forward()` is a distribution.
        samples: Draws, each a forward solve; at least 100.
        seed: Of the draws; rank 0's counts. The state of torch's generator is left as it was found.
        batch: Draws solved at a time.

    Returns:
        The numbers and a verdict; `print` shows a table.

    Raises:
        InvalidInput: Where an argument is of the wrong type, or there are fewer than 100 samples.

    MPI: Collective.
    """
    samples, seed, batch = checked_draws(problem, posterior, samples=samples, seed=seed, batch=batch)
    draws = weighted_draws(problem, posterior, samples=samples, seed=seed, batch=batch)
    khat, smoothed, log_evidence = pareto_smoothed(draws.log_weights)
    with private_generator(seed), torch.no_grad():
        kl = closed_form_kl(distribution_of(posterior), problem.prior)
        check = check_predictions(problem, draws.prediction)
    shift, ratio = _correction(problem, posterior, smoothed, seed=seed, batch=batch)
    ess = effective(smoothed)
    return Diagnosis(
        samples=samples,
        elbo=float(draws.log_weights.mean()),
        elbo_error=float(draws.log_weights.std()) / math.sqrt(samples),
        log_evidence=log_evidence,
        kl=float(draws.log_ratio.mean() if kl is None else kl),
        kl_error=float(draws.log_ratio.std()) / math.sqrt(samples) if kl is None else 0.0,
        khat=khat,
        khat_limit=khat_limit(samples),
        ess=ess,
        mean_shift=shift,
        chance_shift=math.sqrt(max(1.0 / ess - 1.0 / samples, 0.0)),
        sd_ratio=ratio,
        chi2=check.chi2,
        predictive_p=check.p_value,
        coverage=check.coverage,
    )


def _correction(
    problem: InverseProblem, posterior: nn.Module, log_weights: Tensor, *, seed: int, batch: int
) -> tuple[float, float]:
    """Shift of the mean and ratio of standard deviations by the weights, root mean square over all unknowns. Collective."""
    prior = problem.prior
    plain = torch.full_like(log_weights, -math.log(len(log_weights)))
    before = moments(problem, posterior, plain, seed=seed, batch=batch)
    after = moments(problem, posterior, log_weights, seed=seed, batch=batch)
    variance = before[1].clamp_min(torch.finfo(torch.float64).tiny)
    local = torch.stack([((after[0] - before[0]).square() / variance).sum(), (after[1] / variance).sum()])
    shift, ratio = (prior.all_sum(local) / prior.num_global).sqrt().tolist()
    return shift, ratio
