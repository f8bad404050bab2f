"""Spaces of fields: which can carry a prior, integrals of their basis functions, and names for their nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import ufl
from numpy.typing import NDArray

from fem_vi.errors import InvalidInput
from fem_vi.pde import _compat
from fem_vi.pde.agree import agreed, check_space
from fem_vi.pde.assemble import VectorForm
from fem_vi.pde.inputs import Array, local_size


def check_vertex_space(V: Any) -> None:
    """Refuse spaces other than scalar continuous Lagrange of degree one.

    Raises:
        InvalidInput: On every rank.

    MPI: Collective.
    """
    with agreed(V):
        check_space("The prior's V", V)
        element = V.ufl_element()
        name = getattr(element.element_family, "name", "") if hasattr(element, "element_family") else ""
        if name != "P" or element.degree != 1 or element.discontinuous or element.block_size != 1 or V.value_shape != ():
            raise InvalidInput(
                f"The prior lives on {element}; it needs a scalar continuous Lagrange space of degree 1. Build the prior on "
                'fem.functionspace(mesh, ("Lagrange", 1)); the state may live on any other space of that mesh.'
            )


def lumped_mass(V: Any, weight: Any = 1.0) -> Array:
    """Integrals of the basis functions, times a weight, `(n_owned,)`. Collective."""
    return VectorForm(weight * ufl.TestFunction(V) * ufl.dx(domain=V.mesh)).assemble().copy()


def boundary_mass(V: Any, weight: Any = 1.0) -> Array:
    """Integrals of the basis functions, times a weight, over the boundary, `(n_owned,)`. Collective."""
    return VectorForm(weight * ufl.TestFunction(V) * ufl.ds(domain=V.mesh)).assemble().copy()


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
