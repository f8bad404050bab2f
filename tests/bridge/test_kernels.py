"""All kernels of `Residual` give the numbers of DOLFINx: values, gradients, tangents, second derivatives, on any number of ranks."""

from __future__ import annotations

import pytest
from mpi4py import MPI

import fem_vi
from tests.kernel_forms import FORMS, Build, apart, numbers, samples

COMM = MPI.COMM_WORLD
AGREE = 1e-12

every_form = pytest.mark.parametrize("build", FORMS.values(), ids=FORMS.keys())


@pytest.mark.mpi
@every_form
def test_compiled_agrees_with_assembled(build: Build) -> None:
    case = build(COMM)
    compiled, assembled = (fem_vi.Residual(case.pde, kernel=k) for k in (fem_vi.CompiledKernel(), fem_vi.AssembledKernel()))
    at = samples(case, 3)
    assert apart(numbers(compiled, case, at, second=True), numbers(assembled, case, at, second=True), COMM) < AGREE
