"""`Residual`: the weak-form residual vector as a differentiable function of state and inputs; no solver."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from fem_vi.bridge.call import Call
from fem_vi.bridge.operator import BatchedOperator, Bend
from fem_vi.pde.adjoint import ResidualVjp
from fem_vi.pde.assemble import VectorForm
from fem_vi.pde.inputs import Array
from fem_vi.pde.tangent import ResidualTangent
from fem_vi.pde.weak_form import WeakForm


class Residual(BatchedOperator):
    """r = residual(u, m, ...): r_i = F(u, m; phi_i), and u - h at the prescribed dofs; differentiable twice.

    The residual of a state that `Solve` returns is zero, in the prescribed dofs too.

    Args:
        pde: The weak form.

    Call:
        `residual(u, *inputs)`: u is a field tensor `(*batch, n_owned)`, inputs as for `Solve`; returns a field tensor
        `(*batch, n_owned)`: each rank has the entries that it owns, summed over the cells of all ranks.

    Raises:
        InvalidInput: See `BatchedOperator.__call__`.
        NotFinite: On every rank, where the form has no finite value, such as the logarithm of a negative field.

    MPI: Collective, forward and backward.

    Example:
        >>> residual = fem_vi.Residual(pde)
        >>> loss = fem_vi.all_sum(residual(u, m).square().sum(-1), mesh.comm)
    """

    def __init__(self, pde: WeakForm) -> None:
        super().__init__(pde.space.mesh, [pde.unknown, *pde.inputs], pde.unknown.shape)
        self.pde = pde
        self._form = VectorForm(pde.form)
        self._vjp = ResidualVjp(pde)

    def _check_state(self) -> None:
        self.pde.check_fixed()

    def _load(self, call: Call, flat: Sequence[Array], sample: int) -> None:
        for given, value in zip([self.pde.unknown, *self.pde.inputs], call.values(flat, sample), strict=True):
            given.load(value)

    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        out = np.empty((call.num_samples, self.pde.unknown.size))
        owned = self.pde.boundary.owned
        for sample in range(call.num_samples):
            self._load(call, flat, sample)
            out[sample] = self._form.assemble()
            out[sample, owned] = self.pde.state.x.array[owned] - self.pde.boundary.values()
        self._check_finite(out)
        return out

    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> Array:
        lam = g.copy()
        lam[:, self.pde.boundary.owned] = 0.0
        for sample in range(call.num_samples):
            self._load(call, flat, sample)
            self._vjp.load(lam[sample])
            rows = [None if grad is None else grad[call.rows[k][sample]] for k, grad in enumerate(grads)]
            self._add_gradients(rows, g[sample])
        return lam

    def _pushforward(self, call: Call, flat: Sequence[Array], out: Array, tangents: Sequence[Array]) -> Array:
        moved = np.empty_like(out)
        owned = self.pde.boundary.owned
        for sample in range(call.num_samples):
            self._load(call, flat, sample)
            du, *directions = call.values(tangents, sample)
            self._tangent.load(du, directions)
            moved[sample] = self._tangent.vector()
            prescribed = np.zeros_like(du)
            for source in self.pde.boundary.sources:
                source.push(directions[source.position], prescribed)
            moved[sample, owned] = du[owned] - prescribed[owned]
        return moved

    def _curvature(self, call: Call, flat: Sequence[Array], bend: Bend, at_out: Array, grads: Sequence[Array]) -> None:
        for sample in range(call.num_samples):
            self._load(call, flat, sample)
            du, *directions = call.values(bend.tangents, sample)
            self._tangent.load(du, directions)
            self._tangent.load_test(bend.lam[sample])
            for k, grad in enumerate(grads):
                grad[call.rows[k][sample]] += self._tangent.gradient(k)

    @cached_property
    def _tangent(self) -> ResidualTangent:
        return ResidualTangent(self.pde)

    def _add_gradients(self, rows: Sequence[Array | None], g: Array) -> None:
        state, *inputs = rows
        owned = self.pde.boundary.owned
        if state is not None:
            state += self._vjp.state()
            state[owned] += g[owned]
        for position, row in enumerate(inputs):
            if row is not None and position in self._vjp.inputs:
                row += self._vjp.input(position)
        for source in self.pde.boundary.sources:
            row = inputs[source.position]
            if row is not None:
                row -= source.gradient(g, self.comm)
