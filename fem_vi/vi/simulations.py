"""Simulated pairs of unknowns and predictions, in memory and on disk; a simulation that was killed goes on where it stopped.

    simulations.json                 of which problem, seed, size of a shard
    shard-00000.safetensors, .json   unknowns and predictions without noise, with a checksum

Each shard depends on the seed and its own number only, is written aside and renamed when complete, and is made again where it is
missing or damaged. Noise is drawn anew whenever a pair is used.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput, RunFolderError
from fem_vi.output import read_json, read_tensors, write_json, write_tensors
from fem_vi.parallel import agree_on_error, all_values, raise_on_all, shared_seed
from fem_vi.vi.description import differing
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.randomness import private_generator
from fem_vi.vi.run import describe_forward

SOLVED_AT_ONCE = 64
FORMAT = "fem_vi simulations 1"


@dataclass(frozen=True)
class Simulations:
    """Pairs drawn from the prior and its predictions; every tensor is replicated.

    Attributes:
        xi: Whitened unknowns, `(count, n_global)`, in the prior's partition-independent order.
        prediction: Without noise, `(count, num_predicted)`.
    """

    xi: Tensor
    prediction: Tensor

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.xi)

    def __repr__(self) -> str:
        return f"Simulations({len(self)} pairs, {self.xi.shape[1]} unknowns, {self.prediction.shape[1]} predictions)"


@dataclass(frozen=True)
class _Task:
    """What there is to simulate, and where it goes."""

    problem: InverseProblem
    folder: Path | None
    count: int
    shard: int
    seed: int

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard)

    def path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"shard-{number:05d}.safetensors"


def simulate(
    problem: InverseProblem,
    count: int,
    *,
    path: str | Path | None = None,
    shard: int = 256,
    seed: int = 0,
    share: MPI.Comm = MPI.COMM_SELF,
) -> Simulations:
    """Draw unknowns from the prior and solve for what they predict.

    With a path, pairs are kept there: a simulation that was killed goes on where it stopped, one that is complete is read, and a
    larger `count` adds to it.

    Args:
        problem: Prior, forward map and likelihood; its data only give their number.
        count: Pairs.
        path: Folder for the shards, or None. The same for all ranks.
        shard: Pairs in a file.
        seed: Of the unknowns; rank 0's counts. The state of torch's generator is left as it was found.
        share: Ranks that share out the shards, each with a mesh and a problem of its own, or with its group's:
            `fem_vi.ProcessGrid.create(comm, mesh_ranks=1).sample_comm`.

    Returns:
        All pairs, the same on all ranks and for any number of them.

    Raises:
        InvalidInput: Where an argument is of the wrong type or out of range.
        RunFolderError: Where the folder holds the simulations of another problem, seed or size of shard, or cannot be written.
        SolveFailed: Where the forward map has no solution for some draw.

    MPI: Collective over the ranks of the problem and those of `share`; `path` must be on a file system that all ranks see.

    Example:
        >>> simulations = fem_vi.simulate(problem, 10_000, path="runs/simulations")
    """
    instance("problem", problem, InverseProblem)
    comm = problem.prior.comm
    with raise_on_all(comm):
        instance("path", path, str, PathLike, NoneType)
        count, shard, seed = whole("count", count, least=2), whole("shard", shard, least=1), whole("seed", seed)
        if path is None and share.size > 1:
            raise InvalidInput("simulate: ranks share out shards through files. Give path, a folder that all of them see.")
    task = _Task(problem, None if path is None else Path(path), count, shard, shared_seed(comm, seed))
    if task.folder is None:
        return _joined([_draw(task, number) for number in range(task.num_shards)], count)
    for group in (range(1), range(1, share.size)):  # the others find the folder that the first has made
        with _agreed(share):
            if share.rank in group:
                _prepare(task)
    with _agreed(share):
        for number in range(share.rank, task.num_shards, share.size):
            if not _is_sound(task, number):
                _write(task, number)
    with raise_on_all(comm):
        return _joined([read_tensors(task.path(number))[0] for number in range(task.num_shards)], count)


@contextmanager
def _agreed(share: MPI.Comm) -> Iterator[None]:
    """Raise an error of one group of ranks, after the other groups have done their part, on all. Collective over `share`."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree_on_error(share, error)


def _joined(shards: list[dict[str, Tensor]], count: int) -> Simulations:
    xi, prediction = (torch.cat([shard[name] for shard in shards])[:count] for name in ("xi", "prediction"))
    return Simulations(xi, prediction)


@torch.no_grad()
def _draw(task: _Task, number: int) -> dict[str, Tensor]:
    """The pairs of one shard, whole even where fewer are asked for. Collective."""
    prior = task.problem.prior
    word = hashlib.sha256(f"{task.seed} {number}".encode()).digest()[:4]  # torch's generator sees 32 bits of a seed
    with private_generator(int.from_bytes(word)):
        noise = prior.white_noise(torch.Size([task.shard]))
    prediction = torch.cat([task.problem.predict(prior.unwhiten(part)) for part in noise.split(SOLVED_AT_ONCE)])
    return {"xi": prior.gather(noise), "prediction": prediction}


def _write(task: _Task, number: int) -> None:
    """Simulate one shard and write it. Collective over the ranks of the problem."""
    tensors, comm = _draw(task, number), task.problem.prior.comm
    with raise_on_all(comm):
        if comm.rank == 0:
            write_tensors(task.path(number), tensors, {"shard": number})


def _is_sound(task: _Task, number: int) -> bool:
    """Whether a shard is there and whole. Collective over the ranks of the problem."""
    comm, sound = task.problem.prior.comm, False
    with raise_on_all(comm):
        if comm.rank == 0 and task.path(number).with_suffix(".json").exists():
            try:
                sound = len(read_tensors(task.path(number))[0]["xi"]) == task.shard
            except (RunFolderError, KeyError) as error:
                warnings.warn(f"{error} It is simulated again.", stacklevel=4)
    return all_values(comm, sound)[0]


def _prepare(task: _Task) -> None:
    """Make the folder, or see that it is of this problem. Collective over the ranks of the problem."""
    comm, folder = task.problem.prior.comm, task.folder
    assert folder is not None
    described = task.problem.describe()
    content: dict[str, Any] = {"format": FORMAT, "seed": task.seed, "shard": task.shard}
    content["problem"] = {name: described[name] for name in ("prior", "unknowns", "num_data")}
    content["problem"]["forward"] = describe_forward(task.problem)
    with raise_on_all(comm):
        if comm.rank == 0:
            file = folder / "simulations.json"
            if file.exists():
                _check_same(read_json(file), content, file)
                return
            if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
                raise RunFolderError(f"{folder} holds something else than simulations. Choose another path.")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, content)


def _check_same(stored: dict[str, Any], content: dict[str, Any], file: Path) -> None:
    for name in ("format", "seed", "shard"):
        if stored.get(name) != content[name]:
            raise RunFolderError(
                f"{file} has {name} {stored.get(name)}; this simulation has {content[name]}. Give simulate what that was begun "
                "with, or another path."
            )
    difference = differing(stored.get("problem"), content["problem"])
    if difference is not None:
        raise RunFolderError(f"{file} is of another problem: they differ in {difference}. Choose another path.")
