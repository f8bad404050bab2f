"""Compiled forms with buffers of their own: built once, assembled many times, ghosts summed before anyone looks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ufl
from dolfinx import fem, la

from fem_vi.pde.inputs import Array
from fem_vi.pde.region import Region


class VectorForm:
    """A 1-form that assembles into a buffer of its own.

    Args:
        form: UFL 1-form.
        region: The part of the mesh that is visited; all of it, where this is None.
    """

    def __init__(self, form: ufl.Form, region: Region | None = None) -> None:
        space = form.arguments()[0].ufl_function_space()
        self._form = _compile(form, region)
        self._vector = la.vector(space.dofmap.index_map, space.dofmap.index_map_bs)
        self._array: Array = self._vector.array
        self._owned: Array = self._array[: space.dofmap.index_map.size_local * space.dofmap.index_map_bs]

    def assemble(self) -> Array:
        """Owned entries, `(n_owned,)`: a view of the buffer, valid until the next call. Collective."""
        self._array.fill(0.0)
        fem.assemble_vector(self._array, self._form())
        self._vector.scatter_reverse(la.InsertMode.add)
        return self._owned


class ScalarForm:
    """A 0-form; arguments as for `VectorForm`."""

    def __init__(self, form: ufl.Form, region: Region | None = None) -> None:
        self._form = _compile(form, region)

    def assemble(self) -> float:
        """This rank's part of the integral. Not collective."""
        return float(fem.assemble_scalar(self._form()))


class ZeroVector:
    """What a 1-form that vanishes identically assembles to."""

    def __init__(self, size: int) -> None:
        self._zeros = np.zeros(size)

    def assemble(self) -> Array:
        """Zeros, `(n_owned,)`."""
        return self._zeros


def create_vector_form(form: ufl.Form, size: int, region: Region | None = None) -> VectorForm | ZeroVector:
    """Compile a 1-form; a form without integrals becomes zeros of the given owned size."""
    return ZeroVector(size) if form.empty() else VectorForm(form, region)


def _compile(form: ufl.Form, region: Region | None) -> Callable[[], fem.Form]:
    """What returns the compiled form, as it is to be assembled now."""
    if region is not None:
        return region.compile(form)
    compiled = fem.form(form)
    return lambda: compiled
