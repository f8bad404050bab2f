"""Models on disk: safetensors and JSON, with a checksum; nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

from fem_vi.errors import InvalidInput, RunFolderError
from fem_vi.output import read_tensors, write_tensors
from fem_vi.parallel import raise_on_all
from fem_vi.vi.description import differing


def write_model(path: str | Path, model: nn.Module, about: Mapping[str, Any], comm: MPI.Comm) -> None:
    """Write the parameters and buffers of a replicated model.

    Args:
        path: The .safetensors file, with that suffix or without one; what `about` says goes to the .json beside it.
        model: Its `state_dict`.
        about: What must be the same when it is read.
        comm: Rank 0 of it writes.

    Raises:
        InvalidInput: Where the path has another suffix.
        RunFolderError: Where a file cannot be written.

    MPI: Collective.
    """
    with raise_on_all(comm):
        target = _file(path)
        if comm.rank == 0:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunFolderError(f"{target.parent} cannot be made: {error.strerror}.") from error
            write_tensors(target, model.state_dict(), {"about": dict(about)})


@torch.no_grad()
def read_model(path: str | Path, model: nn.Module, about: Mapping[str, Any], comm: MPI.Comm) -> None:
    """Set parameters and buffers from what `write_model` wrote; none of them where anything is wrong.

    Raises:
        RunFolderError: Where a file is missing or damaged, or of another model.

    MPI: Collective; all ranks read.
    """
    with raise_on_all(comm):
        source = _file(path)
        tensors, written = read_tensors(source)
        difference = differing(written.get("about"), about)
        if difference is not None:
            raise RunFolderError(f"{source} is of another model: they differ in {difference}.")
        state = model.state_dict()
        if set(state) != set(tensors):
            raise RunFolderError(f"{source} holds {sorted(tensors)}; this model has {sorted(state)}. Are its networks others?")
        for name, value in state.items():
            if tensors[name].shape != value.shape or tensors[name].dtype != value.dtype:
                raise RunFolderError(f"{source}: {name} has shape {tuple(tensors[name].shape)}; expected {tuple(value.shape)}.")
        for name, value in state.items():
            value.copy_(tensors[name])


def _file(path: str | Path) -> Path:
    if Path(path).suffix not in ("", ".safetensors"):
        raise InvalidInput(f"{path} must end in .safetensors.")
    return Path(path).with_suffix(".safetensors")
