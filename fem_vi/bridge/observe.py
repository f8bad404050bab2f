"""`PointObservation`: a field at points, as a fixed sparse matrix; its adjoint is its transpose."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fem_vi.bridge.layout import OWNED, check_last_axis
from fem_vi.bridge.point_values import PointValues
from fem_vi.errors import InvalidInput
from fem_vi.parallel import all_values, raise_on_all
from fem_vi.pde.agree import agreed, check_space
from fem_vi.pde.points import Outside, find_points


class PointObservation:
    """y = observe(u): the values B u of a field at points, differentiable to any order.

    B is built once. A point on the boundary between cells, or between ranks, is read from one cell only: from the one that
    came first when the mesh was made. Each rank holds the columns of B that it owns, so y is a sum over ranks, and the adjoint
    B^T g needs no communication.

    Args:
        V: Space of the field, of any element; or a subspace `W.sub(i)` of a mixed space, whose field tensor is then that
            of W.
        points: `(num_points, gdim)` or `(num_points, 3)`, mesh units, the same on every rank.
        outside: What to do with points outside the mesh: `RaiseOutside()` or `MaskOutside()`.

    Call:
        `observe(u)`: u is a field tensor `(*batch, n_owned)`; returns `(*batch, num_points, *value_shape)`, replicated: one
        number a point for a scalar space, `(gdim,)` for velocities, `(gdim, gdim)` for stresses, also symmetric ones.

    Raises:
        PointsOutsideMesh: Where points lie outside, listing them.
        InvalidInput: Where points have the wrong shape, are not finite or differ between ranks, or the space is mixed.
        UnsupportedForm: Where the space has values at its own points only (quadrature elements).

    MPI: Collective when built and forward, not collective backward.
    """

    def __init__(self, V: Any, points: ArrayLike, *, outside: Outside | None = None) -> None:
        with agreed(V):
            check_space("PointObservation: V", V)
            if V.ufl_element().is_mixed:
                raise InvalidInput("PointObservation: the space is mixed; observe one of its parts, V.sub(i).")
        self.comm = V.mesh.comm
        self.points, location = find_points(V.mesh, points, outside)
        self.found = torch.from_numpy(location.found)
        self._values = PointValues(V, location)

    @property
    def matrix(self) -> Tensor:
        """The owned columns of B: sparse COO, `(num_points * value_size, n_owned)`."""
        return self._values.matrix

    def __call__(self, u: Tensor) -> Tensor:
        """Values of the field at the points; see the class. Collective."""
        num_owned = self._values.num_owned
        with raise_on_all(self.comm):
            check_last_axis("PointObservation: u", u, num_owned, OWNED)
        batches = all_values(self.comm, tuple(u.shape[:-1]))
        if any(batch != batches[0] for batch in batches):
            raise InvalidInput(f"PointObservation: the batch axes of u differ between ranks: {batches}.")
        (y,) = self._values(u.to(device="cpu", dtype=torch.float64))
        if not bool(self.found.all()):
            found = self.found.reshape(-1, *[1] * (len(self._values.shapes[0]) - 1))
            y = torch.where(found, y, torch.nan)
        return y.to(u.device)
