"""Residuals on disk: whole, checked, and read where FEniCSx and MPI cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from mpi4py import MPI
from torch import Tensor

import fem_vi
from fem_vi import output
from tests.helpers import CASES, Case
from tests.kernel_forms import FORMS

COMM = MPI.COMM_WORLD
ROOT = Path(__file__).parent.parent.parent

WITHOUT_FENICSX = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"dolfinx", "ufl", "basix", "ffcx", "petsc4py", "slepc4py", "mpi4py"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import safetensors.torch, torch, fem_vi
residual = fem_vi.load_residual("residual.safetensors")
tensors = safetensors.torch.load_file("tensors.safetensors")
inputs = [tensors[f"x{k}"].requires_grad_() for k in range(len(residual.plan.given))]
r = residual(*inputs)
(first, *_) = torch.autograd.grad(r.sin().sum(), inputs, create_graph=True)
(second,) = torch.autograd.grad(first.sin().sum(), inputs[1])
out = {"r": r.detach(), "first": first.detach().contiguous(), "second": second.contiguous()}
safetensors.torch.save_file(out, "out.safetensors")
assert not {"dolfinx", "ufl", "basix", "petsc4py", "mpi4py"} & set(sys.modules)
"""


def exported(case: Case, path: Path) -> tuple[fem_vi.Residual, list[Tensor]]:
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel())
    fem_vi.export_residual(residual, path)
    return residual, [torch.stack([x, 1.1 * x]) for x in (0.3 * case.weights[-1], *case.values)]


@pytest.mark.parametrize("name", ["mixed_poisson", "discontinuous"])
def test_a_residual_runs_without_fenicsx(name: str, tmp_path: Path) -> None:
    residual, at = exported(CASES[name](MPI.COMM_SELF), tmp_path / "residual.safetensors")
    safetensors.torch.save_file({f"x{k}": x for k, x in enumerate(at)}, tmp_path / "tensors.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_FENICSX]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    got = safetensors.torch.load_file(tmp_path / "out.safetensors")
    inputs = [x.clone().requires_grad_() for x in at]
    r = residual(*inputs)
    first = torch.autograd.grad(r.sin().sum(), inputs, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.sin().sum(), inputs[1])
    for key, wanted in (("r", r), ("first", first), ("second", second)):
        assert torch.allclose(got[key], wanted, rtol=1e-13, atol=1e-15), key
    assert float(second.abs().max()) > 0.0


def test_a_residual_read_again_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "residual.safetensors"
    residual, at = exported(FORMS["subdomains"](MPI.COMM_SELF), path)
    at[-1] = at[-1][0]
    loaded = fem_vi.load_residual(path)
    assert torch.equal(loaded(*at), residual(*at))
    assert "inputs[0] (m)" in repr(loaded)
    fem_vi.export_residual(loaded, tmp_path / "again.safetensors")
    first, second = (safetensors.torch.load_file(tmp_path / name) for name in ("residual.safetensors", "again.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    single = fem_vi.load_residual(path).float()
    fem_vi.export_residual(single, path)
    assert fem_vi.load_residual(path)(*at).dtype is torch.float32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    where = tmp_path / "residual.safetensors"
    exported(CASES["log_diffusion"](MPI.COMM_SELF), where)
    return where


def rewrite(path: Path, **changes: str) -> None:
    """The same tensors, with another header."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = {**file.metadata(), **changes}
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), metadata=header))


def test_a_damaged_file_is_refused(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(fem_vi.ResidualFileError, match="checksum"):
        fem_vi.load_residual(path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(path: Path, part: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(fem_vi.ResidualFileError, match="cannot be read"):
        fem_vi.load_residual(path)


def test_a_foreign_file_is_refused(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(fem_vi.ResidualFileError, match="holds no residual"):
        fem_vi.load_residual(path)
    path.write_text(json.dumps({"plan": 1}))
    with pytest.raises(fem_vi.ResidualFileError, match="cannot be read"):
        fem_vi.load_residual(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(fem_vi.ResidualFileError, match=r"nowhere\.safetensors"):
        fem_vi.load_residual(tmp_path / "nowhere.safetensors")


def test_another_version_is_refused(path: Path) -> None:
    rewrite(path, version="2")
    with pytest.raises(fem_vi.ResidualFileError, match="version 2"):
        fem_vi.load_residual(path)


def test_a_plan_of_another_kind_is_refused(path: Path) -> None:
    """A file with a right checksum whose plan this version does not understand."""
    module = fem_vi.load_residual(path)
    plan = json.loads(bytes(module.plan_json.numpy()))
    for changes in ({"unknown": 1}, {"offset": "elsewhere"}):
        module.plan_json = torch.frombuffer(bytearray(json.dumps({**plan, **changes}).encode()), dtype=torch.uint8)
        fem_vi.export_residual(module, path)
        with pytest.raises(fem_vi.ResidualFileError, match="cannot be used"):
            fem_vi.load_residual(path)


def test_a_file_is_whole_or_not_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    other = fem_vi.Residual(CASES["reaction"](MPI.COMM_SELF).pde, kernel=fem_vi.TorchKernel())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", fail)
    with pytest.raises(fem_vi.ResidualFileError, match="No space left"):
        fem_vi.export_residual(other, path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    with pytest.raises(fem_vi.ResidualFileError, match="cannot be written"):
        fem_vi.export_residual(other, path.parent / "no folder" / "residual.safetensors")


def test_what_is_not_torch_is_not_written(path: Path) -> None:
    assembled = fem_vi.Residual(CASES["log_diffusion"](MPI.COMM_SELF).pde)
    with pytest.raises(fem_vi.InvalidInput, match="TorchKernel"):
        fem_vi.export_residual(assembled, path)
    with pytest.raises(fem_vi.InvalidInput, match="no such device"):
        fem_vi.load_residual(path, device="no such device")


@pytest.mark.mpi
def test_what_is_spread_over_ranks_is_not_written(tmp_path: Path) -> None:
    residual = fem_vi.Residual(CASES["log_diffusion"](COMM).pde, kernel=fem_vi.TorchKernel())
    if COMM.size == 1:
        fem_vi.export_residual(residual, tmp_path / "residual.safetensors")
        return
    with pytest.raises(fem_vi.InvalidInput, match=r"several ranks.*COMM_SELF"):
        fem_vi.export_residual(residual, tmp_path / "residual.safetensors")


def test_rows_of_a_residual_that_was_read_are_refused_with_a_way_out(path: Path) -> None:
    residual = fem_vi.load_residual(path)
    given = [torch.zeros(about.shape, dtype=torch.float64) for about in residual.plan.given]
    with pytest.raises(fem_vi.InvalidInput, match=r"take residual\(u, \*inputs\)\[\.\.\., rows\]"):
        residual(*given, rows=torch.tensor([0]))
