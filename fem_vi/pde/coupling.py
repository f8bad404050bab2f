"""How the old state enters a time step, where it enters linearly and in the same way in all steps.

With F = J u_new + C u_old + c, products with the matrix C, assembled once, take the place of assembling 1-forms in each step:
b = -(C u_old + c) forward, and -C^T lam backward. Backward it serves nonlinear problems as well: it takes no more than
a dF/du_old = C without the new state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import ufl
from dolfinx import fem
from dolfinx.fem import petsc as fem_petsc
from ufl.algorithms import expand_derivatives

from fem_vi.pde.assemble import create_vector_form
from fem_vi.pde.inputs import Array, FunctionInput
from fem_vi.pde.weak_form import WeakForm


class Coupling:
    """The matrix C = dF/du_old and, where F is affine in the new state too, the rest c.

    Both are assembled at what is loaded when their key changes.

    Args:
        pde: The weak form.
        previous: The old state, one of its inputs.
        form: dF/du_old, a 2-form without the old and the new state.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm, previous: FunctionInput, form: ufl.Form) -> None:
        self._form = fem.form(form)
        self._matrix = fem_petsc.create_matrix(self._form)
        self._x, self._y = self._matrix.createVecs()
        self._key: Hashable = None
        rest = _without(_without(pde.form, pde.state), previous.symbol) if pde.is_linear else ufl.Form([])
        self.rest_inputs = pde.occurs_in(rest)
        self._rest = create_vector_form(rest, pde.unknown.size)
        self._rest_key: Hashable = None
        self._rest_values: Array | None = None

    def assemble(self, key: Hashable) -> None:
        """Assemble C, unless it has been assembled for this key. Collective."""
        if key != self._key:
            self._matrix.zeroEntries()
            fem_petsc.assemble_matrix(self._matrix, self._form)
            self._matrix.assemble()
            self._key = key

    def rest(self, key: Hashable | None) -> Array:
        """c at what is loaded, owned entries; not assembled again for the key of the last call. Collective."""
        if key is None or key != self._rest_key or self._rest_values is None:
            self._rest_values, self._rest_key = self._rest.assemble(), key
        return self._rest_values

    def multiply(self, old: Array) -> Array:
        """C u_old, owned entries: a view, valid until the next product. Collective."""
        return self._product(self._matrix.mult, old)

    def multiply_transposed(self, lam: Array) -> Array:
        """C^T lam, owned entries: a view, valid until the next product. Collective."""
        return self._product(self._matrix.multTranspose, lam)

    def _product(self, multiply: Callable[..., None], values: Array) -> Array:
        self._x.array_w[:] = values
        multiply(self._x, self._y)
        return self._y.array_r  # type: ignore[no-any-return]


def _without(form: ufl.Form, function: fem.Function) -> ufl.Form:
    """What is left of -F, a form affine in a Function, where that is zero."""
    return ufl.rhs(ufl.replace(form, {function: ufl.TrialFunction(function.function_space)}))


def create_coupling(pde: WeakForm, position: int, is_steady: Callable[[int], bool]) -> tuple[Coupling | None, tuple[int, ...]]:
    """The coupling of a weak form, where it is the same in all steps.

    Args:
        pde: The weak form.
        position: Which of its inputs is the old state.
        is_steady: Whether an input, by position, is the same in all steps.

    Returns:
        The coupling, or None; and the positions of the inputs that C sees.

    MPI: Collective.
    """
    previous = pde.inputs[position]
    assert isinstance(previous, FunctionInput)
    form = expand_derivatives(ufl.derivative(pde.form, previous.symbol, ufl.TrialFunction(previous.space)))
    inputs = pde.occurs_in(form)
    on_boundary = any(source.position == position for source in pde.boundary.sources)
    sees_state = any(pde.state is symbol for symbol in form.coefficients())
    if form.empty() or on_boundary or sees_state or not all(is_steady(k) for k in inputs):
        return None, ()
    return Coupling(pde, previous, form), inputs
