"""The folder of a fit on all ranks: what is written there, and how a fit takes up what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fem_vi.errors import RunFolderError
from fem_vi.output import (
    HistoryFile,
    create_run_folder,
    held,
    newest_sound_step,
    read_checkpoint,
    read_json,
    write_checkpoint,
    write_json,
    write_tensors,
)
from fem_vi.parallel import all_values, raise_on_all, shared_seed
from fem_vi.vi.description import differing, name_of
from fem_vi.vi.problem import Problem
from fem_vi.vi.run import describe_versions, rows_of
from fem_vi.vi.session import Session, make_checkpoint, take_checkpoint
from fem_vi.vi.start import GaussNewton, NewtonCG, PresentParameters
from fem_vi.vi.state import gather_parameters


def stored_start(
    problem: Problem, folder: Path, begin: GaussNewton | NewtonCG | PresentParameters
) -> GaussNewton | NewtonCG | PresentParameters:
    """The start that the run in a folder chose by default; `begin` where there is no such run. Collective.

    The default depends on whether the posterior is new, and one that was fitted before in this process is not.
    """
    comm = problem.prior.comm
    name = ""
    with raise_on_all(comm):
        if comm.rank == 0 and (folder / "config.json").exists():
            name = str(read_json(folder / "config.json").get("start"))
    name = all_values(comm, name)[0]
    return next((each for each in (GaussNewton(), PresentParameters()) if name_of(each) == name), begin)


def describe(session: Session, choices: Mapping[str, object], seed: int) -> dict[str, Any]:
    """The content of config.json. Collective."""
    posterior, prior = session.posterior, session.problem.prior
    shapes = {name: list(value.shape) for name, value in gather_parameters(posterior, prior).items()}
    return {
        **{name: name_of(choice) for name, choice in choices.items()},
        "steps": session.steps,
        "seed": seed,
        "ranks": prior.comm.size,
        "versions": describe_versions(),
        "problem": session.problem.describe(),
        "posterior": {"family": type(posterior).__name__, "parameters": shapes},
    }


def restore(session: Session, folder: Path, config: dict[str, Any], resume: bool, holding: ExitStack) -> bool:
    """Make the run folder, or take the state of the run that is in it; and keep other processes out, until `holding` ends.

    Returns:
        True where a checkpoint was taken.

    MPI: Collective.
    """
    comm = session.problem.prior.comm
    step = -1
    with raise_on_all(comm):
        if comm.rank == 0:
            if resume and (folder / "config.json").exists():
                holding.enter_context(held(folder))
                _check_same_run(read_json(folder / "config.json"), config, folder)
                newest = newest_sound_step(folder)
                step = -1 if newest is None else newest
                if step > session.steps:
                    raise RunFolderError(f"{folder} is at step {step} already; steps is {session.steps}.")
            else:
                create_run_folder(folder)
                holding.enter_context(held(folder))
            write_json(folder / "config.json", config)
    step = shared_seed(comm, step)
    if step < 0:
        return False
    with raise_on_all(comm):
        checkpoint = read_checkpoint(folder, step)
        session.history = rows_of(folder, step)
    try:
        take_checkpoint(session, checkpoint)
    except RunFolderError as error:
        raise RunFolderError(f"{folder / 'checkpoints'}, step {step}: {error}") from error
    return True


def _check_same_run(stored: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    for name in ("objective", "optimizer", "schedule", "start", "seed", "posterior", "keep"):
        if stored.get(name) != config[name]:
            raise RunFolderError(
                f"{folder / 'config.json'} is of a run with {name} {stored.get(name)}; this one has {config[name]}. "
                "Give fit what that run was started with, or another path."
            )
    difference = differing(stored.get("problem"), config["problem"])
    if difference is not None:
        raise RunFolderError(
            f"{folder / 'config.json'} is of a run of another problem: they differ in {difference}. "
            "Give fit that problem, or another path."
        )


def save(session: Session, folder: Path, file: HistoryFile | None) -> None:
    """Write a checkpoint, after the rows of the history that lead to it. Collective."""
    checkpoint = make_checkpoint(session)
    with raise_on_all(session.problem.prior.comm):
        if file is not None:
            file.sync()
            write_checkpoint(folder, checkpoint)


@torch.no_grad()
def write_results(session: Session, folder: Path) -> None:
    """The fitted parameters, and the mean and standard deviation as fields. Collective."""
    prior, posterior = session.problem.prior, session.posterior
    parameters = gather_parameters(posterior, prior)
    with raise_on_all(prior.comm):
        if prior.comm.rank == 0:
            about = {"family": type(posterior).__name__, "step": session.step}
            write_tensors(folder / "posterior.safetensors", parameters, about)
    write_fields = getattr(prior, "write_fields", None)
    if write_fields is None or getattr(posterior, "is_conditional", False):  # q(m | y) has moments for each y
        return
    q = posterior()
    try:
        moments = {"mean": q.mean, "sd": q.variance.sqrt()}
    except NotImplementedError:
        return
    write_fields(folder / "fields.xdmf", moments)
