"""Symmetric positive definite operators on fields: assembled once, factorised once, applied to batches of fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import ufl
from dolfinx import fem
from dolfinx.fem import petsc as fem_petsc
from numpy.typing import NDArray
from petsc4py import PETSc

from fem_vi.errors import InvalidInput, SolveFailed
from fem_vi.parallel import raise_on_all
from fem_vi.pde import _compat
from fem_vi.pde.assemble import VectorForm
from fem_vi.pde.factors import reason_name
from fem_vi.pde.inputs import Array, local_size
from fem_vi.pde.petsc_options import Option, Options


class SpdOperator:
    """A symmetric positive definite matrix K and its inverse, on batches of fields.

    Args:
        form: Symmetric positive definite 2-form.
        petsc_options: KSP and PC options without prefix; Cholesky by default.

    MPI: Collective.
    """

    def __init__(self, form: ufl.Form, petsc_options: Mapping[str, Option]) -> None:
        options = Options({"pc_type": "cholesky", **petsc_options, **_determinant_option(petsc_options)})
        self._matrix = fem_petsc.assemble_matrix(fem.form(form))
        self._matrix.assemble()
        self._matrix.setOption(PETSc.Mat.Option.SPD, True)
        self._ksp = PETSc.KSP().create(self._matrix.comm)
        self._ksp.setOptionsPrefix(options.prefix)
        self._ksp.setOperators(self._matrix)
        self._ksp.setFromOptions()
        self._ksp.setUp()
        self._x, self._y = self._matrix.createVecs()

    def solve(self, b: Array) -> Array:
        """K^-1 b for each row of b, all at once.

        Args:
            b: Owned entries, `(num_fields, n_owned)`, the same number of rows on every rank.

        Returns:
            `(num_fields, n_owned)`.

        Raises:
            SolveFailed: Where the solver did not converge.

        MPI: Collective.
        """
        if len(b) == 0:
            return np.zeros_like(b)
        right, left = self._dense(np.array(b)), self._dense(np.zeros_like(b))
        self._ksp.matSolve(right, left)
        reason = self._ksp.getConvergedReason()
        if reason <= 0:
            raise SolveFailed(f"field prior: KSP stopped with {reason_name(PETSc.KSP.ConvergedReason, reason)}.")
        x = np.array(left.getDenseArray(readonly=True).T)
        right.destroy()
        left.destroy()
        return x

    def multiply(self, x: Array) -> Array:
        """K x for each row of x, `(num_fields, n_owned)`. Collective."""
        out = np.empty_like(x)
        for row, product in zip(x, out, strict=True):
            self._x.array_w[:] = row
            self._matrix.mult(self._x, self._y)
            product[:] = self._y.array_r
        return out

    def owned_rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
        """The rows that this rank owns, compressed: starts, global columns, values. Not collective."""
        starts, columns, values = self._matrix.getValuesCSR()
        return starts.astype(np.int64), columns.astype(np.int64), np.array(values)

    def logdet(self) -> float:
        """log det K, from the factorisation, replicated.

        Raises:
            SolveFailed: Where the factorisation is not one by MUMPS.
        """
        preconditioner = self._ksp.getPC()
        if preconditioner.getType() not in ("cholesky", "lu") or preconditioner.getFactorSolverType() != "mumps":
            raise SolveFailed(
                "log det needs a direct factorisation by MUMPS; do not override pc_type for this prior, or use no log_prob."
            )
        factor = preconditioner.getFactorMatrix()
        return float(np.log(factor.getMumpsRinfog(12)) + factor.getMumpsInfog(34) * np.log(2.0))

    def _dense(self, rows: Array) -> PETSc.Mat:
        """PETSc's dense (n, fields), column by column, is NumPy's (fields, n), row by row: no copy."""
        local, total = self._matrix.getSizes()[0]
        return PETSc.Mat().createDense(((local, total), rows.shape[0]), array=rows.T, comm=self._matrix.comm)


def _determinant_option(given: Mapping[str, Option]) -> dict[str, Option]:
    direct = given.get("pc_type", "cholesky") in ("cholesky", "lu") and given.get("pc_factor_mat_solver_type", "mumps") == "mumps"
    return {"mat_mumps_icntl_33": 1} if direct and PETSc.Sys.hasExternalPackage("mumps") else {}


def check_vertex_space(V: Any) -> None:
    """Refuse spaces other than scalar continuous Lagrange of degree one.

    Raises:
        InvalidInput: On every rank.

    MPI: Collective.
    """
    with raise_on_all(V.mesh.comm):
        element = V.ufl_element()
        name = getattr(element.element_family, "name", "") if hasattr(element, "element_family") else ""
        if name != "P" or element.degree != 1 or element.discontinuous or element.block_size != 1 or V.value_shape != ():
            raise InvalidInput(
                f"The prior lives on {element}; it needs a scalar continuous Lagrange space of degree 1. Build the prior on "
                'fem.functionspace(mesh, ("Lagrange", 1)); the state may live on any other space of that mesh.'
            )


def lumped_mass(V: Any) -> Array:
    """Integrals of the basis functions, `(n_owned,)`. Collective."""
    return VectorForm(ufl.TestFunction(V) * ufl.dx).assemble().copy()


def node_names(V: Any) -> NDArray[np.int64]:
    """A name for each owned dof of a vertex space that does not depend on the partition: its node's number in the mesh file.

    Args:
        V: Scalar continuous Lagrange space of degree 1.

    Returns:
        `(n_owned,)`.
    """
    owned, total = local_size(V)
    names = np.empty(total, dtype=np.int64)
    names[V.dofmap.list.ravel()] = _corner_names(V).ravel()
    return names[:owned]


def cell_nodes(V: Any) -> NDArray[np.int64]:
    """The names of the corners of each cell that this rank owns, `(num_cells, num_corners)`; see `node_names`."""
    mesh = V.mesh
    return _corner_names(V)[: mesh.topology.index_map(mesh.topology.dim).size_local]


def _corner_names(V: Any) -> NDArray[np.int64]:
    nodes = _compat.geometry_dofmap(V.mesh)[:, : V.dofmap.list.shape[1]]  # corners come first
    return np.asarray(V.mesh.geometry.input_global_indices)[nodes]
