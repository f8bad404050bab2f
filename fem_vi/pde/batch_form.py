"""A 1-form compiled for batches: all samples at once, each block of samples on SIMD lanes, blocks shared out among threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ufl
from dolfinx import fem
from dolfinx.cpp.mesh import cell_num_entities
from numpy.typing import NDArray

from fem_vi.errors import UnsupportedForm
from fem_vi.parallel import raise_on_all, sum_over_ranks
from fem_vi.pde import _compat
from fem_vi.pde._compat_ffcx import Entities, IntegrationDomains, integral_codes
from fem_vi.pde.c_compiler import load_library
from fem_vi.pde.inputs import Array, ConstantInput, Input
from fem_vi.pde.lane_job import (
    NO_DOFS,
    CEntities,
    CField,
    CJob,
    ConstantSpace,
    Dofs,
    FieldSpace,
    Geometry,
    Rows,
    address,
    field_space,
)
from fem_vi.pde.lane_source import Contents, Plan, source, source_key

_ALIGNMENT = 64
_TOGETHER = 8  # blocks of samples that lie side by side: lines of the cache next to each other, which it fetches ahead
_TOGETHER_MIXED = 4  # where some fields do not, and take scratch memory for as many


@dataclass(frozen=True)
class Values:
    """The values of a Function or Constant for some samples.

    Attributes:
        values: `(num_rows, size)`: owned coefficients, or entries.
        rows: The row that each sample reads.
    """

    values: Array
    rows: Rows

    @property
    def is_shared(self) -> bool:
        """Whether all samples read the same row, the only one that there is."""
        return len(self.values) == 1

    def are_side_by_side(self, lanes: int) -> bool:
        """Whether the samples of each coefficient follow each other in memory, in whole blocks of lanes."""
        return side_by_side(self.values) and len(self.rows) == len(self.values) and len(self.rows) % lanes == 0


def side_by_side(values: Array) -> bool:
    """Whether the rows of `(num_rows, size)` are the columns of what lies in memory."""
    return values.flags.f_contiguous and not values.flags.c_contiguous


def empty_like(values: Array, shape: tuple[int, int]) -> Array:
    """An array to be written to, whose rows lie side by side where some values of as many rows do."""
    if side_by_side(values) and len(values) == shape[0]:
        return np.empty(shape[::-1]).T
    return np.empty(shape)


class KernelMesh:
    """What the compiled forms of one weak form have in common.

    Args:
        mesh: DOLFINx mesh.
        form: UFL form that the others are derived from.
        num_threads: Threads that share the samples out.

    MPI: Collective.
    """

    def __init__(self, mesh: Any, form: ufl.Form, num_threads: int) -> None:
        self.mesh = mesh
        self.comm = self.mesh.comm
        self.num_threads = num_threads
        self._domains = IntegrationDomains(form)
        self._entities: dict[tuple[str, tuple[int, ...]], Entities] = {}
        self._spaces: dict[int, tuple[Any, FieldSpace]] = {}
        self._scratch: dict[int, Array] = {}
        self.num_cells = len(_compat.geometry_dofmap(self.mesh))
        self.geometry = self._create_geometry()

    def _create_geometry(self) -> Geometry:
        mesh, topology = self.mesh, self.mesh.topology
        topology.create_entity_permutations()
        facets = cell_num_entities(topology.cell_type, topology.dim - 1)
        permutations = np.zeros(self.num_cells * facets, dtype=np.uint8)  # of points, which the facets of intervals are
        if topology.dim > 1:
            permutations = np.ascontiguousarray(topology.get_facet_permutations(), dtype=np.uint8)
        return Geometry(mesh.geometry.x, np.ascontiguousarray(_compat.geometry_dofmap(mesh)), permutations, facets)

    def space(self, space: Any) -> FieldSpace:
        """A function space as kernels see it. Collective when it is first asked for."""
        if id(space) not in self._spaces:
            self._spaces[id(space)] = space, field_space(space)
        return self._spaces[id(space)][1]

    def entities(self, kind: str, subdomains: tuple[int, ...]) -> Entities:
        """What an integral runs over. Not collective."""
        if (kind, subdomains) not in self._entities:
            found = [self._domains.entities(kind, number) for number in subdomains]
            self._entities[kind, subdomains] = np.concatenate(found)
        return self._entities[kind, subdomains]

    def scratch(self, thread: int, size: int) -> int:
        """The address of memory for `size` numbers that one thread may write to; it is kept for the next call."""
        if thread not in self._scratch or len(self._scratch[thread]) < size + _ALIGNMENT:
            self._scratch[thread] = np.empty(size + _ALIGNMENT)
        return -(-self._scratch[thread].ctypes.data // _ALIGNMENT) * _ALIGNMENT


class BatchForm:
    """A 1-form whose test function has a block for each of some Functions and Constants.

    Args:
        form: UFL form, derivatives expanded.
        blocks: What the blocks of the test function belong to: a Function's space, or a number for each entry of a Constant. Or
            the space that the entries of element tensors are added to, whatever the arguments of the form are.
        fixed: Functions and Constants of the form whose values do not change.
        mesh: What it shares with other forms.
        zeros: Local dofs, ghosts included, of Functions whose values there count as zero, whatever they are.

    Raises:
        UnsupportedForm: On every rank, naming what has no translation.

    MPI: Collective.
    """

    def __init__(
        self,
        form: ufl.Form,
        blocks: Sequence[Input | FieldSpace],
        fixed: Sequence[Input],
        mesh: KernelMesh,
        zeros: Mapping[Any, Dofs] | None = None,
    ) -> None:
        self._mesh = mesh
        self._zeros = zeros or {}
        self._fixed = {given.symbol: given for given in fixed}
        coefficients = form.coefficients()
        with raise_on_all(mesh.comm):
            _check_meshes(coefficients, mesh)
        spaces = [mesh.space(symbol.function_space) for symbol in coefficients]
        self._constants = list(form.constants())
        self._out = [_out_space(given, mesh) for given in blocks]
        count = sum(int(np.prod(c.ufl_shape)) for c in self._constants)
        self._constant_space = ConstantSpace(count, mesh.num_cells)
        plan = Plan(
            [space.layout for space in spaces],
            count,
            any(c not in self._fixed for c in self._constants),
            [space.layout for space in self._out],
            mesh.geometry.dofmap.shape[1],
            mesh.geometry.facets,
        )
        self._library = load_library(source_key(form, plan), lambda: source(integral_codes(form), plan), mesh.comm)
        self._lanes = ctypes.c_int64.in_dll(self._library, "fem_vi_lanes").value
        contents = Contents.spelt(ctypes.c_char_p.in_dll(self._library, "fem_vi_contents").value or b"")
        self._functions = {coefficients[position]: spaces[position] for position in contents.read}
        self._entities = [mesh.entities(kind, subdomains) for kind, subdomains in contents.integrals]
        self._c_entities = (CEntities * len(self._entities))(
            *(CEntities(address(entities), len(entities)) for entities in self._entities)
        )

    def reads(self, symbol: Any) -> bool:
        """Whether a Function or Constant is read, so that `write_checked` looks at it."""
        return symbol in self._functions or symbol in self._constants

    def write(self, num_samples: int, values: Mapping[Any, Values], results: Sequence[Values]) -> None:
        """Evaluate the form for all samples and write each block's part to the rows of its result.

        Args:
            num_samples: How many samples there are.
            values: For each Function and Constant of the form that is not fixed.
            results: For each block, what is written to, `(num_rows, size)`, and the row that each sample goes to; samples of
                one row are added up, and rows of no sample are zero.

        MPI: Collective.
        """
        self._evaluate(num_samples, values, results, checks=False)

    def write_checked(self, num_samples: int, values: Mapping[Any, Values], results: Sequence[Values]) -> bool:
        """`write`, and whether all that this rank has read and written is finite. Collective."""
        return self._evaluate(num_samples, values, results, checks=True)

    def _evaluate(self, num_samples: int, values: Mapping[Any, Values], results: Sequence[Values], *, checks: bool) -> bool:
        if num_samples == 0:
            for result in results:
                result.values.fill(0.0)
            return False  # nothing has been looked at
        keep: list[Any] = []  # what the C structures point to
        inputs = [self._input(symbol, values, keep) for symbol in self._functions]
        if self._constants:
            inputs.append(self._constant_input(num_samples, values, keep))
        num_blocks = -(-num_samples // self._lanes)
        sums = [self._create_sum(space, result, num_blocks) for space, result in zip(self._out, results, strict=True)]
        is_finite = self._run(num_samples, inputs, [part.field for part in sums], checks=checks)
        for part in sums:
            part.finish()
        return is_finite

    def _input(self, symbol: Any, values: Mapping[Any, Values], keep: list[Any]) -> CField:
        space = self._functions[symbol]
        if symbol in self._fixed:
            local = symbol.x.array
            return space.coefficient(owned=local, ghosts=None, rows=None)
        given, zeros = values[symbol], self._zeros.get(symbol, NO_DOFS)
        if not given.is_shared and given.are_side_by_side(self._lanes):
            ghosts = space.halo.forward(given.values)
            local = np.concatenate([given.values.T, ghosts.T]) if ghosts.size else given.values.T
            keep.append(local)
            return space.coefficient_side_by_side(local, zeros)
        is_shared = given.is_shared and not zeros.size
        owned = np.ascontiguousarray(given.values[given.rows[:1]] if is_shared else given.values)
        ghosts = space.halo.forward(owned)
        if is_shared:
            owned = np.concatenate([owned[0], ghosts[0]]) if ghosts.size else owned
            keep.append(owned)
            return space.coefficient(owned=owned, ghosts=None, rows=None)
        rows = np.ascontiguousarray(given.rows, dtype=np.int64)
        keep += [owned, ghosts, rows]
        return space.coefficient(owned=owned, ghosts=ghosts, rows=rows, zeros=zeros)

    def _constant_input(self, num_samples: int, values: Mapping[Any, Values], keep: list[Any]) -> CField:
        given = [
            Values(np.reshape(c.value, (1, -1)), np.zeros(num_samples, dtype=np.intp)) if c in self._fixed else values[c]
            for c in self._constants
        ]
        is_shared = all(one.is_shared for one in given)
        chosen = slice(1) if is_shared else slice(None)
        table = np.ascontiguousarray(np.concatenate([one.values[one.rows[chosen]] for one in given], axis=1), dtype=np.float64)
        rows = None if is_shared else np.arange(num_samples, dtype=np.int64)
        keep += [table, rows]
        return self._constant_space.field(owned=table, rows=rows)

    def _create_sum(self, space: FieldSpace | ConstantSpace, result: Values, num_blocks: int) -> _Sum:
        """The cheapest way to fill the rows: in place; summed over samples; or sample by sample, and added up afterwards."""
        if isinstance(space, ConstantSpace):
            return _sum_of_constant(space, result, self._mesh.comm)
        if len(result.rows) == len(result.values):  # then each sample has its own
            if result.values.flags.c_contiguous:
                return _sum_in_place(space, result)
            if result.are_side_by_side(self._lanes):
                return _sum_side_by_side(space, result)
        elif result.is_shared:
            return _sum_of_all(space, result, num_blocks)
        alone = Values(np.empty((len(result.rows), space.halo.num_owned)), np.arange(len(result.rows)))
        inner = _sum_in_place(space, alone)

        def add_rows() -> None:
            inner.finish()
            if len(result.rows) == len(result.values):
                result.values[...] = alone.values
            else:
                result.values.fill(0.0)
                np.add.at(result.values, result.rows, alone.values)

        return _Sum(inner.field, add_rows, inner)

    def _run(self, num_samples: int, inputs: Sequence[CField], outputs: Sequence[CField], *, checks: bool) -> bool:
        """Share the blocks of samples out among threads, and say whether all that they looked at is finite. Not collective."""
        mesh, geometry = self._mesh, self._mesh.geometry
        num_blocks = -(-num_samples // self._lanes)
        num_threads = max(1, min(mesh.num_threads, num_blocks))
        fields = (*(given for given in inputs if given.rows or given.stride), *outputs)
        packed = [field for field in fields if not field.stride or field.num_zeros]
        together = 1
        if any(field.stride for field in fields):
            together = min(_TOGETHER_MIXED if packed else _TOGETHER, num_blocks)
        size = self._lanes * together * sum(field.num_local for field in packed)
        c_in, c_out = (CField * max(1, len(inputs)))(*inputs), (CField * len(outputs))(*outputs)
        bounds = [num_blocks * thread // num_threads for thread in range(num_threads + 1)]
        jobs = (CJob * num_threads)(*(
            CJob(
                c_in, c_out, self._c_entities, address(geometry.x), address(geometry.dofmap), address(geometry.permutations),
                mesh.scratch(thread, size), num_samples, bounds[thread], bounds[thread + 1], together, checks,
            )
            for thread in range(num_threads)
        ))  # fmt: skip
        self._library.fem_vi_run(jobs, ctypes.c_int64(num_threads))  # the interpreter's lock is free meanwhile
        return all(job.is_finite for job in jobs)


def _out_space(given: Input | FieldSpace, mesh: KernelMesh) -> FieldSpace | ConstantSpace:
    """What a block of the result is added to. Collective."""
    if isinstance(given, FieldSpace):
        return given
    return ConstantSpace(given.size, mesh.num_cells) if isinstance(given, ConstantInput) else mesh.space(given.space)


def _check_meshes(symbols: Sequence[fem.Function], mesh: KernelMesh) -> None:
    for symbol in symbols:
        if symbol.function_space.mesh.ufl_domain() != mesh.mesh.ufl_domain():
            raise UnsupportedForm(
                f"CompiledKernel takes one mesh; '{symbol}' lives on another. AssembledKernel may take the form."
            )


@dataclass(frozen=True)
class _Sum:
    """Where a kernel adds one block of its results, and what is left to do when it has run.

    Attributes:
        field: For the kernel.
        finish: Collective.
        keep: What the field points to.
    """

    field: CField
    finish: Callable[[], None]
    keep: Any = None


def _sum_in_place(space: FieldSpace, result: Values) -> _Sum:
    rows = np.ascontiguousarray(result.rows, dtype=np.int64)
    ghosts = np.empty((len(result.values), space.halo.num_ghosts))
    field = space.result(owned=result.values, ghosts=ghosts, rows=rows)
    return _Sum(field, lambda: space.halo.reverse(ghosts, result.values), rows)


def _sum_side_by_side(space: FieldSpace, result: Values) -> _Sum:
    halo = space.halo
    shape = halo.num_owned + halo.num_ghosts, len(result.rows)
    local = np.empty(shape) if halo.num_ghosts else result.values.T

    def add_local() -> None:
        if halo.num_ghosts:
            result.values.T[...] = local[: halo.num_owned]
        halo.reverse(local[halo.num_owned :].T, result.values)

    return _Sum(space.result_side_by_side(local), add_local, local)


def _sum_of_all(space: FieldSpace, result: Values, num_blocks: int) -> _Sum:
    halo = space.halo
    parts = np.empty((num_blocks, halo.num_owned + halo.num_ghosts))

    def add_total() -> None:
        total = parts.sum(axis=0, keepdims=True)
        result.values[...] = total[:, : halo.num_owned]
        halo.reverse(total[:, halo.num_owned :], result.values)

    return _Sum(space.result(owned=parts, ghosts=None, rows=None), add_total)


def _sum_of_constant(space: ConstantSpace, result: Values, comm: Any) -> _Sum:
    parts = np.empty((len(result.rows), space.size))
    rows: NDArray[np.int64] = np.arange(len(result.rows), dtype=np.int64)

    def add_rows() -> None:
        total = np.zeros_like(result.values)
        np.add.at(total, result.rows, parts)
        result.values[...] = sum_over_ranks(comm, total)

    return _Sum(space.field(owned=parts, rows=rows), add_rows, rows)
