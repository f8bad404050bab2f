"""Integrals against closed forms, with their gradients, on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, la, mesh
from mpi4py import MPI

import fem_vi
from tests.helpers import interpolated, owned, square

COMM = MPI.COMM_WORLD


def moments(V: fem.FunctionSpace) -> torch.Tensor:
    """Integrals of the basis functions, owned."""
    vector = fem.assemble_vector(fem.form(ufl.TestFunction(V) * ufl.dx))
    vector.scatter_reverse(la.InsertMode.add)
    return torch.from_numpy(vector.array[: V.dofmap.index_map.size_local].copy())


def field(V: fem.FunctionSpace, function: object) -> torch.Tensor:
    f = fem.Function(V)
    f.interpolate(function)
    return owned(f)


@pytest.mark.mpi
def test_quadratics_are_integrated_exactly() -> None:
    """On the unit square: the integral of (x + 2 y)^2 is 1/3 + 4/4 + 4/3 and that of |grad|^2 is 5."""
    V = fem.functionspace(square(COMM), ("Lagrange", 1))
    f = fem.Function(V)
    values = field(V, lambda x: x[0] + 2 * x[1]).requires_grad_()
    mass, stiffness = fem_vi.Functional(f**2 * ufl.dx, [f]), fem_vi.Functional(ufl.inner(ufl.grad(f), ufl.grad(f)) * ufl.dx, [f])
    assert mass(values).item() == pytest.approx(1 / 3 + 1 + 4 / 3, rel=1e-14)
    assert stiffness(values).item() == pytest.approx(5.0, rel=1e-14)
    (gradient,) = torch.autograd.grad(mass(values), values)
    ones = torch.ones_like(gradient)
    assert float(fem_vi.all_sum((gradient * ones).sum(), COMM)) == pytest.approx(2 * 1.5, rel=1e-13)
    assert float(fem_vi.all_sum((gradient * values.detach()).sum(), COMM)) == pytest.approx(2 * 8 / 3, rel=1e-13)


@pytest.mark.mpi
def test_gradient_of_a_mean_is_the_moments() -> None:
    V = fem.functionspace(square(COMM), ("Lagrange", 2))
    f = fem.Function(V)
    values = interpolated(V, 1.0, 0.4).requires_grad_()
    (gradient,) = torch.autograd.grad(fem_vi.Functional(f * ufl.dx, [f])(values), values)
    assert torch.allclose(gradient, moments(V), rtol=1e-13, atol=1e-16)


@pytest.mark.mpi
def test_constants_of_every_rank() -> None:
    """J = int s (a . x) + x . T x + s^2 over the unit square, with its gradients for a scalar, a vector and a tensor."""
    msh = square(COMM)
    x = ufl.SpatialCoordinate(msh)
    s, a, tensor = fem.Constant(msh, 0.0), fem.Constant(msh, np.zeros(2)), fem.Constant(msh, np.zeros((2, 2)))
    functional = fem_vi.Functional((s * ufl.dot(a, x) + ufl.dot(x, tensor * x) + s**2) * ufl.dx, [s, a, tensor])
    values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.5, [2.0, -3.0], [[1.0, 2.0], [3.0, 4.0]])]
    value = functional(*values)
    assert value.shape == ()
    assert value.item() == pytest.approx(1.5 * (-0.5) + (1 / 3 + 5 / 4 + 4 / 3) + 2.25, rel=1e-14)
    gradients = torch.autograd.grad(value, values)
    exact = [-0.5 + 3.0, [0.75, 0.75], [[1 / 3, 1 / 4], [1 / 4, 1 / 3]]]
    for gradient, expected in zip(gradients, exact, strict=True):
        assert torch.allclose(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-13)


@pytest.mark.mpi
def test_boundary_and_interior_facets() -> None:
    """Perimeter 4; the jump of the indicator of x > 1/2 counts the length of that line, 1."""
    msh = square(COMM)
    V = fem.functionspace(msh, ("DG", 0))
    f = fem.Function(V)
    values = field(V, lambda x: (x[0] > 0.5).astype(float)).requires_grad_()
    line = fem_vi.Functional(ufl.jump(f) ** 2 * ufl.dS, [f])
    assert line(values).item() == pytest.approx(1.0, rel=1e-13)
    ring = fem_vi.Functional((1 + f) * ufl.ds, [f])
    assert ring(values).item() == pytest.approx(4 + 2.0, rel=1e-13)
    (gradient,) = torch.autograd.grad(line(values), values)
    assert float(fem_vi.all_sum((gradient * values.detach()).sum(), COMM)) == pytest.approx(2.0, rel=1e-13)


@pytest.mark.mpi
def test_batches_broadcast_and_sum_back() -> None:
    """J = int c f over a batch of three fields and two Constants."""
    msh = square(COMM)
    V = fem.functionspace(msh, ("Lagrange", 1))
    f, c = fem.Function(V), fem.Constant(msh, 0.0)
    functional = fem_vi.Functional(c * f * ufl.dx, [f, c])
    fields = torch.stack([field(V, lambda x, k=k: k + x[0]) for k in range(3)]).requires_grad_()
    constants = torch.tensor([[2.0], [3.0]], dtype=torch.float64, requires_grad=True)
    value = functional(fields, constants)
    expected = torch.tensor([[2.0], [3.0]], dtype=torch.float64) * torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64)
    assert torch.allclose(value, expected, rtol=1e-13)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    g_fields, g_constants = torch.autograd.grad((value * weight).sum(), [fields, constants])
    assert torch.allclose(g_fields, (weight.T @ constants.detach()) * moments(V), rtol=1e-13)
    assert torch.allclose(g_constants, (weight * expected / constants.detach()).sum(1, keepdim=True), rtol=1e-13)


@pytest.mark.mpi
def test_any_number_of_ranks_gives_the_same() -> None:
    results = []
    for comm in (COMM, MPI.COMM_SELF):
        msh = mesh.create_unit_cube(comm, 2, 2, 1, mesh.CellType.hexahedron)
        V = fem.functionspace(msh, ("Lagrange", 2, (3,)))
        f = fem.Function(V)
        functional = fem_vi.Functional((ufl.inner(ufl.grad(f), ufl.grad(f)) ** 2 + ufl.exp(f[0])) * ufl.dx, [f])
        values = interpolated(V, 0.3, 0.2).requires_grad_()
        value = functional(values)
        (gradient,) = torch.autograd.grad(value, values)
        results.append([value.item(), float(fem_vi.all_sum((gradient * interpolated(V, 1.0, 2.0)).sum(), comm))])
    assert np.allclose(*results, rtol=1e-12)


def test_gradcheck_with_an_input_that_has_no_gradient() -> None:
    msh = square(MPI.COMM_SELF, 2)
    V = fem.functionspace(msh, ("Lagrange", 1))
    f, g = fem.Function(V), fem.Function(V)
    functional = fem_vi.Functional(ufl.exp(f) * g**2 * ufl.dx, [f, g])
    at, fixed = interpolated(V, 1.0, 0.1).requires_grad_(), interpolated(V, 1.0, 0.2)
    assert torch.autograd.gradcheck(lambda x: functional(x, fixed), at)
    assert not functional(at.detach(), fixed).requires_grad
    assert math.isfinite(functional(at, fixed).item())


@pytest.mark.mpi
def test_an_integral_without_a_finite_value_is_an_error() -> None:
    """On one rank's cells only; the residual of the same form likewise, with the sample's number."""
    msh = square(COMM)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, v = fem.Function(V), ufl.TestFunction(V)
    good = interpolated(V, 0.0, 0.0) + 1.0
    bad = good.clone()
    bad[: 1 if COMM.rank == 0 else 0] = -3.0
    J = fem_vi.Functional(ufl.ln(u) * ufl.dx, [u])
    residual = fem_vi.Residual(fem_vi.WeakForm(ufl.ln(u) * v * ufl.dx, state=u, inputs=[]))
    for operator in (J, residual):
        operator(good)
        with pytest.raises(fem_vi.NotFinite, match=r"samples \[1\] of 2"):
            operator(torch.stack([good, bad]))
