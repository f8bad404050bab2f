"""A virtual environment for each peer, over the packages that this Python has, in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SHARED = ("torch", "numpy", "scipy", "petsc4py", "mpi4py", "fenics-dolfinx", "fenics-ufl", "fenics-basix", "fenics-ffcx")


class NoPeer(Exception):
    """The peer could not be installed; the message says why."""


def constraints() -> str:
    """What pip may not replace, so that all run on the same libraries."""
    lines = []
    for name in SHARED:
        try:
            lines.append(f"{name}=={version(name)}\n")
        except PackageNotFoundError:
            continue
    return "".join(lines)


def python_with(name: str, requirement: str) -> Path:
    """The interpreter of an environment that has the peer, made where it is missing.

    Args:
        name: Of the peer.
        requirement: For pip.

    Raises:
        NoPeer: Where pip cannot install it here, with pip's last line.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fem_vi" / "peers"
    fixed = constraints()
    key = hashlib.sha256(f"{sys.version}{requirement}{fixed}".encode()).hexdigest()[:12]
    folder = cache / f"{name}-{key}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    print(f"installing {requirement} in {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", folder], check=True)
    (folder / "constraints.txt").write_text(fixed)
    pip = [python, "-m", "pip", "install", "--no-input", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--constraint", folder / "constraints.txt", requirement], capture_output=True, text=True)
    if done.returncode:
        raise NoPeer(f"{requirement} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    (folder / "complete").touch()
    return python
