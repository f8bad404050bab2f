"""One time step: F(u_new, u_old, m, t, dt; v) = 0, its adjoint, and the factors that steps share.

With u_new = S(u_old, m) and a cotangent g of u_new,

    (dF/du_new)^T lam = g,      dL/du_old += -(dF/du_old)^T lam,      dL/dm += -(dF/dm)^T lam,

so the old state is an input of the step like any other.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fem_vi.errors import SolveFailed
from fem_vi.pde.adjoint import ResidualVjp
from fem_vi.pde.coupling import create_coupling
from fem_vi.pde.inputs import Array
from fem_vi.pde.petsc_options import Option
from fem_vi.pde.state import StateEquation
from fem_vi.pde.weak_form import WeakForm


@dataclass(frozen=True)
class Trajectory:
    """The inputs of one trajectory.

    Attributes:
        number: Counts calls; equal on all ranks.
        sample: Which sample of the call.
        rows: For each input, which row of the call's values this is: samples that read the same row share it.
        values: For each input `(size,)`, or `(num_steps, size)` where it depends on time.
    """

    number: int
    sample: int
    rows: tuple[int, ...]
    values: tuple[Array, ...]


class TimeStep:
    """A weak form as a map from the old state to the new one.

    Args:
        pde: The weak form. Its inputs are those of the trajectory, then the old state, then one Constant for each clock.
        time_dependent: For each input of the trajectory, whether it has one value for each step.
        clocks: The values of a Constant in each step, `(num_steps,)`, such as the time or the step size.
        petsc_options: SNES, KSP and PC options, without prefix.
        factor_budget: Bytes per rank for kept factorisations.

    Attributes:
        num_solved: Steps taken so far, those computed again included.

    MPI: Collective.
    """

    def __init__(
        self,
        pde: WeakForm,
        *,
        time_dependent: Sequence[bool],
        clocks: Sequence[Array],
        petsc_options: Mapping[str, Option],
        factor_budget: int,
    ) -> None:
        self.pde = pde
        self.num_solved = 0
        self._time_dependent = tuple(time_dependent)
        self._clocks = tuple(clocks)
        self._equation = StateEquation(pde, petsc_options, factor_budget)
        self._vjp = ResidualVjp(pde, self._equation.matrices)
        self._previous = len(self._time_dependent)
        self._new_each_step = not pde.is_linear or not all(self._no_step(k) for k in self._equation.jacobian_inputs)
        self._coupling, self._coupling_inputs = create_coupling(pde, self._previous, self._is_steady)
        self._multiplies = self._coupling is not None and pde.is_linear and pde.boundary.homogeneous

    @property
    def num_factorisations(self) -> int:
        """Factorisations so far, without those inside SNES."""
        return self._equation.factors.num_factorisations

    def advance(self, given: Trajectory, step: int, old: Array, *, keep: bool) -> Array:
        """Solve for the new state, from the old one as initial guess.

        Args:
            given: The inputs.
            step: Which step, from 0.
            old: Owned coefficients of the old state, `(n_owned,)`.
            keep: Whether the adjoint of this step may follow.

        Returns:
            Owned coefficients of the new state, an array of its own.

        Raises:
            SolveFailed: On every rank, where a solver did not converge.

        MPI: Collective.
        """
        key = self._key(given, step)
        values = self._values(given, step, old)
        new = (
            self._solve_by_matrix(given, step, values, key) if self._multiplies else self._equation.solve(values, key, start=old)
        )
        self.num_solved += 1
        if self._new_each_step and not keep:
            self._equation.factors.release(key)
        return new

    def pull_back(
        self, given: Trajectory, step: int, states: tuple[Array, Array], g: Array, rows: Sequence[Array | None]
    ) -> Array:
        """The adjoint of `advance`.

        Args:
            given: The inputs.
            step: Which step, from 0.
            states: Owned coefficients of the old and the new state.
            g: Owned cotangent of the new state.
            rows: For each input, what its gradient is added to, in the shape of its values; None where it is not wanted.

        Returns:
            Owned cotangent of the old state.

        Raises:
            SolveFailed: On every rank, where the solver did not converge.

        MPI: Collective.
        """
        key = self._key(given, step)
        old, new = states
        by_matrix = self._coupling is not None and all(row is None for row in rows)
        if not (by_matrix and self._equation.factors.keeps(key) and self._coupling_is_assembled(given, step)):
            self._equation.load(self._values(given, step, old), new)
        try:
            lam = self._equation.solve_transposed(g, key)
        except SolveFailed as error:
            raise SolveFailed(f"adjoint: {error}") from error
        by_form = np.zeros_like(g) if self._coupling is None else None
        if not by_matrix:
            self._vjp.load(lam)
            self._vjp.add_implicit(g, [*self._at(step, rows), by_form, *(None for _ in self._clocks)])
        g_old = self._times_coupling(given, step, lam) if by_form is None else by_form
        if self._new_each_step:
            self._equation.factors.release(key)
        return g_old

    def finish(self, given: Trajectory) -> None:
        """Say that no adjoint of this trajectory will follow. Not collective."""
        for step in range(0 if self._new_each_step else len(self._clocks[0]) if self._clocks else 1):
            key = self._key(given, step)
            if any(isinstance(part, tuple) for part in key):
                self._equation.factors.release(key)

    def _solve_by_matrix(self, given: Trajectory, step: int, values: Sequence[Array], key: Hashable) -> Array:
        """J u_new = -(C u_old + c), where all prescribed values are zero."""
        assert self._coupling is not None
        steady = all(self._is_steady(k) for k in self._coupling.rest_inputs)
        rest_key = self._parts(given, step, self._coupling.rest_inputs) if steady else None
        kept = self._coupling_is_assembled(given, step) and self._coupling.keeps_rest(rest_key)
        if not (kept and self._equation.factors.keeps(key)):
            self._equation.load(values)
        self._coupling.assemble(self._parts(given, step, self._coupling_inputs))
        b = -self._coupling.multiply(values[self._previous])
        if not self._coupling.rest_is_zero:
            b -= self._coupling.rest(rest_key)
        b[self.pde.boundary.owned] = 0.0
        return self._equation.solve_linear(b, key)

    def _times_coupling(self, given: Trajectory, step: int, lam: Array) -> Array:
        """-(dF/du_old)^T lam by the matrix."""
        assert self._coupling is not None
        self._coupling.assemble(self._parts(given, step, self._coupling_inputs))
        return -self._coupling.multiply_transposed(lam)

    def _coupling_is_assembled(self, given: Trajectory, step: int) -> bool:
        assert self._coupling is not None
        return self._coupling.is_assembled(self._parts(given, step, self._coupling_inputs))

    def _no_step(self, k: int) -> bool:
        """Whether an input is a clock or the same in all steps."""
        return k > self._previous or (k < self._previous and not self._time_dependent[k])

    def _is_steady(self, k: int) -> bool:
        """Whether an input is the same in all steps."""
        return self._no_step(k) and (k < self._previous or np.ptp(self._clocks[k - self._previous - 1]) == 0.0)

    def _values(self, given: Trajectory, step: int, old: Array) -> list[Array]:
        clocks = (clock[step : step + 1] for clock in self._clocks)
        return [*(value for value in self._at(step, given.values) if value is not None), old, *clocks]

    def _at(self, step: int, arrays: Sequence[Array | None]) -> list[Array | None]:
        """The part of each array that belongs to a step."""
        return [
            array[step] if depends and array is not None else array
            for array, depends in zip(arrays, self._time_dependent, strict=True)
        ]

    def _key(self, given: Trajectory, step: int) -> tuple[Hashable, ...]:
        """Names the Jacobian of a step. What depends on the call is a tuple; what does not is kept for later calls."""
        if not self.pde.is_linear:
            return ((given.number, given.sample, step),)
        return self._parts(given, step, self._equation.jacobian_inputs)

    def _parts(self, given: Trajectory, step: int, inputs: Sequence[int]) -> tuple[Hashable, ...]:
        """Names the values that some inputs have in a step."""
        return tuple(self._part(given, k, step) for k in inputs)

    def _part(self, given: Trajectory, k: int, step: int) -> Hashable:
        if k > self._previous:
            return float(self._clocks[k - self._previous - 1][step])
        if k == self._previous:
            return given.number, -1, given.sample, step
        return given.number, k, given.rows[k], step if self._time_dependent[k] else -1
