"""Some entries of a residual: those of a few test functions, for which only the cells that these reach are visited.

With P the selection of rows, P r is a residual of its own: a cotangent g has lam = P^T g, zero but in the chosen rows, and every
integrand of lam . dr/dx vanishes outside the same cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fem_vi.arguments import whole
from fem_vi.bridge.call import Call
from fem_vi.bridge.operator import BatchedOperator, Bend
from fem_vi.errors import InvalidInput
from fem_vi.parallel import all_values, raise_on_all, shared_seed
from fem_vi.pde.inputs import Array
from fem_vi.pde.kernels import AssembledResidual, BatchKernel
from fem_vi.pde.region import Region
from fem_vi.pde.weak_form import WeakForm

if TYPE_CHECKING:
    from fem_vi.bridge.residual import BatchedResidual

RowNumbers = NDArray[np.int64]
_outside_transforms: Callable[[], AbstractContextManager[None]] = getattr(torch._C, "_DisableFuncTorch", nullcontext)


class RowsResidual(BatchedOperator):
    """P r(u, m, ...): the chosen rows of a residual, in their order; differentiable twice.

    Args:
        whole: The residual, whose kernel assembles in `region`.
        region: The part of the mesh that is visited.
        rows: Owned dofs, unrolled.

    MPI: Collective.
    """

    def __init__(self, whole: BatchedResidual, region: Region, rows: RowNumbers) -> None:
        super().__init__(whole.pde.space.mesh, whole.inputs, (len(rows),))
        self._whole, self._region, self._chosen = whole, region, rows
        self._reach = region.find(rows)

    @property
    def _name(self) -> str:
        return "Residual"

    def _check_state(self) -> None:
        self._whole._check_state()

    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        self._region.select(self._reach)
        return self._whole._forward(call, flat)[:, self._chosen]

    def _spread(self, g: Array) -> Array:
        """P^T g; a row may have been chosen twice."""
        lam = np.zeros((len(g), self._whole.pde.unknown.size))
        np.add.at(lam.T, self._chosen, g.T)
        return lam

    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> Array:
        self._region.select(self._reach)
        self._whole._backward(call, flat, out, self._spread(g), grads)
        return g

    def _pushforward(self, call: Call, flat: Sequence[Array], out: Array, tangents: Sequence[Array]) -> Array:
        self._region.select(self._reach)
        return self._whole._pushforward(call, flat, out, tangents)[:, self._chosen]

    def _curvature(self, call: Call, flat: Sequence[Array], bend: Bend, at_out: Array, grads: Sequence[Array]) -> None:
        self._region.select(self._reach)
        lam = self._spread(bend.lam)
        lam[:, self._whole.pde.boundary.owned] = 0.0  # these rows are u - h
        self._whole._curvature(call, flat, Bend(lam, bend.out, bend.out_dot, bend.tangents), at_out, grads)


class RowChooser:
    """Makes a `RowsResidual` of a weak form for any rows, in microseconds: all of them share what is compiled.

    Args:
        pde: The weak form.
        create: What makes a residual of a kernel.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm, create: Callable[[WeakForm, BatchKernel], BatchedResidual]) -> None:
        self._pde = pde
        self._region = Region(pde.form, pde.space)
        self._whole = create(pde, AssembledResidual(pde, self._region))

    def at(self, rows: object) -> RowsResidual:
        """The residual in some rows; see `Residual.__call__`. Collective."""
        with raise_on_all(self._pde.comm):
            chosen = _checked(rows, self._pde.unknown.size)
        return RowsResidual(self._whole, self._region, chosen)


def _checked(rows: object, size: int) -> RowNumbers:
    try:
        with _outside_transforms():
            chosen = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"rows is {rows!r:.80}; it must be a list or tensor of whole numbers.") from error
    if chosen.ndim != 1 or not (np.issubdtype(chosen.dtype, np.integer) or chosen.size == 0):
        raise InvalidInput(
            f"rows has shape {chosen.shape} and type {chosen.dtype}; it must have one axis, of whole numbers. For a mask take "
            "torch.nonzero(mask).ravel()."
        )
    wrong = chosen[(chosen < 0) | (chosen >= size)]
    if wrong.size:
        raise InvalidInput(
            f"rows contains {wrong[0]}; this rank owns the rows 0 to {size - 1}. Rows are local numbers, of each rank its own."
        )
    return chosen.astype(np.int64)


class RowSampler:
    """Draws rows from those of all ranks where nothing is prescribed, without repetition; see `Residual.sample_rows`.

    Args:
        pde: The weak form.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm) -> None:
        self._comm = pde.comm
        self._free = np.setdiff1d(np.arange(pde.unknown.size), pde.boundary.owned)
        counts = all_values(pde.comm, int(self._free.size))
        self._first, self._total = sum(counts[: pde.comm.rank]), sum(counts)

    def draw(self, count: int) -> Tensor:
        """This rank's rows of a draw, sorted. Collective."""
        with raise_on_all(self._comm):
            count = whole("count", count, least=1)
            if count > self._total:
                raise InvalidInput(f"count is {count}; there are {self._total} rows without a prescribed value.")
        seed = shared_seed(self._comm, int(torch.randint(2**62, ()).item()))
        chosen = np.random.default_rng(seed).choice(self._total, count, replace=False) - self._first
        own = chosen[(chosen >= 0) & (chosen < self._free.size)]
        return torch.from_numpy(np.sort(self._free[own]).astype(np.int64))
