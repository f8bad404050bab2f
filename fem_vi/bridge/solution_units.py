"""A residual in the units of the solution: s(u, m) = A(u, m)^-1 r(u, m) with A = dr/du, the Newton step from u, reversed.

Where F is affine in u, r(u) = A (u - u(m)) for the solution u(m), so that s = u - u(m): one solve for each m, and none for u.

Otherwise, with prescribed dofs B whose rows of A are those of the identity, s_B = r_B =: d and the rest of s = w + d solves

    dF/du(u, m)[w + d; v] = F(u, m; v)  for all v,     w_B = 0:

a weak form that is linear in w, with u, m and d for inputs, so that `Solve` gives s with first and second derivatives, those of A
included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import ufl
from dolfinx import fem
from torch import Tensor

from fem_vi.bridge.call import plan
from fem_vi.bridge.solve import Solve
from fem_vi.parallel import any_rank, raise_on_all
from fem_vi.pde.coordinates import CoordinateInput
from fem_vi.pde.petsc_options import Option
from fem_vi.pde.weak_form import WeakForm


class SolutionUnits:
    """s = A(u, m)^-1 r(u, m), as a function of (u, m, r).

    Args:
        pde: The weak form.
        petsc_options: As for `Solve`.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm, petsc_options: Mapping[str, Option]) -> None:
        self._pde = pde
        self._positions = tuple(range(len(pde.inputs))) if pde.is_linear else pde.occurs_in(pde.form)
        self._lifts = not pde.is_linear and any_rank(pde.comm, pde.boundary.owned.size > 0)
        self.solve = Solve(pde if pde.is_linear else self._newton_form(), petsc_options=petsc_options)
        self._prescribed = torch.zeros(pde.unknown.size, dtype=torch.float64)
        self._prescribed[torch.from_numpy(pde.boundary.owned.astype(np.int64))] = 1.0

    def _newton_form(self) -> WeakForm:
        pde = self._pde
        step, lifting = fem.Function(pde.space, name="step"), fem.Function(pde.space, name="lifting")
        whole: Any = step + lifting if self._lifts else step
        form = ufl.replace(pde.jacobian, {pde.trial: whole}) - pde.form
        given = [pde.unknown, *(pde.inputs[k] for k in self._positions)]
        symbols = [source.given if isinstance(source, CoordinateInput) else source.symbol for source in given]
        derived = WeakForm(form, state=step, inputs=[*symbols, *([lifting] if self._lifts else [])], bcs=_zero_conditions(pde))
        for copy, source in zip(derived.inputs, given, strict=False):
            copy.label = source.label
        return derived

    def __call__(self, residual: Any, u: Tensor, *inputs: Tensor) -> Tensor:
        """s, for a function that gives r at its prescribed dofs. Collective."""
        with raise_on_all(self._pde.comm):
            self._pde.check_fixed()
            plan("Residual.in_solution_units", (u, *inputs), [self._pde.unknown, *self._pde.inputs])
        if self._pde.is_linear:
            return u.to(torch.float64) - self.solve(*inputs)
        used = [inputs[k] for k in self._positions]
        if not self._lifts:
            return self.solve(u, *used)
        lifting = residual(u, *inputs) * self._prescribed.to(u.device)
        return self.solve(u, *used, lifting) + lifting


def _zero_conditions(pde: WeakForm) -> list[fem.DirichletBC]:
    """Conditions that prescribe zero wherever the weak form prescribes anything, one component after another."""
    dofs, space = pde.boundary.dofs, pde.space
    bs = space.dofmap.index_map_bs
    if not any_rank(pde.comm, dofs.size > 0):
        return []
    if bs == 1:
        return [fem.dirichletbc(fem.Function(space), dofs)]
    return [fem.dirichletbc(0.0, dofs[dofs % bs == k], space.sub(k)) for k in range(bs)]
