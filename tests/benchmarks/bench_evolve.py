"""`Evolve` against time loops written by hand: heat equation, value and gradient for the initial state.

Run `python -m tests.benchmarks.bench_evolve [n [steps]]` with one thread. The floors keep the LU factors and all states; one
assembles the right-hand side of each step, as DOLFINx's demonstrations do, the other multiplies by the mass matrix. All take
MUMPS LU.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch
import ufl
from dolfinx import fem
from dolfinx.fem import petsc as fem_petsc
from petsc4py import PETSc

import fem_vi
from tests.benchmarks.compare import compare
from tests.benchmarks.hand_written import Diffusion

DT = 1e-3


def heat_form(u: fem.Function, u_n: fem.Function) -> ufl.Form:
    """Backward Euler."""
    v = ufl.TestFunction(u.function_space)
    return (u - u_n) * v * ufl.dx + DT * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx


class HandWrittenHeat:
    """J(u_0) = |u_T - d|^2 / 2 and its gradient, for u = 0 on the boundary; one factorisation for all calls."""

    def __init__(self, problem: Diffusion, steps: int, data: np.ndarray, *, by_matrix: bool) -> None:
        V, self.steps, self.data = problem.V, steps, data
        w, v = ufl.TrialFunction(V), ufl.TestFunction(V)
        self.old, self.new, self.b = fem.Function(V), fem.Function(V), fem.Function(V)
        self.fixed = problem.bcs[0].dof_indices()[0]
        A = fem_petsc.assemble_matrix(
            fem.form(w * v * ufl.dx + DT * ufl.inner(ufl.grad(w), ufl.grad(v)) * ufl.dx), bcs=problem.bcs
        )
        A.assemble()
        self.M = fem_petsc.assemble_matrix(fem.form(w * v * ufl.dx))
        self.M.assemble()
        self.right = fem.form(self.old * v * ufl.dx)
        self.by_matrix = by_matrix
        self.ksp = PETSc.KSP().create(A.comm)
        self.ksp.setOperators(A)
        self.ksp.setType("preonly")
        self.ksp.getPC().setType("lu")
        self.ksp.getPC().setFactorSolverType("mumps")
        self.states = np.empty((steps + 1, self.b.x.array.size))

    def mass(self) -> None:
        """b = M u_old."""
        if self.by_matrix:
            self.M.mult(self.old.x.petsc_vec, self.b.x.petsc_vec)
        else:
            self.b.x.array[:] = 0.0
            fem.assemble_vector(self.b.x.array, self.right)

    def __call__(self, start: np.ndarray) -> tuple[float, np.ndarray]:
        self.states[0] = start
        for step in range(self.steps):
            self.old.x.array[:] = self.states[step]
            self.mass()
            self.b.x.array[self.fixed] = 0.0
            self.ksp.solve(self.b.x.petsc_vec, self.new.x.petsc_vec)
            self.states[step + 1] = self.new.x.array
        misfit = self.new.x.array - self.data
        value, g = 0.5 * float(misfit @ misfit), misfit
        for _ in range(self.steps):
            self.b.x.array[:] = g
            self.b.x.array[self.fixed] = 0.0
            self.ksp.solveTranspose(self.b.x.petsc_vec, self.old.x.petsc_vec)
            self.mass()
            g = self.b.x.array.copy()
        return value, g


def with_fem_vi(evolve: fem_vi.Evolve, data: np.ndarray) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """The same with `Evolve` and torch."""
    d = torch.from_numpy(data)

    def work(start: np.ndarray) -> tuple[float, np.ndarray]:
        u0 = torch.from_numpy(start).requires_grad_()
        value = 0.5 * (evolve(u0)[-1] - d).square().sum()
        (g,) = torch.autograd.grad(value, u0)
        return float(value.detach()), g.numpy()

    return work


def peak_states(work: Callable[[], object], size: int) -> float:
    """Peak of what NumPy allocates in a call, in states."""
    work()
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / (8 * size)


def main(n: int = 128, steps: int = 100, stored: int = 10) -> None:
    """Print the table."""
    problem = Diffusion.create(n)
    rng = np.random.default_rng(0)
    start, data = rng.standard_normal((2, problem.u.x.array.size))
    u_n = fem.Function(problem.V)
    pde = fem_vi.WeakForm(heat_form(problem.u, u_n), state=problem.u, inputs=[], bcs=problem.bcs)

    def evolve(**settings: object) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        return with_fem_vi(fem_vi.Evolve(pde, previous=u_n, num_steps=steps, petsc_options={"pc_type": "lu"}, **settings), data)  # type: ignore[arg-type]

    floors = {
        name: HandWrittenHeat(problem, steps, data, by_matrix=by_matrix)
        for name, by_matrix in (("assembled", False), ("matrix", True))
    }
    candidates = {
        "trajectory": evolve(),
        "last state, all stored": evolve(save=[-1]),
        f"last state, {stored} stored": evolve(save=[-1], stored_steps=stored),
    }
    value, gradient = floors["assembled"](start)
    for work in (floors["matrix"], *candidates.values()):
        other = work(start)
        assert abs(other[0] - value) < 1e-9 * value
        assert np.allclose(other[1], gradient, rtol=1e-8, atol=1e-11 * np.abs(gradient).max())
    print(f"heat, n = {n}, {steps} steps")
    for floor_name, floor in floors.items():
        for name, work in candidates.items():
            print(compare(f"{name} / {floor_name}", lambda f=floor: f(start), lambda w=work: w(start), rounds=5, budget=0.0))
    for name, work in candidates.items():
        print(f"{name:<44} peak {peak_states(lambda w=work: w(start), start.size):7.1f} states")


if __name__ == "__main__":
    main(*(int(x) for x in sys.argv[1:]))
