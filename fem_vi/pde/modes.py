"""The dominant eigenpairs of a symmetric operator on fields, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from slepc4py import SLEPc

from fem_vi.errors import SolveFailed
from fem_vi.parallel import sum_over_ranks
from fem_vi.pde.inputs import Array

TOLERANCE = 1e-11
GAP = 1e-6
"""Eigenvalues closer than that, relatively, are taken for one: their eigenvectors are determined as a space only."""


def dominant_modes(apply: Callable[[Array], Array], start: Array, num_modes: int, comm: MPI.Comm) -> tuple[Array, Array]:
    """The largest eigenvalues and orthonormal eigenvectors of a symmetric positive semidefinite operator.

    Args:
        apply: The operator on owned entries, `(n_owned,)` to the same; collective.
        start: First vector, owned entries, that does not depend on the partition and is orthogonal to no eigenvector.
        num_modes: How many; fewer come back where the space has fewer.
        comm: Ranks that share the vectors.

    Returns:
        Eigenvalues, descending, `(num_modes,)`, replicated; eigenvectors, `(num_modes, n_owned)`.

    Raises:
        SolveFailed: Where SLEPc found fewer than it was asked for.

    MPI: Collective.
    """
    total = int(sum_over_ranks(comm, np.array([float(len(start))]))[0])
    num_modes = min(num_modes, total)
    matrix = PETSc.Mat().createPython(((len(start), total), (len(start), total)), _Shell(apply), comm=comm)
    matrix.setUp()
    first, vector = matrix.createVecs()
    first.array_w[:] = start
    solver = SLEPc.EPS().create(comm)
    solver.setOperators(matrix)
    solver.setProblemType(SLEPc.EPS.ProblemType.HEP)
    solver.setWhichEigenpairs(SLEPc.EPS.Which.LARGEST_REAL)
    solver.setDimensions(num_modes)
    solver.setTolerances(TOLERANCE, 1000)
    solver.setInitialSpace([first])
    solver.solve()
    found = solver.getConverged()
    values, vectors = np.zeros(num_modes), np.zeros((num_modes, len(start)))
    for k in range(min(found, num_modes)):
        values[k] = solver.getEigenpair(k, vector).real
        vectors[k] = vector.array_r
    for resource in (solver, matrix, first, vector):
        resource.destroy()
    if found < num_modes:
        raise SolveFailed(f"SLEPc found {found} of {num_modes} modes of the covariance. Ask for fewer.")
    return values, vectors


def align_modes(values: Array, vectors: Array, witnesses: Array, comm: MPI.Comm) -> Array:
    """Choose signs, and bases of the spaces of equal eigenvalues, so that they do not depend on the partition.

    Within a space with orthonormal rows Phi and witnesses w let Phi w' = Q R with a positive diagonal of R; the rows Q' Phi are
    the same for every basis Phi of the space.

    Args:
        values: Eigenvalues, descending, `(num_modes,)`.
        vectors: Orthonormal eigenvectors, `(num_modes, n_owned)`.
        witnesses: Random vectors that do not depend on the partition, `(num_modes, n_owned)`.
        comm: Ranks that share the vectors.

    MPI: Collective.
    """
    products = sum_over_ranks(comm, vectors @ witnesses.T)
    aligned = vectors.copy()
    edges = np.flatnonzero(values[:-1] - values[1:] > GAP * np.abs(values[:-1])) + 1
    for group in np.split(np.arange(len(values)), edges):
        q, r = np.linalg.qr(products[np.ix_(group, np.arange(len(group)))])
        aligned[group] = (q * np.where(r.diagonal() < 0.0, -1.0, 1.0)).T @ vectors[group]
    return aligned


class _Shell:
    """An operator for PETSc."""

    def __init__(self, apply: Callable[[Array], Array]) -> None:
        self._apply = apply

    def mult(self, matrix: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        y.array_w[:] = self._apply(x.array_r)
