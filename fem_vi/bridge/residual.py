"""`Residual`: the weak-form residual vector as a differentiable function of state and inputs; no solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fem_vi.arguments import instance
from fem_vi.bridge.call import Call, check_values
from fem_vi.bridge.layout import as_numpy
from fem_vi.bridge.logdet import ExactLogdet, LogdetEstimate, LogdetMethod, StochasticLogdet, create_logdet
from fem_vi.bridge.operator import BatchedOperator, Bend
from fem_vi.bridge.precondition import PreconditionedResidual
from fem_vi.bridge.rows import RowChooser, Sampler
from fem_vi.bridge.solution_units import SolutionUnits
from fem_vi.bridge.weighted import WeightedResidual
from fem_vi.errors import InvalidInput
from fem_vi.parallel import any_rank, raise_on_all
from fem_vi.pde.agree import agreed
from fem_vi.pde.inputs import Array
from fem_vi.pde.kernels import AssembledKernel, BatchKernel, Kernel, Rows, Samples
from fem_vi.pde.petsc_options import Option, check_options
from fem_vi.pde.subset import Cells, Patches
from fem_vi.pde.weak_form import WeakForm, check_weak_form

_ASSEMBLED = AssembledKernel()
_EXACT = ExactLogdet()


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
        petsc_options: For `precondition` and `in_solution_units`, as for `Solve`.

    Call:
        `residual(u, *inputs)`: u is a field tensor `(*batch, n_owned)`, inputs as for `Solve`; returns a field tensor
        `(*batch, n_owned)`: each rank has the entries that it owns, summed over the cells of all ranks.
        `residual(u, *inputs, rows=indices)`: the entries of some test functions only, `(*batch, len(indices))`: rows of this
        rank, local numbers below n_owned, in that order; each rank has its own, perhaps none. Only the cells in their reach are
        visited, by DOLFINx whatever the kernel. Whether the rows are given is the same on all ranks.
        `residual(u, *inputs, rows=Cells(indices))`, `rows=Patches(vertices)`: those that reach some cells, or live in some
        patches, in the order of `find_rows`.

    Raises:
        InvalidInput: Where an argument is of the wrong type. See also `BatchedOperator.__call__`.
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

    def __init__(self, pde: WeakForm, *, kernel: Kernel = _ASSEMBLED, petsc_options: Mapping[str, Option] | None = None) -> None:
        with agreed(pde):
            check_weak_form("Residual: pde", pde)
            check_options(petsc_options)
            if isinstance(kernel, type) or not hasattr(kernel, "create"):
                raise InvalidInput(f"kernel is {kernel!r}; it must be one of fem_vi's kernels, such as fem_vi.AssembledKernel().")
        self.pde = pde
        self.kernel = kernel
        self._petsc_options = dict(petsc_options or {})
        created = kernel.create(pde)
        self.function: Any = BatchedResidual(pde, created) if isinstance(created, BatchKernel) else created

    def __repr__(self) -> str:
        return f"Residual(kernel={self.kernel!r})"

    def __call__(self, u: Tensor, *inputs: Tensor, rows: Tensor | Sequence[int] | Cells | Patches | None = None) -> Tensor:
        """Evaluate; see the class. Collective."""
        if rows is not None:
            return self._chooser.at(rows)(u, *inputs)
        return self.function(u, *inputs)

    def weighted(self, w: Tensor, u: Tensor, *inputs: Tensor) -> Tensor:
        """w . r(u, m, ...), an integral with w in the place of the test function; differentiable twice.

        Args:
            w: Weights of the test functions of all ranks, a field tensor `(*batch, n_owned)`. With one axis more than u, k
                weightings of each residual.
            u: State, `(*batch, n_owned)`. All batch axes broadcast.
            inputs: As for `Solve`.

        Returns:
            `(*batch,)`, replicated.

        Raises:
            InvalidInput: See `BatchedOperator.__call__`.
            NotFinite: On every rank, where the form has no finite value.

        MPI: Collective, forward and backward.
        """
        return self._weighted(w, u, *inputs)

    def sample_rows(self, count: int) -> Tensor:
        """Rows drawn at random, without repetition, from those of all ranks where no value is prescribed.

        With N such rows, N / count times a sum over the drawn ones has the sum over all for its mean.

        Args:
            count: How many on all ranks together.

        Returns:
            Those of this rank, local numbers for `rows=`, sorted, int64.

        Raises:
            InvalidInput: On every rank, where there are fewer.

        MPI: Collective. The draw is that of rank 0's torch generator.

        Example:
            >>> r = residual(u, m, rows=residual.sample_rows(64))
            >>> loss = fem_vi.all_sum(r.square().sum(-1), mesh.comm)
        """
        return self._row_sampler.draw(count)

    def sample_cells(self, count: int) -> Cells:
        """Cells drawn at random, without repetition, from those of all ranks.

        Test functions of many cells are drawn more often than others; where that matters take `sample_rows`.

        Args:
            count: How many on all ranks together.

        Returns:
            Those that this rank owns, for `rows=`.

        Raises:
            InvalidInput: On every rank, where there are fewer.

        MPI: Collective. The draw is that of rank 0's torch generator.

        Example:
            >>> r = residual(u, m, rows=residual.sample_cells(16))
        """
        return Cells(self._cell_sampler.draw(count))

    def sample_patches(self, count: int, *, rings: int = 1) -> Patches:
        """Patches around vertices that are drawn at random, without repetition, from those of all ranks.

        Args:
            count: How many on all ranks together.
            rings: Layers of cells of each, at least 1.

        Returns:
            Those of the vertices that this rank owns, for `rows=`. Of a patch at the boundary, test functions may be missing.

        Raises:
            InvalidInput: On every rank, where there are fewer vertices.

        MPI: Collective. The draw is that of rank 0's torch generator.
        """
        return Patches(self._vertex_sampler.draw(count), rings)

    def find_rows(self, subset: Cells | Patches) -> Tensor:
        """The rows of a subset, in the order in which `residual(..., rows=subset)` has them.

        Args:
            subset: `Cells(indices)` or `Patches(vertices)`.

        Returns:
            Local numbers of rows of this rank, ascending, int64, without rows where a value is prescribed. A subset may have rows
            on other ranks than the one that named it.

        Raises:
            InvalidInput: On every rank, where the subset does not fit the mesh.

        MPI: Collective.
        """
        with raise_on_all(self.pde.comm):
            instance("subset", subset, Cells, Patches)
        return torch.from_numpy(self._chooser.find(subset))

    def precondition(self, *, reference: Tensor | Sequence[Tensor] = (), state: Tensor | None = None) -> PreconditionedResidual:
        """The residual times A0^-1, where A0 = dr/du at a reference, factorised now and kept.

        It makes the entries of r comparable, on any mesh, and does not change the posterior that they give: A0 is constant.

        Args:
            reference: The inputs of the reference, without batch axes: a tensor, or a tuple of one for each input.
            state: The reference state, for a form that is not linear in its state.

        Returns:
            A function `(u, *inputs)` like the residual, differentiable twice.

        Raises:
            InvalidInput: On every rank, where the reference does not fit.
            SolveFailed: On every rank, where A0 is singular.

        MPI: Collective.
        """
        with raise_on_all(self.pde.comm):
            instance("precondition: reference", reference, Tensor, Sequence)
        given = (reference,) if isinstance(reference, Tensor) else tuple(reference)
        return PreconditionedResidual(self, self.pde, reference=given, state=state, petsc_options=self._petsc_options)

    def in_solution_units(self, u: Tensor, *inputs: Tensor) -> Tensor:
        """s = (dr/du)^-1 r(u, m, ...) with dr/du at (u, m): the distance of u from the solution, to first order.

        For a form that is linear in u, s = u - u(m) for the solution u(m): integrating u out of N(s; 0, eps^2) then leaves no
        factor of m behind. For any other, s is what Newton's method would subtract from u; ds/du is one at the solution, so that
        such a factor tends to one with eps.

        Args:
            u: State, `(*batch, n_owned)`.
            inputs: As for `Solve`. Samples that share what the Jacobian sees share a factorisation, and samples of u alone need
                none of their own where the form is linear.

        Returns:
            Field tensor `(*batch, n_owned)`, differentiable twice.

        Raises:
            InvalidInput: See `BatchedOperator.__call__`.
            SolveFailed: On every rank, where a Jacobian is singular or a solver did not converge.

        MPI: Collective, forward and backward.
        """
        return self._solution_units(self, u, *inputs)

    @cached_property
    def _solution_units(self) -> SolutionUnits:
        return SolutionUnits(self.pde, self._petsc_options)

    def logdet(self, u: Tensor, *inputs: Tensor, method: LogdetMethod = _EXACT) -> Tensor:
        """log |det dr/du| of each sample, which takes the factor 1 / |det dr/du| out of a posterior built from residuals.

        Args:
            u: State, `(*batch, n_owned)`; its values do not matter where the form is linear in it.
            inputs: As for `Solve`. Samples that share what the Jacobian sees share the work.
            method: `ExactLogdet()` or `StochasticLogdet()`.

        Returns:
            `(*batch,)`, replicated; differentiable once, second derivatives and forward mode are refused.

        Raises:
            InvalidInput: See `BatchedOperator.__call__`.
            SolveFailed: On every rank, where a Jacobian is singular.
            UnsupportedForm: Where the method does not take the Jacobian, naming one that does.

        MPI: Collective, forward and backward.

        Example:
            >>> log_density = -0.5 / eps**2 * fem_vi.all_sum(residual(u, m).square().sum(-1), comm) + residual.logdet(u, m)
        """
        return self.estimate_logdet(u, *inputs, method=method).value

    def estimate_logdet(self, u: Tensor, *inputs: Tensor, method: LogdetMethod = _EXACT) -> LogdetEstimate:
        """`logdet` with its standard error, of the same random probes. Collective."""
        if not isinstance(method, ExactLogdet | StochasticLogdet) or method not in self._logdets:
            with raise_on_all(self.pde.comm):
                instance("method", method, ExactLogdet, StochasticLogdet)
            self._logdets[method] = create_logdet(self.pde, method)
        return self._logdets[method].estimate(u, *inputs)

    @cached_property
    def _logdets(self) -> dict[LogdetMethod, Any]:
        return {}

    @cached_property
    def _row_sampler(self) -> Sampler:
        free = np.setdiff1d(np.arange(self.pde.unknown.size), self.pde.boundary.owned)
        return Sampler(self.pde.comm, free, "rows without a prescribed value")

    @cached_property
    def _cell_sampler(self) -> Sampler:
        return Sampler(self.pde.comm, np.arange(self._chooser.subsets.num_cells), "cells")

    @cached_property
    def _vertex_sampler(self) -> Sampler:
        return Sampler(self.pde.comm, np.arange(self._chooser.subsets.num_vertices), "vertices")

    @cached_property
    def _chooser(self) -> RowChooser:
        return RowChooser(self.pde, BatchedResidual)

    @cached_property
    def _weighted(self) -> WeightedResidual:
        return WeightedResidual(self.pde)


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

    @property
    def _takes_columns(self) -> bool:
        return self._kernel.takes_columns

    def _check_state(self) -> None:
        self.pde.check_fixed()

    def _check_values(self, inputs: Sequence[Tensor]) -> None:
        for k, (x, given) in enumerate(zip(inputs, self.inputs, strict=True)):
            if k not in self._kernel.checks:
                check_values(self._name, as_numpy(x), given)

    def _create_grad(self, x: Array) -> Array:
        return np.empty_like(x)  # kernels write to it

    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        at = Samples(flat, call.rows)
        out, is_finite = self._kernel.residual(at)
        if any_rank(self.comm, not is_finite):
            with raise_on_all(self.comm):
                for k in sorted(self._kernel.checks):
                    check_values(self._name, flat[k], self.inputs[k])
            self._check_finite(out)
        self._prescribe(out, at, self.pde.boundary.fixed)
        return out

    def _prescribe(self, out: Array, at: Samples, fixed: Array | float) -> None:
        """Write u - h to the rows of prescribed dofs: for values with what is fixed of h, for tangents without."""
        boundary, rows = self.pde.boundary, at.rows[0]
        u = at.values[0][:, boundary.owned] - fixed
        out[:, boundary.owned] = u if len(u) == len(rows) else u[rows]  # as many rows as samples: each has its own
        for source in boundary.sources:
            dofs, entries = source.owned
            out[:, dofs] -= at.values[1 + source.position][:, entries][at.rows[1 + source.position]]

    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> Array:
        owned = self.pde.boundary.owned
        self._kernel.vjp(Samples(flat, call.rows), g, grads)
        if grads[0] is not None:
            _add_columns(grads[0], call.rows[0], owned, g[:, owned])
        for source in self.pde.boundary.sources:
            grad, rows = grads[1 + source.position], call.rows[1 + source.position]
            if grad is not None:
                np.subtract.at(grad, rows, source.gradient(g, self.comm))
        return g

    def _pushforward(self, call: Call, flat: Sequence[Array], out: Array, tangents: Sequence[Array]) -> Array:
        moved = self._kernel.jvp(Samples(flat, call.rows), tangents)
        self._prescribe(moved, Samples(tangents, call.rows), 0.0)
        return moved

    def _curvature(self, call: Call, flat: Sequence[Array], bend: Bend, at_out: Array, grads: Sequence[Array]) -> None:
        self._kernel.curvature(Samples(flat, call.rows), bend.lam, bend.tangents, grads)


def _add_columns(grad: Array, rows: Rows, columns: NDArray[np.int32], values: Array) -> None:
    """Add some columns of each sample to the rows that the samples read, which may be the same for several."""
    if len(rows) == len(grad):  # then each sample has its own
        grad[:, columns] += values
    else:
        np.add.at(grad, (rows[:, None], columns), values)
