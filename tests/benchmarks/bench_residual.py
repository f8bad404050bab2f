"""Residual and gradients of a batch: `CompiledKernel` against the loop of DOLFINx over samples.

    OMP_NUM_THREADS=1 container/run python3 -m tests.benchmarks.bench_residual [name ...]

64 samples; r(u, m), and w . dr/du and w . dr/dm for a w of each sample, with torch on top of both. The floor is written by hand:
three forms that DOLFINx assembles for one sample after another, into arrays of their own. CPU time, medians of rounds in turn;
"two threads" is the wall time with one over that with two, which means something on a machine with two idle cores.
Bars: 10 for P1, 8 for P2 and for the solid; 1.8 for threads; five seconds for the compiler, for each form, in an empty cache.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dolfinx.jit
import numpy as np
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from tests.benchmarks.compare import compare

SAMPLES = 64


@dataclass(frozen=True)
class Problem:
    """A form of a state and a parameter field, and how large they are."""

    F: ufl.Form
    u: fem.Function
    m: fem.Function
    scale: float


def diffusion(n: int, degree: int) -> Problem:
    """-div(exp(m) grad u) = 1."""
    V = fem.functionspace(mesh.create_unit_square(MPI.COMM_SELF, n, n), ("Lagrange", degree))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    dx = ufl.dx(metadata={"quadrature_degree": 3 * degree})  # what FFCx takes for the residual, for its derivatives too
    return Problem(ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * dx - v * dx, u, m, 0.3)


def solid(n: int) -> Problem:
    """A neo-Hookean solid of P1 tetrahedra with the logarithm of its modulus."""
    msh = mesh.create_unit_cube(MPI.COMM_SELF, n, n, n)
    V, P = fem.functionspace(msh, ("Lagrange", 1, (3,))), fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(P), ufl.TestFunction(V)
    D = ufl.Identity(3) + ufl.grad(u)
    log_j = ufl.ln(ufl.det(D))
    energy = ufl.exp(m) * ((ufl.inner(D, D) - 3) / 2 - log_j + log_j**2)
    dx = ufl.dx(metadata={"quadrature_degree": 2})
    return Problem(ufl.derivative(energy * dx, u, v) - v[2] * dx, u, m, 0.02 / n)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    **{f"P1, n = {n}": partial(diffusion, n, 1) for n in (64, 128, 256)},
    **{f"P2, n = {n}": partial(diffusion, n, 2) for n in (32, 64)},
    "neo-Hookean, n = 12": partial(solid, 12),
}


class Floor:
    """The loop of DOLFINx."""

    def __init__(self, problem: Problem) -> None:
        F, self.u, self.m = problem.F, problem.u, problem.m
        self.w = fem.Function(self.u.function_space)
        at_w = ufl.replace(F, {F.arguments()[0]: self.w})
        forms = [F, ufl.derivative(at_w, self.u), ufl.derivative(at_w, self.m)]
        self.forms = [fem.form(form) for form in forms]

    def __call__(self, u: np.ndarray, m: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
        out = [np.zeros_like(u), np.zeros_like(u), np.zeros_like(m)]
        for sample in range(len(u)):
            self.u.x.array[:], self.m.x.array[:], self.w.x.array[:] = u[sample], m[sample], w[sample]
            for form, into in zip(self.forms, out, strict=True):
                fem.assemble_vector(into[sample], form)
        return out


def with_fem_vi(residual: fem_vi.Residual, u: torch.Tensor, m: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
    """The same with torch."""
    r = residual(u, m)
    return [r.detach(), *torch.autograd.grad(r, [u, m], w)]


def wall(work: Callable[[], object], rounds: int = 9) -> float:
    """Median of wall seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compile_seconds(problem: Problem, pde: fem_vi.WeakForm, arguments: list[Any]) -> float:
    """CPU and compiler seconds for one form: those of the residual and its gradients in an empty cache, over two."""
    original = dolfinx.jit.get_options
    with tempfile.TemporaryDirectory() as folder:
        dolfinx.jit.get_options = lambda *given: {**original(*given), "cache_dir": Path(folder)}
        try:
            start = time.perf_counter()
            with_fem_vi(fem_vi.Residual(pde, kernel=fem_vi.CompiledKernel()), *arguments)
            return (time.perf_counter() - start) / 2
        finally:
            dolfinx.jit.get_options = original


def bench(name: str) -> str:
    """One row: the two agree, then they are timed."""
    problem = PROBLEMS[name]()
    rng = np.random.default_rng(0)
    sizes = [x.x.array.size for x in (problem.u, problem.m, problem.u)]
    scales = [problem.scale, 0.3, 1.0]
    arrays = [scale * rng.standard_normal((SAMPLES, size)) for size, scale in zip(sizes, scales, strict=True)]
    tensors = [torch.from_numpy(x.copy()) for x in arrays]
    for x in tensors[:2]:
        x.requires_grad_()
    pde = fem_vi.WeakForm(problem.F, state=problem.u, inputs=[problem.m])
    one, two = (fem_vi.Residual(pde, kernel=fem_vi.CompiledKernel(num_threads=k)) for k in (1, 2))
    floor = Floor(problem)
    for ours, theirs in zip(with_fem_vi(one, *tensors), floor(*arrays), strict=True):
        assert np.abs(ours.numpy() - theirs).max() < 1e-12 * np.abs(theirs).max()
    row = compare(name, lambda: floor(*arrays), lambda: with_fem_vi(one, *tensors), rounds=7)
    threads = wall(lambda: with_fem_vi(one, *tensors)) / wall(lambda: with_fem_vi(two, *tensors))
    seconds = compile_seconds(problem, pde, tensors)
    return f"{row}   faster {1 / row.ratio:5.1f}   two threads {threads:4.2f}   compile {seconds:4.1f} s"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{SAMPLES} samples, residual and both gradients")
    for name in sys.argv[1:] or PROBLEMS:
        print(bench(name), flush=True)


if __name__ == "__main__":
    main()
