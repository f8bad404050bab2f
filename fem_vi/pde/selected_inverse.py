"""Entries of the inverse of a factorised matrix, by MUMPS: those at chosen places, without the columns around them.

MUMPS prunes the elimination tree for each entry. For the entries on the pattern of a plane P1 Laplacian with 4e3 and 17e3
unknowns that takes 15 and 25 numerical factorisations, where solving for all columns takes 190 and 900.

References:
    Amestoy, Duff, L'Excellent, Robert, Rouet, Ucar (2012), On computing inverse entries of a sparse matrix in an out-of-core
    environment.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from petsc4py import PETSc

from fem_vi.errors import SolveFailed
from fem_vi.parallel import all_to_all
from fem_vi.pde.inputs import Array

Numbers = NDArray[np.int64]


def can_select() -> bool:
    """Whether PETSc has MUMPS, and what MUMPS's inverse entries are asked with."""
    return bool(PETSc.Sys.hasExternalPackage("mumps")) and hasattr(_library(), "MatMumpsGetInverseTranspose")


def _library() -> Any:
    """PETSc, as petsc4py is linked with it; petsc4py itself does not have the function."""
    return ctypes.CDLL(PETSc.__file__)


class SelectedInverse:
    """Where entries of A^-T are wanted, for any factors of matrices of one size.

    Rank 0 holds the pattern of all ranks, as MUMPS wants it.

    Args:
        comm: Ranks that share the matrix.
        size: Rows of A on all ranks.
        rows: Global row of each entry that this rank wants.
        columns: Global column of each.

    MPI: Collective.
    """

    def __init__(self, comm: MPI.Comm, size: int, rows: Numbers, columns: Numbers) -> None:
        self._comm = comm
        wanted = all_to_all(comm, [rows * size + columns if rank == 0 else None for rank in range(comm.size)])
        keys = [key for key in wanted if key is not None]
        self._counts = [len(key) for key in keys]
        places, self._positions = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *keys]), return_inverse=True)
        owned = size if comm.rank == 0 else 0
        starts = np.searchsorted(places, np.arange(owned + 1) * size).astype(PETSc.IntType)
        pattern = starts, (places % size).astype(PETSc.IntType), np.zeros(places.size)
        self._matrix = PETSc.Mat().createAIJ(((owned, size), (owned, size)), comm=comm)
        self._matrix.setPreallocationCSR(pattern)
        self._matrix.assemble()
        self._function = _library().MatMumpsGetInverseTranspose
        self._function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def compute(self, factor: PETSc.Mat) -> Array:
        """The entries of A^-T that this rank wants, in its order. MUMPS cannot solve with the factor afterwards.

        Args:
            factor: Factor by MUMPS.

        Raises:
            SolveFailed: On every rank, where MUMPS reports an error.

        MPI: Collective.
        """
        code = self._function(factor.handle, self._matrix.handle)
        if code != 0:
            raise SolveFailed(f"MUMPS could not compute entries of the inverse: PETSc's error {code}")
        parts: list[Any] = [None] * self._comm.size
        if self._comm.rank == 0:
            values = self._matrix.getValuesCSR()[2][self._positions.ravel()]
            parts = np.split(values, np.cumsum(self._counts)[:-1])
        return np.asarray(all_to_all(self._comm, parts)[0])
