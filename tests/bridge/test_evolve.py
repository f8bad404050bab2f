"""`Evolve`: exact decay, right gradients of every scheme, stored or computed again, on any number of ranks."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import dolfinx
import numpy as np
import pytest
import torch
import ufl
from checkpoint_schedules import optimal_steps_binomial
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.bridge.evolve_cases import NUM_STEPS, TIME_CASES, TimeCase, interval_modes
from tests.helpers import boundary_dofs, everywhere, owned, taylor_hood

COMM = MPI.COMM_WORLD
every_case = pytest.mark.parametrize("build", TIME_CASES.values(), ids=TIME_CASES.keys())
Build = Callable[[MPI.Comm], TimeCase]


def gradients(case: TimeCase, evolve: fem_vi.Evolve, comm: MPI.Comm, *, scale: float = 1.0, states: Any = slice(None)) -> Any:
    inputs = case.leaves(scale)
    return torch.autograd.grad(case.loss(evolve(*inputs), comm, states), inputs)


def interval_heat(n: int, theta: float) -> tuple[fem_vi.WeakForm, Any, Tensor, float]:
    """The theta scheme on an interval with dt as an input, and a mode that decays by a known factor in each step."""
    V, mode, lam = interval_modes(n)
    u, u_n, v, dt = fem.Function(V), fem.Function(V), ufl.TestFunction(V), fem.Constant(V.mesh, 1.0)
    middle = theta * u + (1 - theta) * u_n
    F = (u - u_n) * v * ufl.dx + dt * ufl.inner(ufl.grad(middle), ufl.grad(v)) * ufl.dx
    bc = fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)
    return fem_vi.WeakForm(F, state=u, inputs=[dt], bcs=[bc]), u_n, mode, lam


@pytest.mark.parametrize("theta", [1.0, 0.5], ids=["backward_euler", "crank_nicolson"])
def test_discrete_eigenmodes_decay_by_the_known_factor(theta: float) -> None:
    """u_k = r^k u_0 with r = (1 - (1 - theta) dt lam) / (1 + theta dt lam), and its derivatives for u_0 and dt."""
    pde, u_n, mode, lam = interval_heat(7, theta)
    steps = 6
    evolve = fem_vi.Evolve(pde, previous=u_n, num_steps=steps)
    start, dt = mode.clone().requires_grad_(), torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
    trajectory = evolve(start, dt)
    rate = (1 - (1 - theta) * dt * lam) / (1 + theta * dt * lam)
    exact = rate ** torch.arange(steps + 1)[:, None] * mode
    assert torch.allclose(trajectory, exact, rtol=0, atol=1e-13)
    weights = torch.linspace(0.5, 2.0, steps + 1, dtype=torch.float64)[:, None]
    got = torch.autograd.grad((weights * trajectory.square()).sum(), [start, dt])
    (by_rate,) = torch.autograd.grad((weights * exact.square()).sum(), dt)
    assert torch.allclose(got[1], by_rate, rtol=1e-12)
    factors = weights[:, 0] * rate.detach() ** (2 * torch.arange(steps + 1))
    assert torch.allclose((got[0] * mode).sum(), 2 * factors.sum() * mode.square().sum(), rtol=1e-12), "along the mode"


@pytest.mark.mpi
def test_data_that_depend_on_time_enter_at_the_right_step() -> None:
    """u = x c(t) solves the heat equation with source x c'(t); backward Euler and P1 have no error in it."""
    msh = mesh.create_unit_square(COMM, 3, 4)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, u_n, v, f, h = fem.Function(V), fem.Function(V), ufl.TestFunction(V), fem.Function(V), fem.Function(V)
    dt = fem.Constant(msh, 0.0)
    F = (u - u_n) / dt * v * ufl.dx + ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - f * v * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[h, f], bcs=[fem.dirichletbc(h, boundary_dofs(V, everywhere))])
    sizes = [0.1, 0.3, 0.2]
    evolve = fem_vi.Evolve(pde, previous=u_n, num_steps=3, dt=dt, time_steps=sizes, time_dependent=[f, h])
    u.interpolate(lambda x: x[0])
    x = torch.from_numpy(u.x.array[: evolve.pde.unknown.size].copy())
    c = torch.tensor([1.0, -0.5, 2.0, 0.7], dtype=torch.float64)[:, None]
    trajectory = evolve(c[0] * x, c[1:] * x, (c[1:] - c[:-1]) / torch.tensor(sizes, dtype=torch.float64)[:, None] * x)
    assert torch.allclose(trajectory, c * x, rtol=0, atol=1e-12)


def test_time_is_that_of_the_new_state() -> None:
    """u' = t^2 without diffusion: u_k = u_0 + sum_j dt_j t_j^2, with t from the Constant's value on."""
    V, _, _ = interval_modes(2)
    u, u_n, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    t, dt = fem.Constant(V.mesh, 2.0), fem.Constant(V.mesh, 0.25)
    pde = fem_vi.WeakForm((u - u_n) / dt * v * ufl.dx - t**2 * v * ufl.dx, state=u, inputs=[])
    out = fem_vi.Evolve(pde, previous=u_n, num_steps=2, time=t, dt=dt)(torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(out[:, 0], torch.tensor([0.0, 0.25 * 2.25**2, 0.25 * (2.25**2 + 2.5**2)], dtype=torch.float64))
    uneven = fem_vi.Evolve(pde, previous=u_n, num_steps=2, time=t, dt=dt, time_steps=[1.0, 0.5])
    out = uneven(torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(out[:, 0], torch.tensor([0.0, 9.0, 9.0 + 0.5 * 3.5**2], dtype=torch.float64))
    assert (float(t.value), float(dt.value)) == (2.0, 0.25)


def swirl(theta: float, num_steps: int) -> float:
    """The L2 error at t = 1 of Navier-Stokes by the theta scheme, for u = g (y^2, x^2), p = g (x + y), g = exp(sin(2 t)).

    Taylor-Hood elements hold this u and p, so that all of the error is that of the scheme in time.
    """
    msh = mesh.create_unit_square(COMM, 2, 2)
    W = taylor_hood(msh)
    w, w_n, (v, q) = fem.Function(W), fem.Function(W), ufl.TestFunctions(W)
    (u, p), (u_n, _) = ufl.split(w), ufl.split(w_n)
    V, _ = W.sub(0).collapse()
    h, t, dt = fem.Function(V), fem.Constant(msh, 0.0), fem.Constant(msh, 1.0)
    x, normal, nu = ufl.SpatialCoordinate(msh), ufl.FacetNormal(msh), 0.3
    shape, pressure = ufl.as_vector([x[1] ** 2, x[0] ** 2]), x[0] + x[1]

    def terms(z: Any, time: Any) -> ufl.Form:
        """What stands beside du/dt, without the unknown pressure: inertia, viscosity, force and traction at a time."""
        g = ufl.exp(ufl.sin(2 * time))
        force = 2 * ufl.cos(2 * time) * g * shape - nu * g * ufl.div(ufl.grad(shape))
        force += g**2 * ufl.dot(ufl.grad(shape), shape) + g * ufl.grad(pressure)
        traction = g * (nu * ufl.dot(ufl.grad(shape), normal) - pressure * normal)
        inner = ufl.inner(ufl.dot(ufl.grad(z), z) - force, v) + nu * ufl.inner(ufl.grad(z), ufl.grad(v))
        return inner * ufl.dx - ufl.inner(traction, v) * ufl.ds

    F = ufl.inner((u - u_n) / dt, v) * ufl.dx + theta * terms(u, t) + (1 - theta) * terms(u_n, t - dt)
    F -= (p * ufl.div(v) + q * ufl.div(u)) * ufl.dx
    bc = fem.dirichletbc(h, boundary_dofs(W.sub(0), lambda x: x[0] < 0.99, V), W.sub(0))
    pde = fem_vi.WeakForm(F, state=w, inputs=[h], bcs=[bc])
    evolve = fem_vi.Evolve(
        pde, previous=w_n, num_steps=num_steps, time=t, dt=dt, time_steps=1 / num_steps, time_dependent=[h], save=[-1]
    )
    h.interpolate(lambda x: np.stack([x[1] ** 2, x[0] ** 2]))
    w_n.sub(0).interpolate(h)
    growth = torch.exp(torch.sin(2 * torch.linspace(0.0, 1.0, num_steps + 1, dtype=torch.float64)))
    final = evolve(owned(w_n), growth[1:, None] * owned(h))
    difference = u - float(growth[-1]) * shape
    return float(fem_vi.Functional(ufl.inner(difference, difference) * ufl.dx, [w])(final)) ** 0.5


@pytest.mark.mpi
@pytest.mark.parametrize(("theta", "order"), [(1.0, 1), (0.5, 2)], ids=["backward_euler", "crank_nicolson"])
def test_order_in_time_of_navier_stokes(theta: float, order: int) -> None:
    errors = [swirl(theta, num_steps) for num_steps in (8, 16, 32)]
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(rates - order) < 0.15), (errors, rates)


def test_midpoint_rule_keeps_the_energy_of_the_wave() -> None:
    """p' = u'', u' = p: |p|^2 + |grad u|^2 is conserved exactly by the implicit midpoint rule."""
    case = TIME_CASES["wave"](MPI.COMM_SELF)
    evolve = case.evolve(num_steps=20)
    inside = torch.zeros_like(case.values[0])
    inside[evolve.pde.boundary.owned] = 1.0
    states = evolve(case.values[0] * (1 - inside), torch.zeros_like(case.values[1]))
    w = fem.Function(evolve.pde.space)
    u, p = ufl.split(w)
    energy = fem_vi.Functional(p**2 * ufl.dx + ufl.inner(ufl.grad(u), ufl.grad(u)) * ufl.dx, [w])(states)
    assert float(energy[0]) > 0.1
    assert torch.allclose(energy, energy[0].expand(21), rtol=1e-11)


@every_case
def test_gradcheck(build: Build) -> None:
    case = build(MPI.COMM_SELF)
    assert torch.autograd.gradcheck(case.evolve(), case.leaves(), fast_mode=True)


@every_case
def test_gradcheck_of_some_states_computed_again(build: Build) -> None:
    case = build(MPI.COMM_SELF)
    assert torch.autograd.gradcheck(case.evolve(save=[1, -1], stored_steps=1), case.leaves(), fast_mode=True)


@pytest.mark.mpi
@every_case
def test_taylor_remainder_is_second_order(build: Build) -> None:
    case = build(COMM)
    evolve = case.evolve()
    start = float(case.loss(evolve(*case.values), COMM))
    slope = sum(case.paired(COMM, gradients(case, evolve, COMM)))
    remainders = []
    for step in (1e-2, 5e-3, 2.5e-3):
        moved = [x + step * w for x, w in zip(case.values, case.weights, strict=True)]
        remainders.append(abs(float(case.loss(evolve(*moved), COMM)) - start - step * slope))
    rates = np.log2(np.array(remainders[:-1]) / np.array(remainders[1:]))
    assert np.all(rates > 1.9), (remainders, rates)


@pytest.mark.mpi
@every_case
def test_any_number_of_ranks_gives_the_same(build: Build) -> None:
    numbers = []
    for comm in (COMM, MPI.COMM_SELF):
        case = build(comm)
        inputs = case.leaves()
        loss = case.loss(case.evolve(save=[0, 2, 4], stored_steps=1)(*inputs), comm, [0, 2, 4])
        numbers.append([float(loss.detach()), *case.paired(comm, torch.autograd.grad(loss, inputs))])
    assert np.allclose(numbers[0], numbers[1], rtol=1e-9, atol=1e-11)


@every_case
def test_states_computed_again_give_the_gradient_of_stored_ones(build: Build) -> None:
    case = build(MPI.COMM_SELF)
    expected = gradients(case, case.evolve(), MPI.COMM_SELF)
    for num_stored in (None, *range(1, NUM_STEPS + 1)):
        evolve = case.evolve(save=[1, 4], stored_steps=num_stored)
        some = gradients(case, evolve, MPI.COMM_SELF, states=[1, 4])
        whole = case.leaves()
        same = torch.autograd.grad(case.loss(case.evolve()(*whole)[[1, 4]], MPI.COMM_SELF, [1, 4]), whole)
        for a, b in zip(some, same, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
        usable = min(num_stored or NUM_STEPS, NUM_STEPS - 1)
        assert evolve.num_steps_solved == optimal_steps_binomial(NUM_STEPS, usable) - (NUM_STEPS - 1)
    again = case.evolve(stored_steps=1)
    for a, b in zip(gradients(case, again, MPI.COMM_SELF), expected, strict=True):
        assert torch.equal(a, b)
    assert again.num_steps_solved == NUM_STEPS, "the trajectory itself holds all states"


@pytest.mark.mpi
@every_case
@pytest.mark.parametrize("settings", [{}, {"save": [2, 4], "stored_steps": 1}], ids=["stored", "computed_again"])
def test_two_forwards_before_two_backwards(build: Build, settings: dict[str, Any]) -> None:
    case = build(COMM)
    evolve = case.evolve(**settings)
    states = settings.get("save", slice(None))
    scales = (1.0, 0.8)
    alone = [gradients(case, evolve, COMM, scale=scale, states=states) for scale in scales]
    inputs = [case.leaves(scale) for scale in scales]
    losses = [case.loss(evolve(*x), COMM, states) for x in inputs]
    together = [torch.autograd.grad(loss, x) for loss, x in zip(losses, inputs, strict=True)]
    for expected, got in zip(alone, together, strict=True):
        for a, b in zip(expected, got, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_stored", [None, 1])
def test_backward_twice_through_a_kept_graph(num_stored: int | None) -> None:
    case = TIME_CASES["allen_cahn"](MPI.COMM_SELF)
    evolve, inputs = case.evolve(save=[-1], stored_steps=num_stored), case.leaves()
    loss = case.loss(evolve(*inputs), MPI.COMM_SELF, [4])
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    solved = evolve.num_steps_solved
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (evolve.num_steps_solved == solved) == (num_stored is None), "used-up states are computed again, kept ones are not"


@every_case
def test_batches_are_loops(build: Build) -> None:
    """Initial states and the first input in batches that broadcast, the others shared: their gradients are sums."""
    case = build(MPI.COMM_SELF)
    evolve = case.evolve(save=[1, 3, 4], stored_steps=1)
    u0, first, *rest = case.values
    a, b = torch.tensor([1.0, 0.6]).double(), torch.tensor([1.0, 0.9, 1.1]).double()
    batched = [
        (a[:, None, None] * u0).requires_grad_(),
        (b.reshape(3, *[1] * first.ndim) * first).requires_grad_(),
        *[x.clone().requires_grad_() for x in rest],
    ]
    trajectory = evolve(*batched)
    assert trajectory.shape == (2, 3, 3, u0.numel())
    together = torch.autograd.grad(case.loss(trajectory, MPI.COMM_SELF, [1, 3, 4]).sum(), batched)
    sums = [torch.zeros_like(x) for x in batched]
    for i in range(2):
        for j in range(3):
            inputs = [x.detach().clone().requires_grad_() for x in (batched[0][i, 0], batched[1][j], *batched[2:])]
            one = evolve(*inputs)
            assert torch.allclose(one, trajectory[i, j], rtol=1e-12, atol=1e-13)
            single = torch.autograd.grad(case.loss(one, MPI.COMM_SELF, [1, 3, 4]), inputs)
            sums[0][i, 0] += single[0]
            sums[1][j] += single[1]
            for total, part in zip(sums[2:], single[2:], strict=True):
                total += part
    for total, gradient in zip(sums, together, strict=True):
        assert torch.allclose(total, gradient, rtol=1e-9, atol=1e-11)


def test_an_operator_that_sees_no_input_is_factorised_once_for_each_step_size() -> None:
    case = TIME_CASES["clocked_heat"](MPI.COMM_SELF)
    evolve = case.evolve()
    for _ in range(3):
        gradients(case, evolve, MPI.COMM_SELF)
        with torch.no_grad():
            evolve(torch.stack([case.values[0]] * 2), case.values[1])
    assert evolve.num_factorisations == 2, "two sizes of steps, in turn"
    steady = case.evolve(time_steps=0.1, save=[-1], stored_steps=2)
    for _ in range(3):
        gradients(case, steady, MPI.COMM_SELF, states=[4])
    assert steady.num_factorisations == 1


def test_a_coefficient_field_is_factorised_once_for_each_call() -> None:
    case = TIME_CASES["heat"](MPI.COMM_SELF)
    evolve = case.evolve()
    u0, m, f, h = case.leaves()
    evolve(u0, torch.stack([m, 2 * m])[:, None], f, torch.stack([h] * 3)).sum().backward()
    assert evolve.num_factorisations == 2, "two fields, six samples, four steps"
    evolve(u0, m, f, h).sum().backward()
    assert evolve.num_factorisations == 3


def test_factors_beyond_the_budget_are_rebuilt() -> None:
    case = TIME_CASES["linearised_burgers"](MPI.COMM_SELF)
    roomy, tight = case.evolve(), case.evolve(factor_budget=0)
    for a, b in zip(gradients(case, roomy, MPI.COMM_SELF), gradients(case, tight, MPI.COMM_SELF), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    assert (roomy.num_factorisations, tight.num_factorisations) == (NUM_STEPS, 2 * NUM_STEPS - 1)


def test_memory_is_that_of_the_stored_states() -> None:
    V = fem.functionspace(mesh.create_unit_interval(MPI.COMM_SELF, 5_000), ("Lagrange", 1))
    u, u_n, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = (u - u_n) * v * ufl.dx + 1e-4 * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[])
    start = torch.sin(torch.linspace(0.0, 9.0, 5_001, dtype=torch.float64)).requires_grad_()
    peaks, grads = [], []
    for num_stored in (None, 4):
        evolve = fem_vi.Evolve(pde, previous=u_n, num_steps=100, save=[-1], stored_steps=num_stored)
        evolve(start).square().sum().backward()  # builds what is built once
        start.grad = None
        tracemalloc.start()
        evolve(start).square().sum().backward()
        peaks.append(tracemalloc.get_traced_memory()[1] / (8 * 5_001))
        tracemalloc.stop()
        grads.append(start.grad)
        start.grad = None
    assert torch.allclose(grads[0], grads[1], rtol=1e-12, atol=1e-15)
    assert peaks[0] > 99
    assert peaks[1] < 4 + 3 + 7, "stored states, states in use, and a step's own work"


def test_steps_after_the_last_wanted_state_are_not_computed() -> None:
    case = TIME_CASES["allen_cahn"](MPI.COMM_SELF)
    evolve = case.evolve(save=[0, 2])
    out = evolve(*case.values)
    assert evolve.num_steps_solved == 2
    assert torch.equal(out, case.evolve()(*case.values)[[0, 2]])


def test_resting_state_stays_without_a_failure() -> None:
    """A state that solves the next step to rounding leaves SNES nothing to reduce."""
    case = TIME_CASES["allen_cahn"](MPI.COMM_SELF)
    evolve = case.evolve(num_steps=300, save=[-1])
    out = evolve(torch.full_like(case.values[0], 0.7), *case.values[1:])
    assert torch.allclose(out, torch.ones_like(out), rtol=0, atol=1e-10)


@every_case
def test_functions_of_the_caller_are_not_written_to(build: Build) -> None:
    case = build(MPI.COMM_SELF)
    before = [np.array(x.x.array if hasattr(x, "x") else x.value) for x in case.caller]
    gradients(case, case.evolve(), MPI.COMM_SELF)
    for x, old in zip(case.caller, before, strict=True):
        assert np.array_equal(x.x.array if hasattr(x, "x") else x.value, old)


@every_case
def test_nothing_is_compiled_or_created_again(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(MPI.COMM_SELF)
    evolve = case.evolve(save=[-1], stored_steps=2)
    gradients(case, evolve, MPI.COMM_SELF, states=[4])

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
    gradients(case, evolve, MPI.COMM_SELF, states=[4])


@pytest.mark.parametrize("allow_unused", [False, True])
def test_second_derivatives_are_refused(allow_unused: bool) -> None:
    case = TIME_CASES["heat"](MPI.COMM_SELF)
    inputs = case.leaves()
    g = torch.autograd.grad(case.evolve()(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(fem_vi.UnsupportedDerivative, match="Evolve has first derivatives in reverse mode only"):
        torch.autograd.grad(sum(x.sum() for x in g), inputs, allow_unused=allow_unused)


@pytest.mark.mpi
def test_a_failed_step_is_named() -> None:
    """u = u_n + dt u^2 has no root once dt u_n > 1 / 4."""
    V = fem.functionspace(mesh.create_unit_square(COMM, 3, 3), ("Lagrange", 1))
    u, u_n, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    pde = fem_vi.WeakForm((u - u_n - u**2) * v * ufl.dx, state=u, inputs=[])
    evolve = fem_vi.Evolve(pde, previous=u_n, num_steps=5)
    start = torch.ones(evolve.pde.unknown.size, dtype=torch.float64)
    with pytest.raises(fem_vi.SolveFailed, match=r"Evolve: step 3 of 5, sample 1 of 2: SNES stopped with"):
        evolve(torch.stack([0 * start, 0.17 * start]))
    assert torch.equal(evolve(0 * start)[-1], 0 * start), "usable after a failure"


@pytest.mark.mpi
def test_wrong_tensors_are_refused_on_every_rank() -> None:
    case = TIME_CASES["heat"](COMM)
    evolve = case.evolve()
    u0, m, f, h = case.values
    with pytest.raises(fem_vi.InvalidInput, match=r"takes 4 tensors \(u0, inputs\[0\] \(m\)"):
        evolve(u0, m, f)
    with pytest.raises(fem_vi.InvalidInput, match="one value for each of 4 steps"):
        evolve(u0, m, f[:-1], h)
    with pytest.raises(fem_vi.InvalidInput, match="one value for each of 4 steps"):
        evolve(u0, m, f[0], h)
    with pytest.raises(fem_vi.InvalidInput, match=r"u0 has shape"):
        evolve(u0[1:], m, f, h)
    with pytest.raises(fem_vi.InvalidInput, match="not finite"):
        evolve(u0 / 0, m, f, h)


def refused() -> dict[str, tuple[str, Callable[[TimeCase], Any]]]:
    """Ways to build an `Evolve` wrongly, and what the error says."""
    msh = mesh.create_unit_interval(MPI.COMM_SELF, 3)
    V = fem.functionspace(msh, ("Lagrange", 1))
    return {
        "previous_not_in_form": ("previous occurs neither", lambda c: c.evolve(previous=fem.Function(c.pde.space))),
        "previous_is_state": ("previous is the state", lambda c: c.evolve(previous=c.caller[0])),
        "previous_is_input": ("among the inputs", lambda c: c.evolve(previous=c.caller[2])),
        "previous_is_constant": ("previous is a Constant", lambda c: c.evolve(previous=fem.Constant(msh, 0.0))),
        "steps": ("num_steps is 0", lambda c: c.evolve(num_steps=0)),
        "stored": ("stored_steps is 0", lambda c: c.evolve(stored_steps=0)),
        "save_empty": ("save is", lambda c: c.evolve(save=[])),
        "save_beyond": ("save is", lambda c: c.evolve(save=[1, 5])),
        "save_falls": ("save is", lambda c: c.evolve(save=[2, 1])),
        "save_first_only": ("save is", lambda c: c.evolve(save=[0])),
        "dependent": (r"time_dependent\[0\] is not among", lambda c: c.evolve(time_dependent=[fem.Function(V)])),
        "steps_without_clock": ("without time or dt", lambda c: c.evolve(time_steps=0.1)),
        "clock_not_in_form": ("dt occurs neither", lambda c: c.evolve(dt=fem.Constant(msh, 0.1))),
        "clock_is_field": ("must be a scalar", lambda c: c.evolve(time=c.caller[2])),
    }


@pytest.mark.parametrize("name", refused())
def test_wrong_arguments_are_refused(name: str) -> None:
    message, build = refused()[name]
    with pytest.raises(fem_vi.InvalidInput, match=message):
        build(TIME_CASES["heat"](MPI.COMM_SELF))


def test_wrong_step_sizes_are_refused() -> None:
    case = TIME_CASES["clocked_heat"](MPI.COMM_SELF)
    for sizes in ([0.1, 0.1], -0.1, 0.0, float("nan"), [[0.1] * 4]):
        with pytest.raises(fem_vi.InvalidInput, match="time_steps must be a positive number, or 4 of them"):
            case.evolve(time_steps=sizes)
    with pytest.raises(fem_vi.InvalidInput, match="time is given without time_steps or dt"):
        case.evolve(dt=None, time_steps=None)


def test_old_state_from_another_space_is_refused() -> None:
    msh = mesh.create_unit_interval(MPI.COMM_SELF, 3)
    V, Q = (fem.functionspace(msh, ("Lagrange", degree)) for degree in (1, 2))
    u, u_n, v = fem.Function(V), fem.Function(Q), ufl.TestFunction(V)
    pde = fem_vi.WeakForm((u - u_n) * v * ufl.dx, state=u, inputs=[])
    with pytest.raises(fem_vi.InvalidInput, match="another space"):
        fem_vi.Evolve(pde, previous=u_n, num_steps=1)


def test_what_is_fixed_may_not_change_but_the_old_state_may() -> None:
    V, mode, _ = interval_modes(4)
    u, u_n, v, k = fem.Function(V), fem.Function(V), ufl.TestFunction(V), fem.Constant(V.mesh, 1.0)
    F = (u - u_n) * v * ufl.dx + k * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[])
    u_n.x.array[:] = 3.0
    evolve = fem_vi.Evolve(pde, previous=u_n, num_steps=1)
    u_n.x.array[:] = 5.0
    evolve(mode)
    k.value = 2.0
    with pytest.raises(fem_vi.InvalidInput, match="has changed"):
        evolve(mode)
    with pytest.raises(fem_vi.InvalidInput, match="has changed"):
        fem_vi.Evolve(pde, previous=u_n, num_steps=1)
