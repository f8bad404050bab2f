"""The ghosts of many fields at once: rows of coefficients, updated and summed with one message to each neighbour."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fem_vi.parallel import all_to_all, exchange
from fem_vi.pde.inputs import Array, local_size

Positions = NDArray[np.int64]


class Halo:
    """Who owns the ghosts of a space, and who has ghosts of what this rank owns.

    Args:
        space: Function space.

    Attributes:
        num_owned: Unrolled dofs that this rank owns.
        num_ghosts: Unrolled dofs that it has ghosts of.

    MPI: Collective.
    """

    def __init__(self, space: Any) -> None:
        index_map, bs = space.dofmap.index_map, space.dofmap.index_map_bs
        self.num_owned, num_local = local_size(space)
        self.num_ghosts = num_local - self.num_owned
        self._comm = space.mesh.comm
        owners = np.asarray(index_map.owners)
        self._ghosts = {int(rank): _unrolled(np.flatnonzero(owners == rank), bs) for rank in np.unique(owners)}
        first = index_map.local_range[0]
        nothing = np.empty(0, dtype=np.int64)
        wanted = [np.asarray(index_map.ghosts)[owners == rank] for rank in range(self._comm.size)]
        asked = all_to_all(self._comm, [given if given.size else nothing for given in wanted])
        self._shared = {rank: _unrolled(indices - first, bs) for rank, indices in enumerate(asked) if indices.size}

    def forward(self, owned: Array) -> Array:
        """The ghosts of fields, `(num_rows, num_ghosts)`, from their owned coefficients, `(num_rows, num_owned)`. Collective."""
        ghosts = np.empty((len(owned), self.num_ghosts))
        if self._comm.size > 1:
            send = {rank: np.ascontiguousarray(owned[:, own]) for rank, own in self._shared.items()}
            receive = {rank: np.empty((len(owned), own.size)) for rank, own in self._ghosts.items()}
            for rank, values in exchange(self._comm, send, receive).items():
                ghosts[:, self._ghosts[rank]] = values
        return ghosts

    def reverse(self, ghosts: Array, owned: Array) -> None:
        """Add what other ranks have in their ghosts to the owned coefficients; shapes as in `forward`. Collective."""
        if self._comm.size > 1:
            send = {rank: np.ascontiguousarray(ghosts[:, own]) for rank, own in self._ghosts.items()}
            receive = {rank: np.empty((len(owned), own.size)) for rank, own in self._shared.items()}
            for rank, values in exchange(self._comm, send, receive).items():
                owned[:, self._shared[rank]] += values


class NoHalo:
    """The halo of what one rank holds alone; see `Halo`.

    Args:
        num_owned: Entries that this rank owns.
    """

    num_ghosts = 0

    def __init__(self, num_owned: int) -> None:
        self.num_owned = num_owned

    def forward(self, owned: Array) -> Array:
        """No ghosts: `(num_rows, 0)`."""
        return np.empty((len(owned), 0))

    def reverse(self, ghosts: Array, owned: Array) -> None:
        """Nothing comes from other ranks."""


def _unrolled(blocks: Positions, bs: int) -> Positions:
    return (np.asarray(blocks, dtype=np.int64)[:, None] * bs + np.arange(bs)).ravel()
