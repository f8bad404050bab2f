"""Vector-Jacobian products of a residual with respect to its state and inputs.

For the residual vector r_i = F(u, m; phi_i) and a vector lam of its space,

    lam^T dr/du = d/du F(u, m; lam)        and        lam^T dr/dm = d/dm F(u, m; lam),

1-forms that are derived in UFL and compiled once. A Constant c is no Function, so its entries are taken one by one from
d/dc F(u, m; lam) : e, a scalar, with e running over the unit tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import ufl
from dolfinx import fem
from numpy.typing import NDArray
from ufl.algebra import Sum
from ufl.algorithms import expand_derivatives
from ufl.core.expr import Expr
from ufl.differentiation import CoordinateDerivative

from fem_vi.errors import UnsupportedForm
from fem_vi.parallel import sum_over_ranks
from fem_vi.pde.assemble import ScalarForm, VectorForm, ZeroVector, create_vector_form
from fem_vi.pde.coupling import InputMatrix
from fem_vi.pde.inputs import Array, Coefficients, ConstantInput, FunctionInput, Input
from fem_vi.pde.region import Region
from fem_vi.pde.weak_form import WeakForm


class FormGradient:
    """The gradient of a 0-form with respect to Functions and Constants in it.

    Args:
        form: UFL 0-form.
        inputs: What to differentiate for.
        region: The part of the mesh that is visited; all of it, where this is None.

    MPI: Collective.
    """

    def __init__(self, form: ufl.Form, inputs: Sequence[Input], region: Region | None = None) -> None:
        self._form = form
        self._region = region
        self._inputs = tuple(inputs)
        self._parts: dict[int, VectorForm | ZeroVector | _ConstantGradient] = {}

    def assemble(self, position: int) -> Array:
        """Derivative for one input, at what is loaded.

        Args:
            position: Which of the inputs. Its form is compiled when it is first asked for.

        Returns:
            Owned entries `(n_owned,)` for a Function; `(prod(shape),)`, replicated and complete, for a Constant.

        MPI: Collective.
        """
        if position not in self._parts:
            self._parts[position] = self._create(self._inputs[position])
        return self._parts[position].assemble()

    def _create(self, given: Input) -> VectorForm | ZeroVector | _ConstantGradient:
        try:
            if isinstance(given, FunctionInput):
                direction = ufl.TestFunction(given.space)
                derivative = expand_derivatives(ufl.derivative(self._form, given.symbol, direction))
                return create_vector_form(derivative, given.size, self._region)
            return _ConstantGradient(self._form, given, self._region)
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedForm(f"The form cannot be differentiated for {given.label}: {error}") from error


def constant_slope(form: ufl.Form, constant: fem.Constant, direction: fem.Constant) -> ufl.Form:
    """The derivative of a form for a Constant in a direction, a Constant of the same shape."""
    return ufl.Form([integral.reconstruct(_slope(integral.integrand(), constant, direction)) for integral in form.integrals()])


def _slope(integrand: Expr, constant: fem.Constant, direction: fem.Constant) -> Expr:
    """The slope of an integrand. Derivatives for mesh coordinates, which UFL leaves for last, change places with it."""
    if isinstance(integrand, CoordinateDerivative):
        inner, *along = integrand.ufl_operands
        return CoordinateDerivative(_slope(inner, constant, direction), *along)
    if isinstance(integrand, Sum):
        return Sum(*(_slope(part, constant, direction) for part in integrand.ufl_operands))
    variable = ufl.variable(constant)
    return ufl.inner(ufl.diff(ufl.replace(integrand, {constant: variable}), variable), direction)


class _ConstantGradient:
    """Derivative of a 0-form with respect to the entries of a Constant."""

    def __init__(self, form: ufl.Form, given: ConstantInput, region: Region | None) -> None:
        self._comm = given.symbol.ufl_domain().ufl_cargo().comm
        self._size = given.size
        self._direction = fem.Constant(given.symbol.ufl_domain(), np.zeros(given.shape))
        slope = expand_derivatives(constant_slope(form, given.symbol, self._direction))
        self._form = None if slope.empty() else ScalarForm(slope, region)

    def assemble(self) -> Array:
        gradient = np.zeros(self._size)
        if self._form is not None:
            direction = self._direction.value.reshape(-1)
            for entry in range(self._size):
                direction[:] = 0.0
                direction[entry] = 1.0
                gradient[entry] = self._form.assemble()
        return sum_over_ranks(self._comm, gradient)


def _subtract_rows(grad: Array, rows: NDArray[np.intp], values: Array) -> None:
    """grad[rows[i]] -= values[i] for every i, where rows may repeat."""
    if len(rows) == len(grad) and np.array_equal(rows, np.arange(len(grad))):
        grad -= values
    else:
        np.subtract.at(grad, rows, values)


class ResidualVjp:
    """lam^T dr/du and lam^T dr/dm of a weak form, without boundary conditions.

    Args:
        pde: The weak form.
        matrices: dF/dm of inputs that enter by a constant matrix, by position: products take the place of 1-forms.
        region: The part of the mesh that is visited; all of it, where this is None.

    Attributes:
        inputs: Positions of the inputs that occur in the form; others enter by Dirichlet conditions only.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm, matrices: Mapping[int, InputMatrix] | None = None, *, region: Region | None = None) -> None:
        self.pde = pde
        self._matrices = matrices or {}
        lam = fem.Function(pde.space)
        self._lam = Coefficients(lam)
        form = ufl.replace(pde.form, {pde.test: lam})
        self.inputs = pde.occurs_in(form)
        self._gradient = FormGradient(form, [pde.unknown, *pde.inputs], region)

    def load(self, lam: Array) -> None:
        """Set lam: owned entries, `(n_owned,)`. Collective."""
        self._lam.load(lam)

    def state(self) -> Array:
        """lam^T dr/du at what is loaded, owned entries: a view, valid until the next call. Collective."""
        return self._gradient.assemble(0)

    def input(self, position: int) -> Array:
        """lam^T dr/dm for one input at what is loaded; see `FormGradient.assemble`. Collective."""
        if position in self._matrices:
            return self._matrices[position].multiply_transposed(self._lam.owned)
        return self._gradient.assemble(1 + position)

    def add_products(self, lam: Array, rows: Sequence[NDArray[np.intp]], grads: Sequence[Array | None]) -> list[Array | None]:
        """Add -lam^T dF/dm to the gradients of the inputs that enter by a constant matrix, for several lam at once.

        Args:
            lam: `(num_samples, n_owned)`.
            rows: For each input, the row of its gradient that each sample adds to.
            grads: For each input, its gradient; None where it is not wanted.

        Returns:
            The gradients that `add_implicit` has still to add to.

        MPI: Collective.
        """
        prescribed = {source.position for source in self.pde.boundary.sources}
        left = list(grads)
        for position in self._matrices.keys() - prescribed:
            grad, left[position] = left[position], None
            if grad is not None:
                _subtract_rows(grad, rows[position], self._matrices[position].multiply_rows_transposed(lam))
        return left

    def add_implicit(self, g: Array, rows: Sequence[Array | None]) -> None:
        """Add dL/dm of each input, for the u with F(u, m) = 0, a cotangent g = dL/du, and lam = (dF/du)^-T g.

        lam, u and m are loaded. Inputs in the form get -lam^T dF/dm, prescribed values g - (dF/du)^T lam on their dofs.

        Args:
            g: Owned entries, `(n_owned,)`.
            rows: For each input, what its derivative is added to; None where it is not wanted.

        MPI: Collective.
        """
        for position, row in enumerate(rows):
            if row is not None and position in self.inputs:
                row -= self.input(position)
        sources = self.pde.boundary.sources
        if any(rows[source.position] is not None for source in sources):
            at_state = g - self.state()
            for source in sources:
                row = rows[source.position]
                if row is not None:
                    row += source.gradient(at_state, self.pde.comm)
