"""Matrices that share memory with PETSc: the same as PETSc's own insertion, and seen to change by every solver."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from dolfinx.fem import petsc as fem_petsc
from mpi4py import MPI

import fem_vi
from fem_vi.pde.matrix import MatrixForm
from tests.helpers import CASES, Case

COMM = MPI.COMM_WORLD


@pytest.mark.mpi
@pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
def test_the_same_as_inserted(build: Callable[[MPI.Comm], Case]) -> None:
    """Twice, at two points: values, sparsity, block sizes."""
    pde = build(COMM).pde
    form = MatrixForm(pde.jacobian, pde.boundary.bcs)
    matrix = form.create_matrix()
    expected = fem_petsc.create_matrix(form.form)
    for scale in (0.05, 0.02):
        pde.unknown.load(scale * np.linspace(0.0, 1.0, pde.unknown.size))
        matrix.assemble()
        expected.zeroEntries()
        fem_petsc.assemble_matrix(expected, form.form, bcs=form.bcs)
        expected.assemble()
        difference = expected.copy()
        difference.axpy(-1.0, matrix.petsc)
        assert difference.norm() <= 1e-14 * expected.norm()
    assert matrix.petsc.getSizes() == expected.getSizes()
    assert matrix.petsc.getBlockSizes() == expected.getBlockSizes()


@pytest.mark.mpi
@pytest.mark.parametrize(
    "options",
    [
        {"pc_type": "lu"},
        {"pc_type": "cholesky"},
        {"ksp_type": "cg", "pc_type": "bjacobi"},
        {"ksp_type": "cg", "pc_type": "hypre"},
        {"ksp_type": "cg", "pc_type": "gamg"},
        {"ksp_type": "gmres", "pc_type": "asm"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_solvers_see_new_values(options: dict[str, str]) -> None:
    """The same answer at the second point as by an operator that begins there, in as many iterations: nothing is stale.

    GAMG keeps its interpolation by default, which may cost it some.
    """
    case = CASES["log_diffusion"](COMM)
    (m,) = case.values
    used, fresh = (fem_vi.Solve(case.pde, petsc_options=options) for _ in range(2))
    used(m)
    u, expected = used(3.0 * m + 5.0), fresh(3.0 * m + 5.0)
    assert torch.allclose(u, expected, rtol=1e-8, atol=1e-12)
    iterations = [next(iter(s._equation.factors._factors.values())).ksp.getIterationNumber() for s in (used, fresh)]
    assert iterations[0] <= iterations[1] * (1.5 if options["pc_type"] == "gamg" else 1.0)
