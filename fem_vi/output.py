"""Run folders on disk: configuration, history, checkpoints. Whatever is on disk under its final name is whole.

    config.json             what was run, and with which versions
    history.csv             one row a step, flushed as it goes
    checkpoints/            step-00000050.safetensors and .json with its checksum, the last two
    posterior.safetensors   fitted parameters, and posterior.json with its checksum
    fields.xdmf, .h5        mean and standard deviation, for ParaView; where the prior is a field
    .lock                   locked while a process is at work on the run

Files are written under a temporary name, synchronised and renamed; tensors are stored as safetensors, never pickled. These
functions are not collective: rank 0 calls the writers.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fem_vi.arguments import is_number
from fem_vi.errors import RunFolderError

KEPT_CHECKPOINTS = 2
LOCK = ".lock"
REMEDY = "Restore it from a copy, or start anew in another folder."
NUMBERS = ("forward", "backward", "seconds")
"""What a checkpoint holds besides tensors: samples solved forward and backward, and wall time, since the run began."""


@dataclass(frozen=True)
class Checkpoint:
    """A state of a fit.

    Attributes:
        step: Steps done.
        tensors: Parameters, optimiser and generator state, by name.
        numbers: One for each of `NUMBERS`.
    """

    step: int
    tensors: dict[str, Tensor]
    numbers: dict[str, float]


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file that is either there and whole, or not there.

    Raises:
        RunFolderError: Where the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}. Check the disk's space and permissions.") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, atomically."""
    write_atomic(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunFolderError: Where the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged: {error}. {REMEDY}") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{path} is damaged: it holds {type(content).__name__}, not a JSON object. {REMEDY}")
    return content


def create_run_folder(path: Path) -> None:
    """Make an empty run folder.

    Raises:
        RunFolderError: Where something is there already, or the folder cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file; a run needs a folder of its own. Choose another path.")
    try:
        if path.exists() and not _is_unborn(path):
            raise RunFolderError(
                f"{path} already holds files. Continue that run with fit(..., resume=True), choose another path, or delete it."
            )
        (path / "checkpoints").mkdir(parents=True, exist_ok=path.exists())
    except OSError as error:
        raise RunFolderError(f"{path} cannot be made: {error.strerror}.") from error


def _is_unborn(path: Path) -> bool:
    """Whether a folder is empty, or holds no more than a run that was killed before it had begun."""
    checkpoints = path / "checkpoints"
    names = {file.name for file in path.iterdir()}
    return names <= {LOCK, checkpoints.name, ".config.json.tmp"} and not (checkpoints.exists() and any(checkpoints.iterdir()))


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep other processes out of a run folder for a block; the operating system lets go where this one is killed.

    On file systems that know no locks, and on systems without `fcntl`, nothing is kept out.

    Raises:
        RunFolderError: Where another process is at work on the run.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        file = (path / LOCK).open("a")
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}. Check the disk's space and permissions.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"another process is at work on the run in {path}. Wait until it ends, or choose another path."
            ) from error
        except OSError:
            pass
        yield


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors to `path` (.safetensors), then `about` and their checksum beside it (.json).

    Raises:
        RunFolderError: Where a file cannot be written.
    """
    content = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    write_atomic(path, content)
    write_json(path.with_suffix(".json"), {**about, "sha256": hashlib.sha256(content).hexdigest()})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Returns:
        The tensors, and what was written about them.

    Raises:
        RunFolderError: Where a file is missing, or the checksum is wrong.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}.") from error
    about = read_json(path.with_suffix(".json"))
    if hashlib.sha256(content).hexdigest() != about.pop("sha256", None):
        raise RunFolderError(f"{path} is damaged: its checksum is not the one in {path.with_suffix('.json').name}.")
    try:
        return safetensors.torch.load(content), about
    except SafetensorError as error:
        raise RunFolderError(f"{path} is damaged: {error}.") from error


def _checkpoint_path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}.safetensors"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, newest first, sound or not."""
    names = [file.stem.removeprefix("step-") for file in (folder / "checkpoints").glob("step-*.json")]
    return sorted((int(name) for name in names if re.fullmatch("[0-9]{8,}", name)), reverse=True)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, then delete all but the newest two.

    Raises:
        RunFolderError: Where a file cannot be written.
    """
    about = {"step": checkpoint.step, "numbers": checkpoint.numbers}
    write_tensors(_checkpoint_path(folder, checkpoint.step), checkpoint.tensors, about)
    for step in checkpoint_steps(folder)[KEPT_CHECKPOINTS:]:
        old = _checkpoint_path(folder, step)
        old.with_suffix(".json").unlink(missing_ok=True)
        old.unlink(missing_ok=True)


def read_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Read the checkpoint of one step.

    Raises:
        RunFolderError: Where it is missing or damaged.
    """
    path = _checkpoint_path(folder, step)
    tensors, about = read_tensors(path)
    numbers = about.get("numbers")
    if not isinstance(numbers, dict) or set(numbers) != set(NUMBERS) or not all(is_number(value) for value in numbers.values()):
        damaged = path.with_suffix(".json")
        raise RunFolderError(f"{damaged} is damaged: numbers is {numbers!r}; a number each is expected for {', '.join(NUMBERS)}.")
    return Checkpoint(step, tensors, numbers)


def newest_sound_step(folder: Path) -> int | None:
    """Step of the newest checkpoint that can be trusted; None where there is no checkpoint at all.

    Warns of each damaged one that it passes over.

    Raises:
        RunFolderError: Where there are checkpoints, all damaged.
    """
    steps = checkpoint_steps(folder)
    for step in steps:
        try:
            read_checkpoint(folder, step)
        except RunFolderError as error:
            warnings.warn(f"{error} Falling back to an older checkpoint.", stacklevel=2)
        else:
            return step
    if steps:
        raise RunFolderError(
            f"None of the checkpoints in {folder / 'checkpoints'} can be trusted. Delete that folder to start the run anew."
        )
    return None


class HistoryFile:
    """`history.csv`, open for appending; a row is on disk (flushed) when `append` returns.

    Args:
        path: The file.
        columns: Names of the columns.
        rows: Rows to start from, in place of what the file held.
    """

    def __init__(self, path: Path, columns: Iterable[str], rows: Iterable[Iterable[object]] = ()) -> None:
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
        write_atomic(path, text.getvalue().encode())
        self._file: TextIO = path.open("a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def append(self, row: Iterable[object]) -> None:
        """Add a row and flush it.

        Raises:
            RunFolderError: Where the row cannot be written.
        """
        try:
            self._writer.writerow(row)
            self._file.flush()
        except OSError as error:
            raise RunFolderError(f"{self._file.name} cannot be written: {error.strerror}. Is the disk full?") from error

    def sync(self) -> None:
        """Wait until the rows are on the disk.

        Raises:
            RunFolderError: Where they cannot be written.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunFolderError(f"{self._file.name} cannot be written: {error.strerror}. Is the disk full?") from error

    def close(self) -> None:
        """Close the file; a row that could not be written, which `append` told of, is left out."""
        with suppress(OSError):
            self._file.close()


def read_history(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a history file up to the first damaged one, values as text.

    Args:
        path: The file.
        columns: Names that the header must have.

    Raises:
        RunFolderError: Where the file is missing or has another header.
    """
    try:
        lines = path.read_text().split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}.") from error
    if not lines or tuple(lines[0].split(",")) != columns:
        raise RunFolderError(f"{path} does not start with the header {','.join(columns)}.")
    rows = []
    for line in lines[1:]:
        values = line.split(",")
        if len(values) != len(columns):
            break
        rows.append(dict(zip(columns, values, strict=True)))
    return rows
