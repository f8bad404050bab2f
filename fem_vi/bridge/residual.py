"""`Residual`: the weak-form residual vector as a differentiable function of state and inputs; no solver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fem_vi.bridge.call import Call
from fem_vi.bridge.operator import BatchedOperator, Bend
from fem_vi.errors import InvalidInput
from fem_vi.pde.inputs import Array
from fem_vi.pde.kernels import AssembledKernel, BatchKernel, Kernel, Rows, Samples
from fem_vi.pde.weak_form import WeakForm

_ASSEMBLED = AssembledKernel()


class Residual:
    """r = residual(u, m, ...): r_i = F(u, m; phi_i), and u - h at the prescribed dofs; differentiable twice.

    The residual of a state that `Solve` returns is zero, in the prescribed dofs too.

    Args:
        pde: The weak form.
        kernel: Who evaluates the integrals. `AssembledKernel()`: DOLFINx, one sample after another, any form.
            `CompiledKernel()`: C code that evaluates all samples of a batch at once, several times faster from eight samples on;
            it takes no coordinates of the mesh as an input. `TorchKernel(device=...)`: torch operations on any device,
            differentiable to any order, which `export_residual` writes to a file; it looks at no values, so that it does not
            raise `NotFinite`. All kernels give the same numbers, up to rounding.

    Call:
        `residual(u, *inputs)`: u is a field tensor `(*batch, n_owned)`, inputs as for `Solve`; returns a field tensor
        `(*batch, n_owned)`: each rank has the entries that it owns, summed over the cells of all ranks.

    Raises:
        InvalidInput: Where `kernel` is no kernel. See also `BatchedOperator.__call__`.
        UnsupportedForm: Where the kernel cannot take the form, naming one that can.
        NotFinite: On every rank, where the form has no finite value, such as the logarithm of a negative field.

    Attributes:
        pde: The weak form.
        kernel: The kernel that was chosen.
        function: What the kernel made of the weak form: a `BatchedOperator`, or a function of tensors of the kernel's own.

    MPI: Collective, forward and backward.

    Example:
        >>> residual = fem_vi.Residual(pde)
        >>> loss = fem_vi.all_sum(residual(u, m).square().sum(-1), mesh.comm)
    """

    def __init__(self, pde: WeakForm, *, kernel: Kernel = _ASSEMBLED) -> None:
        if isinstance(kernel, type) or not hasattr(kernel, "create"):
            raise InvalidInput(f"kernel is {kernel!r}; it must be one of fem_vi's kernels, such as fem_vi.AssembledKernel().")
        self.pde = pde
        self.kernel = kernel
        created = kernel.create(pde)
        self.function: Any = BatchedResidual(pde, created) if isinstance(created, BatchKernel) else created

    def __call__(self, u: Tensor, *inputs: Tensor) -> Tensor:
        """Evaluate; see the class. Collective."""
        return self.function(u, *inputs)


class BatchedResidual(BatchedOperator):
    """The residual as torch sees it: integrals from a kernel, and the rows u - h of the prescribed dofs.

    Args:
        pde: The weak form.
        kernel: Its integrals.
    """

    def __init__(self, pde: WeakForm, kernel: BatchKernel) -> None:
        super().__init__(pde.space.mesh, [pde.unknown, *pde.inputs], pde.unknown.shape)
        self.pde = pde
        self._kernel = kernel

    @property
    def _name(self) -> str:
        return "Residual"

    def _check_state(self) -> None:
        self.pde.check_fixed()

    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        at = Samples(flat, call.rows)
        out = self._kernel.residual(at)
        self._prescribe(out, at)
        out[:, self.pde.boundary.owned] -= self.pde.boundary.fixed
        self._check_finite(out)
        return out

    def _prescribe(self, out: Array, at: Samples) -> None:
        """Write u - h, as far as h is an input, to the rows of prescribed dofs; for tangents as for values."""
        boundary = self.pde.boundary
        out[:, boundary.owned] = at.values[0][:, boundary.owned][at.rows[0]]
        for source in boundary.sources:
            dofs, entries = source.owned
            out[:, dofs] -= at.values[1 + source.position][:, entries][at.rows[1 + source.position]]

    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> Array:
        owned = self.pde.boundary.owned
        lam = g.copy()
        lam[:, owned] = 0.0
        self._kernel.vjp(Samples(flat, call.rows), lam, grads)
        if grads[0] is not None:
            _add_columns(grads[0], call.rows[0], owned, g[:, owned])
        for source in self.pde.boundary.sources:
            grad, rows = grads[1 + source.position], call.rows[1 + source.position]
            for sample, row in enumerate(rows if grad is not None else ()):
                grad[row] -= source.gradient(g[sample], self.comm)  # type: ignore[index]
        return lam

    def _pushforward(self, call: Call, flat: Sequence[Array], out: Array, tangents: Sequence[Array]) -> Array:
        moved = self._kernel.jvp(Samples(flat, call.rows), tangents)
        self._prescribe(moved, Samples(tangents, call.rows))
        return moved

    def _curvature(self, call: Call, flat: Sequence[Array], bend: Bend, at_out: Array, grads: Sequence[Array]) -> None:
        self._kernel.curvature(Samples(flat, call.rows), bend.lam, bend.tangents, grads)


def _add_columns(grad: Array, rows: Rows, columns: NDArray[np.int32], values: Array) -> None:
    """Add some columns of each sample to the rows that the samples read, which may be the same for several."""
    if len(rows) == len(grad):  # then each sample has its own
        grad[:, columns] += values
    else:
        np.add.at(grad, (rows[:, None], columns), values)
