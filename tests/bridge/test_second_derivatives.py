"""Second derivatives, forward mode, vmap: one recipe for every operator over every weak form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem
from mpi4py import MPI
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fem_vi
from tests.bridge.test_operators import every_case, fields_of, leaves, loss_of
from tests.helpers import CASES, Case, paired

COMM = MPI.COMM_WORLD


def directions_of(case: Case) -> list[Tensor]:
    return case.weights[:-1]


def operators(case: Case) -> list[tuple[Callable[..., Tensor], list[Tensor]]]:
    """Solve, and Residual at a state that is no solution, with where to differentiate them."""
    return [
        (case.solve, leaves(case)),
        (case.residual, [(0.3 * case.weights[-1]).requires_grad_(), *leaves(case)]),
    ]


@every_case
def test_gradgradcheck(build: Callable[[MPI.Comm], Case]) -> None:
    """Reverse over reverse, and forward over reverse."""
    case = build(MPI.COMM_SELF)
    for operator, inputs in operators(case):
        check = {"fast_mode": True, "check_fwd_over_rev": True}
        assert torch.autograd.gradgradcheck(operator, inputs, **check)


@every_case
def test_forward_mode(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(MPI.COMM_SELF)
    for operator, inputs in operators(case):
        check = {"fast_mode": True, "check_forward_ad": True, "check_backward_ad": False}
        assert torch.autograd.gradcheck(operator, inputs, **check)


@pytest.mark.mpi
@every_case
def test_tangent_is_the_adjoint_of_the_gradient(build: Callable[[MPI.Comm], Case]) -> None:
    """<w, du(v)> = <du^T w, v>, on any number of ranks."""
    case = build(COMM)
    solve, w = case.solve, case.weights[-1]
    inputs = leaves(case)
    _, moved = torch.func.jvp(solve, tuple(case.values), tuple(directions_of(case)))
    gradients = torch.autograd.grad(solve(*inputs), inputs, grad_outputs=w)
    left = float(fem_vi.all_sum((moved * w).sum(), COMM))
    right = sum(paired(COMM, list(gradients), directions_of(case), fields_of(case)))
    assert left == pytest.approx(right, rel=1e-10, abs=1e-11)


def hessian_product(case: Case, solve: fem_vi.Solve, comm: MPI.Comm) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    inputs = leaves(case)
    loss = loss_of(case, solve(*inputs), comm)
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    is_field = fields_of(case)
    slopes = [
        fem_vi.all_sum((g * v).sum(), comm) if field else (g * v).sum()
        for g, v, field in zip(gradients, directions_of(case), is_field, strict=True)
    ]
    return loss, list(gradients), list(torch.autograd.grad(sum(slopes), inputs))


@pytest.mark.mpi
@every_case
def test_taylor_remainder_is_third_order(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(COMM)
    solve = case.solve
    loss, gradients, products = hessian_product(case, solve, COMM)
    slope = sum(paired(COMM, gradients, directions_of(case), fields_of(case)))
    bend = sum(paired(COMM, products, directions_of(case), fields_of(case)))
    remainders = []
    for step in (4e-2, 2e-2, 1e-2):
        moved = [x.detach() + step * w for x, w in zip(case.values, directions_of(case), strict=True)]
        ahead = float(loss_of(case, solve(*moved), COMM))
        remainders.append(abs(ahead - float(loss.detach()) - step * slope - 0.5 * step**2 * bend))
    if max(remainders) < 1e-11:
        return  # the loss is quadratic along this line, to rounding: the expansion is exact
    rates = np.log2(np.array(remainders[:-1]) / np.array(remainders[1:]))
    assert np.all(rates > 2.8), (remainders, rates)


@pytest.mark.mpi
@every_case
def test_any_number_of_ranks_gives_the_same_hessian_product(build: Callable[[MPI.Comm], Case]) -> None:
    numbers = []
    for comm in (COMM, MPI.COMM_SELF):
        case = build(comm)
        _, _, products = hessian_product(case, case.solve, comm)
        numbers.append(paired(comm, products, directions_of(case), fields_of(case)))
    assert np.allclose(numbers[0], numbers[1], rtol=1e-8, atol=1e-10)


@every_case
def test_vmap_is_a_batch(build: Callable[[MPI.Comm], Case]) -> None:
    """vmap over the first input, over the gradient, and with the axis at the end; two levels of vmap."""
    case = build(MPI.COMM_SELF)
    scales = torch.linspace(0.8, 1.1, 6, dtype=torch.float64)
    first, *rest = case.values
    varied = scales.reshape(6, *[1] * first.ndim) * first
    for operator, inputs in operators(case):
        state = [x.detach() for x in inputs[: len(inputs) - len(case.values)]]

        def f(x: Tensor, operator: Callable[..., Tensor] = operator, state: list[Tensor] = state) -> Tensor:
            return operator(*state, x, *rest)

        def gradient(x: Tensor, f: Callable[[Tensor], Tensor] = f) -> Tensor:
            return torch.func.grad(lambda y: f(y).square().sum())(x)

        expected = torch.stack([f(x) for x in varied])
        assert torch.allclose(torch.func.vmap(f)(varied), expected, rtol=1e-10, atol=1e-12)
        assert torch.allclose(
            torch.func.vmap(f, in_dims=-1, out_dims=1)(varied.movedim(0, -1)), expected.T, rtol=1e-10, atol=1e-12
        )
        two = torch.func.vmap(torch.func.vmap(f))(varied.reshape(2, 3, *first.shape))
        assert torch.allclose(two.reshape(expected.shape), expected, rtol=1e-10, atol=1e-12)
        gradients = torch.stack([gradient(x) for x in varied])
        assert torch.allclose(torch.func.vmap(gradient)(varied), gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["log_diffusion", "reaction"])
def test_jacobians_and_hessians(name: str) -> None:
    case = CASES[name](MPI.COMM_SELF)
    solve = case.solve
    first, *rest = case.values

    def f(x: Tensor) -> Tensor:
        return solve(x, *rest)

    def loss(x: Tensor) -> Tensor:
        return loss_of(case, f(x), MPI.COMM_SELF)

    before = solve.num_factorisations
    reverse = torch.func.jacrev(f)(first)
    assert solve.num_factorisations - before <= 2, "one factorisation for all rows"
    assert torch.allclose(reverse, torch.func.jacfwd(f)(first), rtol=1e-9, atol=1e-12)
    step = 1e-5
    column = (f(first + step * torch.eye(first.numel())[3]) - f(first - step * torch.eye(first.numel())[3])) / (2 * step)
    assert torch.allclose(reverse[:, 3], column, rtol=1e-6, atol=1e-9)
    forward_over_reverse = torch.func.hessian(loss)(first)
    reverse_over_reverse = torch.func.jacrev(torch.func.jacrev(loss))(first)
    assert torch.allclose(forward_over_reverse, reverse_over_reverse, rtol=1e-8, atol=1e-10)
    assert torch.allclose(forward_over_reverse, forward_over_reverse.T, rtol=1e-8, atol=1e-10)
    reverse_over_forward = torch.func.jacrev(torch.func.jacfwd(loss))(first)
    assert torch.allclose(forward_over_reverse, reverse_over_forward, rtol=1e-8, atol=1e-10)


def test_batched_hessian_product_is_sample_by_sample() -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    solve = fem_vi.Solve(case.pde)
    m = torch.linspace(0.7, 1.2, 4, dtype=torch.float64)[:, None] * case.values[0]
    v = torch.linspace(1.0, -1.0, 4, dtype=torch.float64)[:, None] * case.weights[0]

    def product(x: Tensor, direction: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(case, solve(x), MPI.COMM_SELF).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad((g * direction).sum(), x)
        return h

    alone = torch.stack([product(x, d) for x, d in zip(m, v, strict=True)])
    assert torch.allclose(product(m, v), alone, rtol=1e-9, atol=1e-12)


def test_a_hessian_product_costs_two_solves_and_no_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    solve = fem_vi.Solve(case.pde)
    (m,) = leaves(case)
    (g,) = torch.autograd.grad(loss_of(case, solve(m), MPI.COMM_SELF), m, create_graph=True)
    solves = count_solves(monkeypatch)
    factorisations = solve.num_factorisations
    for scale in (1.0, 2.0):
        torch.autograd.grad((g * scale * case.weights[0]).sum(), m, retain_graph=True)
    assert len(solves) == 4
    assert solve.num_factorisations == factorisations


def test_a_gauss_newton_product_costs_two_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    solve = fem_vi.Solve(case.pde)
    (m,) = leaves(case)
    u = solve(m)
    solves = count_solves(monkeypatch)
    factorisations = solve.num_factorisations
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(m.detach(), case.weights[0])
        moved = forward_ad.unpack_dual(solve(dual)).tangent
    assert len(solves) == 2, "the state once more, and the tangent"
    (product,) = torch.autograd.grad(u, m, grad_outputs=moved)
    assert len(solves) == 3
    assert solve.num_factorisations == factorisations
    jacobian = torch.func.jacrev(solve)(m.detach())
    assert torch.allclose(product, jacobian.T @ (jacobian @ case.weights[0]), rtol=1e-9)


def count_solves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from fem_vi.pde.factors import Factor

    solves: list[int] = []
    plain = Factor.solve

    def counted(self: Factor, b: np.ndarray, *, transposed: bool) -> np.ndarray:
        solves.append(1)
        return plain(self, b, transposed=transposed)

    monkeypatch.setattr(Factor, "solve", counted)
    return solves


@pytest.mark.mpi
def test_functional_to_second_order() -> None:
    case = CASES["reaction"](COMM)
    u, m = case.state, case.given[0]
    tensor = case.given[2]
    form = ufl.exp(m) * ufl.inner(ufl.dot(tensor, ufl.grad(u)), ufl.grad(u)) ** 2 * ufl.dx + ufl.det(tensor) * u**3 * ufl.ds
    J = fem_vi.Functional(form, [u, m, tensor])
    values = [case.weights[-1], case.values[0], case.values[2]]
    inputs = [x.clone().requires_grad_() for x in values]
    directions = [case.weights[-1], case.weights[0], case.weights[2]]
    fields = [True, True, False]
    if COMM.size == 1:
        assert torch.autograd.gradgradcheck(J, inputs, fast_mode=True, check_fwd_over_rev=True)
        assert torch.autograd.gradcheck(J, inputs, fast_mode=True, check_forward_ad=True)
    value = J(*inputs)
    gradients = torch.autograd.grad(value, inputs, create_graph=True)
    slopes = [
        fem_vi.all_sum((g * v).sum(), COMM) if field else (g * v).sum()
        for g, v, field in zip(gradients, directions, fields, strict=True)
    ]
    slope = sum(float(s.detach()) for s in slopes)
    _, tangent = torch.func.jvp(J, tuple(x.detach() for x in inputs), tuple(directions))
    assert float(tangent) == pytest.approx(slope, rel=1e-10)
    bend = sum(paired(COMM, list(torch.autograd.grad(sum(slopes), inputs)), directions, fields))
    remainders = []
    for step in (4e-2, 2e-2, 1e-2):
        ahead = float(J(*[x.detach() + step * d for x, d in zip(inputs, directions, strict=True)]))
        remainders.append(abs(ahead - float(value.detach()) - step * slope - 0.5 * step**2 * bend))
    rates = np.log2(np.array(remainders[:-1]) / np.array(remainders[1:]))
    assert np.all(rates > 2.8), (remainders, rates)


@pytest.mark.parametrize("allow_unused", [False, True])
def test_third_derivatives_are_refused(allow_unused: bool) -> None:
    """Refused even where torch is told to take what is missing in the graph for zero."""
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    (m,) = leaves(case)
    (g,) = torch.autograd.grad(fem_vi.Solve(case.pde)(m).square().sum(), m, create_graph=True)
    (h,) = torch.autograd.grad((g * case.weights[0]).sum(), m, create_graph=True)
    with pytest.raises(fem_vi.UnsupportedDerivative, match="second"):
        torch.autograd.grad(h.sum(), m, allow_unused=allow_unused)


def test_forward_over_forward_is_refused() -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    solve = fem_vi.Solve(case.pde)
    with pytest.raises(fem_vi.UnsupportedDerivative):
        torch.func.jacfwd(torch.func.jacfwd(lambda m: solve(m).sum()))(case.values[0])


@pytest.mark.mpi
def test_checkpointing_a_network_around_a_solve() -> None:
    case = CASES["log_diffusion"](COMM)
    solve = fem_vi.Solve(case.pde)
    wanted, got = [], []
    for out, wrap in (
        (wanted, lambda f, x: f(x)),
        (got, lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)),
    ):
        (m,) = leaves(case)
        out.append(torch.autograd.grad(loss_of(case, wrap(lambda x: solve(x.tanh()), m), COMM), m)[0])
    assert torch.equal(wanted[0], got[0]) or torch.allclose(wanted[0], got[0], rtol=1e-12)


@pytest.mark.mpi
def test_vmap_and_hessian_on_any_number_of_ranks() -> None:
    """Crossings between owned and replicated tensors too: latents -> field -> state -> data -> loss."""
    numbers = []
    for comm in (COMM, MPI.COMM_SELF):
        loss = loss_of_latents(comm)
        z = torch.tensor([0.9, 0.2], dtype=torch.float64)
        hessian = torch.func.hessian(loss)(z)
        assert torch.allclose(hessian, hessian.T, rtol=1e-9, atol=1e-13)
        batch = torch.func.vmap(torch.func.grad(loss))(torch.stack([z, 0.5 * z]))
        numbers.append(torch.cat([hessian.ravel(), batch.ravel()]))
    assert torch.allclose(numbers[0], numbers[1], rtol=1e-9, atol=1e-13)


def loss_of_latents(comm: MPI.Comm) -> Callable[[Tensor], Tensor]:
    case = CASES["log_diffusion"](comm)
    solve = fem_vi.Solve(case.pde)
    observe = fem_vi.PointObservation(case.state.function_space, [[0.3, 0.4], [0.7, 0.6]])

    def loss(z: Tensor) -> Tensor:
        z = fem_vi.localise(z, comm)
        return observe(solve(z[0] * case.values[0] + z[1] * case.weights[0])).square().sum()

    return loss


def test_prior_is_differentiable_twice_and_vmaps() -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    prior = fem_vi.MaternField(case.state.function_space, std=1.0, length=0.3)
    x = case.values[0].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(prior.log_prob, x, fast_mode=True)
    batch = torch.stack([x.detach(), 2 * x.detach()])
    assert torch.allclose(torch.func.vmap(prior.log_prob)(batch), prior.log_prob(batch))
    precision = -torch.func.hessian(prior.log_prob)(x.detach())
    root = torch.func.jacrev(prior.whiten)(x.detach())
    assert torch.allclose(precision, root.T @ root, rtol=1e-9, atol=1e-9)


def test_constant_inputs_of_a_form_keep_their_second_derivative() -> None:
    """A Constant that enters by a nonlinear function, together with a field."""
    msh = CASES["log_diffusion"](MPI.COMM_SELF).state.function_space.mesh
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v, c = fem.Function(V), fem.Function(V), ufl.TestFunction(V), fem.Constant(msh, 0.0)
    F = ufl.exp(c * m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + u * v * ufl.dx - ufl.sin(c) * v * ufl.dx
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[m, c]))
    m0 = torch.linspace(-1, 1, V.dofmap.index_map.size_local, dtype=torch.float64).requires_grad_()
    c0 = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(solve, (m0, c0), fast_mode=True, check_fwd_over_rev=True)


def test_tracing_is_refused() -> None:
    """The trace would hold the solution as a constant."""
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    solve, m = fem_vi.Solve(case.pde), case.values[0]
    for trace in (lambda: torch.func.linearize(solve, m), lambda: make_fx(solve)(m)):
        with pytest.raises(fem_vi.UnsupportedDerivative, match="traced"):
            trace()


def test_batched_cotangents_of_autograd_are_refused() -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    m = case.values[0].clone().requires_grad_()
    u = fem_vi.Solve(case.pde)(m)
    cotangents = torch.eye(u.numel(), dtype=torch.float64)
    with pytest.raises(fem_vi.UnsupportedDerivative, match=r"is_grads_batched.*jacrev"):
        torch.autograd.grad(u, m, cotangents, is_grads_batched=True)


def test_saved_tensors_may_be_packed() -> None:
    """The backward reads what torch hands back, not the memory of the caller's tensor."""
    case = CASES["source_and_data"](MPI.COMM_SELF)
    form = CASES["log_diffusion"](MPI.COMM_SELF)
    for each in (case, form):
        solve = fem_vi.Solve(each.pde)
        expected = torch.autograd.grad(solve(*(inputs := leaves(each))).square().sum(), inputs)
        inputs = leaves(each)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            copies = [x.clone() for x in inputs]
            u = solve(*copies)
            loss = u.square().sum()
        with torch.no_grad():
            for x in copies:
                x.add_(1.0)
        for a, b in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.mpi
@pytest.mark.skipif(COMM.size == 1, reason="one rank cannot differ from another")
def test_lanes_that_differ_between_ranks_are_refused() -> None:
    """As `torch.func.jacfwd` of a field tensor makes them, where ranks own parts of different lengths."""
    case = CASES["log_diffusion"](COMM)
    solve, (m,) = fem_vi.Solve(case.pde), case.values
    lanes = torch.ones(2 + COMM.rank, m.numel(), dtype=torch.float64)
    with pytest.raises(fem_vi.InvalidInput, match=r"differ between ranks.*jacfwd"):
        torch.func.vmap(lambda v: torch.func.jvp(solve, (m,), (v,))[1])(lanes)
