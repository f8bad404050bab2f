"""A step of an ELBO with 64 samples through `Solve`, all at once against one sample after another, in one run.

    OMP_NUM_THREADS=1 container/run python3 -m tests.benchmarks.bench_step

The problem of `demos/demo_uncertainty_table.py`: -div(e^x grad u) = 10 on 32 x 32 bilinear squares, x constant on 8 x 8 blocks,
169 sensors, full-rank normal. Both factorise and solve sample by sample; one evaluates Jacobians and gradients of all together.
CPU time, medians of rounds in turn, without compilation. Bar: 60 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from fem_vi.pde import sample_kernels
from tests.benchmarks.compare import Comparison, compare

CELLS, BLOCKS, SAMPLES = 32, (8, 8), 64
BAR = 0.060
GRID = np.arange(1, 14) / 14
OPTIONS = {"pc_type": "cholesky", "pc_factor_mat_solver_type": "petsc", "pc_factor_mat_ordering_type": "nd"}


def problem() -> fem_vi.InverseProblem:
    """Temperatures at sensors say where a plate conducts heat."""
    plate = mesh.create_unit_square(MPI.COMM_SELF, CELLS, CELLS, mesh.CellType.quadrilateral)
    V, C = fem.functionspace(plate, ("Lagrange", 1)), fem.functionspace(plate, ("DG", 0))
    u, x, v = fem.Function(V), fem.Function(C), ufl.TestFunction(V)
    plate.topology.create_connectivity(1, 2)
    edge = fem.locate_dofs_topological(V, 1, mesh.exterior_facet_indices(plate.topology))
    F = ufl.exp(x) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - 10.0 * v * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[x], bcs=[fem.dirichletbc(0.0, edge, V)])
    solve, blocks = fem_vi.Solve(pde, petsc_options=OPTIONS), fem_vi.PiecewiseConstant(C, fem_vi.Blocks(BLOCKS))
    observe = fem_vi.PointObservation(V, np.stack(np.meshgrid(GRID, GRID, indexing="ij"), axis=-1).reshape(-1, 2))
    n = int(np.prod(BLOCKS))
    prior = fem_vi.GaussianVector(torch.zeros(n), covariance=4.0 * torch.eye(n), comm=MPI.COMM_SELF)
    y = observe(solve(blocks(torch.zeros(n, dtype=torch.float64))))
    return fem_vi.InverseProblem(prior, lambda theta: observe(solve(blocks(theta))), fem_vi.GaussianNoise(0.05), y)


def step_of(inverse: fem_vi.InverseProblem) -> Callable[[], None]:
    """A step of Adam, from the prior; its learning rate is so small that all steps are alike."""
    posterior = fem_vi.FullRankNormal(inverse.prior)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-6)
    objective = fem_vi.ELBO(samples=SAMPLES)

    def step() -> None:
        optimizer.zero_grad()
        objective(inverse, posterior).loss.backward()
        optimizer.step()

    return step


def bench(rounds: int) -> Comparison:
    """One after another, and all at once."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step = step_of(problem())

    def one_after_another() -> None:
        with mock.patch.object(sample_kernels, "FEW", SAMPLES):
            step()

    step()  # compiles
    return compare(f"step of {SAMPLES} samples, one by one / at once", one_after_another, step, rounds=rounds)


def main() -> None:
    """Print the comparison."""
    row = bench(rounds=25)
    print(row)
    print(f"{1e3 * row.candidate:.1f} ms; the bar is {1e3 * BAR:.0f} ms")


if __name__ == "__main__":
    main()
