"""Imports run one way, and importing has no effects."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fem_vi"
MODULES = sorted(PACKAGE.rglob("*.py"))
FENICSX = {"dolfinx", "petsc4py", "slepc4py", "ufl", "basix", "ffcx"}
# The modules that may call mpi4py. Others take a communicator, name its type, and use the functions of parallel.py.
MAY_CALL_MPI = {"parallel.py", "bridge/layout.py", "pde/mesh.py"}
# Priors of fields, which may be made of those of vectors.
FIELD_PRIORS = {"bridge/field_prior.py", "bridge/karhunen_loeve.py"}
MPI_NAMES = {"MPI.Comm", "MPI.Intracomm", "MPI.COMM_SELF"}
MPI_CALLS = {"allreduce", "allgather", "Allgatherv", "bcast", "barrier", "alltoall", "exscan", "Gatherv", "Scatterv"}


def imports_of(source: str, package: str = "fem_vi") -> Iterator[tuple[str, bool]]:
    """The modules that a source imports, and whether for type annotations only."""
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) in for_types) for name in names)


def broken_rules(module: str, source: str) -> list[str]:
    """The rules that the source of `fem_vi/<module>` breaks."""
    layer = module.split("/")[0] if "/" in module else ""
    package = ".".join(["fem_vi", *module.split("/")[:-1]])
    broken = []
    for name, _ in imports_of(source, package):
        root = name.split(".")[0]
        if layer == "pde" and (root == "torch" or name.startswith(("fem_vi.bridge", "fem_vi.vi", "fem_vi.models"))):
            broken.append(f"pde imports {name}")
        if layer == "vi" and root in FENICSX:
            broken.append(f"vi imports {name}")
        above = name.startswith(("fem_vi.pde", "fem_vi.bridge", "fem_vi.models"))
        if layer == "vi" and above and not name.startswith("fem_vi.bridge.layout"):
            broken.append(f"vi imports {name}")
        if layer == "bridge" and name.startswith(("fem_vi.vi", "fem_vi.models")) and module not in FIELD_PRIORS:
            broken.append(f"bridge imports {name}")
    roots = {name.split(".")[0] for name, for_types in imports_of(source, package) if not for_types}
    if layer not in ("bridge", "models") and "torch" in roots and roots & FENICSX:
        broken.append(f"{module} imports both torch and {roots & FENICSX}")
    if module == "bridge/layout.py" and roots - {"__future__", "typing", "collections", "numpy", "torch", "mpi4py", "fem_vi"}:
        broken.append(f"{module}, which vi may use, imports {roots}")
    nodes = list(ast.walk(ast.parse(source)))
    if module not in MAY_CALL_MPI:
        names = [node for node in nodes if isinstance(node, ast.Attribute)]
        raw = [node for node in names if ast.unparse(node).startswith("MPI.") and ast.unparse(node) not in MPI_NAMES]
        raw += [node for node in names if node.attr in MPI_CALLS | {name.capitalize() for name in MPI_CALLS}]
        broken += [f"{module}:{node.lineno} calls mpi4py ({ast.unparse(node)}); use fem_vi.parallel" for node in raw]
    if not module.startswith(("cli", "doctor")):
        worlds = [node for node in nodes if "COMM_WORLD" in (getattr(node, "attr", ""), getattr(node, "name", ""))]
        broken += [f"{module}:{node.lineno} uses COMM_WORLD; take a communicator from the mesh or the caller" for node in worlds]
    if not module.startswith("cli"):
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        broken += [f"{module}:{call.lineno} prints" for call in calls if ast.unparse(call.func) == "print"]
    return broken


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_keeps_the_rules(path: Path) -> None:
    assert broken_rules(path.relative_to(PACKAGE).as_posix(), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pde/state.py", "import torch"),
        ("pde/state.py", "def f():\n    from torch import nn"),
        ("pde/state.py", "from fem_vi.bridge import layout"),
        ("pde/state.py", "from ..bridge.layout import gather"),
        ("pde/state.py", "from mpi4py import MPI\ncomm = MPI.COMM_WORLD"),
        ("pde/mesh.py", "from mpi4py.MPI import COMM_WORLD"),
        ("pde/mesh.py", "comm = MPI.COMM_WORLD"),
        ("pde/state.py", "total = mesh.comm.allreduce(1)"),
        ("pde/state.py", "mesh.comm.Allreduce(a, b)"),
        ("vi/fit.py", "from petsc4py import PETSc"),
        ("vi/fit.py", "from fem_vi.bridge.solve import Solve"),
        ("vi/fit.py", "from fem_vi import bridge"),
        ("vi/fit.py", "print('loss')"),
        ("output.py", "import torch, dolfinx"),
        ("bridge/solve.py", "from fem_vi.vi.prior import Normal"),
        ("bridge/layout.py", "import dolfinx"),
    ],
)
def test_a_broken_rule_is_found(module: str, source: str) -> None:
    assert broken_rules(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pde/state.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mpi4py import MPI"),
        ("pde/state.py", "from mpi4py import MPI\ndef f(comm: MPI.Comm = MPI.COMM_SELF): ..."),
        ("vi/fit.py", "from fem_vi.bridge.layout import all_sum"),
        ("bridge/solve.py", "import torch\nfrom dolfinx import fem\nfrom fem_vi.pde.state import State"),
        ("cli.py", "print('usage')"),
    ],
)
def test_what_is_allowed_is_allowed(module: str, source: str) -> None:
    assert broken_rules(module, source) == []


STATE = """
import json, os, sys
import numpy, torch
from petsc4py import PETSc
def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "torch's random state": torch.get_rng_state().sum().item(),
        "NumPy's random state": int(numpy.random.get_state()[1].sum()),
        "threads": torch.get_num_threads(),
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "PETSc options": PETSc.Options().getAll(),
        "NumPy's errors": numpy.geterr(),
        "files": sorted(os.listdir()),
        "variables": sorted(os.environ),
    }
import dolfinx, mpi4py.MPI
before = state()
import fem_vi
for name in getattr(fem_vi, "__all__", []):
    getattr(fem_vi, name)
print(json.dumps([before, state()]))
"""


def test_importing_has_no_effects(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", STATE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert after == before
    assert done.stderr == ""
