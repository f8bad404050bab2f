"""Residuals on disk: what `TorchKernel` made of a weak form, for machines without FEniCSx.

One safetensors file: the state of a `TorchResidual`, whose plan is JSON, with a format, a version and a checksum in the header.
Nothing is pickled, and nothing of FEniCSx or MPI is imported here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fem_vi.arguments import instance
from fem_vi.bridge.torch_residual import TorchResidual, check_device
from fem_vi.errors import InvalidInput, ResidualFileError, RunFolderError
from fem_vi.output import write_atomic

if TYPE_CHECKING:
    from fem_vi.bridge.residual import Residual

FORMAT = "fem_vi residual"
VERSION = "1"


def export_residual(residual: Residual | TorchResidual, path: str | os.PathLike[str]) -> None:
    """Write a residual to a file that `load_residual` reads where FEniCSx is missing.

    The file is there and whole, or not there. Mesh, fixed fields and prescribed values are in it as they were when the residual
    was built.

    Args:
        residual: `Residual(pde, kernel=TorchKernel())` on one rank, or a `TorchResidual`.
        path: The file; `.safetensors` is the usual ending.

    Raises:
        InvalidInput: For a residual of another kernel, or on several ranks.
        ResidualFileError: Where the file cannot be written.

    MPI: Not collective: the residual must have been built on one rank.

    Example:
        >>> fem_vi.export_residual(fem_vi.Residual(pde, kernel=fem_vi.TorchKernel()), "residual.safetensors")
    """
    instance("export_residual: path", path, str, os.PathLike)
    module = residual if isinstance(residual, TorchResidual) else getattr(getattr(residual, "function", None), "module", None)
    if not isinstance(module, TorchResidual):
        raise InvalidInput(
            f"export_residual: {residual!r} is not evaluated by torch. Build it with Residual(pde, kernel=fem_vi.TorchKernel())."
        )
    if module.is_distributed:
        raise InvalidInput("export_residual: the residual is spread over several ranks. Build it on a mesh on MPI.COMM_SELF.")
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    header = {"format": FORMAT, "version": VERSION, "sha256": _checksum(state)}
    try:
        write_atomic(Path(path), safetensors.torch.save(state, metadata=header))
    except RunFolderError as error:
        raise ResidualFileError(str(error)) from error


def load_residual(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> TorchResidual:
    """Read a residual that `export_residual` wrote; FEniCSx is not needed.

    Args:
        path: The file.
        device: Where the residual shall lie.

    Returns:
        A module: `residual(u, *inputs)`, field tensors as where it was exported, in the order of DOLFINx's dofs there.

    Raises:
        ResidualFileError: Where the file is missing, damaged, of another kind, or from a newer version.
        InvalidInput: For a device that is not there.

    MPI: Not collective.

    Example:
        >>> residual = fem_vi.load_residual("residual.safetensors", device="cuda")
        >>> r = residual(u, m)
    """
    instance("load_residual: path", path, str, os.PathLike)
    check_device("load_residual", device)
    try:
        instance("load_residual: path", path, str, os.PathLike)
        with safetensors.safe_open(Path(path), framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError) as error:
        raise ResidualFileError(
            f"{path} cannot be read: {error}. It must be a file that export_residual wrote, whole."
        ) from error
    if header.get("format") != FORMAT:
        raise ResidualFileError(f"{path} holds no residual of fem_vi; it must be a file that export_residual wrote.")
    if header.get("version") != VERSION:
        raise ResidualFileError(
            f"{path} has version {header.get('version')} of the format; this fem_vi reads version {VERSION}. Use the fem_vi that "
            "wrote it, or export it again with this one."
        )
    if header.get("sha256") != _checksum(state):
        raise ResidualFileError(f"{path} is damaged: its checksum is not the one in its header. Copy or export it again.")
    try:
        return TorchResidual.from_state_dict(state).to(device)
    except InvalidInput as error:
        raise ResidualFileError(f"{path} cannot be used: {error}") from error


def _checksum(state: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
