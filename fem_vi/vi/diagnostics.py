"""Can a fitted posterior be trusted? Importance weights, and a check against the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import StringIO

import numpy as np
import torch
from arviz_stats.base import array_stats
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fem_vi.arguments import instance, whole
from fem_vi.parallel import raise_on_all, shared_seed
from fem_vi.vi.objective import draw
from fem_vi.vi.posterior.whitened import closed_form_kl
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.randomness import private_generator

FEWEST_SAMPLES = 100


@dataclass(frozen=True)
class Diagnosis:
    """How well a posterior fits its problem; every number is replicated.

    Attributes:
        samples: Draws from the posterior that the numbers rest on.
        elbo: Evidence lower bound.
        elbo_error: Its standard error.
        log_evidence: Importance-sampling estimate of log p(y), with smoothed weights.
        kl: KL(q || prior).
        khat: Tail index of the importance weights p(m | y) / q(m); below `khat_limit` importance sampling converges.
        khat_limit: min(1 - 1 / log10(samples), 0.7).
        ess: Effective number of posterior draws after importance weighting, of `samples`.
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
    khat: float
    khat_limit: float
    ess: float
    chi2: float
    predictive_p: float
    coverage: float
    verdict: str

    def __rich__(self) -> Group:
        """A table, and the verdict below it."""
        table = Table("diagnostic", "value", "good", title="Is the posterior to be trusted?")
        table.add_row("ELBO", f"{self.elbo:.4f} +- {self.elbo_error:.4f}", "close to the log evidence")
        table.add_row("log evidence (importance)", f"{self.log_evidence:.4f}", "")
        table.add_row("KL from the prior", f"{self.kl:.4f}", "")
        table.add_row("Pareto k-hat", f"{self.khat:.2f}", f"below {self.khat_limit:.2f}")
        table.add_row("effective samples", f"{self.ess:.0f} of {self.samples}", "a good part")
        table.add_row("chi2 per datum, mean prediction", f"{self.chi2:.3f}", "about 1 or a little less")
        table.add_row("predictive p-value", f"{self.predictive_p:.3f}", "0.01 to 0.99")
        table.add_row("data inside their 90 % interval", f"{100 * self.coverage:.0f} %", "about 90 % or more")
        return Group(table, Text(self.verdict))

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=100).print(self)
        return text.getvalue()


def diagnose(problem: InverseProblem, posterior: nn.Module, *, samples: int = 1000, seed: int = 0, batch: int = 50) -> Diagnosis:
    """Judge a fitted posterior by its importance weights and its predictions.

        log w = log p(y, m) - log q(m),  m ~ q

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
    instance("problem", problem, InverseProblem)
    comm = problem.prior.comm
    with raise_on_all(comm):
        samples, batch = whole("samples", samples, least=FEWEST_SAMPLES), whole("batch", batch, least=1)
        seed = whole("seed", seed)
    with private_generator(shared_seed(comm, seed)), torch.no_grad():
        q = posterior()
        kl = closed_form_kl(q, problem.prior)
        weights, ratios, predictions = [], [], []
        for first in range(0, samples, batch):
            m, log_ratio = draw(q, problem.prior, min(batch, samples - first))
            prediction = problem.predict(m)
            weights.append(problem.likelihood.log_prob(problem.y, prediction) - log_ratio)
            ratios.append(log_ratio)
            predictions.append(prediction)
        log_weights, prediction = torch.cat(weights), torch.cat(predictions)
        khat, smoothed, log_evidence = pareto_smoothed(log_weights)
        chi2, p_value, coverage = _predictive_check(problem, prediction)
    limit = min(1.0 - 1.0 / math.log10(samples), 0.7)
    return Diagnosis(
        samples=samples,
        elbo=float(log_weights.mean()),
        elbo_error=float(log_weights.std()) / math.sqrt(samples),
        log_evidence=log_evidence,
        kl=float(torch.cat(ratios).mean() if kl is None else kl),
        khat=khat,
        khat_limit=limit,
        ess=float(1.0 / smoothed.exp().square().sum()),
        chi2=chi2,
        predictive_p=p_value,
        coverage=coverage,
        verdict=_verdict(khat, limit, p_value),
    )


def pareto_smoothed(log_weights: Tensor) -> tuple[float, Tensor, float]:
    """Tail index and smoothed importance weights.

    Args:
        log_weights: log p(y, m) - log q(m), `(samples,)`.

    Returns:
        k-hat (0 where all weights are equal, infinity where one is not finite); the smoothed log weights, normalised,
        `(samples,)`; and the log of the mean smoothed weight, the estimate of log p(y).
    """
    samples = len(log_weights)
    equal = torch.full_like(log_weights, -math.log(samples))
    if not bool(torch.isfinite(log_weights).all()):
        return math.inf, equal, math.nan
    if float(log_weights.max() - log_weights.min()) < 1e-6:
        return 0.0, equal, float(log_weights.mean())
    # psislw takes log-likelihoods, whose negatives are the log weights of leave-one-out.
    values, khat = array_stats.psislw(-log_weights.numpy())
    smoothed = torch.from_numpy(np.asarray(values, dtype=np.float64))
    # Smoothing changes the largest weights alone: the smallest gives the factor lost in the normalisation.
    smallest = int(log_weights.argmin())
    log_evidence = float(log_weights[smallest] - smoothed[smallest]) - math.log(samples)
    return float(khat), smoothed, log_evidence


def _predictive_check(problem: InverseProblem, prediction: Tensor) -> tuple[float, float, float]:
    """chi2 of the mean prediction per datum, predictive p-value, and coverage of the 90 % intervals."""
    likelihood, y = problem.likelihood, problem.y
    replicated = likelihood.sample(prediction)
    worse = likelihood.log_prob(replicated, prediction) < likelihood.log_prob(y, prediction)
    low, high = torch.quantile(replicated, torch.tensor([0.05, 0.95], dtype=replicated.dtype), dim=0)
    chi2 = float(likelihood.standardise(y, prediction.mean(0)).square().mean())
    return chi2, float(worse.double().mean()), float(((low <= y) & (y <= high)).double().mean())


def _verdict(khat: float, limit: float, p_value: float) -> str:
    """What a reader who knows neither number should do."""
    if not khat < limit:
        fit = (
            f"Do not trust this posterior: k-hat {khat:.2f} is above {limit:.2f}, so it misses part of where the exact one has "
            "mass. Its spread is likely too small. Take more steps, a higher rank or a richer family."
        )
    elif khat > 0.5:
        fit = f"Usable with care: k-hat {khat:.2f}. Means are good after importance weighting; check spreads first."
    else:
        fit = f"The posterior is close to the exact one: k-hat {khat:.2f}."
    if p_value < 0.01:
        return f"{fit} The data fit worse than the model allows (p = {p_value:.3f}): noise std too small, or PDE or prior wrong."
    if p_value > 0.99:
        return f"{fit} The data fit better than their noise allows (p = {p_value:.3f}): noise std probably too large."
    return f"{fit} The data look like the model's own predictions (p = {p_value:.2f})."
