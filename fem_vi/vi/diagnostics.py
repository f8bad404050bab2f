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
from fem_vi.vi.posterior.whitened import closed_form_kl
from fem_vi.vi.predictive import check_predictions, predictive_verdict
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.randomness import private_generator

UNSEEN = "Draws see no mode that none of them comes near: where there may be another, compare the log evidence with smc(problem)."
EQUAL_WEIGHTS = 0.02
"""Mean log weight less log mean weight, in nats, below which k-hat says nothing: the weights are all but equal."""


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
        sd_ratio: Standard deviations after weighting over those before, root mean square over unknowns.
        chi2: Squared residual of the mean prediction in units of the noise, per datum.
        predictive_p: Probability that replicated data fit worse than the data did.
        coverage: Fraction of the data inside their central 90 % predictive interval.
        verdict: What to make of it, in words.

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
    sd_ratio: float
    chi2: float
    predictive_p: float
    coverage: float
    verdict: str

    def __rich__(self) -> Group:
        """A table, and the verdict below it."""
        table = Table("diagnostic", "value", "good", title="Is the posterior to be trusted?")
        table.add_row("ELBO", f"{self.elbo:.4f} +- {self.elbo_error:.4f}", "close to the log evidence")
        table.add_row("log evidence (importance)", f"{self.log_evidence:.4f}", "")
        table.add_row("KL from the prior", f"{self.kl:.4f}" + (f" +- {self.kl_error:.4f}" if self.kl_error else ""), "")
        table.add_row("Pareto k-hat", f"{self.khat:.2f}", f"below {self.khat_limit:.2f}")
        table.add_row("effective samples", f"{self.ess:.0f} of {self.samples}", "a good part")
        table.add_row("importance weights move means by", f"{self.mean_shift:.3f} sd", "below 0.1")
        table.add_row("and standard deviations by", f"a factor of {self.sd_ratio:.3f}", "0.9 to 1.1")
        table.add_row("chi2 per datum, mean prediction", f"{self.chi2:.3f}", "about 1 or a little less")
        table.add_row("predictive p-value", f"{self.predictive_p:.3f}", "0.01 to 0.99")
        table.add_row("data inside their 90 % interval", f"{100 * self.coverage:.0f} %", "about 90 % or more")
        return Group(table, Text(self.verdict))

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
        kl = closed_form_kl(posterior(), problem.prior)
        check = check_predictions(problem, draws.prediction)
    shift, ratio = _correction(problem, posterior, smoothed, seed=seed, batch=batch)
    elbo, ess, limit = float(draws.log_weights.mean()), effective(smoothed), khat_limit(samples)
    close = log_evidence - elbo < EQUAL_WEIGHTS and ess > 0.95 * samples
    return Diagnosis(
        samples=samples,
        elbo=elbo,
        elbo_error=float(draws.log_weights.std()) / math.sqrt(samples),
        log_evidence=log_evidence,
        kl=float(draws.log_ratio.mean() if kl is None else kl),
        kl_error=float(draws.log_ratio.std()) / math.sqrt(samples) if kl is None else 0.0,
        khat=khat,
        khat_limit=limit,
        ess=ess,
        mean_shift=shift,
        sd_ratio=ratio,
        chi2=check.chi2,
        predictive_p=check.p_value,
        coverage=check.coverage,
        verdict=f"{_verdict(khat, limit, log_evidence - elbo, close)} {predictive_verdict(check.p_value)}",
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


def _verdict(khat: float, limit: float, gap: float, close: bool) -> str:
    """What a reader who knows neither number should do."""
    if close:
        return (
            f"Where its draws go, the posterior is close to the exact one: importance weights are all but equal, "
            f"{max(gap, 0.0):.2g} nats from it. {UNSEEN}"
        )
    if not khat < limit:
        return (
            f"Do not trust this posterior: k-hat {khat:.2f} is above {limit:.2f}, so it misses part of where the exact one has "
            "mass. Its spread is likely too small. Take more steps, a higher rank or a richer family."
        )
    if khat > 0.5:
        return f"Usable with care: k-hat {khat:.2f}. Means are good after importance weighting; check spreads first."
    return f"Where its draws go, the posterior is close to the exact one: k-hat {khat:.2f}. {UNSEEN}"
