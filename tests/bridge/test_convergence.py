"""Manufactured solutions: the error of `Solve` falls with the order that theory promises, measured by `Functional`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, la, mesh
from mpi4py import MPI

import fem_vi
from tests.helpers import boundary_dofs, everywhere, owned

COMM = MPI.COMM_WORLD


def error(n: int, degree: int, *, nonlinear: bool) -> float:
    """L2 error for -div((1 + m + c u^2) grad u) = f with u = sin(2 x + y) exp(y) and m = x^2, c = 0 or 1."""
    msh = mesh.create_unit_square(COMM, n, n)
    V = fem.functionspace(msh, ("Lagrange", degree))
    u, m, h, v = fem.Function(V), fem.Function(fem.functionspace(msh, ("Lagrange", 2))), fem.Function(V), ufl.TestFunction(V)
    x = ufl.SpatialCoordinate(msh)
    exact = ufl.sin(2 * x[0] + x[1]) * ufl.exp(x[1])
    flux = lambda w, k: (1 + k + (w**2 if nonlinear else 0)) * ufl.grad(w)  # noqa: E731
    source = -ufl.div(flux(exact, x[0] ** 2))
    F = ufl.inner(flux(u, m), ufl.grad(v)) * ufl.dx - source * v * ufl.dx
    bc = fem.dirichletbc(h, boundary_dofs(V, everywhere))
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[m, h], bcs=[bc]))
    m.interpolate(lambda x: x[0] ** 2)
    data = fem.Function(V)
    data.interpolate(lambda x: np.sin(2 * x[0] + x[1]) * np.exp(x[1]))
    difference = fem_vi.Functional((u - exact) ** 2 * ufl.dx(metadata={"quadrature_degree": 8}), [u])
    return float(difference(solve(owned(m), owned(data)))) ** 0.5


@pytest.mark.mpi
@pytest.mark.parametrize("nonlinear", [False, True], ids=["linear", "nonlinear"])
@pytest.mark.parametrize("degree", [1, 2])
def test_order_of_convergence(degree: int, nonlinear: bool) -> None:
    errors = [error(n, degree, nonlinear=nonlinear) for n in (4, 8, 16)]
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(rates - (degree + 1)) < 0.15), (errors, rates)


@pytest.mark.mpi
def test_gradient_converges_to_that_of_the_equation() -> None:
    """For -u'' = f with u(0) = u(1) = 0 and J = int u, the gradient of J for f is x (1 - x) / 2, exact at the nodes."""
    msh = mesh.create_unit_interval(COMM, 16)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, f, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - f * v * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[f], bcs=[fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)])
    values = torch.ones(V.dofmap.index_map.size_local, dtype=torch.float64, requires_grad=True)
    solution = fem_vi.Solve(pde)(values)
    functional = fem_vi.Functional(u * ufl.dx, [u])
    (gradient,) = torch.autograd.grad(functional(solution), values)
    lam = fem.Function(V)
    lam.interpolate(lambda x: x[0] * (1 - x[0]) / 2)
    assert torch.allclose(solution.detach(), owned(lam), rtol=1e-11, atol=1e-14)
    vector = fem.assemble_vector(fem.form(lam * v * ufl.dx))  # <dJ/df, phi_i> = int lam phi_i
    vector.scatter_reverse(la.InsertMode.add)
    assert torch.allclose(gradient, torch.from_numpy(vector.array[: gradient.numel()]), rtol=1e-11, atol=1e-15)
