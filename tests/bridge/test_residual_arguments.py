"""What `Residual` and what is made of it refuse, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mpi4py import MPI

import fem_vi
from tests.helpers import CASES


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda pde: fem_vi.Residual(pde.form), "pde is .*must be of type WeakForm"),
        (lambda pde: fem_vi.Residual(pde, petsc_options=3), "petsc_options is 3"),
        (lambda pde: fem_vi.Residual(pde).precondition(reference=None), "reference is None"),
        (lambda pde: fem_vi.TorchKernel(device=3.5), "device is 3.5"),
        (lambda pde: fem_vi.export_residual(fem_vi.Residual(pde, kernel=fem_vi.TorchKernel()), None), "path is None"),
        (lambda pde: fem_vi.load_residual(None), "path is None"),
    ],
)
def test_is_refused(call: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(fem_vi.InvalidInput, match=words):
        call(CASES["log_diffusion"](MPI.COMM_SELF).pde)
