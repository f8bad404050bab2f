"""The derivative that is assembled is the derivative of what is assembled, which is what the user wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from tests.helpers import interpolated, owned

COMM = MPI.COMM_SELF
CELLS = [mesh.CellType.triangle, mesh.CellType.quadrilateral]


def coarse(cell: mesh.CellType, *, skew: bool = False) -> mesh.Mesh:
    """The unit square, 2 by 2; skewed, its quadrilaterals are no parallelograms, and their maps not affine."""
    msh = mesh.create_unit_square(COMM, 2, 2, cell)
    if skew:
        msh.geometry.x[:, 0] += 0.2 * msh.geometry.x[:, 0] * msh.geometry.x[:, 1]
    return msh


def tagged(msh: mesh.Mesh) -> tuple[Any, Any, Any]:
    """dx with cells 1 and 2, ds with sides 1 and 2, dS with one tag."""
    tdim = msh.topology.dim
    msh.topology.create_connectivity(tdim - 1, tdim)
    cells = np.arange(msh.topology.index_map(tdim).size_local, dtype=np.int32)
    cell_tags = mesh.meshtags(msh, tdim, cells, (1 + cells % 2).astype(np.int32))
    facets = np.arange(msh.topology.index_map(tdim - 1).size_local, dtype=np.int32)
    facet_tags = mesh.meshtags(msh, tdim - 1, facets, (1 + facets % 2).astype(np.int32))
    return (
        ufl.Measure("dx", msh, subdomain_data=cell_tags),
        ufl.Measure("ds", msh, subdomain_data=facet_tags),
        ufl.Measure("dS", msh, subdomain_data=facet_tags),
    )


def one_measure(f: Any, m: Any, msh: mesh.Mesh) -> ufl.Form:
    return f * ufl.exp(m) * ufl.dx + ufl.inner(ufl.grad(f), ufl.grad(m)) ** 2 * ufl.dx


def several_ids(f: Any, m: Any, msh: mesh.Mesh) -> ufl.Form:
    """On cells 1 the degree is that of the last integrand, on cells 2 that of the first."""
    dx, _, _ = tagged(msh)
    return ufl.sqrt(1 + m**2) * dx((1, 2)) + f**3 * ufl.exp(m) * dx(1)


def several_metadata(f: Any, m: Any, msh: mesh.Mesh) -> ufl.Form:
    dx, _, _ = tagged(msh)
    low, negative = {"quadrature_degree": 1}, {"quadrature_degree": -1}
    return ufl.exp(m) * dx(1, metadata=low) + f**2 * ufl.cos(m) * dx(1) + ufl.sin(3 * m) * dx(1, metadata=negative)


def facets(f: Any, m: Any, msh: mesh.Mesh) -> ufl.Form:
    _, ds, dS = tagged(msh)
    n = ufl.FacetNormal(msh)
    form = ufl.exp(m) * f * ds(1) + ufl.cos(m) * ds((1, 2)) + ufl.sqrt(1 + m**2) * ds
    return form + ufl.exp(ufl.avg(m)) * ufl.jump(ufl.grad(f), n) ** 2 * dS(2) + ufl.sin(ufl.avg(m)) * dS


def curved_coordinates(f: Any, m: Any, msh: mesh.Mesh) -> ufl.Form:
    x = ufl.SpatialCoordinate(msh)
    return ufl.sin(3 * x[0]) * ufl.exp(m) * f * ufl.dx(msh) + x[1] ** 2 * m / (1 + m**2) * ufl.ds(msh)


FORMS = [one_measure, several_ids, several_metadata, facets, curved_coordinates]
every_form = pytest.mark.parametrize("build", FORMS, ids=[f.__name__ for f in FORMS])
every_cell = pytest.mark.parametrize("cell", CELLS, ids=["triangle", "skewed-quadrilateral"])


def functions(cell: mesh.CellType) -> tuple[mesh.Mesh, fem.Function, fem.Function]:
    msh = coarse(cell, skew=cell == mesh.CellType.quadrilateral)
    V = fem.functionspace(msh, ("Lagrange", 1))
    f, m = fem.Function(V, name="f"), fem.Function(V, name="m")
    f.x.array[:], m.x.array[:] = interpolated(V, 1.0, 0.2).numpy(), interpolated(V, 1.0, 1.1).numpy()
    return msh, f, m


@every_cell
@every_form
def test_value_is_what_dolfinx_assembles_of_the_users_form(build: Callable[..., ufl.Form], cell: mesh.CellType) -> None:
    """Term by term: of several rules in one form, FFCx takes some for others, see test_quadrature_rules."""
    msh, f, m = functions(cell)
    form = build(f, m, msh)
    terms = [form] if build is not several_metadata else [ufl.Form([integral]) for integral in form.integrals()]
    plain = sum(fem.assemble_scalar(fem.form(term)) for term in terms)
    assert float(fem_vi.Functional(form, [f, m])(owned(f), owned(m))) == pytest.approx(plain, rel=1e-14)


@every_cell
def test_residual_is_what_dolfinx_assembles_of_the_users_form(cell: mesh.CellType) -> None:
    msh, u, m = functions(cell)
    v = ufl.TestFunction(u.function_space)
    dx, ds, _ = tagged(msh)
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * dx((1, 2)) + ufl.cos(u * m) * v * dx(2) - ufl.exp(u) * v * ds(1)
    plain = torch.from_numpy(fem.assemble_vector(fem.form(F)).array)
    r = fem_vi.Residual(fem_vi.WeakForm(F, state=u, inputs=[m]))(owned(u), owned(m))
    assert float((r - plain).abs().max()) <= 1e-14 * float(plain.abs().max())


def central_difference(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, direction: torch.Tensor) -> float:
    """Fourth order: its error is about 1e-11 for numbers of size one."""
    step = 1e-3
    ahead, behind = (function(at + k * step * direction) - function(at - k * step * direction) for k in (1, 2))
    return float((8 * ahead - behind) / (12 * step))


@every_cell
@every_form
def test_gradient_is_the_derivative_of_the_value(build: Callable[..., ufl.Form], cell: mesh.CellType) -> None:
    msh, f, m = functions(cell)
    functional = fem_vi.Functional(build(f, m, msh), [f, m])
    at, direction = owned(m).requires_grad_(), interpolated(m.function_space, 1.0, 2.0)
    (gradient,) = torch.autograd.grad(functional(owned(f), at), at)
    slope = central_difference(lambda x: functional(owned(f), x), at.detach(), direction)
    assert float(gradient @ direction) == pytest.approx(slope, rel=1e-8)


def test_without_pinning_the_assembled_derivative_is_another_number() -> None:
    """Guards the tests above: the effect that they look for is there, five orders of magnitude above their bound."""
    _, f, m = functions(mesh.CellType.triangle)
    form = f * ufl.exp(m) * ufl.dx
    value = fem.form(form)
    direction = interpolated(m.function_space, 1.0, 2.0)

    def plain(x: torch.Tensor) -> torch.Tensor:
        m.x.array[:] = x.numpy()
        return torch.tensor(fem.assemble_scalar(value))

    at = owned(m)
    slope = central_difference(plain, at, direction)
    m.x.array[:] = at.numpy()
    unpinned = fem.assemble_vector(fem.form(ufl.derivative(form, m, ufl.TestFunction(m.function_space)))).array
    assert abs(float(torch.from_numpy(unpinned) @ direction) / slope - 1) > 1e-6


def test_gradient_of_the_residual_is_the_derivative_of_the_residual() -> None:
    _, u, m = functions(mesh.CellType.triangle)
    v = ufl.TestFunction(u.function_space)
    F = ufl.exp(m + u) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - ufl.exp(u * m) * v * ufl.ds
    residual = fem_vi.Residual(fem_vi.WeakForm(F, state=u, inputs=[m]))
    w, direction = interpolated(u.function_space, 1.0, 0.4), interpolated(u.function_space, 1.0, 2.0)
    at = [owned(u).requires_grad_(), owned(m).requires_grad_()]
    gradients = torch.autograd.grad(residual(*at) @ w, at)
    slopes = (
        central_difference(lambda x: residual(x, owned(m)) @ w, owned(u), direction),
        central_difference(lambda x: residual(owned(u), x) @ w, owned(m), direction),
    )
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert float(gradient @ direction) == pytest.approx(slope, rel=1e-8)
