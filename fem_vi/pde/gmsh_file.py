"""Reading gmsh's own files: MSH 2.2 and 4.1, text and binary.

Written here rather than left to meshio, which refuses elements without a physical group, mixes up groups of different
dimension that share a name, cannot read partitioned files, and takes a cut-off file for a whole one; and rather than left
to gmsh, which not every machine has, and which prints and exits as it likes.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fem_vi.errors import MeshError
from fem_vi.pde.mesh_cells import GMSH, Index, from_gmsh
from fem_vi.pde.mesh_content import UNTAGGED, Block, MeshContent, create_block

_NAME = re.compile(rb'\s*(\d+)\s+(-?\d+)\s+"(.*)"\s*$')


class _Numbers:
    """The numbers of one section, taken in the order of the file."""

    def __init__(self, section: str, data: bytes, start: int, *, binary: bool, size: int) -> None:
        self.section, self.data, self.start, self.position, self.binary = section, data, start, start, binary
        self.size_type = np.dtype(f"u{size}")
        self.values: NDArray[np.float64] = np.empty(0)
        if not binary:
            self.position, self.values = 0, self._parse(data[start : self._end(start)])

    def _end(self, start: int) -> int:
        end = self.data.find(b"$End" + self.section.encode(), start)
        if end < 0:
            raise MeshError(f"section ${self.section} has no $End{self.section}: the file is truncated.")
        return end

    def _parse(self, text: bytes) -> NDArray[np.float64]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy says "deprecated" for text that is not a number
            try:
                return np.fromstring(text, sep=" ") if text.strip() else np.empty(0)  # type: ignore[call-overload, no-any-return]
            except (DeprecationWarning, ValueError):
                raise MeshError(f"section ${self.section} contains something that is not a number.") from None

    def _take(self, kind: np.dtype[np.generic], count: int) -> NDArray[np.generic]:
        width = kind.itemsize if self.binary else 1
        left = (len(self.data) - self.position) // width if self.binary else len(self.values) - self.position
        if count < 0 or count > left:
            raise MeshError(f"section ${self.section} ends too early: {count} more numbers were announced, {left} are there.")
        start, self.position = self.position, self.position + count * width
        if self.binary:
            return np.frombuffer(self.data, kind, count, start)
        return self.values[start : self.position]

    def ints(self, count: int) -> Index:
        return self._whole(self._take(np.dtype(np.int32), count))

    def sizes(self, count: int) -> Index:
        return self._whole(self._take(self.size_type, count))

    def reals(self, count: int) -> NDArray[np.float64]:
        return self._take(np.dtype(np.float64), count).astype(np.float64)

    def _whole(self, values: NDArray[np.generic]) -> Index:
        if not self.binary and not np.all(np.abs(values) < 2.0**53):  # type: ignore[operator]
            raise MeshError(f"section ${self.section} has a number that cannot be a count, a tag or a node.")
        return values.astype(np.int64)

    def one_size(self) -> int:
        return int(self.sizes(1)[0])

    def one_int(self) -> int:
        return int(self.ints(1)[0])

    def rest(self) -> Index:
        """All numbers left in a text section, as integers."""
        return self.ints(len(self.values) - self.position)

    def close(self) -> int:
        """Where the section's numbers end; they must all have been taken."""
        end = self._end(self.position if self.binary else self.start)
        if self.data[self.position : end].strip() if self.binary else self.position != len(self.values):
            raise MeshError(f"section ${self.section} holds more than it announces.")
        return end


@dataclass
class _State:
    """What the sections read so far have told."""

    names: list[tuple[str, int, int]] = field(default_factory=list)
    groups: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (dim, entity) -> physical tags
    node_tags: Index | None = None
    points: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 3)))
    elements: list[tuple[int, Index, Index]] = field(default_factory=list)  # gmsh type, node tags, physical tags


def _read_names(state: _State, body: bytes) -> None:
    lines = body.strip().splitlines()
    matches = [_NAME.match(line) for line in lines[1:]]
    if not lines or not lines[0].strip().isdigit() or None in matches or len(matches) != int(lines[0]):
        raise MeshError("section $PhysicalNames is damaged.")
    for match in matches:
        assert match is not None
        state.names.append((match[3].decode(errors="replace"), int(match[1]), int(match[2])))


def _read_entities(state: _State, numbers: _Numbers, *, partitioned: bool) -> None:
    if partitioned:
        numbers.one_size()
        numbers.ints(2 * numbers.one_size())  # ghost entities
    for dim, count in enumerate(numbers.sizes(4)):
        for _ in range(count):
            tag = numbers.one_int()
            if partitioned:
                numbers.ints(2)  # parent
                numbers.ints(numbers.one_size())  # partitions
            numbers.reals(3 if dim == 0 else 6)
            state.groups[dim, tag] = [int(group) for group in numbers.ints(numbers.one_size())]
            if dim > 0:
                numbers.ints(numbers.one_size())  # boundary


def _read_nodes_4(state: _State, numbers: _Numbers) -> None:
    num_blocks, total, _, _ = numbers.sizes(4)
    tags: list[Index] = [np.empty(0, dtype=np.int64)]
    points: list[NDArray[np.float64]] = [np.empty((0, 3))]
    for _ in range(num_blocks):
        dim, _, parametric = numbers.ints(3)
        count = numbers.one_size()
        tags.append(numbers.sizes(count))
        width = 3 + (int(dim) if parametric else 0)
        points.append(numbers.reals(count * width).reshape(count, width)[:, :3])
    state.node_tags, state.points = np.concatenate(tags), np.concatenate(points)
    if len(state.points) != total:
        raise MeshError(f"section $Nodes announces {total} nodes and lists {len(state.points)}.")


def _kind(number: int) -> int:
    """Number of nodes of a gmsh element."""
    if number not in GMSH:
        raise MeshError(f"it contains elements of gmsh's type {number}, which DOLFINx does not have.")
    return GMSH[number][1]


def _read_elements_4(state: _State, numbers: _Numbers) -> None:
    num_blocks, total, _, _ = numbers.sizes(4)
    found = 0
    for _ in range(num_blocks):
        dim, entity, kind = (int(value) for value in numbers.ints(3))
        count = numbers.one_size()
        nodes = numbers.sizes(count * (1 + _kind(kind))).reshape(count, -1)[:, 1:]
        for group in state.groups.get((dim, entity)) or [UNTAGGED]:
            state.elements.append((kind, nodes, np.full(count, group if group == UNTAGGED else abs(group))))
        found += count
    if found != total:
        raise MeshError(f"section $Elements announces {total} elements and lists {found}.")


def _count_2(data: bytes, start: int, section: str) -> tuple[int, int]:
    """MSH 2.2 writes the count as text, also in binary files."""
    end = data.find(b"\n", start)
    line = data[start:end].strip()
    if end < 0 or not line.isdigit():
        raise MeshError(f"section ${section} does not begin with a count.")
    return int(line), end + 1


def _read_nodes_2(state: _State, numbers: _Numbers, count: int) -> None:
    if numbers.binary:
        kind = np.dtype([("tag", np.int32), ("x", np.float64, 3)])
        table = numbers._take(kind, count)
        state.node_tags, state.points = table["tag"].astype(np.int64), table["x"].copy()  # type: ignore[call-overload]
        return
    values = numbers.reals(4 * count).reshape(count, 4)
    state.node_tags, state.points = values[:, 0].astype(np.int64), values[:, 1:].copy()


def _add_2(state: _State, kind: int, table: Index, num_tags: int) -> None:
    """Elements of one kind, in rows: tags, then nodes."""
    groups = np.abs(table[:, 0]) if num_tags else np.zeros(len(table), dtype=np.int64)
    state.elements.append((kind, table[:, num_tags:], np.where(groups == 0, UNTAGGED, groups)))


def _read_elements_2(state: _State, numbers: _Numbers, count: int) -> None:
    if numbers.binary:
        while count > 0:
            kind, block, num_tags = (int(value) for value in numbers.ints(3))
            width = 1 + num_tags + _kind(kind)
            if block < 1 or num_tags < 0:
                raise MeshError("section $Elements is damaged.")
            _add_2(state, kind, numbers.ints(block * width).reshape(block, width)[:, 1:], num_tags)
            count -= block
        return
    values, position = numbers.rest(), 0
    while count > 0:
        if position + 3 > len(values) or values[position + 2] < 0:
            raise MeshError(f"section $Elements ends too early: {count} elements are missing.")
        kind, num_tags = int(values[position + 1]), int(values[position + 2])
        width = 3 + num_tags + _kind(kind)
        rows = min(count, (len(values) - position) // width, 4096)  # in steps: types may alternate
        table = values[position : position + rows * width].reshape(rows, width)
        other = np.flatnonzero((table[:, 1] != kind) | (table[:, 2] != num_tags))
        rows = int(other[0]) if len(other) else rows
        if rows == 0:
            raise MeshError(f"section $Elements ends too early: {count} elements are missing.")
        _add_2(state, kind, table[:rows, 3:], num_tags)
        position, count = position + rows * width, count - rows


def _read_section(state: _State, name: str, data: bytes, start: int, *, binary: bool, size: int, version: int) -> int:
    """Read one section, and return where its numbers end; one that no mesh needs is skipped."""
    if name == "PhysicalNames":
        _read_names(state, data[start : max(start, data.find(b"$EndPhysicalNames", start))])
        return start
    if name not in ("Nodes", "Elements") and (version == 2 or name not in ("Entities", "PartitionedEntities")):
        return start
    count, start = _count_2(data, start, name) if version == 2 else (0, start)
    numbers = _Numbers(name, data, start, binary=binary, size=size)
    if name == "Nodes":
        _read_nodes_2(state, numbers, count) if version == 2 else _read_nodes_4(state, numbers)
    elif name == "Elements":
        _read_elements_2(state, numbers, count) if version == 2 else _read_elements_4(state, numbers)
    else:
        _read_entities(state, numbers, partitioned=name == "PartitionedEntities")
    return numbers.close()


def _number_nodes(state: _State) -> list[Block]:
    """Blocks in which nodes are numbered by rows of `points`; node tags may have any gaps and order."""
    tags = state.node_tags if state.node_tags is not None else np.empty(0, dtype=np.int64)
    if not len(tags) or not state.elements:
        raise MeshError("it has no nodes or no elements.")
    order = np.argsort(tags, kind="stable")
    ranked = tags[order]
    if np.any(ranked[1:] == ranked[:-1]):
        raise MeshError(f"node {int(ranked[1:][ranked[1:] == ranked[:-1]][0])} is defined twice.")
    blocks = []
    for kind, nodes, groups in state.elements:
        shape, num_nodes = GMSH[kind]
        place = np.minimum(np.searchsorted(ranked, nodes), len(ranked) - 1)
        missing = ranked[place] != nodes
        if np.any(missing):
            raise MeshError(
                f"{int(missing.any(axis=1).sum())} elements refer to nodes that are not there, such as {int(nodes[missing][0])}."
            )
        blocks.append(create_block(shape, order[place], groups, from_gmsh(shape, num_nodes), f"gmsh {kind}"))
    return blocks


def read_gmsh(path: Path, data: bytes) -> MeshContent:
    """Read MSH 2.2 or 4.1, text or binary.

    Args:
        path: The file, for the record.
        data: Its content.

    Raises:
        MeshError: Where the content is damaged; the message does not name the file.

    MPI: Not collective.
    """
    header = data[data.find(b"$MeshFormat") :].split(b"\n", 2)[1].split() if b"$MeshFormat" in data else []
    if len(header) != 3 or header[0] not in (b"2.2", b"4.1", b"2", b"2.0", b"2.1") or header[1] not in (b"0", b"1"):
        raise MeshError("its header is not that of MSH 2.2 or 4.1. Save it again with Mesh.MshFileVersion = 4.1.")
    version, binary, size = int(header[0][:1]), header[1] == b"1", int(header[2]) if header[2] in (b"4", b"8") else 8
    state, position = _State(), 0
    while position < len(data):
        end = data.find(b"\n", position)
        line = data[position : len(data) if end < 0 else end].strip()
        if not line:
            position = len(data) if end < 0 else end + 1
            continue
        if end < 0 or not line.startswith(b"$") or line.startswith(b"$End"):
            raise MeshError(f"a section was expected at byte {position}: the file is damaged or truncated.")
        name = line[1:].decode("ascii", errors="replace")
        if name == "MeshFormat" and binary and data[end + 1 :].split(b"\n", 1)[1][:4] != np.int32(1).tobytes():
            raise MeshError("it was written on a machine with the other byte order. Save it as text.")
        stop = _read_section(state, name, data, end + 1, binary=binary, size=size, version=version)
        mark = b"$End" + line[1:]
        position = data.find(mark, stop)
        if position < 0:
            raise MeshError(f"section ${name} has no $End{name}: the file is truncated.")
        position += len(mark)
    return MeshContent(path, state.points, tuple(_number_nodes(state)), tuple(state.names))
