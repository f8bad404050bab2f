"""Forms whose measures have subdomain data: those that mean something are integrated, the others refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from tests.helpers import interpolated, owned, square

pytestmark = pytest.mark.mpi
COMM = MPI.COMM_WORLD


def side(msh: mesh.Mesh, x: float) -> Any:
    """The facets at one x, with tag 1."""
    facets = mesh.locate_entities_boundary(msh, 1, lambda points: np.isclose(points[0], x))
    return mesh.meshtags(msh, 1, facets, np.ones(len(facets), dtype=np.int32))


def integral(terms: Any) -> float:
    """Terms in u = 1 on the unit square, and measures on its sides x = 0 and x = 1."""
    msh = square(COMM)
    u = fem.Function(fem.functionspace(msh, ("Lagrange", 1)))
    left, right = (ufl.Measure("ds", msh, subdomain_data=side(msh, x)) for x in (0.0, 1.0))
    return float(fem_vi.Functional(terms(u, left, right), [u])(torch.ones_like(owned(u))))


@pytest.mark.parametrize(
    ("terms", "value"),
    [
        (lambda u, left, right: u * ufl.ds + u * left(1), 5.0),
        (lambda u, left, right: u * left(1) + u * ufl.ds, 5.0),
        (lambda u, left, right: u * left + u * left(1) + u * ufl.ds + u * ufl.dx, 10.0),
    ],
    ids=["everywhere first", "tag first", "three and a cell integral"],
)
def test_an_integral_over_everything_needs_no_subdomain_data(terms: Any, value: float) -> None:
    assert integral(terms) == pytest.approx(value)


def _robin(u: Any, v: Any, ds: Any) -> ufl.Form:
    return ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + u * v * ds - v * ds


def test_a_weak_form_may_mix_them() -> None:
    msh = square(COMM)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    ds = ufl.Measure("ds", msh, subdomain_data=side(msh, 0.0))
    x = interpolated(V, 1.0, 0.2)
    ours, reference = (
        fem_vi.Solve(fem_vi.WeakForm(_robin(u, v, whole) - m * v * ds(1), state=u, inputs=[m]))(x) for whole in (ufl.ds, ds)
    )
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (lambda u, left, right: u * left(1) + u * right(1), r"two ds measures .*ds = ufl.Measure\(\"ds\""),
        (lambda u, left, right: u * ufl.ds(1), r"ds\(1\) has no subdomain data.*ds = ufl.Measure\(\"ds\""),
        (lambda u, left, right: u * left(1) + u * ufl.ds(2), r"ds\(2\) has no subdomain data"),
        (lambda u, left, right: u * left(1) + u * ufl.dx(3), r"dx\(3\) has no subdomain data"),
    ],
    ids=["two data", "a tag without", "a tag without beside one with", "a tag of cells without"],
)
def test_what_tags_cannot_mean_is_refused(terms: Any, words: str) -> None:
    with pytest.raises(fem_vi.UnsupportedForm, match=words):
        integral(terms)
