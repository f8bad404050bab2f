"""Coordinates of states: what they lift to keeps the Dirichlet conditions, and they come back."""

from __future__ import annotations

import math

import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch.distributions import Independent, MultivariateNormal, Normal

import fem_vi
from fem_vi.errors import InvalidInput
from tests.helpers import CASES, Case

COMM = MPI.COMM_WORLD
F64 = torch.float64
SAMPLED = [name for name in CASES if name not in ("moving_mesh",)]


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def owned_boundary(case: Case) -> torch.Tensor:
    return torch.from_numpy(case.pde.boundary.owned).long()


def basis(case: Case, count: int = 3) -> torch.Tensor:
    """Modes that depend on the position in the global vector."""
    V = case.pde.space
    x = torch.linspace(0.0, 1.0, V.dofmap.index_map.size_global * V.dofmap.index_map_bs, dtype=F64)
    return fem_vi.distribute(torch.stack([torch.sin((k + 1) * 7.0 * x + k) for k in range(count)]), V)


KINDS = {
    "nodal": lambda case: fem_vi.Nodal(scale=0.3, offset=0.05 * case.weights[-1]),
    "reduced": lambda case: fem_vi.ReducedBasis(basis(case), offset=0.05 * case.weights[-1]),
}


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLED)
def test_a_lifted_state_keeps_the_conditions_and_its_coordinates(name: str, kind: str) -> None:
    case = CASES[name](COMM)
    state = KINDS[kind](case).create(case.pde)
    c = numbers(0, 2, state.size)
    u = state.lift(c, *case.values)
    assert u.shape == (2, case.pde.unknown.size)
    small = 0.005 * c  # a solid must not be turned inside out
    r = fem_vi.Residual(case.pde)(state.lift(small, *case.values), *case.values)
    assert float(r[:, owned_boundary(case)].abs().sum()) < 1e-12
    torch.testing.assert_close(state.coordinates(u), c, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_coordinates_and_prescribed_values(kind: str) -> None:
    case = CASES["reaction"](MPI.COMM_SELF)
    state = KINDS[kind](case).create(case.pde)
    c = numbers(1, 2, state.size).requires_grad_()
    level = torch.tensor([0.7, -0.2], dtype=F64, requires_grad=True)

    def lift(c: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return state.lift(c, *case.values[:-1], level)

    assert torch.autograd.gradcheck(lift, (c, level))


@pytest.mark.mpi
def test_prescribed_values_get_complete_gradients_on_any_number_of_ranks() -> None:
    case = CASES["helmholtz"](COMM)  # h, a field, on the left side
    state = fem_vi.Nodal().create(case.pde)
    w, c = case.weights[-1], numbers(2, state.size).requires_grad_()
    h = case.values[2].clone().requires_grad_()
    fem_vi.all_sum((w * state.lift(c, *case.values[:2], h)).sum(), COMM).backward()
    on_boundary = torch.zeros_like(w)
    on_boundary[owned_boundary(case)] = 1.0
    torch.testing.assert_close(h.grad, on_boundary * w)
    torch.testing.assert_close(c.grad, state.coordinates(w))


@pytest.mark.mpi
def test_the_order_of_nodal_coordinates_is_that_of_the_mesh_file() -> None:
    """A random field of the network's making is the same field on any number of ranks."""

    def norm(comm: MPI.Comm) -> float:
        V = fem.functionspace(mesh.create_unit_square(comm, 4, 3), ("Lagrange", 1))
        u, v = fem.Function(V), ufl.TestFunction(V)
        pde = fem_vi.WeakForm((ufl.inner(ufl.grad(u), ufl.grad(v)) - v) * ufl.dx, state=u, inputs=[])
        state = fem_vi.Nodal().create(pde)
        assert state.order == ""
        J = fem_vi.Functional((1 + ufl.SpatialCoordinate(V.mesh)[0]) * u**2 * ufl.dx, [u])
        return float(J(state.lift(numbers(3, state.size))))

    assert norm(COMM) == pytest.approx(norm(MPI.COMM_SELF), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_deviations_are_those_of_draws(kind: str) -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    state = KINDS[kind](case).create(case.pde)
    root = 0.3 * numbers(4, state.size, state.size).tril(-1) + torch.eye(state.size, dtype=F64)
    torch.manual_seed(0)
    for q in (
        MultivariateNormal(numbers(5, state.size), scale_tril=root),
        Independent(Normal(numbers(5, state.size), numbers(6, state.size).exp()), 1),
    ):
        draws = state.lift(q.sample((20_000,)), *case.values)
        torch.testing.assert_close(draws.std(0), state.deviation(q), rtol=0.04, atol=1e-12)
        assert float(state.deviation(q)[owned_boundary(case)].abs().max()) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_volume_is_that_of_the_linear_map(kind: str) -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    state = KINDS[kind](case).create(case.pde)
    E = state.lift(torch.eye(state.size, dtype=F64), *case.values) - state.lift(torch.zeros(state.size, dtype=F64), *case.values)
    assert state.log_volume == pytest.approx(0.5 * float(torch.linalg.slogdet(E @ E.T)[1]), rel=1e-10)
    assert math.isfinite(state.log_volume)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda case: fem_vi.Nodal(scale=0.0), "scale is 0.0"),
        (lambda case: fem_vi.Nodal(offset=torch.zeros(3)), r"offset has shape \(3,\)"),
        (lambda case: fem_vi.ReducedBasis(torch.zeros(2, 3)), r"modes have shape \(2, 3\)"),
        (lambda case: fem_vi.ReducedBasis(torch.ones(2, case.pde.unknown.size)), "linearly dependent"),
    ],
)
def test_refuses(make, words: str) -> None:
    case = CASES["log_diffusion"](COMM)
    with pytest.raises(InvalidInput, match=words):
        make(case).create(case.pde)
