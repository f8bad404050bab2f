"""Derivatives of forms in a direction, and the gradients of those: what forward mode and second derivatives are made of.

For a form F(x; v) of several Functions and Constants x and a direction dx,

    T(x, dx; v) = d/ds F(x + s dx; v) at s = 0,

is derived in UFL, with dx in Functions and Constants of its own. Its gradient for x at a fixed v is the second derivative of
F, applied to dx.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ufl
from dolfinx import fem
from ufl.algorithms import expand_derivatives

from fem_vi.pde.adjoint import FormGradient, constant_slope
from fem_vi.pde.assemble import ScalarForm, create_vector_form
from fem_vi.pde.inputs import Array, Coefficients, ConstantInput, FunctionInput, Input
from fem_vi.pde.weak_form import WeakForm


class Direction:
    """A direction dx for one input x.

    Attributes:
        symbol: The Function or Constant that holds it.
    """

    def __init__(self, given: Input) -> None:
        self._given = given
        if isinstance(given, FunctionInput):
            self.symbol: Any = fem.Function(given.space)
            self._coefficients = Coefficients(self.symbol)
        else:
            self.symbol = fem.Constant(given.symbol.ufl_domain(), np.zeros(given.shape))

    def load(self, values: Array) -> None:
        """Set its owned coefficients, or its entries. Collective for a Function."""
        if isinstance(self._given, FunctionInput):
            self._coefficients.load(values)
        else:
            self.symbol.value[...] = values.reshape(self._given.shape)

    def derivative(self, form: ufl.Form) -> ufl.Form:
        """The derivative of a form for the input in this direction."""
        if isinstance(self._given, ConstantInput):
            return constant_slope(form, self._given.symbol, self.symbol)
        return ufl.derivative(form, self._given.symbol, self.symbol)


class Tangent:
    """T(x, dx) of a form.

    Args:
        form: UFL form of any arity.
        inputs: x.

    Attributes:
        form: T.
        symbols: The Functions and Constants that hold dx.
    """

    def __init__(self, form: ufl.Form, inputs: Sequence[Input]) -> None:
        self._inputs = tuple(inputs)
        self._directions = [Direction(given) for given in inputs]
        self.symbols = [direction.symbol for direction in self._directions]
        self.form = self.derivative(form)

    def derivative(self, form: ufl.Form) -> ufl.Form:
        """T of another form of the same inputs, in the same direction."""
        parts = [
            direction.derivative(form)
            for given, direction in zip(self._inputs, self._directions, strict=True)
            if given.occurs_in(form)
        ]
        return expand_derivatives(sum(parts, ufl.Form([])))

    def load(self, directions: Sequence[Array]) -> None:
        """Set dx: for each input the owned coefficients, or the entries. Collective."""
        for direction, values in zip(self._directions, directions, strict=True):
            direction.load(values)


class ScalarTangent(Tangent):
    """T of a 0-form, and its gradient.

    Args:
        form: UFL 0-form.
        inputs: The Functions and Constants of which it is a function.

    MPI: Collective.
    """

    def __init__(self, form: ufl.Form, inputs: Sequence[Input]) -> None:
        super().__init__(form, inputs)
        self._value = None if self.form.empty() else ScalarForm(self.form)
        self._gradient = FormGradient(self.form, inputs)

    def value(self) -> float:
        """This rank's part of T at what is loaded. Not collective."""
        return 0.0 if self._value is None else self._value.assemble()

    def gradient(self, position: int) -> Array:
        """The gradient of T for one input; see `FormGradient.assemble`. Collective."""
        return self._gradient.assemble(position)


class ResidualTangent:
    """T of a weak form, as the vector T(u, m, du, dm; phi_i), and the gradient of lam . T for u and m.

    Args:
        pde: The weak form.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm) -> None:
        given = [pde.unknown, *pde.inputs]
        self._tangent = Tangent(pde.form, given)
        self._vector = create_vector_form(self._tangent.form, pde.unknown.size)
        lam = fem.Function(pde.space)
        self._lam = Coefficients(lam)
        self._gradient = FormGradient(self._tangent.derivative(ufl.replace(pde.form, {pde.test: lam})), given)

    def load(self, du: Array, dm: Sequence[Array]) -> None:
        """Set the direction: owned coefficients of du, and for each input owned coefficients or entries. Collective."""
        self._tangent.load([du, *dm])

    def vector(self) -> Array:
        """T(phi_i) at what is loaded, owned entries: a view, valid until the next call. Collective."""
        return self._vector.assemble()

    def load_test(self, lam: Array) -> None:
        """Set lam: owned entries. Collective."""
        self._lam.load(lam)

    def gradient(self, position: int) -> Array:
        """d/du (position 0) or d/dm_k (position 1 + k) of T(lam) at what is loaded; see `FormGradient.assemble`. Collective."""
        return self._gradient.assemble(position)
