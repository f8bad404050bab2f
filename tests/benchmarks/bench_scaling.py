"""Conjugate gradients with algebraic multigrid: how the time of value and gradient grows with the mesh and falls with ranks.

    container/run python3 -m tests.benchmarks.bench_scaling             # time per dof at 1e6 dofs against 1e5; CPU time
    container/run mpirun -n 2 python3 -m tests.benchmarks.bench_scaling # speed-up over 1 rank; wall time, on a quiet machine

Bars: at most 1.5 times the time per dof; a speed-up within 5 % of that of the same written by hand in DOLFINx. In a run on
several ranks, one rank also solves the whole problem alone, while the others sleep; what else runs on a machine only ever
adds to wall time, so the least time of all rounds counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from dolfinx import fem, la
from dolfinx.fem import petsc as fem_petsc
from mpi4py import MPI

import fem_vi
from tests.benchmarks.bench_solve import SOLVERS
from tests.benchmarks.compare import compare, variations
from tests.benchmarks.hand_written import Diffusion, HandWritten

MULTIGRID: dict[str, dict[str, Any]] = {
    "CG + BoomerAMG": SOLVERS["CG + BoomerAMG"],
    "CG + GAMG": {"ksp_type": "cg", "pc_type": "gamg", "ksp_rtol": 1e-10},
}
SMALL, LARGE = 315, 999  # 99 856 and 1 000 000 dofs

Work = Callable[[], tuple[float, np.ndarray]]


class HandWrittenOnRanks(HandWritten):
    """The floor with what several ranks need: ghosts are updated, and what they collect goes to its owner."""

    def __init__(self, problem: Diffusion, data: np.ndarray, options: dict[str, Any]) -> None:
        super().__init__(problem, data, options)
        self.b.scatter_reverse(la.InsertMode.add)
        self.rhs.x.array[:] = self.b.array
        self.comm = problem.V.mesh.comm
        self.owned = slice(problem.V.dofmap.index_map.size_local)

    def __call__(self, m: np.ndarray) -> tuple[float, np.ndarray]:
        self.m.x.array[self.owned] = m
        self.m.x.scatter_forward()
        self.A.zeroEntries()
        fem_petsc.assemble_matrix(self.A, self.a, bcs=self.bcs)
        self.A.assemble()
        self.ksp.setOperators(self.A)
        self.ksp.solve(self.rhs.x.petsc_vec, self.u.x.petsc_vec)
        self.u.x.scatter_forward()
        misfit = self.u.x.array[self.owned] - self.data
        self.g.x.array[self.owned] = misfit
        self.g.x.array[self.fixed] = 0.0
        self.ksp.solve(self.g.x.petsc_vec, self.lam.x.petsc_vec)
        self.lam.x.scatter_forward()
        self.out.x.array[:] = 0.0
        fem.assemble_vector(self.out.x.array, self.gradient)
        self.out.x.scatter_reverse(la.InsertMode.add)
        return 0.5 * self.comm.allreduce(float(misfit @ misfit)), self.out.x.array[self.owned]


def create_field(problem: Diffusion) -> np.ndarray:
    """The same rough but bounded field on any number of ranks: owned values."""
    x, y = problem.V.tabulate_dof_coordinates()[: problem.V.dofmap.index_map.size_local, :2].T
    return 0.5 * (np.sin(37 * x + 11 * y) + np.cos(23 * y - 29 * x))


def create(n: int, options: dict[str, Any], comm: MPI.Comm) -> tuple[Work, Work]:
    """Floor and fem_vi on one mesh (two would be split among the ranks in two ways), which agree to 1e-7."""
    problem = Diffusion.create(n, comm)
    m = create_field(problem)
    d = np.full_like(m, 0.05)
    floor = HandWrittenOnRanks(problem, d, options)
    pde = fem_vi.WeakForm(problem.F, state=problem.u, inputs=[problem.m], bcs=problem.bcs)
    solve = fem_vi.Solve(pde, petsc_options=options)
    data = torch.from_numpy(d)
    mine, theirs = variations(m), variations(m)

    def ours() -> tuple[float, np.ndarray]:
        x = torch.from_numpy(next(mine)).requires_grad_()
        u = solve(x)
        misfit = u.detach() - data
        (gradient,) = torch.autograd.grad(u, x, misfit)
        return 0.5 * comm.allreduce(float(misfit @ misfit)), gradient.numpy()

    (expected, exact), (value, gradient) = floor(next(theirs)), ours()
    assert abs(value - expected) < 1e-8 * abs(expected)
    scale = comm.allreduce(np.abs(exact).max(), op=MPI.MAX)
    assert np.abs(gradient - exact).max() < 1e-7 * scale
    return lambda: floor(next(theirs)), ours


def per_dof() -> None:
    """One rank: time per dof on two meshes."""
    for name, options in MULTIGRID.items():
        rows = [compare(f"{(n + 1) ** 2} dofs, {name}", *create(n, options, MPI.COMM_SELF), rounds=5) for n in (SMALL, LARGE)]
        for row in rows:
            print(row, flush=True)
        growth = (SMALL + 1) ** 2 / (LARGE + 1) ** 2
        small, large = rows
        print(
            f"{name}: time per dof, large against small: fem_vi {growth * large.candidate / small.candidate:.2f}, "
            f"floor {growth * large.floor / small.floor:.2f}   (bar 1.5)",
            flush=True,
        )


def seconds_on(comm: MPI.Comm, work: Work) -> float:
    """Wall seconds of one call, from when all ranks are there until the last is done."""
    comm.barrier()
    start = time.perf_counter()
    work()
    comm.barrier()
    return time.perf_counter() - start


def sleep_until(comm: MPI.Comm) -> None:
    """Wait for the other ranks without taking a core."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.001)


def speed_up(n: int = 512, rounds: int = 15) -> None:
    """Several ranks against one of them, in turn."""
    comm = MPI.COMM_WORLD
    for name, options in MULTIGRID.items():
        alone = create(n, options, MPI.COMM_SELF) if comm.rank == 0 else None
        sleep_until(comm)
        together = create(n, options, comm)
        times: list[tuple[float, ...]] = []
        for _ in range(rounds):
            one = [seconds_on(MPI.COMM_SELF, work) for work in alone] if alone else [0.0, 0.0]
            sleep_until(comm)
            times.append((*one, *(seconds_on(comm, work) for work in together)))
        floor_1, ours_1, floor_p, ours_p = (min(column) for column in zip(*times, strict=True))
        if comm.rank == 0:
            print(
                f"n = {n}, {name:<15} floor {1e3 * floor_1:8.1f} -> {1e3 * floor_p:8.1f} ms, speed-up {floor_1 / floor_p:.3f}"
                f"   fem_vi {1e3 * ours_1:8.1f} -> {1e3 * ours_p:8.1f} ms, speed-up {ours_1 / ours_p:.3f}"
                f"   fem_vi's / floor's {ours_1 / ours_p * floor_p / floor_1:.3f}   (bar 0.95, {comm.size} ranks)",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if MPI.COMM_WORLD.size == 1:
        per_dof()
    else:
        speed_up()
