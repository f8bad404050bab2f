"""`ExpressionObservation`: gradients, fluxes, stresses, or whatever UFL can write, at points.

The values and derivatives of each Function at the points are fixed sparse matrices times its coefficients. What UFL makes of them
is computed point by point by torch, on every rank: forward, one sum over ranks for each Function; backward, no communication.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import ufl
from dolfinx import fem
from numpy.typing import ArrayLike
from torch import Tensor
from ufl import classes
from ufl.algorithms.analysis import extract_arguments, extract_coefficients, extract_constants
from ufl.domain import extract_unique_domain

from fem_vi.bridge.call import plan
from fem_vi.bridge.layout import as_numpy
from fem_vi.bridge.linear import apply_linear
from fem_vi.bridge.point_values import PointValues
from fem_vi.bridge.ufl_torch import TorchExpression, derivative_of, lower, terminals
from fem_vi.errors import InvalidInput, UnsupportedForm
from fem_vi.parallel import all_values, raise_on_all
from fem_vi.pde.agree import agreed
from fem_vi.pde.coordinates import Coordinates
from fem_vi.pde.copies import check_list, check_symbols, create_copies
from fem_vi.pde.inputs import ConstantInput, FrozenMesh, FunctionInput, Input
from fem_vi.pde.locate import Location
from fem_vi.pde.points import Outside, find_points


class ExpressionObservation:
    """y = observe(u, m, ...): a UFL expression at points, differentiable to any order for every input.

    A point on the boundary between cells, or between ranks, is read from one cell only, as by `PointObservation`: from the one
    that came first when the mesh was made, on any number of ranks. Gradients of continuous Functions, which jump there, have the
    value of that cell.

    Args:
        expr: UFL expression of Functions in any space (mixed ones by `ufl.split`), their derivatives in x of any order,
            Constants and `ufl.SpatialCoordinate`, by tensor algebra, functions of numbers and conditions. Facet normals and
            sizes of cells are refused: give the direction of a flux as a Constant. Where a condition excludes a branch whose
            derivative is infinite, the gradient is NaN, as that of `torch.where` is.
        points: `(num_points, gdim)` or `(num_points, 3)`, mesh units, the same on every rank.
        inputs: The Functions and Constants of the expression that gradients reach. Others are fixed at their values of this
            moment; changing one later is an error in the next call. Derivatives in x are those on the mesh as it is: where
            `fem_vi.coordinates` vary, they are not those on the moved mesh.
        outside: What to do with points outside the mesh: `RaiseOutside()` or `MaskOutside()`.

    Call:
        `observe(*inputs)`, in the order of `inputs`: a field tensor `(*batch, n_owned)` for a Function, replicated
        `(*batch, *shape)` for a Constant; batch axes broadcast. Returns `(*batch, num_points, *expr.ufl_shape)`, replicated.

    Raises:
        UnsupportedForm: Naming what has no value at a point: facet normals, test functions, restrictions to a side.
        InvalidInput: Where an input does not occur in the expression, or a tensor has the wrong shape or type; see also
            `PointObservation`.
        PointsOutsideMesh: Where points lie outside, listing them.

    MPI: Collective when built and forward, not collective backward.

    Example:
        >>> flux = fem_vi.ExpressionObservation(-ufl.exp(m) * ufl.grad(u), points, [u, m])
        >>> q = flux(solve(m_), m_)  # (num_points, gdim)
    """

    def __init__(
        self,
        expr: Any,
        points: ArrayLike,
        inputs: Sequence[fem.Function | fem.Constant],
        *,
        outside: Outside | None = None,
    ) -> None:
        with agreed(expr, inputs):
            symbols = _Symbols(expr)
            check_list("inputs", inputs)
            mesh = _mesh_of(symbols)
            _check_given(symbols, inputs)
        self.comm = mesh.comm
        varying, fixed = create_copies(symbols, inputs)
        lowered = lower(expr)
        nodes = terminals(lowered)
        self._expression = TorchExpression(lowered, nodes)
        self._inputs, self._fixed, self._mesh = varying, fixed, FrozenMesh(mesh)
        self.points, location = find_points(mesh, points, outside)
        self.found = torch.from_numpy(location.found)
        inside = Location(location.cells[location.found], location.reference[location.found], location.found[location.found])
        self._readings = [_create_reading(given, nodes, inside, self.comm) for given in varying]
        held = [_create_reading(given, nodes, inside, self.comm)(_values_of(given)) for given in fixed]
        self._held: dict[Any, Tensor] = {node: value for reading in held for node, value in reading.items()}
        coordinates = torch.from_numpy(self.points[location.found, : mesh.geometry.dim])
        self._held.update((node, coordinates) for node in nodes if isinstance(node, classes.SpatialCoordinate))
        self._nodes, self._shape = nodes, tuple(int(n) for n in expr.ufl_shape)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Values of the expression at the points; see the class. Collective."""
        with raise_on_all(self.comm):
            self._mesh.check_unchanged()
            for given in self._fixed:
                given.check_unchanged()
            batch, _ = plan("ExpressionObservation", inputs, self._inputs)
        _check_batches(self.comm, batch)
        values = dict(self._held)
        for reading, x in zip(self._readings, inputs, strict=True):
            values.update(reading(x.to(device="cpu", dtype=torch.float64)))
        y = self._expression(*[values[node] for node in self._nodes])
        y = y.expand(*batch, int(self.found.sum()), *self._shape)
        if not bool(self.found.all()):
            everywhere = y.new_full((*batch, len(self.points), *self._shape), torch.nan)
            y = everywhere.index_copy(len(batch), self.found.nonzero()[:, 0], y)
        return y.to(next((x.device for x in inputs if not x.is_cpu), y.device))


class _Symbols:
    """The Functions and Constants of a UFL expression, told as a form tells its own."""

    def __init__(self, expr: Any) -> None:
        if isinstance(expr, ufl.Form):
            raise UnsupportedForm("expr is a UFL form; an integral is a fem_vi.Functional. Pass the expression without measures.")
        if not isinstance(expr, classes.Expr):
            raise UnsupportedForm(f"expr is a {type(expr).__name__}; it must be a UFL expression, such as -k * ufl.grad(u).")
        if expr.ufl_free_indices:
            raise UnsupportedForm("expr has free indices; bind them with ufl.as_tensor.")
        if extract_arguments(expr):
            raise UnsupportedForm("expr contains a test or trial function, which has no value; write it with Functions.")
        self._coefficients, self._constants = extract_coefficients(expr), extract_constants(expr)

    def coefficients(self) -> Sequence[Any]:
        """Functions, each once."""
        return self._coefficients

    def constants(self) -> Sequence[Any]:
        """Constants, each once."""
        return self._constants


def _mesh_of(symbols: _Symbols) -> Any:
    """The mesh of all Functions and Constants."""
    functions = [f for f in symbols.coefficients() if isinstance(f, fem.Function)]
    if not functions:
        raise InvalidInput("expr contains no dolfinx.fem.Function; there is nothing to observe.")
    mesh = functions[0].function_space.mesh
    if any(extract_unique_domain(symbol) != mesh.ufl_domain() for symbol in (*functions, *symbols.constants())):
        raise InvalidInput("The Functions and Constants of expr live on several meshes; they must share one.")
    return mesh


def _check_given(symbols: _Symbols, inputs: Sequence[fem.Function | fem.Constant]) -> None:
    known = [*symbols.coefficients(), *symbols.constants()]
    if any(isinstance(given, Coordinates) for given in inputs):
        raise InvalidInput("ExpressionObservation: the coordinates of the mesh cannot be an input; its points are found once.")
    for position, given in enumerate(inputs):
        if not any(given is symbol for symbol in known):
            raise InvalidInput(f"inputs[{position}] does not occur in expr.")
    parts = [f.name for f in symbols.coefficients() if isinstance(f, fem.Function) and len(f.function_space.component()) > 0]
    if parts:
        raise InvalidInput(f"{parts[0]} is a part of a Function, w.sub(i); write ufl.split(w)[i] in expr, and list w as input.")
    check_symbols(symbols, inputs)


class _Reading:
    """Turns the tensor of one input into the values of the nodes of the expression that stand for it or its derivatives."""

    def __init__(self, nodes: Sequence[Any], values: PointValues) -> None:
        self._nodes, self._values = nodes, values

    def __call__(self, x: Tensor) -> dict[Any, Tensor]:
        return dict(zip(self._nodes, self._values(x), strict=True))


class _ConstantReading:
    """The same for a Constant."""

    def __init__(self, node: Any, comm: Any) -> None:
        self._node, self._comm, self._num_axes = node, comm, len(node.ufl_shape)

    def __call__(self, x: Tensor) -> dict[Any, Tensor]:
        return {self._node: _replicated(x, self._comm).unsqueeze(x.ndim - self._num_axes)}


def _create_reading(given: Input, nodes: Sequence[Any], location: Location, comm: Any) -> _Reading | _ConstantReading:
    """What reads an input at the points. Collective for Functions."""
    if isinstance(given, ConstantInput):
        return _ConstantReading(given.given, comm)
    by_order = {order: node for node in nodes for what, order in [derivative_of(node)] if what is given.given}
    return _Reading(list(by_order.values()), PointValues(given.space, location, list(by_order) or [0]))


def _values_of(given: Input) -> Tensor:
    """The values that an input had when it was copied."""
    if isinstance(given, FunctionInput):
        return torch.from_numpy(given.coefficients.owned)
    return torch.from_numpy(np.array(given.symbol.value))


def _check_batches(comm: Any, batch: tuple[int, ...]) -> None:
    """Refuse batch axes that differ between ranks. Collective."""
    seen = all_values(comm, batch)
    if any(other != batch for other in seen):
        raise InvalidInput(f"ExpressionObservation: the batch axes differ between ranks: {seen}.")


def _replicated(x: Tensor, comm: Any) -> Tensor:
    """The same tensor, after a check that it is the same on every rank, which also sees through torch's transforms."""

    def check(values: Tensor) -> Tensor:
        seen = all_values(comm, zlib.crc32(as_numpy(values).tobytes()))
        if any(other != seen[0] for other in seen):
            raise InvalidInput(
                "ExpressionObservation: the values of a Constant differ between ranks; they must be replicated. "
                "Seed all ranks alike."
            )
        return values.clone()

    return apply_linear(check, torch.clone, x) if comm.size > 1 else x
