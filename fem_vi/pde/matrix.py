"""Sparse matrices of 2-forms: created once, assembled many times."""

from __future__ import annotations

from collections.abc import Sequence

import ufl
from dolfinx import fem, la
from dolfinx.fem import petsc as fem_petsc
from petsc4py import PETSc

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

    def create_matrix(self) -> Matrix:
        """A matrix with the sparsity of the form. Collective."""
        one_rank = self.form.mesh.comm.size == 1
        rows, columns = (V.dofmap.index_map_bs for V in self.form.function_spaces)
        return _SharedMatrix(self) if one_rank and rows == columns else _InsertedMatrix(self)


class Matrix:
    """A matrix that knows how to assemble itself.

    Attributes:
        petsc: The PETSc matrix.
    """

    petsc: PETSc.Mat

    def assemble(self) -> None:
        """Assemble at what is loaded in the form's Functions and Constants. Collective."""
        raise NotImplementedError

    def create_vectors(self) -> tuple[PETSc.Vec, PETSc.Vec]:
        """A vector that the matrix can multiply, and one that takes the product. Collective."""
        return self.petsc.createVecs()  # type: ignore[no-any-return]


class _SharedMatrix(Matrix):
    """On one rank: DOLFINx assembles into the arrays that PETSc reads, which takes a third less time than PETSc's insertion."""

    def __init__(self, kind: MatrixForm) -> None:
        self._form, self._bcs = kind.form, kind.bcs
        self._csr = fem.create_matrix(self._form, la.BlockMode.expanded)
        self._data: Array = self._csr.data
        spaces = self._form.function_spaces
        sizes = [int(V.dofmap.index_map.size_local * V.dofmap.index_map_bs) for V in spaces]
        rows = (self._csr.indptr.astype(PETSc.IntType), self._csr.indices.astype(PETSc.IntType, copy=False), self._data)
        self.petsc = PETSc.Mat().createAIJWithArrays(sizes, rows, comm=self._form.mesh.comm)
        self.petsc.setBlockSizes(*(int(V.dofmap.index_map_bs) for V in spaces))

    def assemble(self) -> None:
        self._data.fill(0.0)
        fem.assemble_matrix(self._csr, self._form, bcs=self._bcs)
        self.petsc.stateIncrease()


class _InsertedMatrix(Matrix):
    """PETSc's own insertion: on several ranks, and where rows and columns differ in block size, which DOLFINx refuses."""

    def __init__(self, kind: MatrixForm) -> None:
        self._form, self._bcs = kind.form, kind.bcs
        self.petsc = fem_petsc.create_matrix(self._form)

    def assemble(self) -> None:
        self.petsc.zeroEntries()
        fem_petsc.assemble_matrix(self.petsc, self._form, bcs=self._bcs)
        self.petsc.assemble()
