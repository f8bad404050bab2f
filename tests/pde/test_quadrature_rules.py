"""Several quadrature rules in one form: each integral is evaluated by its own, in values and derivatives, by every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import basix
import basix.ufl
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from tests.helpers import interpolated
from tests.kernel_forms import cells
from tests.pde.test_quadrature import tagged

COMM = MPI.COMM_SELF
Terms = Callable[[Any, Any, Any], tuple[Any, ...]]
KERNELS = [fem_vi.AssembledKernel(), fem_vi.CompiledKernel(), fem_vi.TorchKernel()]
dx, ds = ufl.dx, ufl.ds


def reduced(u: Any, m: Any, v: Any) -> tuple[Any, ...]:
    """Selective reduced integration: one term by the rule of one point."""
    return ufl.inner(ufl.grad(u), ufl.grad(v)) * (1 + m**2) * dx(degree=4), u.dx(0) ** 2 * v.dx(0) * m * dx(degree=1)


def vertices(u: Any, m: Any, v: Any) -> tuple[Any, ...]:
    return u**2 * m * v * dx(scheme="vertex", degree=1), u**2 * m * v * dx(degree=0)


def three(u: Any, m: Any, v: Any) -> tuple[Any, ...]:
    return u**2 * m * v * dx(degree=0), m * u**2 * v * dx(degree=1), ufl.exp(m) * u**3 * v * dx(degree=3)


def everything(terms: Terms, cell: str, chosen: tuple[int, ...], kernel: Any, comm: MPI.Comm = COMM) -> list[torch.Tensor]:
    """The residual of some of the terms, its gradients and a tangent."""
    V = fem.functionspace(cells(comm, cell), ("Lagrange", 2))
    u, m, v = fem.Function(V), fem.Function(V, name="m"), ufl.TestFunction(V)
    parts = terms(u, m, v)
    form = ufl.Form([integral for k in chosen for integral in parts[k].integrals()])
    residual = fem_vi.Residual(fem_vi.WeakForm(form, state=u, inputs=[m]), kernel=kernel)
    at = [interpolated(V, 0.6, 0.3).requires_grad_(), interpolated(V, 0.5, 1.1).requires_grad_()]
    w, along = interpolated(V, 1.0, 2.0), (interpolated(V, 1.0, 0.7), interpolated(V, 1.0, 1.9))
    r = residual(*at)
    tangent = torch.func.jvp(residual, tuple(x.detach() for x in at), along)[1]
    return [r.detach(), *torch.autograd.grad(r, at, w), tangent]


@pytest.mark.parametrize(
    ("terms", "cell", "count"),
    [(reduced, "quadrilateral", 2), (vertices, "triangle", 2), (three, "triangle", 3)],
    ids=["reduced", "vertices", "three"],
)
def test_a_sum_of_integrals_is_the_sum_of_its_terms(terms: Terms, cell: str, count: int) -> None:
    """The terms one by one by TorchKernel, which compiles nothing and gives the others' numbers for one rule."""
    parts = [everything(terms, cell, (k,), fem_vi.TorchKernel()) for k in range(count)]
    for kernel in KERNELS:
        whole = everything(terms, cell, tuple(range(count)), kernel)
        for got, summands in zip(whole, zip(*parts, strict=True), strict=True):
            assert float((got - sum(summands)).abs().max()) < 1e-13 * float(got.abs().max()), kernel


@pytest.mark.mpi
def test_a_sum_of_integrals_is_the_sum_of_its_terms_on_ranks() -> None:
    """One kernel, whose numbers the others have on any number of ranks."""
    comm = MPI.COMM_WORLD
    whole, *parts = (
        everything(three, "triangle", chosen, fem_vi.TorchKernel(), comm) for chosen in ((0, 1, 2), (0,), (1,), (2,))
    )
    assembled = everything(three, "triangle", (0, 1, 2), fem_vi.AssembledKernel(), comm)
    for got, again, summands in zip(whole, assembled, zip(*parts, strict=True), strict=True):
        size = comm.allreduce(float(got.abs().max()), op=MPI.MAX)
        assert float((got - sum(summands)).abs().max()) < 1e-13 * size
        assert float((got - again).abs().max()) < 1e-13 * size


def test_without_a_second_point_ffcx_takes_one_rule_for_the_other() -> None:
    """Guards the test above: what it looks for is there."""
    V = fem.functionspace(mesh.create_unit_square(COMM, 3, 2), ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    u.x.array[:], m.x.array[:] = interpolated(V, 1.0, 0.2).numpy(), interpolated(V, 1.0, 1.0).numpy()
    parts = (u**2 * m * v * dx(degree=1), u**2 * v * dx(degree=2))
    first, second, both = (fem.assemble_vector(fem.form(form)).array for form in (*parts, parts[0] + parts[1]))
    assert abs(first + second - both).max() > 1e-3 * abs(both).max()


def weak(form: Any, u: Any, m: Any) -> fem_vi.WeakForm:
    return fem_vi.WeakForm(form, state=u, inputs=[m])


def test_single_points_on_facets_beside_others_are_refused() -> None:
    V = fem.functionspace(mesh.create_unit_square(COMM, 2, 2), ("Lagrange", 2))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    with pytest.raises(fem_vi.UnsupportedForm, match=r"one point.*same degree, or each at least 2"):
        weak(u * m * v * ds(degree=1) + u * m * v * ds(degree=4), u, m)
    weak(u * m * v * ds(degree=1), u, m)  # alone it is what it is


def test_custom_rules_on_facets_are_right_or_refused() -> None:
    """DOLFINx counts them twice beside others since 0.10."""
    V = fem.functionspace(mesh.create_unit_square(COMM, 2, 2), ("Lagrange", 2))
    u = fem.Function(V)
    middle = {"quadrature_rule": "custom", "quadrature_points": ((0.5,), (0.2,)), "quadrature_weights": (1.0, 0.0)}
    x = interpolated(V, 1.0, 0.3)
    try:
        both = fem_vi.Functional(u**2 * ds(metadata=middle, degree=1) + u**2 * ds(degree=4), [u])(x)
    except fem_vi.UnsupportedForm as error:
        assert "custom quadrature rule on facets" in str(error)
        return
    alone = [fem_vi.Functional(form, [u])(x) for form in (u**2 * ds(degree=1), u**2 * ds(degree=4))]
    assert float(both) == pytest.approx(float(sum(alone)), rel=1e-13)


def test_degrees_that_nobody_chose_are_raised_on_facets() -> None:
    """u v on two sides, and a number on one of them: the degrees are the compiler's, 2 and 1."""
    msh = mesh.create_unit_square(COMM, 2, 2)
    _, sides, _ = tagged(msh)
    V, P = fem.functionspace(msh, ("Lagrange", 1)), fem.functionspace(msh, ("DG", 0))
    u, v, m = fem.Function(V), ufl.TestFunction(V), fem.Function(P)
    pde = weak(u * v * sides((1, 2)) - m * v * sides(1), u, m)
    assert {integral.metadata()["quadrature_degree"] for integral in pde.form.integrals()} == {2}


def test_elements_on_subdivided_cells_do_not_meet_others() -> None:
    msh = mesh.create_unit_square(COMM, 2, 2, mesh.CellType.quadrilateral)
    element = basix.ufl.element(basix.ElementFamily.iso, msh.basix_cell(), 2)
    V, P = fem.functionspace(msh, element), fem.functionspace(msh, ("Lagrange", 1))
    u, v, m = fem.Function(V), ufl.TestFunction(V), fem.Function(P, name="m")
    form = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * dx
    with pytest.raises(fem_vi.UnsupportedForm, match=r"'m' has the element.*iso"):
        weak(form, u, m)
    with pytest.raises(fem_vi.UnsupportedForm, match="iso"):
        fem_vi.Functional(u**2 * dx, [u])
    fem_vi.WeakForm(form, state=u, inputs=[])  # m is fixed: no derivative for it
