"""The four crossings between owned and replicated: values, gradients, adjoints, and the same loss on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.helpers import interpolated, square

COMM = MPI.COMM_WORLD


def space(comm: MPI.Comm = COMM) -> fem.FunctionSpace:
    return fem.functionspace(square(comm), ("Lagrange", 1, (2,)))


def replicated(*shape: int) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def rank_local(*shape: int) -> Tensor:
    """Other numbers on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(10 + COMM.rank))


def total(x: float) -> float:
    return COMM.allreduce(x)


def sizes(V: fem.FunctionSpace) -> tuple[int, int]:
    index_map = V.dofmap.index_map
    return 2 * index_map.size_local, 2 * index_map.size_global


@pytest.mark.mpi
def test_all_sum_adds_and_passes_the_gradient_on() -> None:
    x = rank_local(2, 3).requires_grad_()
    y = fem_vi.all_sum(x, COMM)
    assert torch.allclose(y.detach(), torch.from_numpy(COMM.allreduce(x.detach().numpy())), rtol=1e-14)
    g = replicated(2, 3)
    (gradient,) = torch.autograd.grad(y, x, grad_outputs=g)
    assert torch.equal(gradient, g)


@pytest.mark.mpi
def test_all_sum_leaves_its_argument_alone() -> None:
    x = rank_local(4)
    before = x.clone()
    fem_vi.all_sum(x, COMM).add_(1.0)
    assert torch.equal(x, before)


@pytest.mark.mpi
def test_all_sum_keeps_shape_type_and_layout() -> None:
    x = rank_local(3, 2).to(torch.float32).T
    y = fem_vi.all_sum(x, COMM)
    assert y.dtype == torch.float32 and y.shape == (2, 3)
    assert torch.allclose(y, sum(COMM.allgather(x)))
    assert fem_vi.all_sum(torch.tensor(1.0), COMM).shape == ()


@pytest.mark.mpi
def test_localise_keeps_values_and_adds_gradients() -> None:
    y = replicated(5).requires_grad_()
    local = fem_vi.localise(y, COMM)
    assert torch.equal(local, y)
    g = rank_local(5)
    (gradient,) = torch.autograd.grad(local, y, grad_outputs=g)
    assert torch.allclose(gradient, torch.from_numpy(COMM.allreduce(g.numpy())), rtol=1e-14)


@pytest.mark.mpi
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_gather_and_distribute_are_inverse_and_adjoint(batch: tuple[int, ...]) -> None:
    """A pairing of replicated vectors is a plain sum, one of field tensors a sum over ranks: <S x, f> = <x, G f>."""
    V = space()
    n_owned, n_global = sizes(V)
    x, f = replicated(*batch, n_global), rank_local(*batch, n_owned)
    assert fem_vi.distribute(x, V).shape == (*batch, n_owned)
    assert torch.equal(fem_vi.gather(fem_vi.distribute(x, V), V), x)
    assert torch.equal(fem_vi.distribute(fem_vi.gather(f, V), V), f)
    left = total(float((fem_vi.distribute(x, V) * f).sum()))
    assert left == pytest.approx(float((x * fem_vi.gather(f, V)).sum()), rel=1e-12)


@pytest.mark.mpi
def test_gradients_of_distribute_and_gather_are_each_other() -> None:
    V = space()
    n_owned, n_global = sizes(V)
    x, f = replicated(n_global).requires_grad_(), rank_local(n_owned).requires_grad_()
    g_field, g_whole = rank_local(n_owned), replicated(n_global)
    (gradient,) = torch.autograd.grad(fem_vi.distribute(x, V), x, grad_outputs=g_field)
    assert torch.equal(gradient, fem_vi.gather(g_field, V))
    (gradient,) = torch.autograd.grad(fem_vi.gather(f, V), f, grad_outputs=g_whole)
    assert torch.equal(gradient, fem_vi.distribute(g_whole, V))


@pytest.mark.mpi
def test_gather_is_in_dolfinx_global_order() -> None:
    V = space()
    first, last = V.dofmap.index_map.local_range
    numbers = torch.arange(2 * first, 2 * last, dtype=torch.float64)
    assert torch.equal(fem_vi.gather(numbers, V), torch.arange(sizes(V)[1], dtype=torch.float64))


def loss(comm: MPI.Comm) -> tuple[Tensor, list[Tensor], fem.FunctionSpace]:
    """A nonlinear loss of replicated parameters and of a field tensor, through every crossing and an integral."""
    V = fem.functionspace(square(comm), ("Lagrange", 1))
    weight, scale = replicated(3).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    u = interpolated(V, 1.0, 0.3).requires_grad_()
    f = fem.Function(V)
    energy = fem_vi.Functional(ufl.exp(f) * ufl.dx, [f])
    local = fem_vi.localise(scale, comm) * u + fem_vi.localise(weight, comm)[0] * u**2
    direct = fem_vi.all_sum((local * fem_vi.localise(weight, comm)[1]).sin().sum(), comm)
    y = fem_vi.PointObservation(V, [[0.3, 0.4], [0.5, 0.5], [0.7, 0.1]])(local)
    return direct + energy(local) * weight[2] + (y - weight).square().sum() * scale, [weight, scale, u], V


@pytest.mark.mpi
def test_loss_and_gradients_are_the_same_on_any_number_of_ranks() -> None:
    results = []
    for comm in (COMM, MPI.COMM_SELF):
        value, leaves, V = loss(comm)
        weight, scale, u = torch.autograd.grad(value, leaves)
        assert set(COMM.allgather(value.item())) == {value.item()}
        paired = fem_vi.all_sum((u * interpolated(V, 1.0, 1.7)).sum(), comm)
        results.append(torch.cat([value.detach().reshape(1), weight, scale.reshape(1), paired.reshape(1)]))
    assert torch.allclose(*results, rtol=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize("leaf", ["parameter", "field"])
def test_double_backward_through_the_crossings(leaf: str) -> None:
    """A Hessian-vector product of sum_i (a u_i)^4 over all ranks, in closed form."""
    V = fem.functionspace(square(COMM), ("Lagrange", 1))
    a = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    u = interpolated(V, 1.0, 0.3).requires_grad_()
    value = fem_vi.all_sum((fem_vi.localise(a, COMM) * u).pow(4).sum(), COMM)
    fourth, fifth = (total(float(u.detach().pow(k).sum())) for k in (4, 5))
    if leaf == "parameter":
        (g,) = torch.autograd.grad(value, a, create_graph=True)
        (h,) = torch.autograd.grad(g, a)
        assert g.item() == pytest.approx(4 * 1.3**3 * fourth, rel=1e-12)
        assert h.item() == pytest.approx(12 * 1.3**2 * fourth, rel=1e-12)
    else:
        (g,) = torch.autograd.grad(value, u, create_graph=True)
        assert torch.allclose(g, 4 * 1.3**4 * u**3, rtol=1e-12)
        product = fem_vi.all_sum((g * u.detach() ** 2).sum(), COMM)  # = 4 a^4 sum u^3 w with w = u^2 held fixed
        h, mixed = torch.autograd.grad(product, [u, a])
        assert torch.allclose(h, 12 * 1.3**4 * u**4, rtol=1e-12)
        assert mixed.item() == pytest.approx(16 * 1.3**3 * fifth, rel=1e-12)


@pytest.mark.parametrize("crossing", [fem_vi.all_sum, fem_vi.localise], ids=lambda f: f.__name__)
def test_gradcheck_to_second_order(crossing: Callable[..., Tensor]) -> None:
    x = replicated(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: crossing(x.exp(), MPI.COMM_SELF).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: crossing(x.exp(), MPI.COMM_SELF).square(), x)


@pytest.mark.mpi
def test_a_rank_that_owns_nothing() -> None:
    """Two cells and more ranks: fields of length zero on some of them."""
    msh = mesh.create_interval(COMM, 2, (0.0, 1.0))
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V, name="m"), ufl.TestFunction(V)
    pde = fem_vi.WeakForm((u - m**2) * v * ufl.dx, state=u, inputs=[m])
    n_owned = V.dofmap.index_map.size_local
    values = torch.full((2, n_owned), 3.0, dtype=torch.float64, requires_grad=True)
    y = fem_vi.PointObservation(V, [[0.3]])(fem_vi.Solve(pde)(values))
    assert torch.allclose(y, torch.full((2, 1), 9.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(y.sum(), values)
    assert float(fem_vi.all_sum(gradient.sum(), COMM)) == pytest.approx(2 * 6.0, rel=1e-9)
    area = fem_vi.Functional(m * ufl.dx, [m])(values)
    assert torch.allclose(area, torch.full((2,), 3.0, dtype=torch.float64))
    prior = fem_vi.MaternField(V, std=1.0, length=0.5)
    draw = prior.rsample((2,))
    assert prior.whiten(prior.unwhiten(draw)).shape == (2, n_owned)
    assert fem_vi.gather(draw, V).shape == (2, 3)
