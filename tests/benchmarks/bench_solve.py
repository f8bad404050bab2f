"""Value and gradient of a misfit through `Solve`, against the same written by hand in DOLFINx and petsc4py, in one run.

    OMP_NUM_THREADS=1 container/run python3 -m tests.benchmarks.bench_solve [n ...]

CPU time, medians of rounds in turn. Each call has another m than the last, or the kept factor would serve it.
Bars: 1.10 at n = 64, 1.03 at n = 256, 150 us of overhead on a 2 x 2 mesh. There the hand-written value and gradient are timed
inside a plain torch.autograd.Function as well: what that costs is torch's, whatever it wraps.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import torch

import fem_vi
from tests.benchmarks.compare import Comparison, compare
from tests.benchmarks.hand_written import Diffusion, HandWritten

SOLVERS: dict[str, dict[str, Any]] = {
    "MUMPS LU": {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"},
    "MUMPS Cholesky": {"ksp_type": "preonly", "pc_type": "cholesky", "pc_factor_mat_solver_type": "mumps"},
    "PETSc Cholesky": {"ksp_type": "preonly", "pc_type": "cholesky", "pc_factor_mat_solver_type": "petsc"},
    "CG + BoomerAMG": {"ksp_type": "cg", "pc_type": "hypre", "ksp_rtol": 1e-10},
}


class Plain(torch.autograd.Function):
    """A hand-written value with its gradient as a function of torch's: no checks, no batches, one derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, floor: HandWritten) -> torch.Tensor:
        value, gradient = floor(x.detach().numpy())
        ctx.gradient = torch.from_numpy(gradient)
        return torch.tensor(value, dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return g * ctx.gradient, None


def bench_plain(name: str, options: dict[str, Any]) -> Comparison:
    """Hand-written on a 2 x 2 mesh, and the same as a function of torch's."""
    floor = HandWritten(Diffusion.create(2), np.zeros(9), options)
    x = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    plain: Any = Plain.apply

    def value_and_gradient() -> tuple[float, torch.Tensor]:
        value = plain(x, floor)
        return float(value.detach()), torch.autograd.grad(value, x)[0]

    return compare(f"n = 2, {name}, by hand in torch", lambda: floor(x.detach().numpy()), value_and_gradient)


def bench(n: int, name: str, options: dict[str, Any]) -> Comparison:
    """One row: the two agree to 1e-7, then they are timed."""
    problem = Diffusion.create(n)
    size = problem.V.dofmap.index_map.size_local
    m = 0.5 * np.random.default_rng(0).standard_normal(size)
    data = np.zeros(size)
    pde = fem_vi.WeakForm(problem.F, state=problem.u, inputs=[problem.m], bcs=problem.bcs)
    solve = fem_vi.Solve(pde, petsc_options=options)
    floor = HandWritten(Diffusion.create(n), data, options)
    inputs = [torch.from_numpy((1 + 1e-3 * k) * m).requires_grad_() for k in range(7)]
    mine, theirs = itertools.cycle(inputs), itertools.cycle([x.detach().numpy() for x in inputs])
    d = torch.from_numpy(data)

    def ours() -> tuple[float, torch.Tensor]:
        x = next(mine)
        u = solve(x)
        misfit = u.detach() - d
        (gradient,) = torch.autograd.grad(u, x, misfit)
        return 0.5 * float(misfit @ misfit), gradient

    (value, gradient), (expected, exact) = ours(), floor(next(theirs))
    assert abs(value - expected) < 1e-8 * abs(expected)
    assert np.abs(gradient.numpy() - exact).max() < 1e-7 * np.abs(exact).max()
    return compare(f"n = {n}, {name}", lambda: floor(next(theirs)), ours)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for n in [int(a) for a in sys.argv[1:]] or [2, 64, 128, 256]:
        for name, options in SOLVERS.items():
            for row in [bench(n, name, options), *([bench_plain(name, options)] if n == 2 else [])]:
                extra = f"   overhead {1e6 * (row.candidate - row.floor):6.0f} us" if n == 2 else ""
                print(f"{row}{extra}", flush=True)


if __name__ == "__main__":
    main()
