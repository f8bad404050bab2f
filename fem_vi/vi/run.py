"""What a fit leaves behind."""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import astuple, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fem_vi
from fem_vi.errors import RunFolderError, SolveFailed
from fem_vi.output import REMEDY, read_history
from fem_vi.vi.description import sketch
from fem_vi.vi.problem import Cost, InverseProblem
from fem_vi.vi.randomness import private_generator


@dataclass(frozen=True)
class Row:
    """One step of a fit, evaluated before the step was taken.

    Attributes:
        step: Number of the step, from 1.
        elbo: Estimate of the evidence lower bound; not a number where the objective knows none, as of given samples.
        kl: Divergence from the prior; likewise.
        misfit: Minus the expected log-likelihood; likewise.
        loss: What is minimised.
        grad_norm: Norm of the gradient over all parameters on all ranks.
        solves: Samples solved forward and backward since the fit began, the start included.
        seconds: Wall time since the fit began.
    """

    step: int
    elbo: float
    kl: float
    misfit: float
    loss: float
    grad_norm: float
    solves: int
    seconds: float

    def values(self) -> tuple[object, ...]:
        """The values in the order of `COLUMNS`; floats with all their digits."""
        return tuple(repr(value) for value in astuple(self))

    @staticmethod
    def from_text(row: dict[str, str]) -> Row:
        """A row of history.csv; raises ValueError where it holds something else than numbers."""
        number = {name: float(row[name]) for name in COLUMNS if name not in ("step", "solves")}
        return Row(step=int(row["step"]), solves=int(row["solves"]), **number)


COLUMNS = tuple(column.name for column in fields(Row))


@dataclass(frozen=True)
class Run:
    """A finished fit.

    Attributes:
        posterior: The fitted module, the one that was passed to `fit`.
        history: One row a step.
        config: What was run: objective, optimiser, steps, seed, versions; the content of config.json.
        cost: Samples solved by this fit, over all its sessions.
        path: The run folder, or None.
    """

    posterior: nn.Module
    history: tuple[Row, ...] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    cost: Cost
    path: Path | None


@torch.no_grad()
def describe_forward(problem: InverseProblem) -> list[float] | None:
    """What the forward map makes of one fixed m near the prior mean; None where that is not finite.

    At the mean itself, linear maps often give zero, all of them. Costs one solve, which no count includes, and no random number.

    MPI: Collective.
    """
    spent = replace(problem.cost)
    with private_generator(0):
        m = problem.prior.unwhiten(0.1 * problem.prior.white_noise(torch.Size()))
        try:
            prediction = problem.predict(m)
        except SolveFailed:
            return None
        finally:
            problem.cost = spent
    return sketch(prediction) if bool(torch.isfinite(prediction).all()) else None


def describe_versions() -> dict[str, str]:
    """Versions of what a run depends on, for config.json; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "fem_vi": fem_vi.__version__}
    for package in ("torch", "numpy", "fenics-dolfinx", "petsc4py", "mpi4py"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def rows_of(path: Path, steps: int) -> list[Row]:
    """The rows of a run folder's history up to a step.

    Args:
        path: The run folder.
        steps: Last step wanted.

    Raises:
        RunFolderError: Where the file is missing or damaged, or does not reach that step.
    """
    file = path / "history.csv"
    rows = []
    for number, text in enumerate(read_history(file, COLUMNS)[:steps], start=2):
        try:
            rows.append(Row.from_text(text))
        except ValueError as error:
            raise RunFolderError(f"{file} is damaged in line {number}: {error}. {REMEDY}") from error
    if [row.step for row in rows] != list(range(1, steps + 1)):
        raise RunFolderError(f"{file} is damaged: it does not hold steps 1 to {steps}, one a line. {REMEDY}")
    return rows
