"""`Solve`: the state of a PDE as a differentiable function of its inputs.

For F(u, m; v) = 0 and a loss with cotangent g = dL/du, differentiate F(u(m), m) = 0:

    dF/du du + dF/dm dm = 0      so      dL = g^T du = -g^T (dF/du)^-1 dF/dm dm = -lam^T dF/dm dm,
    (dF/du)^T lam = g, lam = 0 on the Dirichlet boundary.

The prescribed values h are part of the state, u = (u_I, h): dL = g_I^T du_I + g_B^T dh with J_II du_I = -J_IB dh, so
dL/dh = g_B - J_IB^T lam_I, which is g - (dF/du)^T lam on the boundary dofs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from fem_vi.bridge.operator import BatchedOperator, Call
from fem_vi.errors import SolveFailed
from fem_vi.pde.adjoint import ResidualVjp
from fem_vi.pde.factors import Option
from fem_vi.pde.inputs import Array
from fem_vi.pde.state import StateEquation
from fem_vi.pde.weak_form import WeakForm


class Solve(BatchedOperator):
    """u = solve(m, ...): the state with F(u, m; v) = 0 for all v, differentiable once for every input.

    A form that is affine in the state is solved by one factorisation, which the adjoint solve uses again; samples that
    share the inputs of the Jacobian share it. Other forms go through PETSc's SNES, from the values that the state
    Function had when the `WeakForm` was built.

    Args:
        pde: The weak form.
        petsc_options: SNES, KSP and PC options without prefix, such as `{"ksp_type": "cg", "pc_type": "hypre"}`; set under a
            prefix that no other object has. The default is LU (MUMPS where PETSc has it), `ksp_rtol` 1e-10, `snes_rtol` 1e-10.
        factor_budget: Bytes per rank for factorisations kept between forward and backward; the least recently used
            goes first and is rebuilt when it is needed.

    Call:
        `solve(*inputs)`, in the order of `WeakForm(inputs=[...])`: `(*batch, n_owned)` for a Function, replicated
        `(*batch, *shape)` for a Constant; returns the state, a field tensor `(*batch, n_owned)`.

    Raises:
        InvalidInput: See `BatchedOperator.__call__`.
        SolveFailed: On every rank, where a solver did not converge: PETSc's reason, iterations, residual, which sample.

    MPI: Collective, forward and backward.

    References:
        Hinze, Pinnau, Ulbrich, Ulbrich (2009), Optimization with PDE Constraints, section 1.6.

    Example:
        >>> solve = fem_vi.Solve(pde)
        >>> loss = (observe(solve(m)) - y).square().sum()
        >>> loss.backward()
    """

    def __init__(self, pde: WeakForm, *, petsc_options: Mapping[str, Option] | None = None, factor_budget: int = 2**30) -> None:
        super().__init__(pde.space.mesh, pde.inputs, pde.unknown.shape)
        self.pde = pde
        self._equation = StateEquation(pde, petsc_options or {}, factor_budget)
        self._vjp = ResidualVjp(pde)

    @property
    def num_factorisations(self) -> int:
        """Factorisations (or preconditioner set-ups) of the Jacobian so far, without those inside SNES."""
        return self._equation.factors.num_factorisations

    def _check_state(self) -> None:
        self.pde.check_fixed()

    def _key(self, call: Call, sample: int) -> Hashable:
        """Names the Jacobian of a sample. One that sees no input of a linear form is the same in all calls."""
        if not self.pde.is_linear:
            return call.number, sample
        if not self._equation.jacobian_inputs:
            return "constant"
        return call.number, *(int(call.rows[k][sample]) for k in self._equation.jacobian_inputs)

    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        out = np.empty((call.num_samples, self.pde.unknown.size))
        for sample in range(call.num_samples):
            key = self._key(call, sample)
            try:
                out[sample] = self._equation.solve(call.values(flat, sample), key)
            except SolveFailed as error:
                for done in range(sample + 1):  # no backward will ask for them
                    self._equation.factors.release(self._key(call, done))
                raise SolveFailed(f"Solve: {_which(call, sample)}: {error}.") from error
            if not call.keep:
                self._equation.factors.release(key)
        return out

    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> None:
        for sample in reversed(range(call.num_samples)):  # the factor used last is the one surely kept
            key = self._key(call, sample)
            try:
                lam = self._equation.solve_adjoint(call.values(flat, sample), out[sample], g[sample], key)
            except SolveFailed as error:
                raise SolveFailed(f"Solve: {_which(call, sample)}: adjoint: {error}.") from error
            self._vjp.load(lam)
            rows = [None if grad is None else grad[call.rows[k][sample]] for k, grad in enumerate(grads)]
            self._vjp.add_implicit(g[sample], rows)
            self._equation.factors.release(key)


def _which(call: Call, sample: int) -> str:
    return f"sample {sample} of {call.num_samples}" if call.batch else "the solve"
