"""What a fit leaves behind."""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

from fem_vi.output import read_history
from fem_vi.vi.problem import Cost, InverseProblem


@dataclass(frozen=True)
class Row:
    """One step of a fit, evaluated before the step was taken.

    Attributes:
        step: Number of the step, from 1.
        elbo: Estimate of the evidence lower bound.
        kl: Divergence from the prior.
        misfit: Minus the expected log-likelihood.
        grad_norm: Norm of the gradient over all parameters on all ranks.
        solves: Samples solved forward and backward since the fit began, the start included.
        seconds: Wall time since the fit began.
    """

    step: int
    elbo: float
    kl: float
    misfit: float
    grad_norm: float
    solves: int
    seconds: float

    def values(self) -> tuple[object, ...]:
        """The values in the order of `COLUMNS`; floats with all their digits."""
        return tuple(repr(value) for value in astuple(self))

    @staticmethod
    def from_text(row: dict[str, str]) -> Row:
        """A row of history.csv."""
        number = {name: float(row[name]) for name in ("elbo", "kl", "misfit", "grad_norm", "seconds")}
        return Row(step=int(row["step"]), solves=int(row["solves"]), **number)


COLUMNS = tuple(field.name for field in fields(Row))


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
    history: tuple[Row, ...]
    config: dict[str, Any]
    cost: Cost
    path: Path | None


def name_of(choice: object) -> str:
    """A value of a run in words that do not change between sessions: functions by name, the rest by `repr`."""
    if isinstance(choice, FunctionType):
        return f"{choice.__module__}.{choice.__qualname__}"
    return repr(choice)


def describe_problem(problem: InverseProblem) -> dict[str, Any]:
    """Prior, likelihood and data of a problem, for config.json."""
    return {
        "prior": name_of(problem.prior),
        "unknowns": problem.prior.num_global,
        "likelihood": name_of(problem.likelihood),
        "num_data": len(problem.y),
        # To six digits: data made by a simulation differ in the last ones between numbers of ranks.
        "data_norm": f"{float(problem.y.norm()):.6g}",
    }


def describe_versions() -> dict[str, str]:
    """Versions of what a run depends on, for config.json; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in ("fem_vi", "torch", "numpy", "fenics-dolfinx", "petsc4py", "mpi4py"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def rows_of(path: Path, steps: int) -> list[Row]:
    """The rows of a run folder's history up to a step.

    Args:
        path: The run folder.
        steps: Last step wanted.

    Raises:
        RunFolderError: Where the file is missing or has another header.
    """
    rows = [Row.from_text(row) for row in read_history(path / "history.csv", COLUMNS)[:steps]]
    return [row for row in rows if row.step <= steps]
