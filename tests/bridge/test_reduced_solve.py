"""Reduced models: exact where their modes span the solution, nearest where they do not, and refused where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from fem_vi.errors import InvalidInput, SolveFailed, UnsupportedForm

COMM = MPI.COMM_WORLD
F64 = torch.float64
Form = Callable[[Any, Any, Any], Any]


def diffusion(u: Any, x: Any, v: Any) -> Any:
    return ufl.exp(x) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - 3.0 * v * ufl.dx


def transport(u: Any, x: Any, v: Any) -> Any:
    return diffusion(u, x, v) + 2.0 * u.dx(0) * v * ufl.dx


def reaction(u: Any, x: Any, v: Any) -> Any:
    return diffusion(u, x, v) + u**3 * v * ufl.dx


@dataclass
class Plate:
    """Two by two blocks on four by four squares, with 0.2 on the edge; nine unknown temperatures."""

    comm: MPI.Comm
    form: Form = diffusion

    def __post_init__(self) -> None:
        msh = mesh.create_unit_square(self.comm, 4, 4)
        V, C = fem.functionspace(msh, ("Lagrange", 1)), fem.functionspace(msh, ("DG", 0))
        u, x = fem.Function(V), fem.Function(C)
        msh.topology.create_connectivity(1, 2)
        edge = fem.locate_dofs_topological(V, 1, mesh.exterior_facet_indices(msh.topology))
        form = self.form(u, x, ufl.TestFunction(V))
        self.pde = fem_vi.WeakForm(form, state=u, inputs=[x], bcs=[fem.dirichletbc(0.2, edge, V)])
        self.residual, self.solve = fem_vi.Residual(self.pde), fem_vi.Solve(self.pde)
        self.blocks = fem_vi.PiecewiseConstant(C, fem_vi.Blocks((2, 2)))
        self.observe = fem_vi.PointObservation(V, np.array([[0.3, 0.3], [0.6, 0.3], [0.3, 0.7], [0.7, 0.8], [0.5, 0.5]]))

    def full(self, theta: Tensor) -> Tensor:
        return self.solve(self.blocks(theta))

    def reduced(self, count: int = 16, **choices: Any) -> fem_vi.ReducedSolve:
        theta = parameters(0, count)
        given = {"theta": theta, "features": torch.exp} | choices
        return fem_vi.ReducedSolve(self.residual, self.blocks, self.full(theta), **given)


def parameters(seed: int, count: int) -> Tensor:
    return torch.randn(count, 4, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.mpi
@pytest.mark.parametrize("form", [diffusion, transport])
def test_modes_that_span_everything_give_the_state_and_its_gradient(form: Form) -> None:
    plate = Plate(COMM, form)
    solve = plate.reduced()
    assert solve.rank == 9
    theta = parameters(1, 3).requires_grad_()
    weight = torch.linspace(0.5, 1.5, 5, dtype=F64)
    found, gradients = [], []
    for states in (solve(theta), plate.full(theta)):
        y = plate.observe(states)
        found.append(y.detach())
        gradients.append(torch.autograd.grad((weight * y).sin().sum(), theta)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)


@pytest.mark.mpi
def test_fewer_modes_give_the_nearest_state_in_the_norm_of_the_energy() -> None:
    plate, theta = Plate(COMM), parameters(2, 1)[0]
    exact, errors = plate.full(theta), []

    def energy(e: Tensor) -> float:  # e has zero on the edge: <e, A e> = <e, r(u + e) - r(u)>
        rise = plate.residual(exact + e, plate.blocks(theta)) - plate.residual(exact, plate.blocks(theta))
        return float(fem_vi.all_sum((e * rise).sum(-1), COMM))

    neglected = []
    for rank in (1, 2, 4, 6):
        solve = plate.reduced(rank=rank)
        state = solve(theta)
        errors.append(energy(state - exact))
        neglected.append(solve.neglected)
        for shift in parameters(3, 4):  # others of the same span
            assert energy(solve(theta + 0.1 * shift) - exact) >= errors[-1] * (1.0 - 1e-9)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]
    assert neglected == sorted(neglected, reverse=True)


@pytest.mark.parametrize("form", [diffusion, transport])
def test_derivatives_of_both_orders(form: Form) -> None:
    plate = Plate(MPI.COMM_SELF, form)
    solve = plate.reduced(rank=4)

    def outputs(theta: Tensor) -> Tensor:
        return plate.observe(solve(theta))

    theta = parameters(4, 2).requires_grad_()
    assert torch.autograd.gradcheck(outputs, (theta,))
    assert torch.autograd.gradgradcheck(outputs, (theta,))


@pytest.mark.mpi
def test_laplace_of_the_reduced_problem_is_that_of_the_full_one() -> None:
    # By products with the derivative in both directions, batches of them included.
    plate = Plate(COMM)
    prior = fem_vi.GaussianVector(torch.zeros(4, dtype=F64), covariance=torch.eye(4, dtype=F64), comm=COMM)
    y = plate.observe(plate.full(parameters(5, 1)[0])).detach()
    solve = plate.reduced()
    forward = (lambda theta: plate.observe(solve(theta)), lambda theta: plate.observe(plate.full(theta)))
    problems = [fem_vi.InverseProblem(prior, each, fem_vi.GaussianNoise(0.01), y) for each in forward]
    reduced, full = (fem_vi.laplace(problem) for problem in problems)
    assert reduced.report.log_evidence == pytest.approx(full.report.log_evidence, rel=1e-6)
    torch.testing.assert_close(reduced().mean, full().mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reduced().variance, full().variance, rtol=1e-5, atol=1e-8)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not affine in the features": ({"features": lambda theta: theta}, "not affine"),
    "features that others make up": (
        {"features": lambda theta: torch.cat([theta.exp(), theta.exp()[..., :1]], -1)},
        "cannot be told apart",
    ),
    "other parameters": ({"theta": parameters(0, 3)}, r"theta has shape \(3, 4\)"),
    "no modes": ({"rank": 0}, "rank"),
    "parameters that are not finite": ({"theta": parameters(0, 16) * torch.inf}, "theta contains values that are not finite"),
    "one feature, not a row of them": ({"features": lambda theta: theta.exp().sum(-1)}, "with the same batch axes and one more"),
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_reduced_model_is_refused(name: str) -> None:
    choices, words = REFUSED[name]
    with pytest.raises(InvalidInput, match=words):
        Plate(COMM).reduced(**choices)


@pytest.mark.mpi
def test_states_that_are_the_same_or_not_linear_are_refused() -> None:
    plate, theta = Plate(COMM), torch.zeros(3, 4, dtype=F64)
    with pytest.raises(InvalidInput, match="all the same"):
        fem_vi.ReducedSolve(plate.residual, plate.blocks, plate.full(theta), theta, features=torch.exp)
    with pytest.raises(InvalidInput, match="not affine in the state"):
        Plate(COMM, reaction).reduced()
    with pytest.raises(InvalidInput, match="its last axis must have 4"):
        plate.reduced()(torch.zeros(3, dtype=F64))


@pytest.mark.mpi
def test_calls_without_a_solution_are_refused() -> None:
    """Where exp(theta) is zero or infinite there is no state, and where it is small there is one: no rounding errors instead."""
    plate = Plate(COMM)
    solve = plate.reduced()
    cold = torch.full((2, 4), -20.0, dtype=F64)
    torch.testing.assert_close(solve(cold), plate.full(cold), rtol=1e-7, atol=0.0)
    for wrong in (-800.0, 800.0):
        theta = torch.stack([torch.zeros(4, dtype=F64), torch.full((4,), wrong, dtype=F64)])
        with pytest.raises(SolveFailed, match=r"singular, or not finite, for samples \[1\]"):
            solve(theta)
    with pytest.raises(InvalidInput, match="theta contains values that are not finite"):
        solve(torch.full((4,), -torch.inf, dtype=F64))
    states = plate.full(parameters(0, 3))
    for given, words in ((states[:, None], "states have shape"), (states * torch.nan, "states contains values that are not")):
        with pytest.raises(InvalidInput, match=words):
            fem_vi.ReducedSolve(plate.residual, plate.blocks, given, parameters(0, 3), features=torch.exp)


@pytest.mark.mpi
def test_conditions_that_are_inputs_are_refused() -> None:
    msh = mesh.create_unit_square(COMM, 2, 2)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, h, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    msh.topology.create_connectivity(1, 2)
    edge = fem.locate_dofs_topological(V, 1, mesh.exterior_facet_indices(msh.topology))
    form = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
    pde = fem_vi.WeakForm(form, state=u, inputs=[h], bcs=[fem.dirichletbc(h, edge)])
    states = torch.zeros(2, pde.unknown.size, dtype=F64)
    with pytest.raises(UnsupportedForm, match="Dirichlet condition takes its values from an input"):
        fem_vi.ReducedSolve(fem_vi.Residual(pde), lambda t: t, states, states, features=torch.exp)
