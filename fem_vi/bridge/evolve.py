"""`Evolve`: the trajectory of a time-dependent PDE as a differentiable function of initial state and inputs.

u_{k+1} = S_k(u_k, m) is one time step (see `fem_vi.pde.step`). For a loss of the whole trajectory with g_k = dL/du_k, the
total derivatives G_k follow backward in time,

    G_T = g_T,      G_k = g_k + (dS_k/du)^T G_{k+1},      dL/dm = sum_k (dS_k/dm)^T G_{k+1},      dL/du0 = G_0.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from dolfinx import fem

from fem_vi.arguments import whole
from fem_vi.bridge.batch import Argument
from fem_vi.bridge.call import Call
from fem_vi.bridge.operator import BatchedOperator
from fem_vi.errors import InvalidInput, SolveFailed
from fem_vi.pde.agree import agreed
from fem_vi.pde.checkpoints import BinomialCheckpoints, Stored
from fem_vi.pde.clock import check_set_by_evolve, create_clocks
from fem_vi.pde.coordinates import CoordinateInput
from fem_vi.pde.inputs import Array, Input
from fem_vi.pde.petsc_options import Option, check_options
from fem_vi.pde.step import TimeStep, Trajectory
from fem_vi.pde.weak_form import WeakForm, check_weak_form


class Evolve(BatchedOperator):
    """trajectory = evolve(u0, m, ...): num_steps solves of a weak form, each from the state before; differentiable once.

    The weak form is one time step F(u, u_n, m, t, dt; v) = 0, such as (u - u_n) / dt v + grad(u) . grad(v) for backward Euler;
    any scheme that reaches one step back. A form that is affine in u is factorised once for all steps, samples and calls
    where no input enters its Jacobian; other forms go through SNES, from the old state.

    Args:
        pde: The weak form of a time step; `state` is the new state.
        previous: The Function of the old state in it, not among its inputs.
        num_steps: T.
        save: Which of the states 0, ..., T are wanted, in increasing order; -1 is the last. The default is all. Steps after
            the last wanted state are not computed.
        stored_steps: Where not all states are saved, the backward needs others: how many of them are stored at a time, for
            each sample; what is not stored is computed again in the backward, as seldom as can be (binomial checkpointing).
            None stores all. Peak memory: `stored_steps` states, three in use, and those of `save`.
        time_dependent: Those inputs of the weak form that have one value for each step, in the axis after the batch axes:
            `(*batch, T, n_owned)` or `(*batch, T, *shape)`. Entry k belongs to the step from state k to state k + 1.
        time: A Constant of the form, not among its inputs, that is to be the time of the new state in each step; it starts
            from the value that it has now.
        dt: A Constant of the form, not among its inputs, that is to be the size of each step. For the gradient of dt, make it an
            input and leave this out.
        time_steps: Size of all steps, or of each of the T, where `time` or `dt` are given; the default is the value of `dt`.
        petsc_options: As for `Solve`.
        factor_budget: As for `Solve`.

    Call:
        `evolve(u0, *inputs)`, in the order of `WeakForm(inputs=[...])`: u0 is a field tensor `(*batch, n_owned)`, inputs are
        `(*batch, n_owned)` for a Function and replicated `(*batch, *shape)` for a Constant, with the axis T where declared;
        returns field tensors `(*batch, T + 1, n_owned)`, or `(*batch, len(save), n_owned)`. State 0 is u0 as given, also on the
        Dirichlet boundary.

    Raises:
        InvalidInput: Where the arguments do not fit the weak form; in a call, see `BatchedOperator.__call__`.
        UnsupportedForm: Where no integral reaches an unknown, and no condition prescribes it.
        SolveFailed: On every rank, where a solver did not converge: which step, which sample, and PETSc's reason.

    MPI: Collective, forward and backward.

    References:
        Hinze, Pinnau, Ulbrich, Ulbrich (2009), Optimization with PDE Constraints, section 1.6.
        Griewank, Walther (2000), Algorithm 799: revolve.

    Example:
        >>> F = (u - u_n) / dt * v * ufl.dx + ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx
        >>> pde = fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[bc])
        >>> evolve = fem_vi.Evolve(pde, previous=u_n, num_steps=100)
        >>> trajectory = evolve(u0, m)
    """

    def __init__(
        self,
        pde: WeakForm,
        *,
        previous: fem.Function,
        num_steps: int,
        save: Sequence[int] | None = None,
        stored_steps: int | None = None,
        time_dependent: Sequence[fem.Function | fem.Constant] = (),
        time: fem.Constant | None = None,
        dt: fem.Constant | None = None,
        time_steps: float | Sequence[float] | None = None,
        petsc_options: Mapping[str, Option] | None = None,
        factor_budget: int = 2**30,
    ) -> None:
        with agreed(pde):
            check_weak_form("Evolve: pde", pde)
            check_options(petsc_options)
            whole("Evolve: num_steps", num_steps, least=1)
            whole("Evolve: factor_budget", factor_budget, least=0)
        if any(isinstance(given, CoordinateInput) for given in pde.inputs):
            raise InvalidInput(
                "Evolve: the coordinates of the mesh cannot be an input of a time step; Solve and Functional take them."
            )
        _check_previous(pde, previous)
        clocks = create_clocks(pde, num_steps, time=time, dt=dt, time_steps=time_steps)
        varies = _declared(pde, time_dependent)
        self.save = _saved(save, num_steps)
        u0 = _Given("u0", pde.unknown.shape, pde.unknown.layout)
        arguments = [_per_step(given, num_steps) if yes else given for given, yes in zip(pde.inputs, varies, strict=True)]
        super().__init__(pde.space.mesh, [u0, *arguments], (len(self.save), pde.unknown.size))
        self.pde = pde.with_inputs(previous, *(constant for constant, _ in clocks))
        self._step = TimeStep(
            self.pde,
            time_dependent=varies,
            clocks=[values for _, values in clocks],
            petsc_options=petsc_options or {},
            factor_budget=factor_budget,
        )
        self._shapes = [(num_steps, given.size) if yes else (given.size,) for given, yes in zip(pde.inputs, varies, strict=True)]
        self._num_steps = self.save[-1]
        self._row = {state: row for row, state in enumerate(self.save)}
        self._saves_all = len(self.save) == self._num_steps + 1
        if stored_steps is not None:
            whole("Evolve: stored_steps", stored_steps, least=1)
        self._checkpoints = BinomialCheckpoints(self._num_steps, num_steps if stored_steps is None else stored_steps)

    @property
    def num_factorisations(self) -> int:
        """Factorisations (or preconditioner set-ups) of the Jacobian so far, without those inside SNES."""
        return self._step.num_factorisations

    @property
    def num_steps_solved(self) -> int:
        """Time steps solved forward so far, those computed again for a backward included."""
        return self._step.num_solved

    def _check_state(self) -> None:
        self.pde.check_fixed()

    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        out: Array = np.empty((call.num_samples, *self._output_shape))
        for sample in range(call.num_samples):
            u0, given = self._trajectory(call, flat, sample)
            if 0 in self._row:
                out[sample, 0] = u0
            if call.keep and not self._saves_all:
                call.saved[sample] = self._walk(call, given, u0, out[sample])
            else:
                state = u0
                for step in range(self._num_steps):
                    state = self._advance(call, given, step, state, out[sample])
                if not call.keep:
                    self._step.finish(given)
        return out

    def _walk(self, call: Call, given: Trajectory, u0: Array, out: Array | None = None) -> Stored:
        """All steps, storing what the backward starts from."""
        return self._checkpoints.forward(u0, lambda step, state: self._advance(call, given, step, state, out))

    def _advance(self, call: Call, given: Trajectory, step: int, state: Array, out: Array | None = None) -> Array:
        """One step, written to the output where its end is saved."""
        try:
            new = self._step.advance(given, step, state, keep=call.keep)
        except SolveFailed as error:
            raise SolveFailed(self._where(call, given, step, error)) from error
        row = self._row.get(step + 1)
        if out is not None and row is not None:
            out[row] = new
        return new

    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> Array:
        for sample in reversed(range(call.num_samples)):  # the factor used last is the one surely kept
            u0, given = self._trajectory(call, flat, sample)
            rows = [None if grad is None else grad[call.rows[k][sample]] for k, grad in enumerate(grads)]
            back = _Back(self, call, given, g[sample].reshape(self._output_shape), rows[1:])
            if self._saves_all:
                states = out[sample].reshape(self._output_shape)
                for step in reversed(range(self._num_steps)):
                    back.pull_back(step, states[step], states[step + 1])
            else:
                self._walk_back(call, given, u0, back)
            self._step.finish(given)
            if rows[0] is not None:
                rows[0] += back.total(0)
        return g

    def _walk_back(self, call: Call, given: Trajectory, u0: Array, back: _Back) -> None:
        """Backward with stored states; those that an earlier backward of the same graph has used up are computed again."""
        stored = call.saved.pop(given.sample, None) or self._walk(call, given, u0)
        if self._checkpoints.stores_all:
            call.saved[given.sample] = dict(stored)
        self._checkpoints.backward(stored, lambda step, state: self._advance(call, given, step, state), back.pull_back)

    def _trajectory(self, call: Call, flat: Sequence[Array], sample: int) -> tuple[Array, Trajectory]:
        u0, *values = call.values(flat, sample)
        rows = tuple(int(rows[sample]) for rows in call.rows[1:])
        shaped = tuple(value.reshape(shape) for value, shape in zip(values, self._shapes, strict=True))
        return u0, Trajectory(call.number, sample, rows, shaped)

    def _where(self, call: Call, given: Trajectory, step: int, error: SolveFailed) -> str:
        which = f", sample {given.sample} of {call.num_samples}" if call.batch else ""
        return f"Evolve: step {step + 1} of {self._num_steps}{which}: {error}."


class _Back:
    """The way back over one trajectory: the total derivative of the loss for the state that has been reached."""

    def __init__(self, evolve: Evolve, call: Call, given: Trajectory, g: Array, rows: Sequence[Array | None]) -> None:
        self._evolve, self._call, self._given, self._g = evolve, call, given, g
        self._rows = [None if row is None else row.reshape(shape) for row, shape in zip(rows, evolve._shapes, strict=True)]
        self._carried: Array = np.zeros(g.shape[-1])

    def total(self, state: int) -> Array:
        """G of the state that has been reached: what later states carried back, and what the loss sees of it itself.

        To be asked for once a state: the sum is made in place.
        """
        row = self._evolve._row.get(state)
        if row is not None:
            self._carried += self._g[row]
        return self._carried

    def pull_back(self, step: int, old: Array, new: Array) -> None:
        """From the end of a step to its start. Collective."""
        evolve, given = self._evolve, self._given
        try:
            self._carried = evolve._step.pull_back(given, step, (old, new), self.total(step + 1), self._rows)
        except SolveFailed as error:
            raise SolveFailed(evolve._where(self._call, given, step, error)) from error


@dataclass(frozen=True)
class _Given:
    """A tensor that Evolve takes besides, or in place of, an input of its weak form."""

    label: str
    shape: tuple[int, ...]
    layout: str
    is_field: bool = True

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def _per_step(given: Input, num_steps: int) -> Argument:
    layout = f"it has one value for each of {num_steps} steps, and {given.layout}"
    return _Given(given.label, (num_steps, *given.shape), layout, given.is_field)


def _check_previous(pde: WeakForm, previous: object) -> None:
    if not isinstance(previous, fem.Function):
        raise InvalidInput(
            f"Evolve: previous is a {type(previous).__name__}; it must be the Function of the old state in the form."
        )
    check_set_by_evolve(pde, previous, "previous")
    if previous.function_space != pde.space:
        raise InvalidInput("Evolve: previous lives in another space than the state; take fem.Function(state.function_space).")


def _declared(pde: WeakForm, time_dependent: Sequence[object]) -> list[bool]:
    """For each input, whether it depends on time."""
    for number, given in enumerate(time_dependent):
        if not any(given is other.given for other in pde.inputs):
            raise InvalidInput(f"Evolve: time_dependent[{number}] is not among WeakForm(inputs=[...]).")
    return [any(given.given is other for other in time_dependent) for given in pde.inputs]


def _saved(save: Sequence[int] | None, num_steps: int) -> tuple[int, ...]:
    """Numbers of the wanted states, negative ones counted from the end."""
    if save is None:
        return tuple(range(num_steps + 1))
    out = tuple(int(k) + num_steps + 1 if k < 0 else int(k) for k in save)
    rising = all(a < b for a, b in itertools.pairwise(out))
    if not out or not rising or out[0] < 0 or not 0 < out[-1] <= num_steps:
        raise InvalidInput(
            f"Evolve: save is {list(save)}; it must have rising numbers from 0 to {num_steps}, or from -1 downward for the last "
            "ones, and at least one after state 0."
        )
    return out
