"""Matrices of many samples at once are those that DOLFINx assembles, one after another."""

from __future__ import annotations

import numpy as np
import pytest
import ufl
from dolfinx import fem
from mpi4py import MPI

import fem_vi
from fem_vi.errors import UnsupportedForm
from fem_vi.pde._compat_ffcx import integral_codes
from fem_vi.pde.batch_form import KernelMesh, Values
from fem_vi.pde.batch_matrix import BatchMatrix
from fem_vi.pde.lane_code import LaneFormatter
from fem_vi.pde.matrix import MatrixForm
from tests.kernel_forms import FORMS, Build, samples

COMM = MPI.COMM_WORLD
AGREE = 1e-13
NAMES = [
    "diffusion_curved_P2", "diffusion_tetrahedron_P3", "curl_curl_tetrahedron_1", "tensors", "sizes", "elasticity", "stokes",
    "mixed_poisson", "hyperelasticity", "helmholtz",
]  # fmt: skip
LONG = {"diffusion_tetrahedron_P3", "hyperelasticity", "helmholtz"}
OTHERS = sorted(name for name in FORMS.keys() - set(NAMES) if not name.startswith(("discontinuous", "face", "subdomains")))


def matrix_of(pde: fem_vi.WeakForm) -> BatchMatrix:
    return BatchMatrix(pde.jacobian, pde.boundary, pde.fixed, KernelMesh(pde.space.mesh, pde.form, 1))


@pytest.mark.parametrize(
    "build",
    [
        *(pytest.param(FORMS[name], id=name, marks=[pytest.mark.long] if name in LONG else []) for name in NAMES),
        *(pytest.param(FORMS[name], id=name, marks=[pytest.mark.long]) for name in OTHERS),
    ],
)
def test_matrices_are_those_of_dolfinx(build: Build) -> None:
    """Nine samples, of which two share their values: a block of samples and a part of one."""
    case = build(MPI.COMM_SELF)
    pde = case.pde
    given = [pde.unknown, *pde.inputs]
    values = [x.reshape(8, -1).numpy() for x in samples(case, 8)]
    rows = np.array([0, 1, 2, 3, 3, 4, 5, 6, 7])
    found = matrix_of(pde).values(9, {one.symbol: Values(x, rows) for one, x in zip(given, values, strict=True)})
    matrix = MatrixForm(pde.jacobian, pde.boundary.bcs).create_matrix()
    for entries, row in zip(found, rows, strict=True):
        for one, x in zip(given, values, strict=True):
            one.load(x[row])
        matrix.assemble()
        expected = matrix.petsc.getValuesCSR()[2]
        assert np.abs(entries - expected).max() < AGREE * np.abs(expected).max()
        matrix.write(entries)
        assert np.array_equal(matrix.petsc.getValuesCSR()[2], entries)


def test_interior_facets_are_refused() -> None:
    with pytest.raises(UnsupportedForm, match="interior facets"):
        matrix_of(FORMS["discontinuous"](MPI.COMM_SELF).pde)


@pytest.mark.mpi
@pytest.mark.skipif(COMM.size == 1, reason="one rank has all entries")
def test_meshes_on_several_ranks_are_refused() -> None:
    with pytest.raises(UnsupportedForm, match="one rank only"):
        matrix_of(FORMS["log_diffusion"](COMM).pde)


def test_matrices_too_large_to_keep_several_of_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fem_vi.pde.batch_matrix.MOST_BYTES", 2**10)
    with pytest.raises(UnsupportedForm, match="memory"):
        matrix_of(FORMS["log_diffusion"](MPI.COMM_SELF).pde)


def test_loops_of_large_element_matrices_stay_loops() -> None:
    """Quadratic displacements of tetrahedra: 900 entries, which a compiler takes ten seconds for when they stand one by one."""
    V = fem.functionspace(FORMS["solid_tetrahedron_P1"](MPI.COMM_SELF).pde.space.mesh, ("Lagrange", 2, (3,)))
    u, v, m = ufl.TrialFunction(V), ufl.TestFunction(V), fem.Function(V)
    form = (1 + m[0] ** 2) * ufl.inner(ufl.sym(ufl.grad(u)), ufl.sym(ufl.grad(v))) * ufl.dx(metadata={"quadrature_degree": 3})
    (code,) = integral_codes(form)
    assert code.size == 900
    body = LaneFormatter(code.tree, frozenset({"w", "A"})).body()
    assert body.count("A[") < 900
