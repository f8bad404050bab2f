"""Sample, density and gradient of `SparsePrecisionNormal`, against one sparse factorisation of its precision, in one run.

    OMP_NUM_THREADS=1 container/run python3 -m tests.benchmarks.bench_sparse_precision [n ...]

CPU time, medians of rounds in turn, on n by n squares; the floor is SuperLU in the same order. Bar: 1.5 at n = 315, which has
1e5 unknowns.
"""

from __future__ import annotations

import sys

import scipy.sparse.linalg
import torch
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from tests.benchmarks.compare import Comparison, compare


def bench(n: int) -> Comparison:
    """One row."""
    V = fem.functionspace(mesh.create_unit_square(MPI.COMM_SELF, n, n), ("Lagrange", 1))
    prior = fem_vi.MaternField(V, std=1.0, length=0.2)
    posterior = fem_vi.SparsePrecisionNormal(prior)
    precision = prior.precision(2)
    options = {"SymmetricMode": True}

    def factorise() -> object:
        return scipy.sparse.linalg.splu(precision, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)

    def ours() -> torch.Tensor:
        posterior.zero_grad()
        q = posterior()
        density = q.log_prob(q.rsample())
        density.backward()
        return density

    name = f"{prior.num_global} unknowns, {len(posterior.theta)} entries"
    return compare(name, factorise, ours, rounds=5)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for n in [int(a) for a in sys.argv[1:]] or [100, 315]:
        print(bench(n), flush=True)


if __name__ == "__main__":
    main()
