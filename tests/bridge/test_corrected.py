"""Residuals times A0^-1, and in the units of the solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.bridge.test_operators import fields_of, leaves
from tests.helpers import CASES, Case, paired

COMM = MPI.COMM_WORLD
ON_RANKS = {"elasticity"}
NONLINEAR = ["reaction", "navier_stokes", "hyperelasticity"]


def state_of(case: Case) -> Tensor:
    return (0.3 * case.weights[-1]).clone().requires_grad_()


def preconditioned(case: Case) -> fem_vi.PreconditionedResidual:
    state = None if case.pde.is_linear else 0.2 * case.weights[-1]
    return fem_vi.Residual(case.pde).precondition(reference=[0.9 * x for x in case.values], state=state)


def dense_jacobian(case: Case, u: Tensor, inputs: list[Tensor]) -> Tensor:
    return torch.func.jacfwd(lambda u: fem_vi.Residual(case.pde)(u, *inputs))(u.detach())


@pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
def test_preconditioned_is_solved_with_the_dense_jacobian(build: Callable[[MPI.Comm], Case]) -> None:
    """With r_B other than zero: u does not keep the boundary conditions."""
    case = build(MPI.COMM_SELF)
    A0 = dense_jacobian(case, 0.2 * case.weights[-1], [0.9 * x for x in case.values])
    u, inputs = state_of(case), leaves(case)
    batch = (torch.linspace(0.5, 1.5, 3, dtype=torch.float64)[:, None] * u.detach()).requires_grad_()
    r = fem_vi.Residual(case.pde)(batch, *inputs)
    got, expected = preconditioned(case)(batch, *inputs), torch.linalg.solve(A0, r.T).T
    scale = float(expected.detach().abs().max())
    assert torch.allclose(got, expected, rtol=1e-8, atol=1e-10 * scale)
    g = case.weights[-1].expand(3, -1)
    for a, b in zip(
        torch.autograd.grad(got, [batch, *inputs], g), torch.autograd.grad(expected, [batch, *inputs], g), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9 * float(b.abs().max() + 1.0))


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["reaction", "mixed_poisson"])
def test_preconditioned_on_any_number_of_ranks(name: str) -> None:
    """Values, gradients and products of second derivatives."""
    numbers = []
    for comm in (COMM, MPI.COMM_SELF):
        case = CASES[name](comm)
        at, directions = [state_of(case), *leaves(case)], [case.weights[-1], *case.weights[:-1]]
        value = fem_vi.all_sum((case.weights[-1] * preconditioned(case)(*at)).square().sum(), comm)
        gradients = torch.autograd.grad(value, at, create_graph=True)
        is_field = [True, *fields_of(case)]
        slope = sum(
            fem_vi.all_sum((g * d).sum(), comm) if field else (g * d).sum()
            for g, d, field in zip(gradients, directions, is_field, strict=True)
        )
        products = torch.autograd.grad(slope, at)
        numbers.append([float(value.detach()), float(slope.detach()), *paired(comm, list(products), directions, is_field)])
    assert np.allclose(numbers[0], numbers[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["reaction", "source_and_data"])
def test_preconditioned_to_second_order(name: str) -> None:
    case = CASES[name](MPI.COMM_SELF)
    operator, at = preconditioned(case), [state_of(case), *leaves(case)]
    assert torch.autograd.gradcheck(operator, at, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(operator, at, fast_mode=True, check_fwd_over_rev=True)
    batch = torch.stack([at[0].detach(), 0.5 * at[0].detach()])
    together = operator(batch, *case.values)
    assert torch.allclose(torch.func.vmap(lambda u: operator(u, *case.values))(batch), together, rtol=1e-12)


def test_a_preconditioner_is_factorised_once_and_applied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fem_vi.pde.factors import Factor, FactorPool

    case = CASES["log_diffusion"](MPI.COMM_SELF)
    operator, widths = preconditioned(case), []

    def refuse(*args: Any) -> None:
        raise AssertionError("factorised again")

    plain = Factor._solve_block

    def counted(self: Factor, rows: np.ndarray, first: int, transposed: bool) -> Any:
        widths.append(len(rows))
        return plain(self, rows, first, transposed)

    monkeypatch.setattr(FactorPool, "_build", refuse)
    monkeypatch.setattr(Factor, "_solve_block", counted)
    u = (torch.linspace(0.5, 1.5, 20, dtype=torch.float64)[:, None] * case.weights[-1]).requires_grad_()
    operator(u, case.values[0]).square().sum().backward()
    assert widths == [20, 20]


@pytest.mark.mpi
def test_wrong_references_are_refused() -> None:
    case = CASES["reaction"](COMM)
    residual = fem_vi.Residual(case.pde)
    m, *rest = case.values
    with pytest.raises(fem_vi.InvalidInput, match="state=u0"):
        residual.precondition(reference=case.values)
    for wrong, words in (([m], "tensors"), ([m[:-1], *rest], "shape"), ([m.expand(2, -1), *rest], "batch axes")):
        with pytest.raises(fem_vi.InvalidInput, match=words):
            residual.precondition(reference=wrong, state=case.weights[-1])
    operator = residual.precondition(reference=case.values, state=0.2 * case.weights[-1])
    with pytest.raises(fem_vi.InvalidInput, match="apply"):
        operator.apply(torch.zeros(3 + case.weights[-1].numel(), dtype=torch.float64))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.mpi] if name in ON_RANKS else []) for name in CASES if name not in NONLINEAR]
)
def test_linear_residuals_in_solution_units_are_errors_of_the_state(name: str) -> None:
    case = CASES[name](COMM)
    u = state_of(case)
    s = fem_vi.Residual(case.pde).in_solution_units(u, *case.values)
    assert torch.allclose(s, u - fem_vi.Solve(case.pde)(*case.values), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
def test_solution_units_are_solved_with_the_dense_jacobian(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(MPI.COMM_SELF)
    residual, u, inputs = fem_vi.Residual(case.pde), state_of(case), leaves(case)
    s = residual.in_solution_units(u, *inputs)
    r = residual(u, *inputs)
    expected = torch.linalg.solve(dense_jacobian(case, u, [x.detach() for x in inputs]), r.detach())
    assert torch.allclose(s, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [*NONLINEAR, "source_and_data"])
def test_solution_units_to_second_order(name: str) -> None:
    case = CASES[name](MPI.COMM_SELF)
    residual, at = fem_vi.Residual(case.pde), [state_of(case), *leaves(case)]
    assert torch.autograd.gradcheck(residual.in_solution_units, at, fast_mode=True, check_forward_ad=True, atol=1e-4)
    if name == "reaction":
        assert torch.autograd.gradgradcheck(residual.in_solution_units, at, fast_mode=True, atol=1e-4)


@pytest.mark.mpi
def test_solution_units_on_any_number_of_ranks() -> None:
    """Against finite differences, in a batch."""
    numbers = []
    for comm in (COMM, MPI.COMM_SELF):
        case = CASES["reaction"](comm)
        residual, at = fem_vi.Residual(case.pde), [state_of(case), *leaves(case)]

        def loss(u: Tensor, *m: Tensor, case: Case = case, residual: Any = residual, comm: MPI.Comm = comm) -> Tensor:
            batch = torch.stack([u, 0.5 * u])
            return fem_vi.all_sum((case.weights[-1] * residual.in_solution_units(batch, *m)).square().sum(), comm)

        gradients = torch.autograd.grad(loss(*at), at)
        directions = [case.weights[-1], *case.weights[:-1]]
        slopes = paired(comm, list(gradients), directions, [True, *fields_of(case)])
        step = 1e-5
        ahead, behind = (
            float(loss(*[x.detach() + sign * step * d for x, d in zip(at, directions, strict=True)])) for sign in (1, -1)
        )
        assert sum(slopes) == pytest.approx((ahead - behind) / (2 * step), rel=1e-5)
        numbers.append([ahead, *slopes])
    assert np.allclose(numbers[0], numbers[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["log_diffusion", "reaction"])
def test_empty_batches(name: str) -> None:
    case = CASES[name](MPI.COMM_SELF)
    residual, inputs = fem_vi.Residual(case.pde), case.values
    u = torch.empty((0, case.weights[-1].numel()), dtype=torch.float64, requires_grad=True)
    operators = {
        "rows": (lambda: residual(u, *inputs, rows=[1, 2]), (0, 2)),
        "weighted": (lambda: residual.weighted(case.weights[-1], u, *inputs), (0,)),
        "precondition": (lambda: preconditioned(case)(u, *inputs), u.shape),
        "solution units": (lambda: residual.in_solution_units(u, *inputs), u.shape),
        "logdet": (lambda: residual.logdet(u, *inputs), (0,)),
    }
    for what, (evaluate, shape) in operators.items():
        value = evaluate()
        assert value.shape == shape, what
        assert torch.autograd.grad(value.sum(), u)[0].shape == u.shape, what
