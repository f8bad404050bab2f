"""A weak form as programs of torch operations: what `TorchKernel` evaluates, built once from UFL, basix and DOLFINx."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import basix
import numpy as np
import torch
from torch import Tensor
from ufl import classes
from ufl.algorithms import compute_form_data, extract_elements

from fem_vi.bridge.form_scalars import Component, Scalars, Terminal, TestKey
from fem_vi.bridge.form_spaces import Spaces
from fem_vi.bridge.scalar_graph import ScalarGraph
from fem_vi.bridge.torch_emit import Emission, Group, Store, fixed_values
from fem_vi.bridge.torch_program import Program
from fem_vi.errors import UnsupportedForm
from fem_vi.pde import integrals
from fem_vi.pde.tabulate import Orientation, Table, tabulate
from fem_vi.pde.weak_form import WeakForm


@dataclass(frozen=True)
class Compiled:
    """A form as programs.

    Attributes:
        programs: What varies with the inputs.
        constant: What does not, to be run once.
        store: Buffers of the programs.
        constant_store: Buffers of the others.
    """

    programs: list[Program]
    constant: list[Program]
    store: Store
    constant_store: Store


def compile_form(pde: WeakForm) -> Compiled:
    """The programs of a form's integrals.

    Args:
        pde: The weak form; its quadrature degrees are pinned.

    Raises:
        UnsupportedForm: Naming the integral or the UFL node that has no torch operation, and the kernel that takes it.

    MPI: Collective.
    """
    msh = pde.space.mesh
    if any(domain != msh.ufl_domain() for domain in pde.form.ufl_domains()):
        raise UnsupportedForm(
            "TorchKernel takes forms on the mesh of the state only; this one has another mesh in it. Use AssembledKernel()."
        )
    cell = msh.topology.cell_name()
    if cell not in integrals.CELLS:
        raise UnsupportedForm(f"TorchKernel takes no meshes of cells of shape {cell}. Use AssembledKernel().")
    data = {}
    for integral in pde.form.integrals():
        if integral.integral_type() not in integrals.KINDS:
            raise UnsupportedForm(f"TorchKernel takes no integrals of type {integral.integral_type()}. Use AssembledKernel().")
        data[integral.integral_type()] = integral.subdomain_data()
    spaces = Spaces(pde)
    compiled = Compiled([], [], Store(), Store())
    for group in _form_data(pde.form).integral_data:
        ids = group.subdomain_id if isinstance(group.subdomain_id, tuple) else (group.subdomain_id,)
        entities = integrals.integration_entities(msh, group.integral_type, data[group.integral_type], ids)
        for one in group.integrals:
            _IntegralCompiler(spaces, group.integral_type, entities, one).compile(compiled)
    return compiled


def _form_data(form: Any) -> Any:
    """The form as FFCx would see it: pulled back to reference cells, geometry lowered to Jacobians, restrictions at terminals."""
    try:
        return compute_form_data(
            form,
            do_apply_function_pullbacks=True,
            do_apply_integral_scaling=True,
            do_apply_geometry_lowering=True,
            preserve_geometry_types=(classes.Jacobian,),
            do_apply_restrictions=True,
            do_append_everywhere_integrals=False,
            complex_mode=False,
        )
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise UnsupportedForm(f"UFL cannot lower the form: {error}. AssembledKernel() may take it.") from error


@dataclass(frozen=True)
class FieldLeaf:
    """A reference component of a field, or of its derivative, at the points."""

    source: int
    side: int
    component: int
    directions: Component


@dataclass(frozen=True)
class FacetLeaf:
    """A number that depends on the local facet only."""

    side: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class EntryLeaf:
    """An entry of a Constant that is given."""

    source: int
    entry: int


class _IntegralCompiler:
    """One integral; it gives terminals their nodes.

    Args:
        spaces: Sources.
        kind: Type of the integral.
        entities: What is integrated over.
        integral: The UFL integral.
    """

    def __init__(self, spaces: Spaces, kind: str, entities: integrals.Entities, integral: Any) -> None:
        self._spaces = spaces
        self._entities = entities
        self._integral = integral
        self._cell = spaces.mesh.topology.cell_name()
        elements = extract_elements(integral)
        points, self._weights = integrals.quadrature(kind, self._cell, integral.metadata(), elements)
        self._points = integrals.variant_points(kind, self._cell, points)
        self._graph = ScalarGraph(float(self._weights.sum()))
        self._tables: dict[tuple[int, int, Component], Table] = {}
        self._orientations: dict[tuple[int, int], Orientation | None] = {}

    def compile(self, into: Compiled) -> None:
        """Add the programs, and their buffers."""
        factors = Scalars(self._graph, self).factors(self._integral.integrand())
        groups = [self._output(key, node) for key, node in factors.items()]
        for programs, store, fixed in ((into.programs, into.store, False), (into.constant, into.constant_store, True)):
            outputs = [group for group in groups if self._graph.nodes[group.node].fixed is fixed]
            if outputs:
                programs.append(self._program(store, outputs))

    def _program(self, store: Store, outputs: Sequence[Group]) -> Program:
        nodes = self._graph.nodes
        live = self._graph.reachable([group.node for group in outputs])
        needed = {arg for k in live for arg in nodes[k].args} | {group.node for group in outputs}
        wanted = sorted(k for k in needed if nodes[k].fixed)
        fixed = fixed_values(self._graph, wanted, self._fixed_leaf, torch.from_numpy(self._weights))
        emission = Emission(store, self._graph, self._entities.cells.shape[1], self._weights)
        for k in live:
            leaf: Any = nodes[k].data
            if isinstance(leaf, EntryLeaf):
                emission.entry(k, leaf.source, leaf.entry)
            elif isinstance(leaf, FieldLeaf):
                table = self._table(leaf.source, leaf.component, leaf.directions)
                emission.read(k, leaf.source, self._group(leaf.source, leaf.side, table, k))
        return emission.program(live, fixed, outputs)

    def _group(self, source: int, side: int, table: Table, node: int) -> Group:
        """A table with the dofs and variants that it goes with; all dofs of the element where cells turn it."""
        key = source, side
        cells = self._entities.cells[side]
        if key not in self._orientations:
            self._orientations[key] = self._spaces.orientation(source, cells)
        turns = self._orientations[key]
        dofs = self._spaces.dofs(source, cells)
        values = table.values
        if turns is not None:
            values = np.zeros((*values.shape[:2], dofs.shape[0]))
            values[..., table.dofs] = table.values
        else:
            dofs = dofs[table.dofs]
        return Group(values, dofs, self._entities.variants[side], turns, node)

    def _output(self, key: TestKey, node: int) -> Group:
        """What a component of the test function is multiplied by, with its table and the weights in it."""
        side, component, directions = key
        table = self._table(0, component, directions)
        weights = self._weights[:, None]
        if not table.varies_over_points:
            return self._group(0, side, table, self._graph.integral(node))
        values = table.values * weights
        if not self._graph.nodes[node].points:
            values = values.sum(axis=1, keepdims=True)
        return self._group(0, side, Table(values, table.dofs), node)

    def _table(self, source: int, component: int, directions: Component) -> Table:
        key = source, component, directions
        if key not in self._tables:
            self._tables[key] = tabulate(self._spaces.element(source), component, directions, self._points)
        return self._tables[key]

    def test(self, terminal: Terminal) -> TestKey:
        """See `Leaves`."""
        return terminal.side, self._flat(0, terminal), terminal.directions

    def node(self, terminal: Terminal) -> int:
        """See `Leaves`."""
        symbol = terminal.symbol
        if isinstance(symbol, classes.Coefficient):
            source = self._spaces.source(symbol)
            return self._field(source, terminal.side, self._flat(source, terminal), terminal.directions)
        if isinstance(symbol, classes.Constant):
            return self._constant(terminal)
        rule = {
            classes.SpatialCoordinate: self._position,
            classes.Jacobian: self._jacobian,
            classes.CellVertices: self._vertex,
            classes.CellEdgeVectors: self._edge,
        }.get(type(symbol))
        return rule(terminal) if rule else self._reference(terminal)

    def _flat(self, source: int, terminal: Terminal) -> int:
        shape = self._spaces.element(source).reference_value_shape
        return int(np.ravel_multi_index(terminal.component, shape)) if terminal.component else 0

    def _field(self, source: int, side: int, component: int, directions: Component) -> int:
        table = self._table(source, component, directions)
        if table.is_zero():
            return self._graph.zero
        leaf = FieldLeaf(source, side, component, directions)
        return self._graph.leaf(leaf, fixed=not self._spaces.is_given(source), points=table.varies_over_points)

    def _constant(self, terminal: Terminal) -> int:
        entry = int(np.ravel_multi_index(terminal.component, terminal.symbol.ufl_shape)) if terminal.component else 0
        found = self._spaces.constant(terminal.symbol)
        if isinstance(found, tuple):
            return self._graph.number(float(found[1][entry]))
        return self._graph.leaf(EntryLeaf(found, entry), fixed=False, points=False)

    def _position(self, terminal: Terminal) -> int:
        return self._field(self._spaces.geometry, terminal.side, terminal.component[0], terminal.directions)

    def _jacobian(self, terminal: Terminal) -> int:
        row, column = terminal.component
        directions = tuple(sorted((column, *terminal.directions)))
        return self._field(self._spaces.geometry, terminal.side, row, directions)

    def _vertex(self, terminal: Terminal) -> int:
        return self._corner(terminal.side, terminal.component[0], terminal.component[1])

    def _edge(self, terminal: Terminal) -> int:
        first, second = basix.topology(basix.CellType[self._cell])[1][terminal.component[0]]
        a, b = (self._corner(terminal.side, corner, terminal.component[1]) for corner in (first, second))
        return self._graph.sum([a, self._graph.product(self._graph.number(-1.0), b)])

    def _corner(self, side: int, corner: int, component: int) -> int:
        """A coordinate of a corner of the cell: directions below zero stand for the corner."""
        source, directions = self._spaces.geometry, (-1 - corner,)
        at = np.asarray(basix.geometry(basix.CellType[self._cell]))[corner]
        table = tabulate(self._spaces.element(source), component, (), at[None, None])
        self._tables[source, component, directions] = table
        leaf = FieldLeaf(source, side, component, directions)
        return self._graph.leaf(leaf, fixed=not self._spaces.is_given(source), points=False)

    def _reference(self, terminal: Terminal) -> int:
        """What the reference cell knows: normals, facet Jacobians and volumes."""
        shape, symbol = basix.CellType[self._cell], terminal.symbol
        if isinstance(symbol, classes.ReferenceCellVolume):
            return self._graph.number(float(basix.cell.volume(shape)))
        tables = {
            classes.ReferenceNormal: basix.cell.facet_outward_normals,
            classes.CellFacetJacobian: basix.cell.facet_jacobians,
            classes.ReferenceFacetVolume: basix.cell.facet_reference_volumes,
        }
        if type(symbol) not in tables or terminal.directions:
            raise UnsupportedForm(
                f"TorchKernel has no torch operation for the UFL node {type(symbol).__name__} ({symbol}). Use AssembledKernel()."
            )
        whole: Any = np.asarray(tables[type(symbol)](shape))
        values = whole[(slice(None), *terminal.component)]
        if np.ptp(values) == 0.0:
            return self._graph.number(float(values[0]))
        return self._graph.leaf(FacetLeaf(terminal.side, tuple(map(float, values))), fixed=True, points=False)

    def _fixed_leaf(self, leaf: Any) -> Tensor:
        """The value of a leaf that does not vary with the inputs, `(points or 1, num_entities, 1)`."""
        if isinstance(leaf, FacetLeaf):
            return torch.from_numpy(np.array(leaf.values)[self._entities.facets[leaf.side]])[None, :, None]
        table = self._table(leaf.source, leaf.component, leaf.directions)
        group = self._group(leaf.source, leaf.side, table, 0)
        x = self._spaces.values(leaf.source)[group.dofs]
        return torch.from_numpy(group.values_of(x))[..., None]
