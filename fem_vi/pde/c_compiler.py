"""The C compiler: shared libraries from source, kept on disk beside those of FFCx."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import dolfinx.jit
from mpi4py import MPI

from fem_vi.errors import CompilerFailed
from fem_vi.parallel import raise_on_all

# Fast mathematics stays off: sums keep their order, NaN and infinity are told from numbers. What is set lets a square root be an
# instruction (no errno) and both sides of a choice be computed (no traps).
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-shared",
    "-pthread",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-semantic-interposition",
)
_NATIVE = ("-march=native", "-mcpu=native", None)
_MESSAGE_LENGTH = 800


def command() -> list[str]:
    """The C compiler: of the environment variable CC, or that of Python's own build."""
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]


@cache
def target() -> tuple[tuple[str, ...], str]:
    """The flags that choose this processor, and all that the compiler says of it and itself, its predefined macros.

    Raises:
        CompilerFailed: Where there is no compiler.
    """
    for flag in _NATIVE:
        flags = (flag,) if flag else ()
        try:
            return flags, _run([*command(), *flags, "-dM", "-E", "-x", "c", os.devnull])
        except CompilerFailed:
            if flag is None:
                raise
    raise AssertionError


def _run(arguments: list[str]) -> str:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompilerFailed(
            f"The C compiler {arguments[0]} cannot be run ({error}). Install one, or name it in the environment variable CC; "
            "AssembledKernel() needs none besides FFCx's."
        ) from error
    if done.returncode != 0:
        raise CompilerFailed(f"The C compiler failed: {shlex.join(arguments)}\n{done.stderr[:_MESSAGE_LENGTH]}")
    return done.stdout


def has_macro(name: str) -> bool:
    """Whether the compiler defines a macro for this processor."""
    return any(line.split(maxsplit=2)[1:2] == [name] for line in target()[1].splitlines())


@cache
def vector_library() -> ctypes.CDLL | None:
    """The C library's vector functions, where it has any."""
    try:
        return ctypes.CDLL("libmvec.so.1")
    except OSError:
        return None


def vector_symbol(name: str, arguments: int) -> str | None:
    """The name of a function on whole vectors in the vector library; None where it is not there."""
    kinds = [("__AVX512F__", "eN8"), ("__AVX2__", "dN4"), ("__AVX__", "cN4"), ("__SSE2__", "bN2"), ("__ARM_NEON", "nN2")]
    kind = next((kind for macro, kind in kinds if has_macro(macro)), None)
    symbol = f"_ZGV{kind}{'v' * arguments}_{name}"
    return symbol if kind and vector_library() is not None and hasattr(vector_library(), symbol) else None


def load_library(key: str, source: Callable[[], str], comm: MPI.Comm) -> ctypes.CDLL:
    """A shared library from C source, compiled where the cache has none.

    The cache is FFCx's folder (`cache_dir` of DOLFINx's options for compilation). A file's name is a hash of what the source is
    made of, the flags, the compiler and the processor; it appears there complete, by renaming, so that any number of processes
    may compile at once.

    Args:
        key: Names all that the source depends on, the same on all ranks.
        source: Makes the C.
        comm: Ranks that want it: the first compiles, then the others look into their cache.

    Raises:
        CompilerFailed: On every rank, quoting the compiler.
        UnsupportedForm: On every rank, where `source` raises it.

    MPI: Collective.
    """
    path = None
    with raise_on_all(comm):
        if comm.rank == 0:
            path = _cached(key, source)
    with raise_on_all(comm):
        library = _loaded(path or _cached(key, source), key, source)
    return library


def _loaded(path: Path, key: str, source: Callable[[], str]) -> ctypes.CDLL:
    """The library in a file; made again where the file is none, as a disk that was full or a crash may leave it."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)
    try:
        return ctypes.CDLL(str(_cached(key, source)))
    except OSError as error:
        raise CompilerFailed(f"The library that the C compiler made cannot be loaded: {error}.") from error


def _cached(key: str, source: Callable[[], str]) -> Path:
    native, macros = target()
    digest = hashlib.sha256("\0".join([key, *FLAGS, *native, *command(), macros]).encode()).hexdigest()[:40]
    folder = Path(dolfinx.jit.get_options()["cache_dir"])
    path = folder / f"libfem_vi_{digest}.so"
    if not path.exists():
        text = source()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="fem_vi_") as building:
                made = _compile(text, Path(building), native)
                with made.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(made, path)
        except OSError as error:
            raise CompilerFailed(
                f"{folder} cannot be written: {error.strerror}. Compiled forms are kept there; set another cache_dir in "
                "DOLFINx's dolfinx_jit_options.json, or XDG_CACHE_HOME."
            ) from error
    return path


def _compile(source: str, folder: Path, native: Sequence[str]) -> Path:
    code = folder / "kernel.c"
    code.write_text(source)
    made = code.with_suffix(".so")
    libraries = ["-lmvec", "-lm"] if "_ZGV" in source else ["-lm"]
    _run([*command(), *FLAGS, *native, str(code), "-o", str(made), *libraries])
    return made
