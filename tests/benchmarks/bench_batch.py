"""A batch of samples through `Solve`, value and gradient, against the same written by hand in DOLFINx and petsc4py.

    OMP_NUM_THREADS=1 container/run python3 -m tests.benchmarks.bench_batch [n ...]

First table: the parameter is the source of one operator, which is factorised once; the floors solve all samples together with
KSPMatSolve, forward and adjoint. One assembles the right-hand sides, the other multiplies by the mass matrix. Second table:
the parameter is in the operator; the floor takes one sample after another with one matrix and one KSP, so that the symbolic
factorisation is made once. Each call has other parameters than the last. CPU time, medians of rounds in turn.
Bars: 1.15 against the assembled right-hand sides, and 1.05.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse
import torch
import ufl
from dolfinx import fem
from dolfinx.fem import petsc as fem_petsc
from petsc4py import PETSc

import fem_vi
from tests.benchmarks.bench_solve import SOLVERS
from tests.benchmarks.compare import Comparison, compare, variations
from tests.benchmarks.hand_written import Diffusion, HandWritten

BATCH = 32
DIRECT = ("MUMPS Cholesky", "PETSc Cholesky")

Work = Callable[[np.ndarray], tuple[float, np.ndarray]]


def source_form(u: fem.Function, f: fem.Function) -> ufl.Form:
    """-div(grad u) + u = f."""
    v = ufl.TestFunction(u.function_space)
    return (ufl.inner(ufl.grad(u), ufl.grad(v)) + u * v - f * v) * ufl.dx


class HandWrittenBatch:
    """J(f) = sum over samples of |u(f) - d|^2 / 2 and its gradient; the factor is kept, the dense matrices are NumPy's memory."""

    def __init__(self, problem: Diffusion, data: np.ndarray, options: dict[str, Any], *, by_matrix: bool) -> None:
        V, self.data, self.by_matrix = problem.V, data, by_matrix
        w, v = ufl.TrialFunction(V), ufl.TestFunction(V)
        self.f = fem.Function(V)
        self.right = fem.form(self.f * v * ufl.dx)
        M = fem_petsc.assemble_matrix(fem.form(w * v * ufl.dx))
        M.assemble()
        self.mass = scipy.sparse.csr_array(M.getValuesCSR()[::-1], shape=M.getSize())
        self.fixed = problem.bcs[0].dof_indices()[0]
        A = fem_petsc.assemble_matrix(fem.form((ufl.inner(ufl.grad(w), ufl.grad(v)) + w * v) * ufl.dx), bcs=problem.bcs)
        A.assemble()
        prefix = f"floor_{id(self)}_"
        for name, value in options.items():
            PETSc.Options().setValue(prefix + name, value)
        self.ksp = PETSc.KSP().create(A.comm)
        self.ksp.setOptionsPrefix(prefix)
        self.ksp.setOperators(A)
        self.ksp.setFromOptions()
        shape = data.shape[::-1]
        self.b, self.x = np.zeros((2, *data.shape))
        self.B = PETSc.Mat().createDense(shape, array=self.b.T, comm=A.comm)
        self.X = PETSc.Mat().createDense(shape, array=self.x.T, comm=A.comm)
        for dense in (self.B, self.X):
            dense.assemble()

    def assemble(self, coefficients: np.ndarray, out: np.ndarray) -> None:
        """Rows of integrals of each sample's function times v."""
        if self.by_matrix:
            for row, into in zip(coefficients, out, strict=True):
                into[:] = self.mass @ row
            return
        out[:] = 0.0
        for row, into in zip(coefficients, out, strict=True):
            self.f.x.array[:] = row
            fem.assemble_vector(into, self.right)

    def __call__(self, f: np.ndarray) -> tuple[float, np.ndarray]:
        self.assemble(f, self.b)
        self.b[:, self.fixed] = 0.0
        self.ksp.matSolve(self.B, self.X)
        np.subtract(self.x, self.data, out=self.b)
        value = 0.5 * float(np.vdot(self.b, self.b))
        self.b[:, self.fixed] = 0.0
        self.ksp.matSolve(self.B, self.X)  # the operator is symmetric
        gradient = np.empty_like(self.b)
        self.assemble(self.x, gradient)
        return value, gradient


class HandWrittenLoop:
    """The same for the parameter in the operator: state and adjoint of one sample, then the next."""

    def __init__(self, problem: Diffusion, data: np.ndarray, options: dict[str, Any]) -> None:
        self.one, self.data = HandWritten(problem, data[0], options), data

    def __call__(self, m: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = 0.0, np.empty_like(m)
        for row, data, into in zip(m, self.data, gradient, strict=True):
            self.one.data = data
            of_sample, into[:] = self.one(row)
            value += of_sample
        return value, gradient


def with_fem_vi(solve: fem_vi.Solve, data: np.ndarray) -> Work:
    """Value and gradient with torch."""
    d = torch.from_numpy(data)

    def work(x: np.ndarray) -> tuple[float, np.ndarray]:
        given = torch.from_numpy(x).requires_grad_()
        u = solve(given)
        misfit = u.detach() - d
        (gradient,) = torch.autograd.grad(u, given, misfit)
        return 0.5 * float(misfit.ravel() @ misfit.ravel()), gradient.numpy()

    return work


def bench(name: str, floor: Work, ours: Work, x: np.ndarray) -> Comparison:
    """One row: the two agree to 1e-8, then they are timed."""
    (value, gradient), (expected, exact) = ours(x), floor(x)
    assert abs(value - expected) < 1e-8 * abs(expected)
    assert np.abs(gradient - exact).max() < 1e-8 * np.abs(exact).max()
    mine, theirs = variations(x), variations(x)
    return compare(name, lambda: floor(next(theirs)), lambda: ours(next(mine)), rounds=7)


def source(n: int, solver: str) -> Iterator[Comparison]:
    """Rows of the first table."""
    problem = Diffusion.create(n)
    x, data = np.random.default_rng(0).standard_normal((2, BATCH, problem.u.x.array.size))
    pde = fem_vi.WeakForm(source_form(problem.u, problem.m), state=problem.u, inputs=[problem.m], bcs=problem.bcs)
    solve = fem_vi.Solve(pde, petsc_options=SOLVERS[solver])
    for name, by_matrix in (("assembled", False), ("matrix", True)):
        floor = HandWrittenBatch(problem, data, SOLVERS[solver], by_matrix=by_matrix)
        yield bench(f"source / {name}, n = {n}, {solver}", floor, with_fem_vi(solve, data), x)
    assert solve.num_factorisations == 1


def operator(n: int, solver: str) -> Iterator[Comparison]:
    """Row of the second table."""
    problem = Diffusion.create(n)
    x, data = 0.5 * np.random.default_rng(0).standard_normal((2, BATCH, problem.u.x.array.size))
    pde = fem_vi.WeakForm(problem.F, state=problem.u, inputs=[problem.m], bcs=problem.bcs)
    solve = fem_vi.Solve(pde, petsc_options=SOLVERS[solver], factor_budget=2**32)
    floor = HandWrittenLoop(Diffusion.create(n), data, SOLVERS[solver])
    yield bench(f"operator, n = {n}, {solver}", floor, with_fem_vi(solve, data), x)
    before = solve.num_factorisations
    with_fem_vi(solve, data)(1.01 * x)
    assert solve.num_factorisations == before + BATCH


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    print(f"batch of {BATCH}, value and gradient")
    for rows in (source, operator):
        for n in [int(a) for a in sys.argv[1:]] or [64, 128, 256]:
            for solver in DIRECT:
                for row in rows(n, solver):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
