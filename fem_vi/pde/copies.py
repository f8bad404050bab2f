"""Private copies of the Functions and Constants of a form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from dolfinx import fem

from fem_vi.errors import InvalidInput
from fem_vi.pde.coordinates import CoordinateInput, Coordinates, check_shape_derivative
from fem_vi.pde.inputs import ConstantInput, Input, create_function_input


def create_input(given: object, label: str) -> Input:
    """The private copy of a Function or Constant.

    Args:
        given: `dolfinx.fem.Function` or `dolfinx.fem.Constant`, real, double precision; or the `coordinates` of the mesh.
        label: How error messages call it.

    Raises:
        InvalidInput: For anything else.
    """
    if isinstance(given, Coordinates):
        return CoordinateInput(given, label)
    if isinstance(given, fem.Function):
        return create_function_input(given, label)
    if isinstance(given, fem.Constant):
        if np.iscomplexobj(given.value):
            raise InvalidInput(f"{label} is complex; fem_vi works with real numbers.")
        return ConstantInput(given, label)
    raise InvalidInput(
        f"{label} is a {type(given).__name__}; it must be a dolfinx.fem.Function or dolfinx.fem.Constant that occurs in the form "
        "or is the value of a Dirichlet condition."
    )


def check_list(name: str, given: object) -> None:
    """Refuse a single object where several are expected. Not collective.

    Raises:
        InvalidInput: For anything but a list or tuple.
    """
    if not isinstance(given, list | tuple):
        raise InvalidInput(f"{name} is a {type(given).__name__}; it must be a list, {name}=[...], also of one or none.")


def create_copies(form: ufl.Form, inputs: Sequence[object], *, besides: Sequence[object] = ()) -> tuple[list[Input], list[Input]]:
    """Private copies of everything in a form: of the listed inputs, and of the rest, which stays fixed.

    Args:
        form: UFL form.
        inputs: The caller's Functions and Constants that vary.
        besides: What needs no copy.

    Returns:
        Copies of the inputs, in order, and of the other coefficients and Constants of the form.

    Raises:
        InvalidInput: Where an input is of the wrong kind or listed twice.
        UnsupportedForm: Where the coordinates of the mesh are an input, and the form is not differentiated rightly for them.
    """
    for position, given in enumerate(inputs):
        if any(given is other for other in inputs[:position]):
            raise InvalidInput(f"inputs[{position}] is listed twice.")
    varying = [
        create_input(given, f"inputs[{k}] ({given.name})" if isinstance(given, fem.Function) else f"inputs[{k}]")
        for k, given in enumerate(inputs)
    ]
    if any(isinstance(given, CoordinateInput) for given in varying):
        check_shape_derivative(form)
    known = [*inputs, *besides]
    others = [symbol for symbol in (*form.coefficients(), *form.constants()) if not any(symbol is k for k in known)]
    return varying, [create_input(symbol, f"the {type(symbol).__name__} '{symbol}' of the form") for symbol in others]
