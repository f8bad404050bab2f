"""Models on disk: safetensors and JSON, with a checksum; nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

from fem_vi.errors import RunFolderError
from fem_vi.output import read_tensors, write_tensors
from fem_vi.parallel import raise_on_all


def write_model(path: str | Path, model: nn.Module, about: Mapping[str, Any], comm: MPI.Comm) -> None:
    """Write the parameters and buffers of a replicated model.

    Args:
        path: The .safetensors file; what `about` says goes to the .json beside it.
        model: Its `state_dict`.
        about: What must be the same when it is read.
        comm: Rank 0 of it writes.

    Raises:
        RunFolderError: Where a file cannot be written.

    MPI: Collective.
    """
    target = Path(path).with_suffix(".safetensors")
    with raise_on_all(comm):
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
    source = Path(path).with_suffix(".safetensors")
    with raise_on_all(comm):
        tensors, written = read_tensors(source)
        there = written.get("about")
        known = there if isinstance(there, dict) else {}
        for name, value in about.items():
            if known.get(name) != value:
                raise RunFolderError(f"{source} is of a model with {name} {known.get(name)!r}; this one has {value!r}.")
        state = model.state_dict()
        if set(state) != set(tensors):
            raise RunFolderError(f"{source} holds {sorted(tensors)}; this model has {sorted(state)}. Are its networks others?")
        for name, value in state.items():
            if tensors[name].shape != value.shape or tensors[name].dtype != value.dtype:
                raise RunFolderError(f"{source}: {name} has shape {tuple(tensors[name].shape)}; expected {tuple(value.shape)}.")
        for name, value in state.items():
            value.copy_(tensors[name])
