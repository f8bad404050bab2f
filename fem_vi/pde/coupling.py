"""How inputs that a form is affine in enter it: by matrices that are assembled once.

With F = J u + C m + c, products with the matrix C take the place of assembling 1-forms for each sample or time step:
b = -(C m + c) forward, and -C^T lam backward. Backward it serves nonlinear problems as well: it takes no more than
a dF/dm = C without the state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import ufl
from dolfinx import fem
from petsc4py import PETSc
from ufl.algorithms import expand_derivatives

from fem_vi.pde.assemble import VectorForm, ZeroVector, create_vector_form
from fem_vi.pde.dense_block import DenseBlock
from fem_vi.pde.inputs import Array, FunctionInput
from fem_vi.pde.matrix import MatrixForm
from fem_vi.pde.weak_form import WeakForm, is_switched_by


class InputMatrix:
    """The matrix C = dF/dm of an input, assembled at what is loaded when its key changes.

    Args:
        form: dF/dm, a 2-form.

    MPI: Collective.
    """

    def __init__(self, form: ufl.Form) -> None:
        self._matrix = MatrixForm(form).create_matrix()
        self._x, self._y = self._matrix.petsc.createVecs()
        self._key: Hashable = None
        self._block: DenseBlock | None = None
        self._transpose: PETSc.Mat | None = None  # products with many vectors take three times as long transposed
        self._transposed_block: DenseBlock | None = None

    def assemble(self, key: Hashable) -> None:
        """Assemble C, unless it has been assembled for this key. Collective."""
        if key != self._key:
            self._matrix.assemble()
            self._key = key
            self._transpose = self._transposed_block = None

    def is_assembled(self, key: Hashable) -> bool:
        """Whether C has been assembled for this key last."""
        return key == self._key

    def multiply(self, values: Array) -> Array:
        """C m, owned entries in the space of the state: a view, valid until the next product. Collective."""
        self._x.array_w[:] = values
        self._matrix.petsc.mult(self._x, self._y)
        return self._y.array_r  # type: ignore[no-any-return]

    def multiply_rows(self, rows: Sequence[Array]) -> Array:
        """C m for each row, `(width, n_owned)`: a view, valid until the next product. Collective."""
        if self._block is None or self._block.width != len(rows):
            self._block = DenseBlock(self._matrix.petsc, len(rows))
        self._block.set_left(rows)
        self._matrix.petsc.matMult(self._block.x, self._block.b)
        return self._block.right

    def multiply_rows_transposed(self, rows: Array) -> Array:
        """C^T lam for each row, `(width, n_owned)`: a view, valid until the next product. Collective."""
        if self._transpose is None:
            self._transpose = self._matrix.petsc.transpose(PETSc.Mat())
        if self._transposed_block is None or self._transposed_block.width != len(rows):
            self._transposed_block = DenseBlock(self._transpose, len(rows))
        self._transposed_block.set_left(rows)
        self._transpose.matMult(self._transposed_block.x, self._transposed_block.b)
        return self._transposed_block.right

    def multiply_transposed(self, lam: Array) -> Array:
        """C^T lam, owned entries in the space of the input: a view, valid until the next product. Collective."""
        self._y.array_w[:] = lam
        self._matrix.petsc.multTranspose(self._y, self._x)
        return self._x.array_r  # type: ignore[no-any-return]


def input_matrix_form(pde: WeakForm, position: int) -> ufl.Form:
    """dF/dm of an input, a 2-form."""
    given = pde.inputs[position]
    assert isinstance(given, FunctionInput)
    return expand_derivatives(ufl.derivative(pde.form, given.symbol, ufl.TrialFunction(given.space)))


def constant_matrices(pde: WeakForm) -> dict[int, InputMatrix]:
    """The matrices of those inputs whose dF/dm sees neither the state nor any input, by position. Collective."""
    out = {}
    for position, given in enumerate(pde.inputs):
        if isinstance(given, FunctionInput) and given.occurs_in(pde.form) and not is_switched_by(pde.form, given.symbol):
            form = input_matrix_form(pde, position)
            if not (form.empty() or pde.occurs_in(form) or any(pde.state is c for c in form.coefficients())):
                out[position] = InputMatrix(form)
                out[position].assemble("constant")
    return out


def without(form: ufl.Form, functions: Sequence[fem.Function]) -> ufl.Form:
    """What is left of a form that is affine in some Functions together, where those are zero."""
    for function in functions:
        if not form.empty() and any(function is c for c in form.coefficients()):
            form = -ufl.rhs(ufl.replace(form, {function: ufl.TrialFunction(function.function_space)}))
    return form


class Coupling(InputMatrix):
    """How the old state enters a time step: C = dF/du_old and, where F is affine in the new state too, the rest c.

    Args:
        pde: The weak form.
        previous: The old state, one of its inputs.
        form: dF/du_old, a 2-form without the old and the new state.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm, previous: FunctionInput, form: ufl.Form) -> None:
        super().__init__(form)
        rest = without(pde.form, [pde.state, previous.symbol]) if pde.is_linear else ufl.Form([])
        self.rest_inputs = pde.occurs_in(rest)
        self._rest: VectorForm | ZeroVector = create_vector_form(rest, pde.unknown.size)
        self._rest_key: Hashable = None
        self._rest_values: Array | None = None

    @property
    def rest_is_zero(self) -> bool:
        """Whether c vanishes whatever is loaded."""
        return isinstance(self._rest, ZeroVector)

    def keeps_rest(self, key: Hashable | None) -> bool:
        """Whether c is known for this key."""
        return self.rest_is_zero or (key is not None and key == self._rest_key and self._rest_values is not None)

    def rest(self, key: Hashable | None) -> Array:
        """c at what is loaded, owned entries; not assembled again for the key of the last call. Collective."""
        if key is None or key != self._rest_key or self._rest_values is None:
            self._rest_values, self._rest_key = self._rest.assemble(), key
        return self._rest_values


def create_coupling(pde: WeakForm, position: int, is_steady: Callable[[int], bool]) -> tuple[Coupling | None, tuple[int, ...]]:
    """The coupling of a weak form to the old state, where it is the same in all steps.

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
    form = input_matrix_form(pde, position)
    inputs = pde.occurs_in(form)
    on_boundary = any(source.position == position for source in pde.boundary.sources)
    sees_state = any(pde.state is symbol for symbol in form.coefficients())
    switched = is_switched_by(pde.form, previous.symbol)
    if form.empty() or on_boundary or sees_state or switched or not all(is_steady(k) for k in inputs):
        return None, ()
    return Coupling(pde, previous, form), inputs
