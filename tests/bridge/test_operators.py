"""One recipe for every operator over every weak form: right gradients, saved per call, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dolfinx
import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.helpers import CASES, Case, boundary_dofs, everywhere, interpolated, left, paired, square

COMM = MPI.COMM_WORLD
every_case = pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())


def leaves(case: Case, *, scale: float = 1.0) -> list[Tensor]:
    return [(scale * x).clone().requires_grad_() for x in case.values]


def fields_of(case: Case) -> list[bool]:
    return [given.is_field for given in case.pde.inputs]


def loss_of(case: Case, u: Tensor, comm: MPI.Comm) -> Tensor:
    """A nonlinear, replicated function of the state; of w u, as the sign of a facet's dof depends on the partition."""
    product = case.weights[-1] * u
    return fem_vi.all_sum((product + 0.5 * product.square()).sum(-1), comm)


@every_case
def test_gradcheck_of_solve(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(MPI.COMM_SELF)
    assert torch.autograd.gradcheck(case.solve, leaves(case), fast_mode=True)


@every_case
def test_gradcheck_of_residual(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(MPI.COMM_SELF)
    u = (0.3 * case.weights[-1]).clone().requires_grad_()
    assert torch.autograd.gradcheck(case.residual, [u, *leaves(case)], fast_mode=True)


@pytest.mark.mpi
@every_case
def test_residual_of_the_solution_is_zero(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(COMM)
    u = case.solve(*case.values)
    r = case.residual(u, *case.values)
    assert float(r.abs().max()) < 1e-10
    assert float(fem_vi.all_sum(u.abs().sum(), COMM)) > 1e-3


@pytest.mark.mpi
@every_case
def test_taylor_remainder_is_second_order(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(COMM)
    solve = case.solve
    inputs = leaves(case)
    start = loss_of(case, solve(*inputs), COMM)
    gradients = torch.autograd.grad(start, inputs)
    slope = sum(paired(COMM, list(gradients), case.weights[:-1], fields_of(case)))
    remainders = []
    for step in (2e-2, 1e-2, 5e-3):
        moved = [x.detach() + step * w for x, w in zip(inputs, case.weights[:-1], strict=True)]
        remainders.append(abs(float(loss_of(case, solve(*moved), COMM)) - float(start.detach()) - step * slope))
    rates = np.log2(np.array(remainders[:-1]) / np.array(remainders[1:]))
    assert np.all(rates > 1.9), (remainders, rates)


@pytest.mark.mpi
@every_case
def test_any_number_of_ranks_gives_the_same(build: Callable[[MPI.Comm], Case]) -> None:
    numbers = []
    for comm in (COMM, MPI.COMM_SELF):
        case = build(comm)
        inputs = leaves(case)
        u = case.solve(*inputs)
        loss = loss_of(case, u, comm)
        gradients = torch.autograd.grad(loss, inputs)
        numbers.append([float(loss.detach()), *paired(comm, list(gradients), case.weights[:-1], fields_of(case))])
    assert np.allclose(numbers[0], numbers[1], rtol=1e-9, atol=1e-11)


@pytest.mark.mpi
@every_case
def test_adjoint_of_residual(build: Callable[[MPI.Comm], Case]) -> None:
    """<J v, w> = <v, J' w> with J v by central differences, for state and inputs together."""
    case = build(COMM)
    residual = case.residual
    u = 0.3 * case.weights[-1]
    at = [u.clone().requires_grad_(), *leaves(case)]
    directions = [case.weights[-1], *case.weights[:-1]]
    w = case.weights[-1].flip(0) if COMM.size == 1 else case.weights[-1]
    step = 1e-5
    ahead, behind = (residual(*[x.detach() + s * d for x, d in zip(at, directions, strict=True)]) for s in (step, -step))
    left = float(fem_vi.all_sum(((ahead - behind) / (2 * step) * w).sum(), COMM))
    gradients = torch.autograd.grad(residual(*at), at, grad_outputs=w)
    right = sum(paired(COMM, list(gradients), directions, [True, *fields_of(case)]))
    assert left == pytest.approx(right, rel=1e-7, abs=1e-8)


@pytest.mark.mpi
@every_case
def test_two_forwards_before_two_backwards(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(COMM)
    solve, residual = case.solve, case.residual
    for operator in (lambda x: solve(*x), lambda x: residual(0.3 * case.weights[-1], *x)):
        alone = []
        for scale in (1.0, 0.8):
            inputs = leaves(case, scale=scale)
            alone.append(torch.autograd.grad(loss_of(case, operator(inputs), COMM), inputs))
        first, second = leaves(case), leaves(case, scale=0.8)
        losses = [loss_of(case, operator(x), COMM) for x in (first, second)]
        together = [torch.autograd.grad(loss, x) for loss, x in zip(losses, (first, second), strict=True)]
        for expected, got in zip(alone, together, strict=True):
            for a, b in zip(expected, got, strict=True):
                assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@every_case
def test_functions_of_the_caller_are_not_written_to(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(MPI.COMM_SELF)
    everything = [case.state, *case.given]
    before = [np.array(x.x.array if hasattr(x, "x") else x.value) for x in everything]
    inputs = leaves(case)
    u = fem_vi.Solve(case.pde)(*inputs)
    (fem_vi.Residual(case.pde)(u, *inputs).sum() + u.sum()).backward()
    for x, old in zip(everything, before, strict=True):
        assert np.array_equal(x.x.array if hasattr(x, "x") else x.value, old)


@every_case
def test_nothing_is_compiled_or_created_again(build: Callable[[MPI.Comm], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(MPI.COMM_SELF)
    solve, residual = fem_vi.Solve(case.pde), fem_vi.Residual(case.pde)

    def run() -> None:
        inputs = leaves(case)
        u = solve(*inputs)
        (residual(u, *inputs).square().sum() + u.sum()).backward()

    run()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("built in a call")

    for module, name in (
        (dolfinx.fem, "form"),
        (dolfinx.jit, "ffcx_jit"),
        (dolfinx.fem.petsc, "create_matrix"),
        (dolfinx.fem, "Function"),
        (dolfinx.la, "vector"),
    ):
        monkeypatch.setattr(module, name, refuse)
    run()


@every_case
def test_batches_are_loops(build: Callable[[MPI.Comm], Case]) -> None:
    """Batch axes of any number, one input unbatched: the same as sample by sample, gradients summed where broadcast."""
    case = build(MPI.COMM_SELF)
    solve = case.solve
    first, *rest = case.values
    scales = torch.linspace(0.7, 1.1, 6, dtype=torch.float64).reshape(2, 3)
    varied = scales.reshape(2, 3, *[1] * first.ndim) * first
    batched = [varied.requires_grad_(), *[x.clone().requires_grad_() for x in rest]]
    u = solve(*batched)
    assert u.shape == (2, 3, case.weights[-1].numel())
    gradients = torch.autograd.grad(loss_of(case, u, MPI.COMM_SELF).sum(), batched)
    sums = [torch.zeros_like(x) for x in rest]
    for i in range(2):
        for j in range(3):
            inputs = [batched[0][i, j].detach().clone().requires_grad_(), *[x.clone().requires_grad_() for x in rest]]
            one = solve(*inputs)
            assert torch.allclose(one, u[i, j], rtol=1e-12, atol=1e-13)
            single = torch.autograd.grad(loss_of(case, one, MPI.COMM_SELF), inputs)
            assert torch.allclose(single[0], gradients[0][i, j], rtol=1e-9, atol=1e-12)
            for total, part in zip(sums, single[1:], strict=True):
                total += part
    for total, gradient in zip(sums, gradients[1:], strict=True):
        assert torch.allclose(total, gradient, rtol=1e-9, atol=1e-11)


def test_backward_twice_through_a_kept_graph() -> None:
    case = CASES["reaction"](MPI.COMM_SELF)
    inputs = leaves(case)
    loss = fem_vi.Solve(case.pde, factor_budget=0)(*inputs).square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.allclose(a, b) for a, b in zip(first, second, strict=True))


def test_single_precision_is_cast_and_gets_its_gradient_back() -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    solve = fem_vi.Solve(case.pde)
    m = case.values[0].to(torch.float32).requires_grad_()
    u = solve(m)
    assert u.dtype == torch.float64
    u.sum().backward()
    assert m.grad is not None
    assert m.grad.dtype == torch.float32
    exact = m.detach().to(torch.float64).requires_grad_()
    solve(exact).sum().backward()
    assert torch.allclose(m.grad.to(torch.float64), exact.grad, rtol=1e-6)


def test_factors_are_kept_within_the_budget_and_rebuilt_beyond_it() -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    gradients = []
    for budget, expected in ((2**30, 5), (0, 9)):
        solve = fem_vi.Solve(case.pde, factor_budget=budget)
        m = (torch.linspace(0.5, 1.5, 5, dtype=torch.float64)[:, None] * case.values[0]).requires_grad_()
        u = solve(m)
        assert solve.num_factorisations == 5
        (g,) = torch.autograd.grad(u.square().sum(), m)
        assert solve.num_factorisations == expected, "5 in the forward; with room for one only, 4 of them again in the backward"
        gradients.append(g)
    assert torch.equal(*gradients) or torch.allclose(*gradients, rtol=1e-12)


def test_operator_without_inputs_is_factorised_once() -> None:
    case = CASES["source_and_data"](MPI.COMM_SELF)
    solve = fem_vi.Solve(case.pde)
    for _ in range(3):
        inputs = leaves(case)
        inputs[0] = (torch.ones(4, 1, dtype=torch.float64) * case.values[0]).requires_grad_()
        solve(*inputs).sum().backward()
    assert solve.num_factorisations == 1


DEFINITE = {"log_diffusion", "source_and_data", "elasticity", "discontinuous", "hyperelasticity"}
SYMMETRIC = DEFINITE | {"stokes", "mixed_poisson", "helmholtz"}
METHODS: list[tuple[dict[str, str], set[str]]] = [  # and the cases whose Jacobians they are made for
    ({"ksp_type": "cg", "pc_type": "hypre"}, DEFINITE),
    ({"ksp_type": "cg", "pc_type": "gamg"}, DEFINITE),
    ({"ksp_type": "gmres", "pc_type": "hypre"}, DEFINITE | {"reaction"}),
    ({"ksp_type": "bcgs", "pc_type": "jacobi"}, DEFINITE | {"reaction"}),
    ({"ksp_type": "minres", "pc_type": "jacobi"}, SYMMETRIC),
    ({"pc_type": "cholesky"}, SYMMETRIC),
]


ON_RANKS = {"log_diffusion", "reaction", "helmholtz"}


@pytest.mark.parametrize(("options", "made_for"), METHODS, ids=["-".join(options.values()) for options, _ in METHODS])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.mpi] if name in ON_RANKS else []) for name in CASES])
def test_other_solvers_give_the_gradient_of_the_default_one(name: str, options: dict[str, str], made_for: set[str]) -> None:
    """A method may refuse a matrix that it is not made for, and may not answer wrongly.

    BoomerAMG applied transposed, and Cholesky without symmetry, answer wrongly and say that they converged.
    """
    case = CASES[name](COMM)
    wanted, got = [], []
    for out, petsc_options in ((wanted, {}), (got, options)):
        inputs = leaves(case)
        solve = fem_vi.Solve(case.pde, petsc_options=petsc_options) if petsc_options else case.solve
        try:
            out += torch.autograd.grad(loss_of(case, solve(*inputs), COMM), inputs)
        except fem_vi.SolveFailed:
            assert petsc_options and name not in made_for
            return
    for a, b in zip(wanted, got, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.mpi
@pytest.mark.parametrize("what", ["Solve", "Residual"])
def test_a_condition_may_list_a_dof_twice(what: str) -> None:
    """A corner belongs to two sides; its gradient counts once."""
    msh = square(COMM)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, h, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
    sides = [boundary_dofs(V, left), boundary_dofs(V, lambda x: np.isclose(x[1], 0.0))]
    gradients = []
    for dofs in (np.sort(np.concatenate(sides)), np.unique(np.concatenate(sides))):
        pde = fem_vi.WeakForm(F, state=u, inputs=[h], bcs=[fem.dirichletbc(h, dofs)])
        at = interpolated(V, 1.0, 0.4).requires_grad_()
        out = fem_vi.Solve(pde)(at) if what == "Solve" else fem_vi.Residual(pde)(interpolated(V, 1.0, 0.1), at)
        gradients += torch.autograd.grad(fem_vi.all_sum(out.square().sum(), COMM), at)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("switch", ["input", "sign", "state"])
def test_conditions_on_inputs_and_states(switch: str) -> None:
    """A form is not affine in what it asks a condition of, though the derivative does not see it."""
    msh = square(MPI.COMM_SELF)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    source = {
        "input": ufl.conditional(ufl.gt(m, 0.1), 5.0, 0.0) + m,
        "sign": ufl.sign(m) + m,
        "state": m - ufl.conditional(ufl.gt(u, 50.0), 5.0, 0.0),
    }[switch]
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - source * v * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)])
    assert pde.is_linear == (switch != "state")
    at = interpolated(V, 1.0, 0.2)
    solve, residual = fem_vi.Solve(pde), fem_vi.Residual(pde)
    assert float(residual(solve(at), at).abs().max()) < 1e-12
    at.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: solve(x).sum(), at, eps=1e-7, atol=1e-6)
