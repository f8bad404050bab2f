"""Points that a caller passes: checked, the same on every rank, and each found in one cell or handled as the caller says."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fem_vi.arguments import instance
from fem_vi.errors import InvalidInput, PointsOutsideMesh
from fem_vi.parallel import all_values, raise_on_all
from fem_vi.pde.inputs import Array
from fem_vi.pde.locate import Location, locate_points


@dataclass(frozen=True)
class RaiseOutside:
    """Refuse points that lie in no cell of the mesh."""


@dataclass(frozen=True)
class MaskOutside:
    """Observe NaN at points that lie in no cell of the mesh."""


Outside = RaiseOutside | MaskOutside


def find_points(mesh: Any, points: ArrayLike, outside: Outside | None) -> tuple[Array, Location]:
    """Check points and find their cells.

    Args:
        mesh: DOLFINx mesh.
        points: `(num_points, gdim)` or `(num_points, 3)`, mesh units, the same on every rank.
        outside: What to do with points outside the mesh; None is `RaiseOutside()`.

    Returns:
        The points as an array, and where they lie.

    Raises:
        PointsOutsideMesh: Where points lie outside, listing them.
        InvalidInput: Where points have the wrong shape, are not finite or differ between ranks, or `outside` is of another type.

    MPI: Collective.
    """
    with raise_on_all(mesh.comm):
        instance("outside", outside, RaiseOutside, MaskOutside, type(None))
        array = _check_points(points, mesh.geometry.dim)
    _check_replicated(mesh.comm, array)
    location = locate_points(mesh, np.pad(array, ((0, 0), (0, 3 - array.shape[1]))))
    if not location.found.all() and not isinstance(outside, MaskOutside):
        raise PointsOutsideMesh(_describe(array[~location.found], len(array)))
    return array, location


def _check_points(points: ArrayLike, gdim: int) -> Array:
    if np.iscomplexobj(points):
        raise InvalidInput("points are complex; they must be real coordinates in mesh units.")
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


def _check_replicated(comm: Any, points: Array) -> None:
    sums = all_values(comm, (points.shape, zlib.crc32(points.tobytes())))
    if any(other != sums[0] for other in sums):
        raise InvalidInput("points differ between ranks; every rank must pass all points.")


def _describe(outside: Array, total: int) -> str:
    listed = "; ".join(str(tuple(round(float(x), 6) for x in point)) for point in outside[:10])
    more = f" and {len(outside) - 10} more" if len(outside) > 10 else ""
    return (
        f"{len(outside)} of {total} points lie outside the mesh: {listed}{more}. "
        "Move or drop them, or pass outside=fem_vi.MaskOutside() to observe NaN there."
    )
