"""Several vectors at once, as dense PETSc matrices that share memory with NumPy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from petsc4py import PETSc

from fem_vi.parallel import sum_over_ranks
from fem_vi.pde.inputs import Array


class DenseBlock:
    """Operands and results of products or solves with one matrix A, one row of NumPy for each vector.

    PETSc's dense (n, width), column by column, is NumPy's (width, n), row by row: both look at the same memory.

    Args:
        matrix: A, of shape (m, n).
        width: Number of vectors.

    Attributes:
        left: `(width, n_owned)`: what A multiplies, or the solutions.
        right: `(width, m_owned)`: the products, or the right-hand sides.
        x: `left` for PETSc.
        b: `right` for PETSc.

    MPI: Collective.
    """

    def __init__(self, matrix: PETSc.Mat, width: int) -> None:
        rows, columns = matrix.getSizes()
        self.width = width
        self._comm = matrix.comm.tompi4py()
        self.left, self.right = np.zeros((width, columns[0])), np.zeros((width, rows[0]))
        self.x = PETSc.Mat().createDense((columns, width), array=self.left.T, comm=matrix.comm)
        self.b = PETSc.Mat().createDense((rows, width), array=self.right.T, comm=matrix.comm)

    def set_left(self, rows: Iterable[Array]) -> None:
        """Write what A multiplies."""
        for into, row in zip(self.left, rows, strict=True):
            into[:] = row
        self.x.stateIncrease()

    def set_right(self, rows: Array) -> None:
        """Write the right-hand sides."""
        self.right[:] = rows
        self.b.stateIncrease()

    def scales(self) -> Array:
        """One over the norm of each right-hand side (one where that is zero), replicated. Collective."""
        norms = np.sqrt(sum_over_ranks(self._comm, np.einsum("ij,ij->i", self.right, self.right)))
        return 1.0 / np.where(norms > 0.0, norms, 1.0)
