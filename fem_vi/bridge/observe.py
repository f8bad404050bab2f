"""`PointObservation`: a field at points, as a fixed sparse matrix; its adjoint is its transpose."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fem_vi.bridge.layout import all_sum, num_owned
from fem_vi.errors import InvalidInput, PointsOutsideMesh
from fem_vi.parallel import all_values, raise_on_all
from fem_vi.pde.observe import evaluate_points


@dataclass(frozen=True)
class RaiseOutside:
    """Refuse points that lie in no cell of the mesh."""


@dataclass(frozen=True)
class MaskOutside:
    """Observe NaN at points that lie in no cell of the mesh."""


class PointObservation:
    """y = observe(u): the values B u of a field at points, differentiable to any order.

    B is built once. A point on the boundary between cells, or between ranks, is read from one cell only. Each rank holds
    the columns of B that it owns, so y is a sum over ranks, and the adjoint B^T g needs no communication.

    Args:
        V: Scalar or vector space of the field, of any element; or a subspace `W.sub(i)` of a mixed space, whose field
            tensor is then that of W.
        points: `(num_points, gdim)` or `(num_points, 3)`, mesh units, the same on every rank.
        outside: What to do with points outside the mesh: `RaiseOutside()` or `MaskOutside()`.

    Call:
        `observe(u)`: u is a field tensor `(*batch, n_owned)`; returns `(*batch, num_points)`, replicated, for a scalar
        space, `(*batch, num_points, value_size)` for a vector space.

    Raises:
        PointsOutsideMesh: Where points lie outside, listing them.
        InvalidInput: Where points have the wrong shape, are not finite or differ between ranks.

    MPI: Collective when built and forward, not collective backward.
    """

    def __init__(self, V: Any, points: ArrayLike, *, outside: RaiseOutside | MaskOutside | None = None) -> None:
        self.comm = V.mesh.comm
        with raise_on_all(self.comm):
            self.points = _check_points(points, V.mesh.geometry.dim)
        _check_replicated(self.comm, self.points)
        padded = np.pad(self.points, ((0, 0), (0, 3 - self.points.shape[1])))
        evaluation = evaluate_points(V, padded)
        self.found = torch.from_numpy(evaluation.found)
        if not evaluation.found.all() and not isinstance(outside, MaskOutside):
            raise PointsOutsideMesh(_describe(self.points[~evaluation.found], len(self.points)))
        self._num_owned = num_owned(V)
        self._rows, self._cols = torch.from_numpy(evaluation.rows), torch.from_numpy(evaluation.cols)
        self._weights = torch.from_numpy(evaluation.weights)
        self._shape = (len(self.points),) if V.value_shape == () else (len(self.points), evaluation.value_size)

    @property
    def matrix(self) -> Tensor:
        """The owned columns of B: sparse COO, `(num_points * value_size, n_owned)`."""
        size = (int(np.prod(self._shape)), self._num_owned)
        return torch.sparse_coo_tensor(torch.stack([self._rows, self._cols]), self._weights, size).coalesce()

    def __call__(self, u: Tensor) -> Tensor:
        """Values of the field at the points; see the class. Collective."""
        with raise_on_all(self.comm):
            if not isinstance(u, Tensor):
                raise InvalidInput(f"PointObservation: u is a {type(u).__name__}; it must be a torch tensor.")
            if u.ndim == 0 or u.shape[-1] != self._num_owned:
                raise InvalidInput(
                    f"PointObservation: u has shape {tuple(u.shape)}; its last axis must be {self._num_owned}, the coefficients "
                    "that this rank owns. Use fem_vi.distribute to slice a replicated vector."
                )
        batches = all_values(self.comm, tuple(u.shape[:-1]))
        if any(batch != batches[0] for batch in batches):
            raise InvalidInput(f"PointObservation: the batch axes of u differ between ranks: {batches}.")
        host = u.to(device="cpu", dtype=torch.float64)
        local = host.new_zeros(*host.shape[:-1], int(np.prod(self._shape)))
        local = local.index_add(-1, self._rows, host[..., self._cols] * self._weights)
        y = all_sum(local, self.comm).reshape(*host.shape[:-1], *self._shape)
        if not bool(self.found.all()):
            found = self.found.reshape(-1, *[1] * (len(self._shape) - 1))
            y = torch.where(found, y, torch.nan)
        return y.to(u.device)


def _check_points(points: ArrayLike, gdim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        array = np.atleast_2d(np.asarray(points, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"points are not an array of numbers: {error}.") from error
    if array.ndim != 2 or array.shape[1] not in (gdim, 3) or array.shape[0] == 0:
        raise InvalidInput(
            f"points have shape {array.shape}; expected (num_points, {gdim}) or (num_points, 3), at least one point."
        )
    wrong = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if wrong.size:
        raise InvalidInput(f"points {wrong[:10].tolist()} are not finite.")
    return array


def _check_replicated(comm: Any, points: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    sums = all_values(comm, (points.shape, zlib.crc32(points.tobytes())))
    if any(other != sums[0] for other in sums):
        raise InvalidInput("points differ between ranks; every rank must pass all points.")


def _describe(outside: np.ndarray[Any, np.dtype[np.float64]], total: int) -> str:
    listed = "; ".join(str(tuple(round(float(x), 6) for x in point)) for point in outside[:10])
    more = f" and {len(outside) - 10} more" if len(outside) > 10 else ""
    return (
        f"{len(outside)} of {total} points lie outside the mesh: {listed}{more}. "
        "Move or drop them, or pass outside=fem_vi.MaskOutside() to observe NaN there."
    )
