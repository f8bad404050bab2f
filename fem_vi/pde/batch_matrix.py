"""The matrices of a 2-form for many samples at once: element matrices on SIMD lanes, added to the entries of sparse matrices.

The entries of a sparse matrix are taken for the coefficients of a field, and an element matrix for the integrals of one cell: a
vector whose dofmap says which entry each of them is added to. All samples share it. Integrals in rows and columns of Dirichlet
conditions go to one more entry, behind the last, that nobody reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse
import ufl
from dolfinx import fem
from numpy.typing import NDArray

from fem_vi.errors import UnsupportedForm
from fem_vi.parallel import raise_on_all
from fem_vi.pde.batch_form import BatchForm, KernelMesh, Values
from fem_vi.pde.boundary import Boundary
from fem_vi.pde.dof_transformations import element_matrix_transformation
from fem_vi.pde.halo import NoHalo
from fem_vi.pde.inputs import Array, Input, local_size
from fem_vi.pde.lane_job import FieldSpace
from fem_vi.pde.matrix import create_pattern

AT_ONCE = 8
"""Matrices that are evaluated at once: one block of samples, or more, whatever the processor."""
MOST_BYTES = 2**28
"""Memory that these may take, on lanes and as the rows that are copied from there; a matrix like that takes long to factorise."""


class BatchMatrix:
    """The matrices of a 2-form on one space, on one rank, with the Dirichlet conditions of its rows and columns.

    Args:
        form: UFL 2-form, derivatives expanded.
        boundary: Its Dirichlet conditions: their rows and columns are those of the identity.
        fixed: Functions and Constants of the form whose values do not change.
        mesh: What it shares with other compiled forms.

    Raises:
        UnsupportedForm: On every rank, where the mesh lies on several, the form has integrals over interior facets, or something
            has no translation.
        CompilerFailed: Where there is no C compiler.

    Attributes:
        num_entries: Entries of each matrix, in the order of `create_pattern`.

    MPI: Collective.
    """

    def __init__(self, form: ufl.Form, boundary: Boundary, fixed: tuple[Input, ...], mesh: KernelMesh) -> None:
        with raise_on_all(mesh.comm):
            _check(form, mesh)
        space = form.arguments()[0].ufl_function_space()
        csr = create_pattern(fem.form(form), boundary.bcs)
        with raise_on_all(mesh.comm):
            _check_memory(len(csr.indices))
        entries = _Entries(csr.indptr, csr.indices)
        self.num_entries = entries.num
        self._ones = entries.find(boundary.owned, boundary.owned)
        self._form = BatchForm(form, [_matrix_space(space, entries, boundary)], fixed, mesh)

    def values(self, num_samples: int, given: Mapping[Any, Values]) -> Array:
        """The entries of the matrices of some samples, `(num_samples, num_entries)`.

        Args:
            num_samples: How many samples there are.
            given: For each Function and Constant of the form that is not fixed, its values.

        MPI: Collective.
        """
        out = np.empty((num_samples, self.num_entries + 1))
        self._form.write(num_samples, given, [Values(out, np.arange(num_samples))])
        out[:, self._ones] = 1.0
        return out[:, :-1]


def _check(form: ufl.Form, mesh: KernelMesh) -> None:
    if mesh.comm.size > 1:
        raise UnsupportedForm("The matrices of many samples are evaluated at once on one rank only.")
    if any(integral.integral_type() == "interior_facet" for integral in form.integrals()):
        raise UnsupportedForm("The matrices of many samples are not evaluated at once over interior facets.")


def _check_memory(num_entries: int) -> None:
    if 2 * AT_ONCE * num_entries * 8 > MOST_BYTES:
        raise UnsupportedForm(f"The matrices of {AT_ONCE} samples would take more memory at once than {MOST_BYTES} bytes.")


class _Entries:
    """The entries of a sparse matrix, by row and column."""

    def __init__(self, indptr: NDArray[Any], indices: NDArray[Any]) -> None:
        self.num = len(indices)
        order = np.arange(self.num)
        size = len(indptr) - 1
        self._numbers = scipy.sparse.csr_array((order, np.array(indices), np.array(indptr)), shape=(size, size))
        self._numbers.sort_indices()
        self._keys = np.repeat(np.arange(size), np.diff(indptr)) * size + self._numbers.indices

    def find(self, rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[np.int64]:
        """The numbers of entries that exist; rows and columns broadcast."""
        keys = np.asarray(rows, dtype=np.int64) * self._numbers.shape[0] + columns
        return np.asarray(self._numbers.data[np.searchsorted(self._keys, keys)])


def _matrix_space(space: Any, entries: _Entries, boundary: Boundary) -> FieldSpace:
    """The entries, and one more, as a space whose dofs on a cell are those of an element matrix, row by row."""
    bs = space.dofmap.bs
    dofs = np.asarray(space.dofmap.list, dtype=np.int64)[:, :, None] * bs + np.arange(bs)
    dofs = dofs.reshape(len(dofs), -1)
    dofmap = entries.find(dofs[:, :, None], dofs[:, None, :])
    free = np.ones(local_size(space)[1], dtype=bool)
    free[boundary.dofs] = False
    dofmap[~(free[dofs][:, :, None] & free[dofs][:, None, :])] = entries.num
    transformation = element_matrix_transformation(space)
    return FieldSpace(
        NoHalo(entries.num + 1),
        dofmap.reshape(len(dofs), -1).astype(np.int32),
        1,
        None if transformation is None else (transformation, transformation),
    )
