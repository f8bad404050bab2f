"""The gradients of a 0-form for several Functions and Constants as one 1-form.

Its test function has a block for each: of the space of a Function, and a number in each cell for each entry of a Constant, so
that the sum over all cells is the derivative for that entry. One kernel then computes all gradients in one pass over the cells,
and what they have in common once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import basix.ufl
import numpy as np
import ufl
from ufl.algorithms import expand_derivatives

from fem_vi.errors import UnsupportedForm
from fem_vi.pde.adjoint import constant_slope
from fem_vi.pde.inputs import ConstantInput, Input


def block_gradient(form: ufl.Form, inputs: Sequence[Input]) -> ufl.Form:
    """d/dx of a 0-form.

    Args:
        form: UFL 0-form.
        inputs: Functions and Constants x, at least one, in the order of the blocks.

    Returns:
        1-form, derivatives expanded; empty where the gradient is zero.

    Raises:
        UnsupportedForm: Naming what cannot be differentiated for.
    """
    domain = form.ufl_domain()
    elements = [_element(given, domain) for given in inputs]
    space = ufl.FunctionSpace(domain, elements[0] if len(elements) == 1 else basix.ufl.mixed_element(elements))
    test = ufl.TestFunction(space)
    parts, first = [], 0
    for given, element in zip(inputs, elements, strict=True):
        shape = ufl.FunctionSpace(domain, element).value_shape
        direction = test if len(elements) == 1 else _part(test, first, shape)
        first += int(np.prod(shape, dtype=int))
        try:
            parts.append(_derivative(form, given, direction))
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedForm(f"The form cannot be differentiated for {given.label}: {error}") from error
    return sum(parts, ufl.Form([]))


def _element(given: Input, domain: ufl.Mesh) -> Any:
    if isinstance(given, ConstantInput):
        return basix.ufl.element("DG", domain.ufl_coordinate_element().cell_type.name, 0, shape=given.shape or None)
    return given.space.ufl_element()


def _part(test: ufl.Argument, first: int, shape: tuple[int, ...]) -> Any:
    """Some components of a test function, in a shape of their own."""
    if not shape:
        return test[first]
    if len(shape) == 1:
        return ufl.as_vector([test[first + i] for i in range(shape[0])])
    size = int(np.prod(shape[1:]))
    return ufl.as_tensor([_part(test, first + i * size, shape[1:]) for i in range(shape[0])])


def _derivative(form: ufl.Form, given: Input, direction: Any) -> ufl.Form:
    if not isinstance(given, ConstantInput):
        return expand_derivatives(ufl.derivative(form, given.symbol, direction))
    parts = []
    for integral in form.integrals():
        along = direction("+") if integral.integral_type() == "interior_facet" else direction
        parts.append(constant_slope(ufl.Form([integral]), given.symbol, along))
    return expand_derivatives(sum(parts, ufl.Form([])))
