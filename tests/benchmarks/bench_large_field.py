"""One ELBO step of a posterior over a large field in space, against the value and gradient of the PDE that it contains.

    OMP_NUM_THREADS=1 container/run python3 -m tests.benchmarks.bench_large_field [n ...]

-div(exp(m) grad u) = 1 on the unit cube, P1 on n x n x n cubes, 100 sensors; prior `MaternField`, posterior `LowRankNormal` of
rank 50, one sample. CPU time, medians of rounds in turn. Bar: 1.3 at n = 99, which has 1e6 unknowns and is not among the
defaults. The last column is the largest resident set so far, over the unknowns.
"""

from __future__ import annotations

import resource
import sys
from functools import partial

import numpy as np
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from tests.benchmarks.compare import compare, variations

RANK = 50


def create_problem(n: int) -> tuple[fem_vi.InverseProblem, fem_vi.MaternField]:
    """The inverse problem and its prior."""
    msh = mesh.create_unit_cube(MPI.COMM_SELF, n, n, n)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
    msh.topology.create_connectivity(2, 3)
    edge = fem.locate_dofs_topological(V, 2, mesh.exterior_facet_indices(msh.topology))
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(0.0, edge, V)]))
    observe = fem_vi.PointObservation(V, np.random.default_rng(0).uniform(0.1, 0.9, (100, 3)))
    prior = fem_vi.MaternField(V, std=0.5, length=0.2, variance=fem_vi.PlainVariance())
    y = torch.full((100,), 0.05, dtype=torch.float64)
    return fem_vi.InverseProblem(prior, lambda m: observe(solve(m)), fem_vi.GaussianNoise(std=0.01), y), prior


def pde_step(problem: fem_vi.InverseProblem, field: torch.Tensor) -> torch.Tensor:
    """Value and gradient of the log-likelihood of one field."""
    m = field.clone().requires_grad_()
    problem.log_likelihood(m).sum().backward()
    assert m.grad is not None
    return m.grad


def elbo_step(problem: fem_vi.InverseProblem, posterior: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Value, gradient and update."""
    optimizer.zero_grad()
    fem_vi.ELBO(samples=1)(problem, posterior).loss.backward()
    optimizer.step()


def bench(n: int) -> str:
    """One row."""
    problem, prior = create_problem(n)
    posterior = fem_vi.LowRankNormal(prior, rank=RANK)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-3)
    fields = variations(prior.rsample((1,)).numpy())
    row = compare(
        f"{prior.num_global} unknowns",
        lambda: pde_step(problem, torch.from_numpy(next(fields))),
        partial(elbo_step, problem, posterior, optimizer),
        rounds=6 if n < 80 else 3,
        budget=0.0,
    )
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{row}   peak {peak / 1e9:5.2f} GB, {peak / prior.num_global / 1e3:6.1f} kB an unknown"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for n in [int(a) for a in sys.argv[1:]] or [20, 40, 60]:
        print(bench(n), flush=True)


if __name__ == "__main__":
    main()
