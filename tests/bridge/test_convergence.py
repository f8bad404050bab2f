"""Manufactured solutions: the error of `Solve` falls with the order that theory promises, measured by `Functional`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, la, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.helpers import boundary_dofs, everywhere, neo_hookean, owned, taylor_hood

COMM = MPI.COMM_WORLD


Errors = dict[str, float]


def norms(solution: Tensor, state: fem.Function, differences: dict[str, Any]) -> Errors:
    """The L2 norm over the domain of each difference, an expression in the state, at a solution."""
    dx = ufl.dx(metadata={"quadrature_degree": 8})
    return {name: float(fem_vi.Functional(ufl.inner(d, d) * dx, [state])(solution)) ** 0.5 for name, d in differences.items()}


def values_of(V: Any, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """The owned coefficients of an interpolation."""
    out = fem.Function(V)
    out.interpolate(function)
    return owned(out)


def not_right(x: np.ndarray) -> np.ndarray:
    """The boundary of the square without the inner part of the side x = 1."""
    return x[0] < 1 - 1e-12


def diffusion(n: int, *, degree: int, nonlinear: bool) -> Errors:
    """-div((1 + m + c u^2) grad u) = f with u = sin(2 x + y) exp(y) and m = x^2, c = 0 or 1."""
    msh = mesh.create_unit_square(COMM, n, n)
    V, Q = (fem.functionspace(msh, ("Lagrange", d)) for d in (degree, 2))
    u, m, h, v = fem.Function(V), fem.Function(Q), fem.Function(V), ufl.TestFunction(V)
    x = ufl.SpatialCoordinate(msh)
    exact = ufl.sin(2 * x[0] + x[1]) * ufl.exp(x[1])
    flux = lambda w, k: (1 + k + (w**2 if nonlinear else 0)) * ufl.grad(w)  # noqa: E731
    F = ufl.inner(flux(u, m), ufl.grad(v)) * ufl.dx + ufl.div(flux(exact, x[0] ** 2)) * v * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[m, h], bcs=[fem.dirichletbc(h, boundary_dofs(V, everywhere))])
    given = values_of(Q, lambda x: x[0] ** 2), values_of(V, lambda x: np.sin(2 * x[0] + x[1]) * np.exp(x[1]))
    return norms(fem_vi.Solve(pde)(*given), u, {"u": u - exact, "grad u": ufl.grad(u - exact)})


def solenoidal(x: Any, maths: Any) -> list[Any]:
    """A velocity without divergence, for UFL or NumPy."""
    return [3 * maths.sin(2 * x[0]) * maths.cos(3 * x[1]), -2 * maths.cos(2 * x[0]) * maths.sin(3 * x[1])]


def flow(n: int, *, inertia: bool) -> Errors:
    """Stokes or Navier-Stokes, -div(nu grad u) + (u . grad) u + grad p = f, with p = 5 cos(x + 2 y) and nu = (1 + x) / 4.

    Velocity prescribed on three sides, the force nu du/dn - p n on the fourth, which fixes the pressure.
    """
    msh = mesh.create_unit_square(COMM, n, n)
    W = taylor_hood(msh)
    w, (v, q) = fem.Function(W), ufl.TestFunctions(W)
    u, p = ufl.split(w)
    V, _ = W.sub(0).collapse()
    Q = fem.functionspace(msh, ("Lagrange", 1))
    nu, h = fem.Function(Q), fem.Function(V)
    x, normal = ufl.SpatialCoordinate(msh), ufl.FacetNormal(msh)
    exact_u, exact_p, exact_nu = ufl.as_vector(solenoidal(x, ufl)), 5 * ufl.cos(x[0] + 2 * x[1]), (1 + x[0]) / 4
    advection = lambda z: ufl.dot(ufl.grad(z), z) if inertia else 0 * z  # noqa: E731
    f = -ufl.div(exact_nu * ufl.grad(exact_u)) + advection(exact_u) + ufl.grad(exact_p)
    traction = exact_nu * ufl.dot(ufl.grad(exact_u), normal) - exact_p * normal
    F = nu * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + ufl.inner(advection(u) - f, v) * ufl.dx
    F -= (p * ufl.div(v) + q * ufl.div(u)) * ufl.dx + ufl.inner(traction, v) * ufl.ds
    bc = fem.dirichletbc(h, boundary_dofs(W.sub(0), not_right, V), W.sub(0))
    pde = fem_vi.WeakForm(F, state=w, inputs=[nu, h], bcs=[bc])
    given = values_of(Q, lambda x: (1 + x[0]) / 4), values_of(V, lambda x: np.stack(solenoidal(x, np)))
    differences = {"u": u - exact_u, "grad u": ufl.grad(u - exact_u), "p": p - exact_p}
    return norms(fem_vi.Solve(pde)(*given), w, differences)


def hyperelasticity(n: int, *, degree: int) -> Errors:
    """A neo-Hookean solid from its energy, clamped on three sides: force -div P, traction P n on the fourth.

    P = mu (D - D^-T) + 2 mu ln J D^-T with D = I + grad u, J = det D, strains of up to 0.2.
    """
    msh = mesh.create_unit_square(COMM, n, n)
    V, Q = fem.functionspace(msh, ("Lagrange", degree, (2,))), fem.functionspace(msh, ("Lagrange", 1))
    u, mu, v = fem.Function(V), fem.Function(Q), ufl.TestFunction(V)
    metadata = {"quadrature_degree": 6}
    x, dx, ds = ufl.SpatialCoordinate(msh), ufl.dx(metadata=metadata), ufl.ds(metadata=metadata)
    exact_mu = 1 + x[0]
    exact = ufl.as_vector([ufl.sin(2 * x[0]) * ufl.sin(np.pi * x[1]) / 10, x[0] * ufl.sin(2 * np.pi * x[1]) / 50])
    deformation = ufl.Identity(2) + ufl.grad(exact)
    inverse = ufl.inv(deformation).T
    stress = exact_mu * (deformation - inverse) + 2 * exact_mu * ufl.ln(ufl.det(deformation)) * inverse
    F = ufl.derivative(neo_hookean(u, mu, 2 * mu) * dx, u, v) + ufl.inner(ufl.div(stress), v) * dx
    F -= ufl.inner(ufl.dot(stress, ufl.FacetNormal(msh)), v) * ds
    bc = fem.dirichletbc(np.zeros(2), boundary_dofs(V, not_right), V)
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[mu], bcs=[bc]))
    solution = solve(values_of(Q, lambda x: 1 + x[0]))
    return norms(solution, u, {"u": u - exact, "grad u": ufl.grad(u - exact)})


def helmholtz(n: int, *, degree: int) -> Errors:
    """A plane wave, u = sin(k (0.8 x + 0.6 y)): -div grad u = k^2 u, prescribed on three sides, du/dn given on the fourth.

    k^2 = 27 lies between the eigenvalues 22.2 and 32.1 of -div grad: the matrix is indefinite.
    """
    msh = mesh.create_unit_square(COMM, n, n)
    V = fem.functionspace(msh, ("Lagrange", degree))
    u, h, v, k = fem.Function(V), fem.Function(V), ufl.TestFunction(V), fem.Constant(msh, 0.0)
    x, number = ufl.SpatialCoordinate(msh), 27**0.5
    exact = ufl.sin(number * (0.8 * x[0] + 0.6 * x[1]))
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - k**2 * u * v * ufl.dx
    F -= ufl.dot(ufl.grad(exact), ufl.FacetNormal(msh)) * v * ufl.ds
    pde = fem_vi.WeakForm(F, state=u, inputs=[k, h], bcs=[fem.dirichletbc(h, boundary_dofs(V, not_right))])
    given = torch.tensor(number, dtype=torch.float64), values_of(V, lambda x: np.sin(number * (0.8 * x[0] + 0.6 * x[1])))
    return norms(fem_vi.Solve(pde)(*given), u, {"u": u - exact, "grad u": ufl.grad(u - exact)})


FLOW = {"u": 3, "grad u": 2, "p": 2}
MANUFACTURED: dict[str, tuple[Callable[[int], Errors], tuple[int, ...], dict[str, int]]] = {  # cells along a side, and orders
    "diffusion P1": (partial(diffusion, degree=1, nonlinear=False), (4, 8, 16), {"u": 2, "grad u": 1}),
    "diffusion P2": (partial(diffusion, degree=2, nonlinear=False), (4, 8, 16), {"u": 3, "grad u": 2}),
    "nonlinear diffusion P1": (partial(diffusion, degree=1, nonlinear=True), (4, 8, 16), {"u": 2, "grad u": 1}),
    "nonlinear diffusion P2": (partial(diffusion, degree=2, nonlinear=True), (4, 8, 16), {"u": 3, "grad u": 2}),
    "Stokes": (partial(flow, inertia=False), (4, 8, 16), FLOW),
    "Navier-Stokes": (partial(flow, inertia=True), (4, 8, 16), FLOW),
    "hyperelasticity P1": (partial(hyperelasticity, degree=1), (8, 16, 32), {"u": 2, "grad u": 1}),
    "hyperelasticity P2": (partial(hyperelasticity, degree=2), (4, 8, 16), {"u": 3, "grad u": 2}),
    "Helmholtz P1": (partial(helmholtz, degree=1), (16, 32, 64), {"u": 2, "grad u": 1}),
    "Helmholtz P2": (partial(helmholtz, degree=2), (8, 16, 32), {"u": 3, "grad u": 2}),
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", MANUFACTURED)
def test_order_of_convergence(name: str) -> None:
    problem, sizes, orders = MANUFACTURED[name]
    errors = [problem(n) for n in sizes]
    for what, order in orders.items():
        sequence = np.array([each[what] for each in errors])
        rates = np.log2(sequence[:-1] / sequence[1:])
        assert np.all(np.abs(rates - order) < 0.15), (what, sequence, rates)


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
