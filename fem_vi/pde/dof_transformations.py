"""How the dofs of a cell differ from those of its reference cell: signs and rotations on shared edges and faces.

The basis functions of a cell are phi = T phi_ref with a matrix T that depends on how the cell's edges and faces are turned
against its neighbours'; coefficients are read as T^T w, and vectors of integrals leave as T b. Few classes of cells differ in T,
so that their matrices are tabulated once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import basix.ufl
import numpy as np
import scipy.linalg
import scipy.sparse
from numpy.typing import NDArray

from fem_vi.pde.inputs import Array


@dataclass(frozen=True)
class Transformation:
    """A sparse matrix for each class of cells.

    Attributes:
        class_of: The class of each local cell, ghosts included.
        ptr: For each class, where the rows of its matrix begin, and the last ends, `(num_classes, n + 1)`.
        col: Columns of the entries.
        val: Values of the entries.
    """

    class_of: NDArray[np.int32]
    ptr: NDArray[np.int32]
    col: NDArray[np.int32]
    val: Array


def dof_transformations(space: Any) -> tuple[Transformation, Transformation] | None:
    """T^T, for coefficients, and T, for vectors of integrals; None where they are the identity. Not collective.

    Args:
        space: DOLFINx function space.
    """
    classes = _classes(space)
    if classes is None:
        return None
    matrices, class_of = classes
    return _stored([matrix.T for matrix in matrices], class_of), _stored(matrices, class_of)


def element_matrix_transformation(space: Any) -> Transformation | None:
    """T x T, for the entries of element matrices A, row by row, which leave as T A T^T; None where it is the identity."""
    classes = _classes(space)
    if classes is None:
        return None
    matrices, class_of = classes
    return _stored([np.kron(matrix, matrix).astype(np.float64) for matrix in matrices], class_of)


def _classes(space: Any) -> tuple[list[Array], NDArray[np.intp]] | None:
    """T of each class of cells, and the class of each cell; None where all are the identity."""
    element = space.ufl_element()
    if transformation_matrix(element, 0) is None:
        return None
    topology = space.mesh.topology
    topology.create_entity_permutations()
    info, class_of = np.unique(topology.get_cell_permutation_info(), return_inverse=True)
    return [np.asarray(transformation_matrix(element, int(number))) for number in info], class_of


def _stored(matrices: list[Array], class_of: NDArray[np.intp]) -> Transformation:
    sparse = [scipy.sparse.csr_array(matrix) for matrix in matrices]
    begin = np.cumsum([0, *(matrix.nnz for matrix in sparse)])
    size = matrices[0].shape[0] if matrices else 0
    ptr = [matrix.indptr + first for matrix, first in zip(sparse, begin, strict=False)]
    return Transformation(
        np.ascontiguousarray(class_of, dtype=np.int32),
        np.array(ptr, dtype=np.int32).reshape(-1, size + 1),
        np.concatenate([np.empty(0), *(matrix.indices for matrix in sparse)]).astype(np.int32),
        np.concatenate([np.empty(0), *(matrix.data for matrix in sparse)]),
    )


def transformation_matrix(element: Any, cell_info: int) -> Array | None:
    """T of one cell; None where it is the identity for every cell."""
    if isinstance(element, basix.ufl._MixedElement):
        parts = [(part.dim, transformation_matrix(part, cell_info)) for part in element.sub_elements]
        if all(matrix is None for _, matrix in parts):
            return None
        return scipy.linalg.block_diag(*(np.eye(dim) if matrix is None else matrix for dim, matrix in parts))
    if isinstance(element, basix.ufl._BlockedElement):
        inner = transformation_matrix(element.sub_elements[0], cell_info)
        return None if inner is None else np.kron(inner, np.eye(element.block_size)).astype(np.float64)
    if not isinstance(element, basix.ufl._BasixElement):
        return None  # of quadrature points, which belong to their cell
    basic = element.basix_element
    if basic.dof_transformations_are_identity or basic.dof_transformations_are_permutations:
        return None  # permutations are in the dofmap
    matrix = np.eye(basic.dim, dtype=np.float64)
    basic.T_apply(matrix.reshape(-1), basic.dim, cell_info)  # in place
    return matrix
