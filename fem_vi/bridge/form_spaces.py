"""Where the symbols of a weak form get their values: tensors of a call, or values that are fixed."""

from __future__ import annotations

from typing import Any

import numpy as np

from fem_vi.errors import UnsupportedForm
from fem_vi.pde.coordinates import CoordinateInput
from fem_vi.pde.inputs import Array, FunctionInput
from fem_vi.pde.tabulate import Orientation, cell_dofs, geometry_nodes, orientation
from fem_vi.pde.weak_form import WeakForm

GEOMETRY = -1
"""The source that stands for the coordinates of a mesh that does not move."""


class Spaces:
    """Where the symbols of a weak form get their values: tensors of a call, or values that are fixed.

    Args:
        pde: The weak form.
    """

    def __init__(self, pde: WeakForm) -> None:
        self.mesh = pde.space.mesh
        self.test = pde.space
        self.given = [pde.unknown, *pde.inputs]
        self._fixed = list(pde.fixed)
        moving = [k for k, given in enumerate(self.given) if isinstance(given, CoordinateInput)]
        self.geometry = moving[0] if moving else GEOMETRY

    def source(self, symbol: Any) -> int:
        """The number of a Function's tensor; from len(given) on, it is fixed."""
        for number, given in enumerate([*self.given, *self._fixed]):
            if given.symbol is symbol:
                return number
        raise UnsupportedForm(f"TorchKernel does not know the Function {symbol} of the form. Use AssembledKernel().")

    def constant(self, symbol: Any) -> tuple[int, Array] | int:
        """The number of a Constant's tensor, or its values where it is fixed."""
        number = self.source(symbol)
        return number if self.is_given(number) else (number, np.ravel(self._fixed[number - len(self.given)].symbol.value))

    def is_given(self, source: int) -> bool:
        """Whether a source is a tensor of the call."""
        return 0 <= source < len(self.given)

    def element(self, source: int) -> Any:
        """The basix element of a source."""
        if source == GEOMETRY:
            return self.mesh.ufl_domain().ufl_coordinate_element()
        return self._space(source).ufl_element()

    def dofs(self, source: int, cells: Any) -> Any:
        """Rows of a source's tensor that cells read."""
        return geometry_nodes(self.mesh, cells) if source == GEOMETRY else cell_dofs(self._space(source), cells)

    def orientation(self, source: int, cells: Any) -> Orientation | None:
        """See `tabulate.orientation`."""
        return None if source == GEOMETRY else orientation(self._space(source), cells)

    def values(self, source: int) -> Array:
        """Local values of a fixed source, ghosts included."""
        if source == GEOMETRY:
            return np.ravel(self.mesh.geometry.x[:, : self.mesh.geometry.dim])
        values: Array = self._fixed[source - len(self.given)].symbol.x.array
        return values

    def _space(self, source: int) -> Any:
        given = (self.given + self._fixed)[source]
        if not isinstance(given, FunctionInput):
            raise UnsupportedForm(f"{given.label} is no Function; TorchKernel cannot take its values at points.")
        return given.space
