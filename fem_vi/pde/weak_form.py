"""A PDE as a weak-form residual: what is solved for, what varies, and what is prescribed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ufl
from dolfinx import fem
from ufl import classes
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.algorithms.analysis import extract_type

from fem_vi.arguments import instance
from fem_vi.errors import InvalidInput, UnsupportedForm
from fem_vi.parallel import raise_on_all
from fem_vi.pde.agree import agreed
from fem_vi.pde.boundary import Boundary
from fem_vi.pde.coordinates import Coordinates
from fem_vi.pde.copies import check_list, check_symbols, create_copies, label_of
from fem_vi.pde.inputs import FunctionInput, Input, check_function
from fem_vi.pde.quadrature import check_rules_of_derivatives, pin_quadrature


class WeakForm:
    """The residual F(u, m; v) of a PDE, written once in UFL.

    The form is copied on to private Functions and Constants: operators built from it never write to those of the caller.
    The state Function's values at this moment are the initial guess of nonlinear solves. Functions and Constants
    of the form that are not listed as inputs are fixed at their values of this moment; changing one later is an
    error in the next call, not a silently old number.

    Args:
        F: UFL form with one test function v in the space of the state, zero at the solution.
        state: The Function u that is solved for; any space, mixed ones included.
        inputs: The Functions and Constants that gradients reach: coefficients and sources in any space, Constants of any
            shape, values of Dirichlet conditions (the Function or Constant passed to `dirichletbc`).
        bcs: Dirichlet conditions on the state's space or its subspaces. Where they overlap, the last one counts.

    Raises:
        InvalidInput: Where an input is of the wrong kind, occurs twice, or occurs nowhere in the form or conditions.
        UnsupportedForm: Where F does not have exactly one argument, its test function lives in another space, measures of one
            kind have different subdomain data or a tag without any, or the form compiler would take quadrature rules for each
            other.

    Attributes:
        form: F on the private copies.
        jacobian: dF/du, a 2-form.
        is_linear: Whether F is affine in the state, seen from the form.
        initial_guess: Local coefficients, ghosts included.

    MPI: Collective.

    Example:
        >>> F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
        >>> pde = fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[bc])
    """

    def __init__(
        self,
        F: ufl.Form,
        *,
        state: fem.Function,
        inputs: Sequence[fem.Function | fem.Constant],
        bcs: Sequence[fem.DirichletBC] = (),
    ) -> None:
        with agreed(state, F, inputs):
            test = _test_function(F, state)
            check_list("inputs", inputs)
            check_list("bcs", bcs)
            check_function("the state", state)
            if any(given is state for given in inputs):
                raise InvalidInput("The state is listed among the inputs; it is what Solve returns.")
            check_symbols(F, inputs, besides=[state])
            _check_occurrence(F, inputs, bcs)
        self._given = F, state, tuple(inputs), tuple(bcs)
        self.space = state.function_space
        self.comm = self.space.mesh.comm
        self.unknown = FunctionInput(state, "the state")
        varying, self._fixed = create_copies(F, inputs, besides=[state])
        self.inputs = tuple(varying)
        self.test = ufl.TestFunction(self.space)
        self.trial = ufl.TrialFunction(self.space)
        self.state: fem.Function = self.unknown.symbol
        copies = {given.given: given.symbol for given in (self.unknown, *self.inputs, *self._fixed)}
        self.form = pin_quadrature(expand_derivatives(ufl.replace(F, {test: self.test, **copies})))
        check_rules_of_derivatives(self.form, [given.symbol for given in (self.unknown, *self.inputs)])
        self.boundary = Boundary(self.space, bcs, self.inputs)
        with raise_on_all(self.comm):
            self._check_occurrence()
        self.initial_guess = self.state.x.array.copy()
        self.jacobian: ufl.Form = expand_derivatives(ufl.derivative(self.form, self.state, self.trial))
        sees_state = any(self.state is c for c in self.jacobian.coefficients())
        self.is_linear = not (sees_state or is_switched_by(self.form, self.state))

    @property
    def fixed(self) -> tuple[Input, ...]:
        """Private copies of the Functions and Constants of the form that are neither the state nor inputs."""
        return tuple(self._fixed)

    def _check_occurrence(self) -> None:
        on_boundary = {source.position for source in self.boundary.sources}
        for position, given in enumerate(self.inputs):
            if position not in on_boundary and not given.occurs_in(self.form):
                raise InvalidInput(f"{given.label} occurs neither in the form nor as the value of a Dirichlet condition.")
        if not self.unknown.occurs_in(self.form):
            raise InvalidInput(
                "The state does not occur in the form; use the Function passed as state in place of a TrialFunction."
            )

    def occurs_in(self, form: ufl.Form) -> tuple[int, ...]:
        """Positions of the inputs that occur in a form derived from this one."""
        return tuple(k for k, given in enumerate(self.inputs) if given.occurs_in(form))

    def with_inputs(self, *others: fem.Function | fem.Constant) -> WeakForm:
        """The same PDE, on copies of its own, where `others` vary too; they come after the inputs. Collective."""
        self.check_fixed(besides=others)
        F, state, inputs, bcs = self._given
        return WeakForm(F, state=state, inputs=[*inputs, *others], bcs=bcs)

    def fixes(self, given: fem.Function | fem.Constant) -> bool:
        """Whether something occurs in the form or as the value of a Dirichlet condition, without being an input."""
        values = [bc.g for bc in self.boundary.bcs]
        if any(given is other.given for other in self.inputs):
            return False
        return any(given is other.given for other in self._fixed) or any(given._cpp_object is value for value in values)

    def check_fixed(self, besides: Sequence[fem.Function | fem.Constant] = ()) -> None:
        """Refuse to go on where a Function or Constant that is no input, nor one of `besides`, has been changed. Not collective.

        Raises:
            InvalidInput: Naming what changed.
        """
        for given in self._fixed:
            if not any(given.given is other for other in besides):
                given.check_unchanged()
        if self.boundary.changed(besides):
            raise InvalidInput(
                "The value of a Dirichlet condition has changed since the WeakForm was built. "
                "What varies must be listed in WeakForm(inputs=[...])."
            )


def check_weak_form(name: str, pde: object) -> None:
    """Refuse what is no weak form, such as the UFL form that one is made of. Not collective.

    Raises:
        InvalidInput: Naming it.
    """
    instance(name, pde, WeakForm, way_out="Write the PDE as fem_vi.WeakForm(F, state=u, inputs=[...]) first.")


def is_switched_by(form: ufl.Form, symbol: object) -> bool:
    """Whether a Function stands in a condition: the form is then not affine in it, though its derivative may say so."""
    conditions = extract_type(form, classes.Condition)
    return any(symbol in extract_coefficients(condition) for condition in conditions)


def _check_occurrence(F: ufl.Form, inputs: Sequence[Any], bcs: Sequence[object]) -> None:
    """Refuse inputs that occur nowhere before anything is copied, which all ranks do together."""
    symbols = [*F.coefficients(), *F.constants(), *(bc.g for bc in bcs if isinstance(bc, fem.DirichletBC))]
    for position, given in enumerate(inputs):
        known = isinstance(given, Coordinates) or any(symbol is given or symbol is given._cpp_object for symbol in symbols)
        if not known:
            raise InvalidInput(
                f"{label_of(position, given)} occurs neither in the form nor as the value of a Dirichlet condition."
            )


def _test_function(F: object, state: object) -> ufl.Argument:
    if not isinstance(F, ufl.Form):
        raise UnsupportedForm(f"F is a {type(F).__name__}; it must be a UFL form (an integrand times ufl.dx, ufl.ds or ufl.dS).")
    if not isinstance(state, fem.Function):
        raise InvalidInput(f"state is a {type(state).__name__}; it must be the dolfinx.fem.Function that the form contains.")
    arguments = F.arguments()
    if len(arguments) != 1:
        raise UnsupportedForm(
            f"F has {len(arguments)} arguments; a residual has one, its test function. Write it with the state Function in "
            "place of a TrialFunction."
        )
    if arguments[0].ufl_function_space() != state.function_space:
        raise UnsupportedForm(
            "The test function of F lives in another space than the state; take ufl.TestFunction(state.function_space)."
        )
    return arguments[0]
