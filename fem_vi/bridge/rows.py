"""Some entries of a residual: those of a few test functions, for which only the cells that these reach are visited.

With P the selection of rows, P r is a residual of its own: a cotangent g has lam = P^T g, zero but in the chosen rows, and every
integrand of lam . dr/dx vanishes outside the same cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fem_vi.arguments import indices, whole
from fem_vi.bridge.call import Call
from fem_vi.bridge.operator import BatchedOperator, Bend
from fem_vi.errors import InvalidInput
from fem_vi.parallel import all_values, raise_on_all, shared_seed
from fem_vi.pde.inputs import Array
from fem_vi.pde.kernels import AssembledResidual, BatchKernel
from fem_vi.pde.region import Region
from fem_vi.pde.subset import Cells, Patches, SubsetFinder
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
        return RowsResidual(self._whole, self._region, self.find(rows))

    def find(self, rows: object) -> RowNumbers:
        """Rows of this rank: as they are given, or those of a subset.

        Raises:
            InvalidInput: On every rank, where rows or a subset do not fit, or ranks give different kinds.

        MPI: Collective.
        """
        kinds = all_values(self._pde.comm, type(rows).__name__ if isinstance(rows, Cells | Patches) else "rows")
        if kinds.count(kinds[0]) < len(kinds):
            raise InvalidInput(f"rows= is {kinds} on ranks 0 to {len(kinds) - 1}; it must be of one kind. Each may be empty.")
        if isinstance(rows, Cells | Patches):
            return self.subsets.find(rows)
        with raise_on_all(self._pde.comm), _outside_transforms():
            return indices("rows", rows, size=self._pde.unknown.size, owning="owns the rows")

    @cached_property
    def subsets(self) -> SubsetFinder:
        """Finds rows by cells and patches. Collective when it is first asked for."""
        return SubsetFinder(self._pde.space, self._pde.boundary.owned)


class Sampler:
    """Draws from what the ranks have, without repetition; see `Residual.sample_rows`.

    Args:
        comm: Communicator of the mesh.
        own: What this rank has to be drawn, local numbers.
        name: How an error calls what there is.

    MPI: Collective.
    """

    def __init__(self, comm: Any, own: RowNumbers, name: str) -> None:
        self._comm, self._own, self._name = comm, own, name
        counts = all_values(comm, int(own.size))
        self._first, self._total = sum(counts[: comm.rank]), sum(counts)

    def draw(self, count: int) -> Tensor:
        """This rank's part of a draw, sorted. Collective."""
        with raise_on_all(self._comm):
            count = whole("count", count, least=1)
            if count > self._total:
                raise InvalidInput(f"count is {count}; there are {self._total} {self._name}.")
        seed = shared_seed(self._comm, int(torch.randint(2**62, ()).item()))
        chosen = np.random.default_rng(seed).choice(self._total, count, replace=False) - self._first
        mine = chosen[(chosen >= 0) & (chosen < self._own.size)]
        return torch.from_numpy(np.sort(self._own[mine]).astype(np.int64))
