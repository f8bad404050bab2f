"""Compiled forms with buffers of their own: built once, assembled many times, ghosts summed before anyone looks."""

from __future__ import annotations

import numpy as np
import ufl
from dolfinx import fem, la

from fem_vi.pde.inputs import Array


class VectorForm:
    """A 1-form that assembles into a buffer of its own."""

    def __init__(self, form: ufl.Form) -> None:
        space = form.arguments()[0].ufl_function_space()
        self._form = fem.form(form)
        self._vector = la.vector(space.dofmap.index_map, space.dofmap.index_map_bs)
        self._array: Array = self._vector.array
        self._owned: Array = self._array[: space.dofmap.index_map.size_local * space.dofmap.index_map_bs]

    def assemble(self) -> Array:
        """Owned entries, `(n_owned,)`: a view of the buffer, valid until the next call. Collective."""
        self._array.fill(0.0)
        fem.assemble_vector(self._array, self._form)
        self._vector.scatter_reverse(la.InsertMode.add)
        return self._owned


class ScalarForm:
    """A 0-form."""

    def __init__(self, form: ufl.Form) -> None:
        self._form = fem.form(form)

    def assemble(self) -> float:
        """This rank's part of the integral. Not collective."""
        return float(fem.assemble_scalar(self._form))


class ZeroVector:
    """What a 1-form that vanishes identically assembles to."""

    def __init__(self, size: int) -> None:
        self._zeros = np.zeros(size)

    def assemble(self) -> Array:
        """Zeros, `(n_owned,)`."""
        return self._zeros


def create_vector_form(form: ufl.Form, size: int) -> VectorForm | ZeroVector:
    """Compile a 1-form; a form without integrals becomes zeros of the given owned size."""
    return ZeroVector(size) if form.empty() else VectorForm(form)
