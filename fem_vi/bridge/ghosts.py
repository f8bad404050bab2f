"""Ghost rows of fields as differentiable maps: owned rows to local ones, and the sum of local rows on their owners.

Rows are dofs and columns are samples, so that one message carries a row of all samples. The two maps are each other's adjoint:

    to_local   owners' rows are copied to ghosts      its adjoint adds what ghosts have to their owners
    to_owned   ghosts' rows are added to owners       its adjoint copies
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fem_vi.bridge.linear import apply_linear
from fem_vi.pde.halo import Halo


class Ghosts:
    """The ghosts of a function space.

    Args:
        V: Function space.

    MPI: Collective when built.
    """

    def __init__(self, V: Any) -> None:
        self._halo = Halo(V)

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
        samples = x.movedim(-2, -1)
        ghosts = torch.from_numpy(self._halo.forward(_lines(samples))).reshape(*samples.shape[:-1], self._halo.num_ghosts)
        return torch.cat([x, ghosts.to(x.device).movedim(-1, -2)], dim=-2)

    def _add(self, r: Tensor) -> Tensor:
        samples = r.movedim(-2, -1)
        lines = _lines(samples)
        owned = lines[:, : self._halo.num_owned].copy()
        self._halo.reverse(lines[:, self._halo.num_owned :], owned)
        return torch.from_numpy(owned).reshape(*samples.shape[:-1], self._halo.num_owned).to(r.device).movedim(-1, -2)


def _lines(samples: Tensor) -> Any:
    """All leading axes as one, on the host: `(num_lines, n)`."""
    return samples.flatten(0, -2).numpy(force=True)
