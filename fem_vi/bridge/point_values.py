"""Values and derivatives of a field at points as fixed sparse matrices: linear maps from field tensors to replicated ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fem_vi.bridge.layout import all_sum, num_owned
from fem_vi.pde.locate import Location
from fem_vi.pde.observe import evaluate_points


class PointValues:
    """Values of a field, and derivatives in x, at points; differentiable to any order.

    Args:
        V: Function space.
        location: Where the points lie. Points outside the mesh have no entries in the matrix: zeros.
        orders: Orders of derivatives; 0 is the value.

    Attributes:
        shapes: For each order, the shape of what is returned, without batch axes: `(num_points, *value_shape, gdim, ...)`.

    MPI: Collective when built and forward, not collective backward.
    """

    def __init__(self, V: Any, location: Location, orders: Sequence[int] = (0,)) -> None:
        self._comm = V.mesh.comm
        self.num_owned = num_owned(V)
        parts = evaluate_points(V, location, orders)
        self.shapes = [(len(location.found), *part.shape) for part in parts]
        self._sizes = [int(np.prod(shape, dtype=int)) for shape in self.shapes]
        starts = np.cumsum([0, *self._sizes])
        rows = [part.rows + start for part, start in zip(parts, starts, strict=False)]
        self._rows = torch.from_numpy(np.concatenate(rows))
        self._cols = torch.from_numpy(np.concatenate([part.cols for part in parts]))
        self._weights = torch.from_numpy(np.concatenate([part.weights for part in parts]))

    @property
    def matrix(self) -> Tensor:
        """The owned columns: sparse COO, all orders one below the other."""
        size = (sum(self._sizes), self.num_owned)
        return torch.sparse_coo_tensor(
            torch.stack([self._rows, self._cols]), self._weights, size, check_invariants=True
        ).coalesce()

    def __call__(self, u: Tensor) -> list[Tensor]:
        """For each order, the derivatives of `u`, a field tensor `(*batch, n_owned)` on the host, float64. Collective."""
        local = u.new_zeros(*u.shape[:-1], sum(self._sizes))
        local = local.index_add(-1, self._rows, u[..., self._cols] * self._weights)
        parts = all_sum(local, self._comm).split(self._sizes, dim=-1)
        return [part.reshape(*u.shape[:-1], *shape) for part, shape in zip(parts, self.shapes, strict=True)]
