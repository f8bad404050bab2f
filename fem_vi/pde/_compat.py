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


def pack_coefficients(form: Any) -> dict[tuple[Any, int], NDArray[np.float64]]:
    """The packed coefficients of a compiled form, by kind of integral and the key of `integral_domains`."""
    pack = getattr(dolfinx.fem, "pack_coefficients", None)  # since 0.10; before, of C++ objects
    packed = dolfinx.cpp.fem.pack_coefficients(form._cpp_object) if pack is None else pack(form)
    return dict(packed)


def integral_domains(form: Any) -> list[tuple[Any, int, int, NDArray[np.int32]]]:
    """Kind, key of the packed coefficients, subdomain id and entities of each integral of a compiled form.

    Ids were the keys before 0.10; positions, in the order of the compiled form's ids, are since. Entities are cells, `(n,)`,
    pairs of a cell and a local facet, `(n, 2)`, or two such pairs, `(n, 2, 2)`.
    """
    cpp, ufcx = form._cpp_object, form.ufcx_form
    out = []
    for kind in cpp.integral_types:
        if DOLFINX_VERSION < (0, 10):
            ids = [int(k) for k in cpp.integral_ids(kind)]
            out += [(kind, k, k, np.asarray(cpp.domains(kind, k))) for k in ids]
        else:
            first = ufcx.form_integral_offsets[kind.value]
            number = cpp.num_integrals(kind, 0)
            ids = [int(ufcx.form_integral_ids[first + k]) for k in range(number)]
            out += [(kind, k, ids[k], np.asarray(cpp.domains(kind, k))) for k in range(number)]
    return out


def restricted_form(form: Any, symbols: tuple[Any, Any], subdomains: dict[Any, list[tuple[int, NDArray[np.int32]]]]) -> Any:
    """A compiled form, without compiling it again, whose integrals run over other entities.

    Args:
        form: `dolfinx.fem.Form` whose integrals all have an id.
        symbols: C++ objects of its coefficients, in the order of the compiled form, and of its Constants.
        subdomains: Entities of each kind, by id.
    """
    coefficients, constants = symbols
    address = int(form.module.ffi.cast("uintptr_t", form.module.ffi.addressof(form.ufcx_form)))
    create = dolfinx.cpp.fem.create_form_float64
    cpp = create(address, form.function_spaces, coefficients, constants, subdomains, form.mesh)
    return dolfinx.fem.Form(cpp, form.ufcx_form, form.code, form.module)
