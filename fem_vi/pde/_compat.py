"""Every difference between DOLFINx versions that the solvers meet, and nothing else."""

from __future__ import annotations

import logging
from typing import Any

import dolfinx
import numpy as np
from numpy.typing import NDArray
from petsc4py import PETSc

DOLFINX_VERSION: tuple[int, ...] = tuple(int(part) for part in dolfinx.__version__.split(".")[:2])

LU_TRANSPOSES_BLOCKS = PETSc.Sys.getVersion() >= (3, 25)
"""Whether KSPMatSolveTranspose takes LU factors: PETSc 3.22 refuses them, 3.25 does not."""

if all(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("py.warnings").handlers):
    logging.captureWarnings(False)  # FFCx 0.9 sends all Python warnings to a log that nobody reads


def collapsed_parent_dofs(space: Any) -> NDArray[np.int32]:
    """For each unrolled dof of a collapsed C++ subspace, the unrolled dof of its parent (a list of arrays since 0.10)."""
    return np.asarray(space.collapse()[1], dtype=np.int32).ravel()


def geometry_dofmap(mesh: Any) -> NDArray[np.int32]:
    """Geometry nodes of each cell, `(num_cells, num_nodes)`."""
    geometry = mesh.geometry
    return np.asarray(geometry.dofmap if DOLFINX_VERSION < (0, 10) else geometry.dofmaps[0])


def bounding_box_tree(mesh: Any, padding: float) -> Any:
    """Bounding boxes of all local cells (keyword-only arguments since 0.10)."""
    return dolfinx.geometry.bb_tree(mesh, mesh.topology.dim, padding=padding)


def integration_domains(kind: Any, topology: Any, entities: NDArray[np.int32]) -> NDArray[np.int32]:
    """Cells, or cells and local facets, of entities that a form is integrated over (the dimension is an argument before 0.10)."""
    dim = topology.dim - 1 if kind != dolfinx.fem.IntegralType.cell else topology.dim
    before = (dim,) if DOLFINX_VERSION < (0, 10) else ()
    return np.asarray(dolfinx.fem.compute_integration_domains(kind, topology, entities, *before))


def option_used(name: str) -> bool:
    """Whether PETSc has read an option of its database; True where petsc4py (before 3.23) cannot tell."""
    database = PETSc.Options()
    return bool(database.used(name)) if hasattr(database, "used") else True
