"""The Jacobian of a residual at a reference point, factorised once: A0 = dr/du.

With unknowns I and prescribed dofs B, whose rows of r are u - h, and J = dF/du at the reference,

    A0 = [[J_II, J_IB], [0, 1]],      A0^-1 r:  x_B = r_B,  J_II x_I = r_I - J_IB r_B,
                                      A0^-T g:  J_II^T y_I = g_I,  y_B = g_B - J_IB^T y_I.

The factor is that of J with rows and columns B of the identity; J_IB takes part by products with the whole J.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fem_vi.parallel import any_rank
from fem_vi.pde.coordinates import CoordinateInput
from fem_vi.pde.coupling import InputMatrix
from fem_vi.pde.factors import FactorPool
from fem_vi.pde.inputs import Array
from fem_vi.pde.petsc_options import Option, Options
from fem_vi.pde.solver_choice import choose_solver
from fem_vi.pde.weak_form import WeakForm

_KEY = "reference"


class ReferenceJacobian:
    """A0 of a weak form, with a factorisation that stays.

    Args:
        pde: The weak form.
        values: Owned values of the state, or None where the form is linear in it, and of each input.
        petsc_options: As for `choose_solver`.

    Raises:
        SolveFailed: On every rank, where A0 is singular.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm, values: Sequence[Array | None], petsc_options: Mapping[str, Option]) -> None:
        choice = choose_solver(pde, petsc_options)
        self._owned = pde.boundary.owned
        options = Options(choice.options, watched=petsc_options)
        self._pool = FactorPool(pde.jacobian, pde.boundary, options, 0, prepare=choice.prepare, is_symmetric=choice.is_symmetric)
        self._jacobian = InputMatrix(pde.jacobian) if any_rank(pde.comm, self._owned.size > 0) else None
        given = [pde.unknown, *pde.inputs]
        try:
            for one, value in zip(given, values, strict=True):
                if value is not None:
                    one.load(value)
            self._pool.get(_KEY)
            if self._jacobian is not None:
                self._jacobian.assemble(_KEY)
        finally:
            for one in given:
                if isinstance(one, CoordinateInput):
                    one.restore()
        options.warn_unused()

    def solve(self, r: Array) -> Array:
        """A0^-1 r for each row, with a direct method all at once.

        Args:
            r: Owned entries, `(num, n_owned)`.

        Returns:
            `(num, n_owned)`.

        Raises:
            SolveFailed: On every rank, where the solver did not converge.

        MPI: Collective.
        """
        right = r.copy()
        if self._jacobian is not None:
            lifted = np.zeros_like(r)
            lifted[:, self._owned] = r[:, self._owned]
            right -= self._jacobian.multiply_rows(list(lifted))
            right[:, self._owned] = r[:, self._owned]
        return self._solve(right, transposed=False)

    def solve_transposed(self, g: Array) -> Array:
        """A0^-T g for each row; as `solve`, but one row after another with LU before PETSc 3.25. Collective."""
        right = g.copy()
        right[:, self._owned] = 0.0
        y = self._solve(right, transposed=True)
        if self._jacobian is not None:
            product = self._jacobian.multiply_rows_transposed(y)
            y[:, self._owned] = g[:, self._owned] - product[:, self._owned]
        return y

    def _solve(self, right: Array, *, transposed: bool) -> Array:
        if len(right) == 0:
            return right
        out, failures = self._pool.get(_KEY).solve_many(right, transposed=transposed)
        for error in failures.values():
            raise error
        return np.array(out)
