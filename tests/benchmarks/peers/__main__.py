"""Value and gradient through fem_vi against dolfinx-adjoint and torch-fem, on the same problem, in one table.

    OMP_NUM_THREADS=1 FENICSX=0.11 container/run python3 -m tests.benchmarks.peers [n ...]

Each peer runs in an environment of its own, installed on first use in `~/.cache/fem_vi/peers`, in a process of its own that
waits while another is timed. The loss is |u - d|^2 / 2 over the nodes, or its integral. Each call has
another m than the last. CPU time, medians of rounds in turn.
Bars at n = 256 on DOLFINx 0.11, for the sum: fem_vi is 1.8 times as fast as dolfinx-adjoint with the same LU, 2.3 times with
Cholesky, and 5 times as fast as torch-fem with its direct solver.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import basix
import numpy as np
import torch
import ufl
from dolfinx import fem

import fem_vi
from tests.benchmarks.bench_solve import SOLVERS
from tests.benchmarks.compare import seconds, variations
from tests.benchmarks.hand_written import Diffusion
from tests.benchmarks.peers.case import Case
from tests.benchmarks.peers.environments import NoPeer, python_with

Loss = Callable[[torch.Tensor], torch.Tensor]
Work = Callable[[], tuple[float, np.ndarray]]

REQUIREMENTS = {"dolfinx-adjoint": "dolfinx-adjoint==0.4.*", "torch-fem": "torch-fem==0.14.*"}


@dataclass(frozen=True)
class Row:
    """A peer with one solver, and the solvers of fem_vi that it is held against, each with its bar at n = 256."""

    peer: str
    solver: str
    loss: str
    serve: str
    against: dict[str, float | None]


ROWS = [
    Row("dolfinx-adjoint", "MUMPS LU", "sum", "with_dolfinx_adjoint:sum-lu", {"MUMPS LU": 1.8, "MUMPS Cholesky": 2.3}),
    Row("dolfinx-adjoint", "MUMPS Cholesky", "sum", "with_dolfinx_adjoint:sum-cholesky", {"MUMPS Cholesky": None}),
    Row(
        "dolfinx-adjoint", "MUMPS LU", "integral", "with_dolfinx_adjoint:integral-lu", {"MUMPS LU": None, "MUMPS Cholesky": None}
    ),
    Row("torch-fem", "direct", "sum", "with_torch_fem:direct", {"MUMPS LU": None, "MUMPS Cholesky": 5.0}),
    Row("torch-fem", "CG + AMG", "sum", "with_torch_fem:cg", {"CG + BoomerAMG": None}),
]
UNPINNED = "with_dolfinx_adjoint:unpinned-lu"


class Peer:
    """A process that times itself on request and idles otherwise."""

    def __init__(self, python: Path, serve: str, case: Path) -> None:
        result = case.with_name(f"{serve.replace(':', '-')}.npz")
        command = [python, "-m", "tests.benchmarks.peers.serve", serve, case, result]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if not self.read():
            raise RuntimeError(f"{serve} failed; its message stands above.")
        with np.load(result) as file:
            self.value, self.gradient = float(file["value"]), file["gradient"]

    def read(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def seconds(self, repeats: int) -> float:
        """CPU seconds of one call."""
        assert self.process.stdin
        print(repeats, file=self.process.stdin, flush=True)
        return float(self.read())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def create_case(problem: Diffusion, n: int) -> Case:
    """A rough field and data that it does not fit."""
    V, rng = problem.V, np.random.default_rng(0)
    nodes = V.tabulate_dof_coordinates()[:, :2]
    cells = np.array(V.dofmap.list)
    a, b, c = (nodes[cells[:, k]] for k in range(3))
    clockwise = np.linalg.det(np.stack([b - a, c - a], axis=1)) < 0
    cells[clockwise] = cells[clockwise][:, [0, 2, 1]]
    points, weights = basix.make_quadrature(basix.CellType.triangle, 3)
    return Case(
        n,
        nodes,
        cells,
        problem.bcs[0].dof_indices()[0],
        np.column_stack([1 - points.sum(axis=1), points]),
        weights / weights.sum(),
        0.5 * rng.standard_normal(len(nodes)),
        0.05 * rng.standard_normal(len(nodes)),
    )


def losses(problem: Diffusion, case: Case) -> dict[str, Loss]:
    """The two losses: the sum over nodes, in torch, and the integral."""
    u, d = fem.Function(problem.V), fem.Function(problem.V)
    d.x.array[:] = case.data
    data = torch.from_numpy(case.data)
    return {
        "sum": lambda state: 0.5 * (state - data).square().sum(),
        "integral": fem_vi.Functional(0.5 * (u - d) ** 2 * ufl.dx, [u]),
    }


def with_fem_vi(problem: Diffusion, case: Case, loss: Loss, solver: str) -> Work:
    """Value and gradient through `Solve`."""
    pde = fem_vi.WeakForm(problem.F, state=problem.u, inputs=[problem.m], bcs=problem.bcs)
    solve = fem_vi.Solve(pde, petsc_options=SOLVERS[solver])
    inputs = variations(case.m)

    def work() -> tuple[float, np.ndarray]:
        m = torch.from_numpy(next(inputs)).requires_grad_()
        value = loss(solve(m))
        (gradient,) = torch.autograd.grad(value, m)
        return float(value.detach()), gradient.numpy()

    return work


def error(gradient: np.ndarray, exact: np.ndarray) -> float:
    """Largest difference, relative to the largest entry."""
    return float(np.abs(gradient - exact).max() / np.abs(exact).max())


def take_turns(timers: list[Callable[[int], float]], *, rounds: int = 10, budget: float = 0.2) -> np.ndarray:
    """CPU seconds of one call of each in each round, (rounds, len(timers)); a first round is thrown away.

    Args:
        timers: Each takes a number of calls and returns the seconds of one.
        rounds: Rows of the result.
        budget: CPU seconds for one measurement: short calls are repeated.
    """
    repeats = [max(1, round(budget / timer(1))) for timer in timers]
    turns = [[timer(count) for timer, count in zip(timers, repeats, strict=True)] for _ in range(rounds + 1)]
    return np.array(turns[1:])


def compare(row: Row, case: Path, python: Path, ours: dict[str, Work], n: int) -> None:
    """The lines of one peer and solver: the two agree to 1e-6, then they are timed."""
    peer = Peer(python, row.serve, case)
    off = {}
    for solver, work in ours.items():
        value, gradient = work()
        off[solver] = error(peer.gradient, gradient)
        assert abs(peer.value - value) < 1e-6 * abs(value), (row, peer.value, value)
        assert off[solver] < 1e-6, (row, off)
    times = take_turns([peer.seconds, *(partial(seconds, work) for work in ours.values())])
    peer.close()
    theirs = np.median(times[:, 0])
    for column, (solver, bar) in enumerate(row.against.items(), start=1):
        mine, ratio = np.median(times[:, column]), np.median(times[:, 0] / times[:, column])
        against = f"   (bar {bar})" if bar and n == 256 else ""
        print(
            f"{n:>3}   {row.loss:<8}   {row.peer + ', ' + row.solver:<31} {1e3 * theirs:8.1f} ms   fem_vi, {solver:<14} "
            f"{1e3 * mine:7.1f} ms   {ratio:5.2f} times as fast{against:<12}   gradients differ by {off[solver]:.0e}",
            flush=True,
        )


def report_unpinned(case: Path, python: Path, exact: np.ndarray, n: int) -> None:
    """How far a gradient is off where the peer leaves the quadrature of each form to UFL."""
    peer = Peer(python, UNPINNED, case)
    peer.close()
    print(
        f"{n:>3}   integral   dolfinx-adjoint with the quadrature degrees that UFL estimates for each form: "
        f"the gradient is off by {error(peer.gradient, exact):.0e}",
        flush=True,
    )


def main(sizes: list[int]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    pythons: dict[str, Path] = {}
    for name, requirement in REQUIREMENTS.items():
        try:
            pythons[name] = python_with(name, requirement)
        except NoPeer as reason:
            print(reason)
    print(f"DOLFINx {version('fenics-dolfinx')}, torch {torch.__version__}; value and gradient, CPU time")
    for n in sizes:
        problem = Diffusion.create(n)
        with tempfile.TemporaryDirectory() as folder:
            case = Path(folder) / "case.npz"
            content = create_case(problem, n)
            content.write(case)
            loss = losses(problem, content)
            for row in ROWS:
                if row.peer in pythons:
                    ours = {solver: with_fem_vi(problem, content, loss[row.loss], solver) for solver in row.against}
                    compare(row, case, pythons[row.peer], ours, n)
            if "dolfinx-adjoint" in pythons:
                exact = with_fem_vi(problem, content, loss["integral"], "MUMPS LU")()[1]
                report_unpinned(case, pythons["dolfinx-adjoint"], exact, n)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [64, 128, 256])
