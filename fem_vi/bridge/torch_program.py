"""A list of torch operations for one integral of a form; plain data, so that it can be written to a file.

Axes are (points, cells, samples), samples last, so that reading and adding the rows of a field are copies of whole lines, tables
meet all cells and samples in one matrix product, and an axis has size 1 where a value does not vary along it. A program reads
fields at cells' dofs, multiplies them by tables, computes scalars, and multiplies those by the tables of the test functions.

It imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Buffers = Mapping[str, Tensor]
Operation = Callable[..., Tensor]

OPERATIONS: dict[str, Operation] = {
    "add": torch.add, "mul": torch.mul, "addcmul": torch.addcmul, "reciprocal": torch.reciprocal,
    "sqrt": torch.sqrt, "pow": torch.pow,
    "abs": torch.abs, "sign": torch.sign, "exp": torch.exp, "log": torch.log, "erf": torch.erf,
    "cos": torch.cos, "sin": torch.sin, "tan": torch.tan, "acos": torch.acos, "asin": torch.asin, "atan": torch.atan,
    "cosh": torch.cosh, "sinh": torch.sinh, "tanh": torch.tanh, "atan2": torch.atan2,
    "minimum": torch.minimum, "maximum": torch.maximum, "where": torch.where,
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_not": torch.logical_not,
}  # fmt: skip
"""Operations on tensors that broadcast."""

NUMBER_OPERATIONS: dict[str, Operation] = {"scale": torch.mul, "shift": torch.add, "power": torch.pow}
"""Operations on a tensor and a number."""


@dataclass(frozen=True)
class Gather:
    """Rows of a tensor: those of a field at the dofs of cells, or all entries of a Constant.

    Attributes:
        source: Which tensor.
        dofs: Buffer `(num_dofs, num_entities)`; empty for a Constant.
    """

    source: int
    dofs: str


@dataclass(frozen=True)
class Read:
    """Tables times what was gathered: one slot for each range of the tables' rows.

    Attributes:
        gather: Which gather.
        table: Buffer `(rows, num_dofs)`, or `(num_variants, rows, num_dofs)`.
        variants: Buffer `(num_entities,)` that says which variant; empty for none.
        orientation: Buffers of the transformations of the cells' basis functions; see `oriented`.
        rows: Ranges of rows, one after the other.
    """

    gather: int
    table: str
    variants: str
    orientation: tuple[str, ...]
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Entry:
    """One slot: an entry of a Constant that was gathered."""

    gather: int
    entry: int


@dataclass(frozen=True)
class Step:
    """One slot: an operation on slots, with a number where it takes one. "integral" is the weighted sum over points."""

    op: str
    args: tuple[int, ...]
    number: float | None


@dataclass(frozen=True)
class Write:
    """Tables of test functions, transposed, times slots, added to the rows of the residual.

    Attributes:
        dofs: Buffer `(num_dofs, num_entities)`.
        table: Buffer `(rows, num_dofs)`, or `(num_variants, rows, num_dofs)`; quadrature weights are in it.
        variants: As for `Read`.
        orientation: As for `Read`.
        slots: What is multiplied.
        rows: The range of rows that each slot meets.
    """

    dofs: str
    table: str
    variants: str
    orientation: tuple[str, ...]
    slots: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Program:
    """One integral. Slots are numbered in this order: reads, entries, fixed values, steps.

    Attributes:
        size: Number of cells or facets.
        points: Number of quadrature points.
        weights: Buffer `(1, points)`.
        gathers: What is read from the tensors.
        reads: Values of fields at points.
        entries: Entries of Constants.
        fixed: Buffers `(points or 1, num_entities or 1, 1)`.
        steps: Operations.
        writes: What comes out.
    """

    size: int
    points: int
    weights: str
    gathers: tuple[Gather, ...]
    reads: tuple[Read, ...]
    entries: tuple[Entry, ...]
    fixed: tuple[str, ...]
    steps: tuple[Step, ...]
    writes: tuple[Write, ...]

    @cached_property
    def freed(self) -> dict[int, list[int]]:
        """For each step, the slots that nothing after it needs."""
        last: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            last.update(dict.fromkeys(step.args, number))
        kept = {k for write in self.writes for k in write.slots}
        freed: dict[int, list[int]] = {}
        for slot, number in last.items():
            if slot not in kept:
                freed.setdefault(number, []).append(slot)
        return freed


class Part:
    """Some of the cells of a program: what is made of its buffers for them.

    Args:
        program: The program.
        buffers: All buffers.
        start: First cell.
        stop: One past the last.
    """

    def __init__(self, program: Program, buffers: Buffers, start: int, stop: int) -> None:
        self.program = program
        self._buffers = buffers
        self._range = slice(start, stop)
        self._size = stop - start

    def gather(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """`(num_dofs, num_cells, samples)` for each gather from a field, `(size, samples)` from a Constant."""
        return [columns[g.source] if not g.dofs else self._rows(columns[g.source], g.dofs) for g in self.program.gathers]

    def _rows(self, column: Tensor, dofs: str) -> Tensor:
        numbers = self._buffers[dofs][:, self._range]
        return column.index_select(0, numbers.reshape(-1)).reshape(*numbers.shape, column.shape[-1])

    def add_rows(self, out: Tensor, dofs: str, values: Tensor) -> Tensor:
        """`out` with values, `(num_dofs, num_cells, samples)`, added at the dofs."""
        return out.index_add(0, self._numbers(dofs), self._lines(values, out))

    def add_rows_(self, out: Tensor, dofs: str, values: Tensor) -> None:
        """The same in place."""
        out.index_add_(0, self._numbers(dofs), self._lines(values, out))

    def _numbers(self, dofs: str) -> Tensor:
        return self._buffers[dofs][:, self._range].reshape(-1)

    def _lines(self, values: Tensor, out: Tensor) -> Tensor:
        return values.flatten(0, 1).expand(-1, out.shape[-1])

    def take_rows(self, out: Tensor, dofs: str) -> Tensor:
        """The adjoint of `add_rows`."""
        return self._rows(out, dofs)

    def compute(self, gathered: Sequence[Tensor]) -> list[Tensor]:
        """For each write, `(num_dofs, num_cells, samples)`."""
        program = self.program
        slots: list[Tensor | None] = []
        for read in program.reads:
            slots += self._read(read, gathered[read.gather])
        slots += [gathered[entry.gather][entry.entry].reshape(1, 1, -1) for entry in program.entries]
        slots += [self._cells(self._buffers[name]) for name in program.fixed]
        for number, step in enumerate(program.steps):
            operands = [slots[k] for k in step.args]
            slots.append(self._step(step, operands))  # type: ignore[arg-type]
            del operands
            for k in () if torch.compiler.is_compiling() else program.freed.get(number, ()):
                slots[k] = None  # frees memory, or lets it be used again while it is in the cache
        return [self._write(write, [slots[k] for k in write.slots]) for write in program.writes]  # type: ignore[misc]

    def _cells(self, fixed: Tensor) -> Tensor:
        return fixed if fixed.shape[1] == 1 else fixed[:, self._range]

    def _read(self, read: Read, x: Tensor) -> list[Tensor]:
        x = self._oriented(read.orientation, x, transposed=True)
        table = self._buffers[read.table]
        if read.variants:
            values = torch.matmul(table[self._buffers[read.variants][self._range]], x.transpose(0, 1)).transpose(0, 1)
        else:
            values = torch.matmul(table, x.flatten(1)).unflatten(1, x.shape[1:])
        return list(values.split([stop - start for start, stop in read.rows]))

    def _step(self, step: Step, operands: Sequence[Tensor]) -> Tensor:
        if step.op == "integral":
            (x,) = operands
            return torch.matmul(self._buffers[self.program.weights], x.flatten(1)).unflatten(1, x.shape[1:])
        if step.op == "number":
            return self._buffers[self.program.weights].new_full((1, 1, 1), step.number or 0.0)
        if step.number is not None:
            return NUMBER_OPERATIONS[step.op](*operands, step.number)
        return OPERATIONS[step.op](*operands)

    def _write(self, write: Write, values: Sequence[Tensor]) -> Tensor:
        table = self._buffers[write.table]
        if write.variants:
            table = table[self._buffers[write.variants][self._range]]
        total: Tensor | None = None
        for (start, stop), x in _joined(write.rows, values):
            spread = x.expand(x.shape[0], self._size, x.shape[2])
            part = _contract(table[..., start:stop, :].transpose(-1, -2), spread)
            total = part if total is None else total + part
        assert total is not None  # no write without slots
        return self._oriented(write.orientation, total, transposed=False)

    def _oriented(self, names: tuple[str, ...], x: Tensor, *, transposed: bool) -> Tensor:
        """T x, or T^T x, for each cell's T: signs `(num_dofs, num_cells, 1)`, or matrices and which of them each cell has."""
        if not names:
            return x
        if len(names) == 1:
            return x * self._buffers[names[0]][:, self._range]
        matrices = self._buffers[names[0]][self._buffers[names[1]][self._range]]
        return torch.matmul(matrices.transpose(1, 2) if transposed else matrices, x.transpose(0, 1)).transpose(0, 1)


def _contract(table: Tensor, x: Tensor) -> Tensor:
    """Tables `(num_dofs, rows)`, or `(num_cells, num_dofs, rows)`, times `(rows, num_cells, samples)`."""
    if table.ndim == 3:
        return torch.matmul(table, x.transpose(0, 1)).transpose(0, 1)
    return torch.matmul(table, x.flatten(1)).unflatten(1, x.shape[1:])


def _joined(rows: Sequence[tuple[int, int]], values: Sequence[Tensor]) -> Iterable[tuple[tuple[int, int], Tensor]]:
    """Neighbours of one row each, in one tensor: one matrix product for all."""
    at = 0
    while at < len(values):
        end = at + 1
        while (
            end < len(values)
            and all(stop - start == 1 for start, stop in rows[at : end + 1])
            and values[end].shape == values[at].shape
        ):
            end += 1
        joined = torch.cat(list(values[at:end])) if end > at + 1 else values[at]
        yield (rows[at][0], rows[end - 1][1]), joined
        at = end
