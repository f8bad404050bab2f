"""What a fit leaves behind."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

import fem_vi
from fem_vi.arguments import is_number
from fem_vi.errors import RunFolderError, SolveFailed
from fem_vi.output import read_history
from fem_vi.vi.problem import Cost, InverseProblem, Likelihood, Problem
from fem_vi.vi.randomness import private_generator

# How far vectors of two descriptions of one problem may be apart, as a fraction of their norms.
AGREEMENT = {"data": 1e-8, "noise": 1e-8, "forward": 1e-5}
REMEDY = "Restore it from a copy, or start anew in another folder."


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
        """A row of history.csv; raises ValueError where it holds something else than numbers."""
        number = {name: float(row[name]) for name in ("elbo", "kl", "misfit", "grad_norm", "seconds")}
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


def name_of(choice: object) -> str:
    """A value of a run in words that do not change between sessions: functions by name, the rest by `repr` without addresses."""
    if isinstance(choice, FunctionType):
        return f"{choice.__module__}.{choice.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(choice))


def describe_problem(problem: InverseProblem | Problem) -> dict[str, Any]:
    """Prior, likelihood and data of an inverse problem, for config.json; of another what it says itself."""
    if not isinstance(problem, InverseProblem):
        return problem.describe()
    noise = _tensors(problem.likelihood)
    return {
        "prior": name_of(problem.prior),
        "unknowns": problem.prior.num_global,
        "likelihood": name_of(problem.likelihood),
        "num_data": len(problem.y),
        "data": _sketch(problem.y),
        "noise": _sketch(torch.cat(noise)) if noise else None,
    }


def _tensors(likelihood: object) -> list[Tensor]:
    """All numbers that a likelihood holds, and likelihoods inside it, flat, in the order of their names."""
    found: list[Tensor] = []
    for _, value in sorted(getattr(likelihood, "__dict__", {}).items()):
        if isinstance(value, Tensor):
            found.append(value.detach().to("cpu", torch.float64).reshape(-1))
        elif isinstance(value, Likelihood):
            found += _tensors(value)
    return found


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
    return _sketch(prediction) if bool(torch.isfinite(prediction).all()) else None


def _sketch(x: Tensor) -> list[float]:
    """Norm and two projections of a vector: few numbers that tell it from others, in another order too."""
    k = torch.arange(1, len(x) + 1, dtype=torch.float64)
    x = x.detach().to(torch.float64)
    return [float(f"{float(value):.12g}") for value in (x.norm(), x @ torch.cos(k * k), x @ torch.cos(math.pi * k.sqrt()))]


def differing(stored: object, present: Mapping[str, Any]) -> str | None:
    """The first part in which two descriptions of problems differ, in words; None where they agree.

    The first was read from a file, and may be anything. Vectors need only agree to rounding: those made by a simulation
    differ in their last digits between numbers of ranks.
    """
    words = {"data": "the data y", "noise": "the noise's numbers", "forward": "the forward map"}
    there = stored if isinstance(stored, dict) else {}
    for name, value in present.items():
        other: Any = there.get(name)
        if name not in words:
            if other != value:
                return f"{name} ({other} there, {value} here)"
        elif isinstance(value, list) and _is_sketch(other):
            if any(abs(a - b) > AGREEMENT[name] * (abs(other[0]) + abs(value[0])) for a, b in zip(other, value, strict=True)):
                return f"{words[name]} (norm {other[0]:.6g} there, {value[0]:.6g} here)"
        elif other != value:
            return words[name]
    return None


def _is_sketch(value: Any) -> bool:
    """Whether a value read from a file can be what `_sketch` wrote."""
    return isinstance(value, list) and len(value) == 3 and all(is_number(each) for each in value)


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
