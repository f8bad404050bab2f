"""Private copies of the Functions and Constants of a form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from dolfinx import fem

from fem_vi.errors import InvalidInput
from fem_vi.pde.coordinates import CoordinateInput, Coordinates, check_shape_derivative
from fem_vi.pde.inputs import ConstantInput, FunctionInput, Input, check_function


def check_symbols(form: ufl.Form, inputs: Sequence[object], *, besides: Sequence[object] = ()) -> None:
    """Refuse inputs, and other symbols of a form, that cannot be copied. Not collective.

    Args:
        form: UFL form.
        inputs: The caller's Functions and Constants that vary.
        besides: What needs no copy.

    Raises:
        InvalidInput: Where one is of the wrong kind, not real or not of double precision, or an input is listed twice.
        UnsupportedForm: Where the coordinates of the mesh are an input, and the form is not differentiated rightly for them.
    """
    for position, given in enumerate(inputs):
        if any(given is other for other in inputs[:position]):
            raise InvalidInput(f"inputs[{position}] is listed twice.")
        _check_symbol(given, label_of(position, given))
    if any(isinstance(given, Coordinates) for given in inputs):
        check_shape_derivative(form)
    for symbol in _others(form, [*inputs, *besides]):
        _check_symbol(symbol, _name(symbol))


def _check_symbol(given: object, label: str) -> None:
    if isinstance(given, fem.Function) and not isinstance(given, Coordinates):
        check_function(label, given)
    elif isinstance(given, fem.Constant):
        if np.iscomplexobj(given.value):
            raise InvalidInput(f"{label} is complex; fem_vi works with real numbers.")
    elif not isinstance(given, Coordinates):
        raise InvalidInput(
            f"{label} is a {type(given).__name__}; it must be a dolfinx.fem.Function or dolfinx.fem.Constant that occurs in "
            "the form or is the value of a Dirichlet condition."
        )


def label_of(position: int, given: object) -> str:
    """How errors call an input."""
    return f"inputs[{position}] ({given.name})" if isinstance(given, fem.Function) else f"inputs[{position}]"


def _name(symbol: object) -> str:
    return f"the {type(symbol).__name__} '{symbol}' of the form"


def _others(form: ufl.Form, known: Sequence[object]) -> list[object]:
    return [symbol for symbol in (*form.coefficients(), *form.constants()) if not any(symbol is k for k in known)]


def _copy(given: object, label: str) -> Input:
    if isinstance(given, Coordinates):
        return CoordinateInput(given, label)
    return FunctionInput(given, label) if isinstance(given, fem.Function) else ConstantInput(given, label)


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

    MPI: Collective, so that `check_symbols` comes first.
    """
    varying = [_copy(given, label_of(k, given)) for k, given in enumerate(inputs)]
    return varying, [_copy(symbol, _name(symbol)) for symbol in _others(form, [*inputs, *besides])]
