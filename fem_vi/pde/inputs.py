"""The inputs of a weak form: private copies of the caller's Functions and Constants, with their layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import ufl
from dolfinx import fem
from numpy.typing import NDArray

from fem_vi.errors import InvalidInput

Array = NDArray[np.float64]


def local_size(space: Any) -> tuple[int, int]:
    """Unrolled dofs of a space on this rank: owned, and owned with ghosts."""
    index_map, bs = space.dofmap.index_map, space.dofmap.index_map_bs
    return index_map.size_local * bs, (index_map.size_local + index_map.num_ghosts) * bs


class Coefficients:
    """The coefficients of a private Function, with what NumPy and DOLFINx need to write them at hand.

    Attributes:
        array: All local coefficients, ghosts included: a view.
        owned: Those that this rank owns: a view.
    """

    def __init__(self, function: fem.Function) -> None:
        self._vector = function.x
        self.array: Array = function.x.array
        self.owned: Array = self.array[: local_size(function.function_space)[0]]

    def load(self, values: Array) -> None:
        """Write the owned coefficients, `(n_owned,)`, and update the ghosts. Collective."""
        self.owned[:] = values
        self._vector.scatter_forward()


def load_owned(function: fem.Function, values: Array) -> None:
    """Write owned coefficients into a Function and update its ghosts. Collective."""
    Coefficients(function).load(values)


class FunctionInput:
    """A private copy of a Function: `values` are its owned coefficients, `(n_owned,)`."""

    def __init__(self, given: fem.Function, label: str) -> None:
        self.given = given
        self.label = label
        self.space = given.function_space
        self.symbol: Any = fem.Function(self.space, name=given.name)
        self.symbol.x.array[:] = given.x.array
        self.shape: tuple[int, ...] = (local_size(self.space)[0],)
        self.size = self.shape[0]
        self.is_field = True
        self.layout = f"this rank owns {self.size} coefficients"
        self.coefficients = Coefficients(self.symbol)
        self._frozen = given.x.array.copy()

    def load(self, values: Array) -> None:
        """Set the owned coefficients. Collective."""
        self.coefficients.load(values)

    def occurs_in(self, form: ufl.Form) -> bool:
        """Whether a form contains it."""
        return any(self.symbol is symbol for symbol in form.coefficients())

    def changed(self) -> bool:
        """Whether the caller's Function differs from what it was when the copy was made."""
        return not np.array_equal(self.given.x.array, self._frozen, equal_nan=True)

    def check_unchanged(self) -> None:
        """Refuse a changed original; see `check_unchanged`."""
        check_unchanged(self)


class FrozenMesh:
    """The coordinates of a mesh as they were when an operator was built on it."""

    def __init__(self, mesh: Any) -> None:
        self._coordinates = mesh.geometry.x
        self._frozen = self._coordinates.tobytes()

    def check_unchanged(self) -> None:
        """Refuse to go on where the mesh has been moved. Not collective.

        Raises:
            InvalidInput: What was assembled before belongs to the old mesh.
        """
        if self._coordinates.tobytes() != self._frozen:
            raise InvalidInput("The mesh has been moved since the operator was built. Build the operator again on it.")


class ConstantInput:
    """A private copy of a Constant: `values` are its entries, row by row, `(prod(shape),)`, replicated."""

    def __init__(self, given: fem.Constant, label: str) -> None:
        self.given = given
        self.label = label
        self.symbol = fem.Constant(given.ufl_domain(), np.array(given.value, dtype=np.float64))
        self.shape: tuple[int, ...] = tuple(given.value.shape)
        self.size = int(np.prod(self.shape))
        self.is_field = False
        self.layout = "the Constant has that shape"
        self._frozen = np.array(given.value)

    def load(self, values: Array) -> None:
        """Set the entries. Not collective."""
        self.symbol.value[...] = values.reshape(self.shape)

    def occurs_in(self, form: ufl.Form) -> bool:
        """Whether a form contains it."""
        return any(self.symbol is symbol for symbol in form.constants())

    def changed(self) -> bool:
        """Whether the caller's Constant differs from what it was when the copy was made."""
        return not np.array_equal(self.given.value, self._frozen, equal_nan=True)

    def check_unchanged(self) -> None:
        """Refuse a changed original; see `check_unchanged`."""
        check_unchanged(self)


Input = FunctionInput | ConstantInput


def check_unchanged(given: Input) -> None:
    """Refuse to go on where the caller has changed a Function or Constant that is fixed. Not collective.

    Raises:
        InvalidInput: Naming what changed.
    """
    if given.changed():
        raise InvalidInput(f"{given.label} has changed since the operator was built. What varies must be listed in inputs=[...].")


def check_function(label: str, given: fem.Function) -> None:
    """Refuse Functions of single precision or complex numbers. Not collective.

    Raises:
        InvalidInput: Naming the type.
    """
    if given.x.array.dtype != np.float64:
        raise InvalidInput(f"{label} has dtype {given.x.array.dtype}; fem_vi works in float64 with real numbers.")
