"""What compiled kernels are given: C structures over NumPy arrays, which must outlive the call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fem_vi.pde.dof_transformations import Transformation, dof_transformations
from fem_vi.pde.halo import Halo, NoHalo
from fem_vi.pde.inputs import Array
from fem_vi.pde.lane_source import Layout

Rows = NDArray[np.intp]
Dofs = NDArray[np.int32]
NO_DOFS: Dofs = np.empty(0, dtype=np.int32)

_pointer, _int64 = ctypes.c_void_p, ctypes.c_int64


class CTransform(ctypes.Structure):
    """See `fem_vi.pde.lane_runtime`."""

    _fields_ = [(name, _pointer) for name in ("class_of", "ptr", "col", "val")]


class CField(ctypes.Structure):
    """See `fem_vi.pde.lane_runtime`."""

    _fields_ = [
        *((name, _pointer) for name in ("owned", "ghosts", "rows")),
        *((name, _int64) for name in ("num_owned", "num_local", "stride")),
        ("zeros", _pointer),
        ("num_zeros", _int64),
        ("dofmap", _pointer),
        ("transform", CTransform),
    ]


class CEntities(ctypes.Structure):
    """See `fem_vi.pde.lane_runtime`."""

    _fields_ = [("list", _pointer), ("num", _int64)]


class CJob(ctypes.Structure):
    """See `fem_vi.pde.lane_runtime`."""

    _fields_ = [
        ("in", ctypes.POINTER(CField)),
        ("out", ctypes.POINTER(CField)),
        ("entities", ctypes.POINTER(CEntities)),
        *((name, _pointer) for name in ("x", "geometry", "permutations", "scratch")),
        *((name, _int64) for name in ("num_samples", "first", "last", "together", "checks", "is_finite")),
    ]


def address(array: NDArray[Any] | None) -> int | None:
    """Where an array's contiguous entries begin."""
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise AssertionError("an array for a compiled kernel is not contiguous")
    return int(array.__array_interface__["data"][0])  # array.ctypes.data takes 5 us


def c_transform(given: Transformation | None) -> CTransform:
    """A transformation, or none, as C reads it."""
    if given is None:
        return CTransform()
    return CTransform(address(given.class_of), address(given.ptr), address(given.col), address(given.val))


class FieldSpace:
    """A function space as kernels see it, or what looks like one to them.

    Args:
        halo: Its ghosts.
        dofmap: The dofs of each cell, `(num_cells, nodes)`.
        bs: Block size of the dofmap.
        transformations: See `dof_transformations`.

    Attributes:
        halo: Its ghosts.
        layout: How a cell's dofs lie in an element tensor.
    """

    def __init__(
        self,
        halo: Halo | NoHalo,
        dofmap: NDArray[np.int32],
        bs: int,
        transformations: tuple[Transformation, Transformation] | None,
    ) -> None:
        self.halo = halo
        self._dofmap = np.ascontiguousarray(dofmap, dtype=np.int32)
        self._transformations = transformations
        self.layout = Layout(self._dofmap.shape[1], bs, transformations is not None)
        self._c_dofmap = address(self._dofmap)
        self._c_transforms = [c_transform(given) for given in transformations or (None, None)]

    def coefficient(self, *, owned: Array, ghosts: Array | None, rows: Rows | None, zeros: Dofs = NO_DOFS) -> CField:
        """The structure for a coefficient that is read.

        Args:
            owned: `(num_rows, num_owned)`; without rows one row of all local coefficients.
            ghosts: `(num_rows, num_ghosts)`.
            rows: Row of each sample, int64; None where they have one in common.
            zeros: Local dofs whose value counts as zero; not without rows.
        """
        field = self._field(owned, ghosts, rows, is_result=False)
        field.zeros, field.num_zeros = address(zeros), len(zeros)
        return field

    def result(self, *, owned: Array, ghosts: Array | None, rows: Rows | None) -> CField:
        """The structure for a block of the result, which is written to.

        Args:
            owned: `(num_rows, num_owned)`; without rows one row of all local coefficients for each block of samples.
            ghosts: `(num_rows, num_ghosts)`.
            rows: Row of each sample, int64, of its own; None where they have one in common.
        """
        return self._field(owned, ghosts, rows, is_result=True)

    def coefficient_side_by_side(self, values: Array, zeros: Dofs = NO_DOFS) -> CField:
        """`coefficient` where samples lie side by side, `(num_local, num_samples)`, in whole blocks."""
        field = self._side_by_side(values, is_result=False)
        field.zeros, field.num_zeros = address(zeros), len(zeros)
        return field

    def result_side_by_side(self, values: Array) -> CField:
        """`result` where samples lie side by side, `(num_local, num_samples)`, in whole blocks."""
        return self._side_by_side(values, is_result=True)

    def _field(self, owned: Array, ghosts: Array | None, rows: Rows | None, *, is_result: bool) -> CField:
        size = self.halo.num_owned + self.halo.num_ghosts
        return CField(
            owned=address(owned),
            ghosts=address(ghosts),
            rows=address(rows),
            num_owned=self.halo.num_owned,
            num_local=size,
            dofmap=self._c_dofmap,
            transform=self._c_transforms[is_result],
        )

    def _side_by_side(self, values: Array, *, is_result: bool) -> CField:
        num_local, num_samples = values.shape
        return CField(
            owned=address(values),
            num_owned=self.halo.num_owned,
            num_local=num_local,
            stride=num_samples,
            dofmap=self._c_dofmap,
            transform=self._c_transforms[is_result],
        )


def field_space(space: Any) -> FieldSpace:
    """A DOLFINx function space as kernels see it. Collective."""
    return FieldSpace(Halo(space), space.dofmap.list, space.dofmap.bs, dof_transformations(space))


class ConstantSpace:
    """The entries of Constants, the same for every cell.

    Args:
        size: Number of entries.
        num_cells: Cells of this rank, ghosts included.
    """

    def __init__(self, size: int, num_cells: int) -> None:
        self.size = size
        self.layout = Layout(1, size, False)
        self._dofmap = np.zeros(num_cells, dtype=np.int32)

    def field(self, *, owned: Array, rows: Rows | None) -> CField:
        """The structure for Constants that are read, or for the gradient of one; see `FieldSpace`."""
        return CField(
            owned=address(owned), rows=address(rows), num_owned=self.size, num_local=self.size, dofmap=address(self._dofmap)
        )


@dataclass(frozen=True)
class Geometry:
    """The mesh as kernels see it.

    Attributes:
        x: Coordinates of the nodes.
        dofmap: Nodes of each cell.
        permutations: How each facet of each cell is turned.
        facets: Facets of a cell.
    """

    x: Array
    dofmap: NDArray[np.int32]
    permutations: NDArray[np.uint8]
    facets: int
