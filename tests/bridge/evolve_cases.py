"""The table of time-dependent problems that the recipes of `Evolve` run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import basix.ufl
import numpy as np
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.helpers import boundary_dofs, everywhere, interpolated, left, once, square

NUM_STEPS = 4
DT = 0.05


@dataclass(frozen=True)
class TimeCase:
    """A time step with inputs to try it at.

    Attributes:
        pde: The weak form.
        settings: Keyword arguments of `Evolve` besides the number of steps.
        values: Initial state, and one tensor for each input.
        weights: For each of `values`, a direction to move in; what is a field is the same function on any partition.
        is_field: For each of `values`, whether each rank has its own entries.
        weight: A trajectory to pair states with.
        caller: The caller's Functions and Constants.
    """

    pde: fem_vi.WeakForm
    settings: dict[str, Any]
    values: list[Tensor]
    weights: list[Tensor]
    is_field: list[bool]
    weight: Tensor
    caller: list[Any]

    def evolve(self, **more: Any) -> fem_vi.Evolve:
        """The operator."""
        return fem_vi.Evolve(self.pde, **{"num_steps": NUM_STEPS, **self.settings, **more})

    def leaves(self, scale: float = 1.0) -> list[Tensor]:
        """Values that gradients are asked for."""
        return [(scale * x).clone().requires_grad_() for x in self.values]

    def loss(self, trajectory: Tensor, comm: MPI.Comm, states: Any = slice(None)) -> Tensor:
        """A nonlinear, replicated function of all saved states."""
        product = self.weight[states] * trajectory
        return fem_vi.all_sum((product + 0.5 * product.square()).sum((-1, -2)), comm)

    def paired(self, comm: MPI.Comm, tensors: Any) -> list[float]:
        """The pairing of each tensor with its weight."""
        out = []
        for x, w, is_field in zip(tensors, self.weights, self.is_field, strict=True):
            local = float((x * w).sum())
            out.append(comm.allreduce(local, op=MPI.SUM) if is_field else local)
        return out


def make_case(
    F: ufl.Form, u: Any, u_n: Any, inputs: list[tuple[Any, Any]], bcs: list[Any], *, u0: float = 0.5, **more: Any
) -> TimeCase:
    """Fill a row: `inputs` pairs a Function with a scale or a Constant with its value; `per_step` lists what depends on time."""
    per_step = more.pop("per_step", [])
    values, weights = [interpolated(u.function_space, u0, 0.2)], [interpolated(u.function_space, 1.0, 1.1)]
    for k, (given, value) in enumerate(inputs):
        repeats = range(NUM_STEPS if any(given is other for other in per_step) else 1)
        if isinstance(given, fem.Function):
            V = given.function_space
            own = [interpolated(V, value, 0.3 + k + 0.4 * step) for step in repeats]
            direction = [interpolated(V, 1.0, 1.9 * k + step) for step in repeats]
        else:
            base = torch.as_tensor(np.array(value, dtype=np.float64))
            own = [base * (1 + 0.2 * step) for step in repeats]
            direction = [torch.full_like(base, 0.7 + 0.1 * step) for step in repeats]
        stacked = any(given is other for other in per_step)
        values.append(torch.stack(own) if stacked else own[0])
        weights.append(torch.stack(direction) if stacked else direction[0])
    weight = torch.stack([interpolated(u.function_space, 1.0, 0.7 + 0.5 * k) for k in range(NUM_STEPS + 1)])
    given = [each for each, _ in inputs]
    fields = [True, *(isinstance(each, fem.Function) for each in given)]
    pde = fem_vi.WeakForm(F, state=u, inputs=given, bcs=bcs)
    settings = {"previous": u_n, "time_dependent": per_step, **more}
    return TimeCase(pde, settings, values, weights, fields, weight, [u, u_n, *given])


def heat(comm: MPI.Comm) -> TimeCase:
    """Crank-Nicolson, log-diffusivity in the operator, source and boundary data that depend on time."""
    msh = square(comm)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, u_n, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    m, f, h = fem.Function(V, name="m"), fem.Function(fem.functionspace(msh, ("DG", 0)), name="f"), fem.Function(V, name="h")
    middle = 0.5 * (u + u_n)
    F = (u - u_n) / DT * v * ufl.dx + ufl.exp(m) * ufl.inner(ufl.grad(middle), ufl.grad(v)) * ufl.dx - f * v * ufl.dx
    bcs = [fem.dirichletbc(h, boundary_dofs(V, left))]
    return make_case(F, u, u_n, [(m, 0.4), (f, 2.0), (h, 0.6)], bcs, per_step=[f, h])


def clocked_heat(comm: MPI.Comm) -> TimeCase:
    """Backward Euler with a source that knows the time, uneven steps, and an operator that sees the step only."""
    msh = square(comm)
    V = fem.functionspace(msh, ("Lagrange", 2))
    u, u_n, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    t, dt, rate = fem.Constant(msh, 0.3), fem.Constant(msh, 1.0), fem.Constant(msh, 0.0)
    F = (u - u_n) / dt * v * ufl.dx + ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - ufl.exp(-rate * t) * v * ufl.dx
    bcs = [fem.dirichletbc(0.0, boundary_dofs(V, left), V)]
    return make_case(F, u, u_n, [(rate, 0.8)], bcs, time=t, dt=dt, time_steps=[0.1, 0.05, 0.1, 0.05])


def sources(comm: MPI.Comm) -> TimeCase:
    """An operator that no input enters, zero on the boundary; sources steady, per step, and by the clock."""
    msh = square(comm, cell=mesh.CellType.quadrilateral)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, u_n, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    f, level, t = fem.Function(V, name="f"), fem.Constant(msh, 0.0), fem.Constant(msh, 0.0)
    F = (u - u_n) / DT * v * ufl.dx + ufl.inner(ufl.grad(0.7 * u + 0.3 * u_n), ufl.grad(v)) * ufl.dx
    F -= (f * ufl.exp(f) + level * ufl.cos(t)) * v * ufl.dx
    bcs = [fem.dirichletbc(0.0, boundary_dofs(V, left), V)]
    return make_case(F, u, u_n, [(f, 0.8), (level, 1.5)], bcs, per_step=[level], time=t, time_steps=DT)


def wave(comm: MPI.Comm) -> TimeCase:
    """A first-order system for displacement and velocity, by the midpoint rule; wave speed as a field."""
    msh = square(comm)
    P1 = basix.ufl.element("Lagrange", msh.basix_cell(), 1)
    W = fem.functionspace(msh, basix.ufl.mixed_element([P1, P1]))
    w, w_n = fem.Function(W), fem.Function(W)
    (u, p), (u_n, p_n), (a, b) = ufl.split(w), ufl.split(w_n), ufl.TestFunctions(W)
    m = fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m")
    F = (u - u_n) / DT * a * ufl.dx - 0.5 * (p + p_n) * a * ufl.dx + (p - p_n) / DT * b * ufl.dx
    F += ufl.exp(m) * ufl.inner(ufl.grad(0.5 * (u + u_n)), ufl.grad(b)) * ufl.dx
    zero = fem.Constant(msh, 0.0)
    bcs = [fem.dirichletbc(zero, boundary_dofs(W.sub(k), everywhere), W.sub(k)) for k in (0, 1)]
    return make_case(F, w, w_n, [(m, 0.3)], bcs)


def allen_cahn(comm: MPI.Comm) -> TimeCase:
    """Nonlinear; the width of the interface and the size of the step are inputs."""
    msh = square(comm)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, u_n, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    width, dt = fem.Constant(msh, 0.0), fem.Constant(msh, 1.0)
    F = (u - u_n) * v * ufl.dx + dt * width**2 * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + dt * (u**3 - u) * v * ufl.dx
    return make_case(F, u, u_n, [(width, 0.3), (dt, 0.2)], [], u0=0.9)


def burgers(comm: MPI.Comm) -> TimeCase:
    """A nonlinear vector problem with a force that depends on time, and the old values on the boundary."""
    msh = square(comm)
    V = fem.functionspace(msh, ("Lagrange", 1, (2,)))
    u, u_n, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    nu, force = fem.Constant(msh, 0.0), fem.Constant(msh, np.zeros(2))
    F = ufl.inner((u - u_n) / DT + ufl.dot(u, ufl.nabla_grad(u)) - force, v) * ufl.dx
    F += nu * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx
    bcs = [fem.dirichletbc(u_n, boundary_dofs(V, left))]
    return make_case(F, u, u_n, [(nu, 0.1), (force, [0.5, -0.3])], bcs, per_step=[force])


def linearised_burgers(comm: MPI.Comm) -> TimeCase:
    """Linear in the new state, with the old one in the Jacobian: a new operator for each step."""
    msh = square(comm)
    V = fem.functionspace(msh, ("Lagrange", 1, (2,)))
    u, u_n, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    nu = fem.Constant(msh, 0.0)
    F = (
        ufl.inner((u - u_n) / DT + ufl.dot(u_n, ufl.nabla_grad(u)), v) * ufl.dx
        + nu * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx
    )
    return make_case(F, u, u_n, [(nu, 0.1)], [])


def navier_stokes(comm: MPI.Comm) -> TimeCase:
    """Taylor-Hood, velocity and pressure together, velocity prescribed in time on three sides, free outflow."""
    msh = square(comm, 3)
    cell = msh.basix_cell()
    parts = [basix.ufl.element("Lagrange", cell, 2, shape=(2,)), basix.ufl.element("Lagrange", cell, 1)]
    W = fem.functionspace(msh, basix.ufl.mixed_element(parts))
    w, w_n, (v, q) = fem.Function(W), fem.Function(W), ufl.TestFunctions(W)
    (u, p), (u_n, _) = ufl.split(w), ufl.split(w_n)
    nu = fem.Constant(msh, 0.0)
    V, _ = W.sub(0).collapse()
    h = fem.Function(V, name="h")
    F = ufl.inner((u - u_n) / DT + ufl.dot(u, ufl.nabla_grad(u)), v) * ufl.dx + nu * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx
    F += -p * ufl.div(v) * ufl.dx - q * ufl.div(u) * ufl.dx
    bcs = [fem.dirichletbc(h, boundary_dofs(W.sub(0), lambda x: x[0] < 0.99, V), W.sub(0))]
    return make_case(F, w, w_n, [(nu, 0.2), (h, 0.5)], bcs, per_step=[h])


TIME_CASES: dict[str, Callable[[MPI.Comm], TimeCase]] = {
    build.__name__: once(build)
    for build in (heat, clocked_heat, sources, wave, allen_cahn, burgers, linearised_burgers, navier_stokes)
}


def interval_modes(n: int) -> tuple[Any, Tensor, float]:
    """P1 on n cells of the unit interval: the space, a discrete eigenmode sin(pi x), and its eigenvalue of -d^2/dx^2.

    K v = lam M v holds exactly for v_i = sin(pi x_i), with lam = (6 / h^2) (1 - cos(pi h)) / (2 + cos(pi h)).
    """
    V = fem.functionspace(mesh.create_unit_interval(MPI.COMM_SELF, n), ("Lagrange", 1))
    h, x = 1 / n, V.tabulate_dof_coordinates()[:, 0]
    mode = torch.from_numpy(np.sin(np.pi * x))
    return V, mode, float(6 / h**2 * (1 - np.cos(np.pi * h)) / (2 + np.cos(np.pi * h)))
