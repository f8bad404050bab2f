"""Ghost rows of fields as differentiable maps: owned rows to local ones, and the sum of local rows on their owners.

Rows are dofs and columns are samples. The two maps are each other's adjoint:

    to_local   owners' rows are copied to ghosts      its adjoint adds what ghosts have to their owners
    to_owned   ghosts' rows are added to owners       its adjoint copies
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fem_vi.bridge.layout import as_numpy
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
        ghosts = self._halo.forward(_lines(x))
        return torch.cat([x, _restored(ghosts, x)], dim=-2)

    def _add(self, r: Tensor) -> Tensor:
        owned, ghosts = r.split([self._halo.num_owned, self._halo.num_ghosts], dim=-2)
        lines = _lines(owned).copy()
        self._halo.reverse(_lines(ghosts), lines)
        return _restored(lines, owned)


def _lines(x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`(*lead, rows, num_samples)` as `(lead * num_samples, rows)`, on the host."""
    across = x.transpose(-1, -2)
    return np.ascontiguousarray(as_numpy(across).reshape(across.shape[:-1].numel(), across.shape[-1]))


def _restored(lines: np.ndarray[Any, np.dtype[np.float64]], like: Tensor) -> Tensor:
    """The inverse of `_lines`, for the leading axes, number of samples, type and device of another tensor."""
    across = torch.from_numpy(lines).reshape(*like.shape[:-2], like.shape[-1], lines.shape[1])
    return across.transpose(-1, -2).to(like).contiguous()
