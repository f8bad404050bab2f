"""`Functional`: a UFL scalar as a differentiable function of the Functions and Constants in it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import ufl
from dolfinx import fem
from ufl.algorithms import expand_derivatives

from fem_vi.bridge.call import Call
from fem_vi.bridge.operator import BatchedOperator, Bend
from fem_vi.errors import InvalidInput, UnsupportedForm
from fem_vi.parallel import sum_over_ranks
from fem_vi.pde.adjoint import FormGradient
from fem_vi.pde.agree import agreed
from fem_vi.pde.assemble import ScalarForm
from fem_vi.pde.coordinates import Coordinates
from fem_vi.pde.copies import check_list, check_symbols, create_copies
from fem_vi.pde.inputs import Array
from fem_vi.pde.quadrature import check_rules_of_derivatives, pin_quadrature
from fem_vi.pde.tangent import ScalarTangent


class Functional(BatchedOperator):
    """J(u, m, ...): an integral over the mesh, the global number on every rank; differentiable twice.

    Args:
        form: UFL form without test and trial functions.
        inputs: The Functions and Constants of the form that gradients reach. Others are fixed at their values of this
            moment; changing one later is an error in the next call.

    Call:
        `functional(*inputs)`, as for `Solve`; returns `(*batch,)`, replicated.

    Raises:
        UnsupportedForm: Where the form has arguments.
        InvalidInput: Where an input does not occur in the form; see also `BatchedOperator.__call__`.
        NotFinite: On every rank, where the integral has no finite value, such as the logarithm of a negative field.

    MPI: Collective, forward and backward.

    Example:
        >>> energy = fem_vi.Functional(0.5 * ufl.inner(ufl.grad(u), ufl.grad(u)) * ufl.dx, [u])
    """

    def __init__(self, form: ufl.Form, inputs: Sequence[fem.Function | fem.Constant]) -> None:
        with agreed(form, inputs):
            _check(form, inputs)
        copies, self._fixed = create_copies(form, inputs)
        super().__init__(form.ufl_domain().ufl_cargo(), copies, ())
        expanded = pin_quadrature(expand_derivatives(ufl.replace(form, {c.given: c.symbol for c in (*copies, *self._fixed)})))
        check_rules_of_derivatives(expanded, [c.symbol for c in copies])
        self._copies = copies
        self._expanded = expanded
        self._form = ScalarForm(expanded)
        self._gradient = FormGradient(expanded, copies)

    def _check_state(self) -> None:
        for given in self._fixed:
            given.check_unchanged()

    def _load(self, call: Call, flat: Sequence[Array], sample: int) -> None:
        for given, value in zip(self._copies, call.values(flat, sample), strict=True):
            given.load(value)

    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        out = np.empty(call.num_samples)
        for sample in range(call.num_samples):
            self._load(call, flat, sample)
            out[sample] = self._form.assemble()
        total = sum_over_ranks(self.comm, out)
        self._check_finite(total[:, None])
        return total

    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> Array:
        for sample in range(call.num_samples):
            self._load(call, flat, sample)
            for position, grad in enumerate(grads):
                if grad is not None:
                    grad[call.rows[position][sample]] += g[sample] * self._gradient.assemble(position)
        return g

    @cached_property
    def _tangent(self) -> ScalarTangent:
        return ScalarTangent(self._expanded, self._copies)

    def _pushforward(self, call: Call, flat: Sequence[Array], out: Array, tangents: Sequence[Array]) -> Array:
        moved = np.empty_like(out)
        for sample in range(call.num_samples):
            self._load(call, flat, sample)
            self._tangent.load(call.values(tangents, sample))
            moved[sample] = self._tangent.value()
        return sum_over_ranks(self.comm, moved)

    def _curvature(self, call: Call, flat: Sequence[Array], bend: Bend, at_out: Array, grads: Sequence[Array]) -> None:
        for sample in range(call.num_samples):
            self._load(call, flat, sample)
            self._tangent.load(call.values(bend.tangents, sample))
            for k, grad in enumerate(grads):
                grad[call.rows[k][sample]] += bend.lam[sample] * self._tangent.gradient(k)


def _check(form: object, inputs: Sequence[object]) -> None:
    if not isinstance(form, ufl.Form):
        raise UnsupportedForm(
            f"form is a {type(form).__name__}; it must be a UFL form (an integrand times ufl.dx, ufl.ds or ufl.dS)."
        )
    if form.empty():
        raise UnsupportedForm("form has no integrals; a functional has one at least.")
    if form.arguments():
        raise UnsupportedForm(f"form has {len(form.arguments())} arguments; a functional has none.")
    check_list("inputs", inputs)
    symbols = [*form.coefficients(), *form.constants()]
    for position, given in enumerate(inputs):
        if not isinstance(given, Coordinates) and not any(given is symbol for symbol in symbols):
            raise InvalidInput(f"inputs[{position}] does not occur in the form.")
    check_symbols(form, inputs)
