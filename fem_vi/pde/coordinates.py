"""Mesh coordinates as an input of weak forms and functionals: shape derivatives.

UFL's coordinate derivative gives d/ds F(x + s V) for a motion V of the nodes, quadrature points and normals included
(Ham, Mitchell, Paganini, Wechsung 2019, Automated shape differentiation in the Unified Form Language). While an operator
works, the nodes of the caller's mesh stand where its input says; afterwards they stand where they stood.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ufl
from dolfinx import fem
from dolfinx.mesh import Mesh
from ufl import classes
from ufl.algorithms.analysis import extract_type

from fem_vi.arguments import instance
from fem_vi.errors import InvalidInput, UnsupportedForm
from fem_vi.pde import _compat
from fem_vi.pde.inputs import Array, FunctionInput
from fem_vi.pde.mesh_check import jacobians, sample_points, signed_volumes


class Coordinates(fem.Function):
    """The positions of a mesh's nodes, a Function in the space of its geometry; made by `coordinates`."""


def coordinates(mesh: Any) -> Coordinates:
    """The positions of a mesh's nodes, to be listed in `WeakForm(inputs=[...])` or `Functional(form, [...])`.

    Its tensors hold the positions, `(*batch, n_owned)`, in the order of `coordinates(mesh).function_space`, a vector Lagrange
    space of the degree of the mesh's geometry, mesh units. Start from `fem_vi.to_tensor(coordinates(mesh))` and add a
    displacement.
    Values of Functions and of Dirichlet conditions move with the nodes; `PointObservation` keeps its points in the cells and
    at the local coordinates where it found them.

    Args:
        mesh: DOLFINx mesh whose topological and geometric dimensions are equal.

    Raises:
        InvalidInput: For other meshes.
        UnsupportedForm: By `WeakForm` and `Functional`, for a form with a diameter or an edge length of cells (volumes are
            differentiated).

    MPI: Collective.

    References:
        Ham, Mitchell, Paganini, Wechsung (2019), Automated shape differentiation in the Unified Form Language.

    Example:
        >>> x = fem_vi.coordinates(mesh)
        >>> solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[x], bcs=bcs))
        >>> u = solve(fem_vi.to_tensor(x) + displacement)
    """
    instance("coordinates: mesh", mesh, Mesh, way_out="It is V.mesh for a function space V.")
    if mesh.geometry.dim != mesh.topology.dim:
        raise InvalidInput(
            f"The mesh has cells of dimension {mesh.topology.dim} in {mesh.geometry.dim} dimensions; coordinates of surfaces "
            "and curves cannot vary."
        )
    function = Coordinates(fem.functionspace(mesh, mesh.ufl_domain().ufl_coordinate_element()), name="coordinates")
    function.x.array[:] = mesh.geometry.x[_nodes(function.function_space), : mesh.geometry.dim].ravel()
    return function


class CoordinateInput(FunctionInput):
    """Coordinates as an input: loading them moves the mesh, `restore` moves it back."""

    def __init__(self, given: Coordinates, label: str) -> None:
        super().__init__(given, label)
        mesh = self.space.mesh
        self.symbol = ufl.SpatialCoordinate(mesh)
        self._positions: Array = mesh.geometry.x
        self._nodes = _nodes(self.space)
        self._at_first = self._positions.copy()
        self._cells = _compat.geometry_dofmap(mesh)
        element = mesh.ufl_domain().ufl_coordinate_element()
        self._shape, self._order = element.cell_type.name, element.degree
        self._signs = np.sign(self._volumes())

    def occurs_in(self, form: ufl.Form) -> bool:
        """Every integral sees the mesh."""
        return not form.empty()

    def load(self, values: Array) -> None:
        """Move the mesh to owned coordinates, `(n_owned,)`. Collective."""
        super().load(values)
        gdim = self.space.mesh.geometry.dim
        self._positions[self._nodes, :gdim] = self.coefficients.array.reshape(-1, gdim)

    def at_first(self) -> Array:
        """Owned coordinates of the mesh where it stands while no operator works, `(n_owned,)`."""
        return self._at_first[self._nodes, : self.space.mesh.geometry.dim].ravel()[: self.size]

    def restore(self) -> None:
        """Move the mesh back. Not collective."""
        self._positions[:] = self._at_first

    def check_cells(self) -> None:
        """Refuse cells that are turned inside out where the mesh stands now. Not collective.

        Raises:
            InvalidInput: With the number of such cells, and where the first one is.
        """
        wrong = np.flatnonzero(~(self._volumes() * self._signs > 0.0).all(axis=1))
        if wrong.size:
            middle = self._positions[self._cells[wrong[0]]].mean(axis=0)[: self.space.mesh.geometry.dim]
            at = ", ".join(f"{value:.6g}" for value in middle)
            raise InvalidInput(
                f"{self.label}: {wrong.size} of {len(self._cells)} cells are turned inside out or flat, the first around ({at})."
            )

    def _volumes(self) -> Array:
        x = self._positions[self._cells][..., : self.space.mesh.geometry.dim]
        return signed_volumes(jacobians(self._shape, self._order, x, sample_points(self._shape, self._order)))


_SIZES = (
    classes.Circumradius,
    classes.CellDiameter,
    classes.MinCellEdgeLength,
    classes.MaxCellEdgeLength,
    classes.MinFacetEdgeLength,
    classes.MaxFacetEdgeLength,
    classes.CellVertices,
    classes.CellEdgeVectors,
    classes.FacetEdgeVectors,
)


def check_shape_derivative(form: ufl.Form) -> None:
    """Refuse sizes of cells and facets that UFL's coordinate derivative takes for constants. Not collective.

    Raises:
        UnsupportedForm: Naming the size, and what takes its place.
    """
    if form.ufl_domain().ufl_coordinate_element().cell_type.name == "interval":
        return
    found = [kind.__name__ for kind in _SIZES if extract_type(form, kind)]
    if found:
        raise UnsupportedForm(
            f"The form contains {found[0]}, which UFL takes for a constant when it differentiates for coordinates of the "
            "mesh. Use ufl.CellVolume(mesh) ** (1 / d) for the size of a cell, or leave the coordinates out of the inputs."
        )


def _nodes(V: Any) -> Any:
    """The mesh node of each local dof (block) of the space of the geometry."""
    nodes = np.empty(V.dofmap.index_map.size_local + V.dofmap.index_map.num_ghosts, dtype=np.int32)
    nodes[V.dofmap.list.ravel()] = _compat.geometry_dofmap(V.mesh).ravel()
    return nodes
