"""Sparse matrices of 2-forms: created once, assembled many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ufl
from dolfinx import cpp, fem, la
from dolfinx.fem import petsc as fem_petsc
from numpy.typing import NDArray
from petsc4py import PETSc

from fem_vi.errors import UnsupportedForm
from fem_vi.parallel import all_values
from fem_vi.pde.inputs import Array


class MatrixForm:
    """A compiled 2-form with the Dirichlet conditions of its rows and columns, from which matrices are made.

    Args:
        form: UFL 2-form.
        bcs: Conditions whose rows and columns become those of the identity.

    MPI: Collective.
    """

    def __init__(self, form: ufl.Form, bcs: Sequence[fem.DirichletBC] = ()) -> None:
        self.form = fem.form(form)
        self.bcs = list(bcs)
        self._is_everywhere = any(
            part.integral_type() == "cell" and part.subdomain_id() in ("everywhere", "otherwise") for part in form.integrals()
        )

    def check_rows(self) -> None:
        """Refuse a form on parts of the mesh that leaves rows empty, without a condition: its matrices are all singular.

        Raises:
            UnsupportedForm: On every rank.

        MPI: Collective.
        """
        if self._is_everywhere:
            return
        index_map = self.form.function_spaces[0].dofmap.index_map
        starts = _sparsity(self.form, self.bcs).graph[1][: index_map.size_local + 1]
        empty = sum(all_values(self.form.mesh.comm, int((np.diff(starts) == 0).sum())))
        if empty:
            raise UnsupportedForm(
                f"No integral of the Jacobian reaches {empty} of {index_map.size_global} nodes of the state, and no Dirichlet "
                "condition prescribes their values: nothing determines them. Prescribe them by fem.dirichletbc, or state the "
                "problem on a mesh of that part (dolfinx.mesh.create_submesh)."
            )

    def create_matrix(self) -> Matrix:
        """A matrix with the sparsity of the form. Collective."""
        rows, columns = (V.dofmap.index_map_bs for V in self.form.function_spaces)
        if self.form.mesh.comm.size == 1 and rows == columns:
            return _SharedMatrix(self)
        return _SplitMatrix(self) if rows == columns == 1 else _InsertedMatrix(self)


def create_pattern(form: fem.Form, bcs: Sequence[fem.DirichletBC]) -> la.MatrixCSR:
    """The sparsity of a compiled 2-form on one rank, each entry by itself, with room for the entries."""
    return la.matrix_csr(_sparsity(form, bcs), la.BlockMode.expanded)


def _sparsity(form: fem.Form, bcs: Sequence[fem.DirichletBC]) -> Any:
    """Where a form has entries, and the diagonal of prescribed rows, which need not be reached by any integral. Collective."""
    pattern = fem.create_sparsity_pattern(form)
    dofmap = form.function_spaces[0].dofmap
    for bc in bcs:
        rows = np.unique(bc.dof_indices()[0] // dofmap.index_map_bs)
        pattern.insert_diagonal(rows[rows < dofmap.index_map.size_local].astype(np.int32))
    pattern.finalize()
    return pattern


class Matrix:
    """A matrix that knows how to assemble itself.

    Attributes:
        petsc: The PETSc matrix.
    """

    petsc: PETSc.Mat

    def assemble(self) -> None:
        """Assemble at what is loaded in the form's Functions and Constants. Collective."""
        raise NotImplementedError

    def write(self, entries: Array) -> None:
        """Take all entries, `(num_entries,)`, in the order of `create_pattern`, for those of the matrix. Not collective.

        On one rank, for spaces of one block size; matrices on several ranks have their entries from each other.
        """
        raise NotImplementedError


Assemble = Callable[[Matrix], None]
"""Gives a matrix its entries."""


def assemble_loaded(matrix: Matrix) -> None:
    """Assemble a matrix at what is loaded. Collective."""
    matrix.assemble()


class _SharedMatrix(Matrix):
    """On one rank: DOLFINx assembles into the arrays that PETSc reads, which takes a third less time than PETSc's insertion."""

    def __init__(self, kind: MatrixForm) -> None:
        self._form, self._bcs = kind.form, kind.bcs
        self._csr = create_pattern(self._form, self._bcs)
        self._data: Array = self._csr.data
        spaces = self._form.function_spaces
        sizes = [int(V.dofmap.index_map.size_local * V.dofmap.index_map_bs) for V in spaces]
        rows = (_integers(self._csr.indptr), _integers(self._csr.indices), self._data)
        self.petsc = PETSc.Mat().createAIJWithArrays(sizes, rows, comm=self._form.mesh.comm)
        self.petsc.setBlockSizes(*(int(V.dofmap.index_map_bs) for V in spaces))

    def assemble(self) -> None:
        self._data.fill(0.0)
        fem.assemble_matrix(self._csr, self._form, bcs=self._bcs)
        self.petsc.stateIncrease()

    def write(self, entries: Array) -> None:
        self._data[:] = entries
        self.petsc.stateIncrease()


class _SplitMatrix(Matrix):
    """On several ranks, for spaces without blocks: DOLFINx assembles into its own arrays, and PETSc reads copies.

    One holds the columns that the rank owns, the other those of other ranks.
    """

    def __init__(self, kind: MatrixForm) -> None:
        self._form, self._bcs = kind.form, kind.bcs
        self._csr = la.matrix_csr(_sparsity(self._form, self._bcs))
        self._data: Array = self._csr.data
        spaces = self._form.function_spaces
        maps = [V.dofmap.index_map for V in spaces]
        rows, columns = (int(m.size_local) for m in maps)
        starts = self._csr.indptr[: rows + 1]
        indices = self._csr.indices[: starts[-1]]
        own = indices < columns
        self._own, other = np.flatnonzero(own), np.flatnonzero(~own)
        row_of = np.repeat(np.arange(rows), np.diff(starts))[other]
        ghosts = self._csr.index_map(1).ghosts
        self._other = other[np.lexsort((ghosts[indices[other] - columns], row_of))]  # PETSc wants each row in global order
        self._values = self._data[self._own], self._data[self._other]
        others = ghosts[indices[self._other] - columns]
        before = np.concatenate([[0], np.cumsum(own)])
        blocks = (
            (_integers(before[starts]), _integers(indices[self._own]), self._values[0]),
            (_integers(starts - before[starts]), _integers(others), self._values[1]),
        )
        sizes = [(int(m.size_local), int(m.size_global)) for m in maps]
        self.petsc = PETSc.Mat().createAIJWithArrays(sizes, blocks, comm=self._form.mesh.comm)

    def assemble(self) -> None:
        self._data.fill(0.0)
        fem.assemble_matrix(self._csr, self._form, bcs=self._bcs)
        self._csr.scatter_reverse()
        for values, positions in zip(self._values, (self._own, self._other), strict=True):
            np.take(self._data, positions, out=values)
        self.petsc.assemble()


def _integers(x: NDArray[np.integer]) -> NDArray[np.integer]:
    return x.astype(PETSc.IntType)


class _InsertedMatrix(Matrix):
    """PETSc's own insertion, for blocked spaces where DOLFINx's matrices fail.

    They take no rows and columns of different block sizes, and no Dirichlet conditions on several ranks.
    """

    def __init__(self, kind: MatrixForm) -> None:
        self._form, self._bcs = kind.form, kind.bcs
        self.petsc = cpp.la.petsc.create_matrix(self._form.mesh.comm, _sparsity(self._form, self._bcs))

    def assemble(self) -> None:
        self.petsc.zeroEntries()
        fem_petsc.assemble_matrix(self.petsc, self._form, bcs=self._bcs)
        self.petsc.assemble()
