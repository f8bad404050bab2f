"""Ghost rows of fields as differentiable maps: owned rows to local ones, and the sum of local rows on their owners.

Rows are dofs and columns are samples, so that one message carries a row of all samples. The two maps are each other's adjoint:

    to_local   owners' rows are copied to ghosts      its adjoint adds what ghosts have to their owners
    to_owned   ghosts' rows are added to owners       its adjoint copies
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor

from fem_vi.bridge.linear import apply_linear
from fem_vi.parallel import exchange_rows, send_to_each


class Ghosts:
    """The ghosts of a function space.

    Args:
        V: Function space.

    MPI: Collective when built.
    """

    def __init__(self, V: Any) -> None:
        index_map, bs = V.dofmap.index_map, V.dofmap.index_map_bs
        self._comm: MPI.Comm = V.mesh.comm
        owners = np.asarray(index_map.owners, dtype=np.int64)
        order = np.argsort(owners, kind="stable")
        ghosts = np.asarray(index_map.ghosts, dtype=np.int64)[order]
        counts = np.bincount(owners, minlength=self._comm.size)
        wanted = send_to_each(self._comm, np.split(ghosts, np.cumsum(counts)[:-1]))
        shared = np.concatenate(wanted) - index_map.local_range[0]
        self.num_owned = int(index_map.size_local * bs)
        self._num_ghosts = int(len(owners) * bs)
        self._ghost_rows = torch.from_numpy(_unrolled(order, bs))  # among the ghosts, in the order of their owners
        self._shared_rows = torch.from_numpy(_unrolled(shared, bs))
        self._num_ghost_rows = (counts * bs).astype(np.int64)
        self._num_shared_rows = np.array([len(part) * bs for part in wanted], dtype=np.int64)

    def to_local(self, x: Tensor) -> Tensor:
        """Owned rows, then those of ghosts.

        Args:
            x: `(n_owned, num_samples)`, the same number of samples on every rank.

        Returns:
            `(n_local, num_samples)`.

        MPI: Collective, forward and backward.
        """
        return apply_linear(self._copy, self._add, x)

    def to_owned(self, r: Tensor) -> Tensor:
        """The sum of all ranks' rows at their owners.

        Args:
            r: `(n_local, num_samples)`.

        Returns:
            `(n_owned, num_samples)`.

        MPI: Collective, forward and backward.
        """
        return apply_linear(self._add, self._copy, r)

    def _copy(self, x: Tensor) -> Tensor:
        received = self._exchange(x.index_select(-2, self._shared_rows.to(x.device)), self._num_shared_rows, self._num_ghost_rows)
        out = x.new_empty(*x.shape[:-2], self.num_owned + self._num_ghosts, x.shape[-1])
        out[..., : self.num_owned, :] = x
        out.index_copy_(-2, self._ghost_rows.to(x.device) + self.num_owned, received)
        return out

    def _add(self, r: Tensor) -> Tensor:
        ghosts = r.index_select(-2, self._ghost_rows.to(r.device) + self.num_owned)
        received = self._exchange(ghosts, self._num_ghost_rows, self._num_shared_rows)
        return r[..., : self.num_owned, :].index_add(-2, self._shared_rows.to(r.device), received)

    def _exchange(self, rows: Tensor, num_send: NDArray[np.int64], num_receive: NDArray[np.int64]) -> Tensor:
        """`(*lead, num_send, num_samples)` to `(*lead, num_receive, num_samples)`: each row with all its leading axes."""
        first = rows.detach().to("cpu").movedim(-2, 0)
        width = math.prod(first.shape[1:])
        lines = first.reshape(len(first), width).contiguous()
        received = torch.from_numpy(exchange_rows(self._comm, lines.numpy(), num_send, num_receive))
        return received.reshape(len(received), *first.shape[1:]).movedim(0, -2).to(rows.device)


def _unrolled(blocks: NDArray[np.int64], bs: int) -> NDArray[np.int64]:
    return (np.asarray(blocks, dtype=np.int64)[:, None] * bs + np.arange(bs)).ravel()
