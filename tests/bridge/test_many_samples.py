"""Batches of many samples with Jacobians of their own: what is compiled for them gives the numbers of one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import ufl
from dolfinx import fem
from mpi4py import MPI
from torch import Tensor

import fem_vi
from fem_vi.errors import CompilerFailed
from fem_vi.pde import batch_form, sample_kernels
from fem_vi.pde.sample_kernels import BatchedJacobians, LoadedJacobians
from tests.benchmarks import bench_step
from tests.helpers import CASES, Case, boundary_dofs, everywhere, interpolated, left, square
from tests.kernel_forms import samples

COMM = MPI.COMM_WORLD
AGREE = 1e-12
# Linear, nonlinear, blocks, mixed spaces, dofs that change sign; values on the boundary, Constants, fields. Mesh coordinates and
# matrices with inner facets are left to DOLFINx.
NAMES = ["log_diffusion", "reaction", "elasticity", "stokes", "mixed_poisson", "discontinuous", "moving_mesh"]
ON_RANKS = ["log_diffusion", "reaction", "stokes"]

Numbers = list[Tensor]


def numbers(solve: fem_vi.Solve, at: list[Tensor], weight: Tensor) -> Numbers:
    """States, and the gradients of a function of them."""
    leaves = [x.clone().requires_grad_() for x in at]
    u = solve(*leaves)
    scale = torch.linspace(1.0, 0.4, u.shape[0], dtype=torch.float64).reshape(-1, *[1] * (u.ndim - 1))
    gradients = torch.autograd.grad(u, leaves, scale * weight + 0.1 * u.detach())
    return [u.detach(), *gradients]


def one_after_another(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Numbers]) -> Numbers:
    with monkeypatch.context() as patch:
        patch.setattr(sample_kernels, "FEW", 1000)
        return work()


def apart(a: Numbers, b: Numbers, comm: MPI.Comm) -> float:
    """The largest difference relative to the largest number of its kind, over all ranks; infinite where there is a NaN."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        mine = float((x - y).abs().nan_to_num(nan=float("inf")).max()) if x.numel() else 0.0
        size = comm.allreduce(float(y.abs().max()) if y.numel() else 0.0, op=MPI.MAX)
        worst = max(worst, comm.allreduce(mine, op=MPI.MAX) / size)
    return worst


def agree(case: Case, comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> fem_vi.Solve:
    at = samples(case, 9)[1:]
    solve = fem_vi.Solve(case.pde, **settings)
    found = numbers(solve, at, case.weights[-1])
    expected = one_after_another(monkeypatch, lambda: numbers(fem_vi.Solve(case.pde, **settings), at, case.weights[-1]))
    assert apart(found, expected, comm) < AGREE
    return solve


@pytest.mark.parametrize("name", NAMES)
def test_many_samples_are_as_one_after_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agree(CASES[name](MPI.COMM_SELF), MPI.COMM_SELF, monkeypatch)


@pytest.mark.mpi
@pytest.mark.skipif(COMM.size == 1, reason="the test above has it on one rank")
@pytest.mark.parametrize("name", ON_RANKS)
def test_many_samples_are_as_one_after_another_on_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agree(CASES[name](COMM), COMM, monkeypatch)


def lifted(comm: MPI.Comm) -> tuple[fem_vi.WeakForm, Any]:
    """-div(exp(m) grad u) + f^2 u = f^2, u = h on one side: right-hand sides that need a 1-form for each sample."""
    V = fem.functionspace(square(comm), ("Lagrange", 1))
    u, v, m, f, h = (fem.Function(V) for _ in range(5))
    v = ufl.TestFunction(V)
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + f**2 * (u - 1) * v * ufl.dx
    return fem_vi.WeakForm(F, state=u, inputs=[m, f, h], bcs=[fem.dirichletbc(h, boundary_dofs(V, left))]), V


@pytest.mark.mpi
def test_samples_share_inputs_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch axes that broadcast, one input that all share, and groups of samples that share a Jacobian."""
    pde, V = lifted(COMM)
    x = interpolated(V, 0.5, 0.3)
    scale = torch.linspace(0.5, 1.0, 5, dtype=torch.float64)
    at = [scale.reshape(5, 1, 1) * x, 1.0 + scale[:2, None] * x, 2.0 - x]
    alone = torch.stack([x, 2 * x, x, 3 * x, x, 4 * x, x, 5 * x, x, 6 * x])
    for inputs in (at, [alone, 1.0 + x, at[2] * torch.linspace(1.0, 2.0, 10, dtype=torch.float64)[:, None]]):
        found = numbers(fem_vi.Solve(pde), inputs, x)
        expected = one_after_another(monkeypatch, lambda inputs=inputs: numbers(fem_vi.Solve(pde), inputs, x))  # type: ignore[misc]
        assert apart(found, expected, COMM) < AGREE
    solve = fem_vi.Solve(pde)
    together = solve(*at)
    for k in range(5):
        for j in range(2):
            assert apart([together[k, j]], [solve(at[0][k, 0], at[1][j], at[2])], COMM) < AGREE


@pytest.mark.parametrize("budget", [0, 2**30])
def test_factors_that_were_let_go_are_built_again_from_the_same_matrices(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples than are evaluated at once, forward and backward."""
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    scale = torch.linspace(-1.0, 1.0, 21, dtype=torch.float64)[:, None]
    solve = fem_vi.Solve(case.pde, factor_budget=budget)
    expected = one_after_another(monkeypatch, lambda: numbers(fem_vi.Solve(case.pde), [scale * case.values[0]], case.weights[-1]))
    assert apart(numbers(solve, [scale * case.values[0]], case.weights[-1]), expected, MPI.COMM_SELF) < AGREE
    assert solve.num_factorisations == (41 if budget == 0 else 21)  # the one used last is kept


def test_nothing_is_compiled_for_a_few_samples_nor_again_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    created: list[Any] = []
    plain = batch_form.load_library
    monkeypatch.setattr(batch_form, "load_library", lambda *given: (created.append(given[0]), plain(*given))[1])
    solve = fem_vi.Solve(case.pde)
    few = samples(case, sample_kernels.FEW)[1:]
    numbers(solve, few, case.weights[-1])
    assert not created
    for _ in range(2):
        numbers(solve, samples(case, sample_kernels.FEW + 1)[1:], case.weights[-1])
        assert len(created) == 2, "the matrix and the gradient; the right-hand side is the same for all"


def test_a_machine_without_a_compiler_takes_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise CompilerFailed("there is none")

    case = CASES["stokes"](MPI.COMM_SELF)
    at, weight = samples(case, 6)[1:], case.weights[-1]
    expected = one_after_another(monkeypatch, lambda: numbers(fem_vi.Solve(case.pde), at, weight))
    monkeypatch.setattr(batch_form, "load_library", fail)
    with pytest.warns(UserWarning, match="one after another, which takes longer: there is none"):
        found = numbers(fem_vi.Solve(case.pde), at, weight)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_evaluated_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jacobians on one rank without inner facets, and all gradients: the tests above do not compare one path with itself."""
    jacobians: list[type] = []
    gradients: list[bool] = []
    plain, adding = sample_kernels.SampleKernels.jacobians, sample_kernels.SampleKernels.add_implicit
    monkeypatch.setattr(
        sample_kernels.SampleKernels, "jacobians", lambda *given: (found := plain(*given), jacobians.append(type(found)))[0]
    )
    monkeypatch.setattr(
        sample_kernels.SampleKernels, "add_implicit", lambda *given: (added := adding(*given), gradients.append(added))[0]
    )
    case = CASES[name](MPI.COMM_SELF)
    numbers(fem_vi.Solve(case.pde), samples(case, 6)[1:], case.weights[-1])
    assert jacobians[-1] is (LoadedJacobians if name in ("discontinuous", "moving_mesh") else BatchedJacobians)
    assert gradients == [name != "moving_mesh"]


@pytest.mark.long
def test_a_step_of_many_samples_takes_less_time() -> None:
    """0.58 of the CPU time of one sample after another, on eight lanes; most of that goes into factorisations."""
    assert bench_step.bench(rounds=6).ratio < 0.8


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_samples_that_fail_leave_the_others_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    V = fem.functionspace(square(COMM), ("Lagrange", 1))
    u, m, f, v = fem.Function(V), fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = m * (1 if kind == "linear" else 1 + u**2) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - f**2 * v * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[m, f], bcs=[fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)])
    coefficients = torch.stack([1.0 + 0.1 * k + interpolated(V, 0.3, float(k)) for k in range(9)])
    coefficients[[2, 7]] = 0.0
    good = [k for k in range(9) if k not in (2, 7)]

    def masked() -> Numbers:
        at = [coefficients.clone().requires_grad_(), (1.0 + interpolated(V, 0.2, 0.5)).requires_grad_()]
        with pytest.warns(UserWarning, match=r"2 of 9 samples failed and are NaN: \[2, 7\]"):
            out = fem_vi.Solve(pde, failed=fem_vi.MaskFailed())(*at)
        return [out.detach()[good], *torch.autograd.grad(fem_vi.all_sum(out[good].square().sum(), COMM), at)]

    found, expected = masked(), one_after_another(monkeypatch, masked)
    assert apart(found, expected, COMM) < AGREE
