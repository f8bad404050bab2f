"""From a graph of scalars to a program: fixed values computed, tables of one field stacked, steps in order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fem_vi.bridge.scalar_graph import Node, ScalarGraph
from fem_vi.bridge.torch_program import OPERATIONS, Entry, Gather, Program, Read, Step, Write
from fem_vi.pde.inputs import Array
from fem_vi.pde.tabulate import Orientation


class Store:
    """Buffers by name; equal ones are stored once.

    Attributes:
        buffers: The tensors.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self._known: dict[str, str] = {}

    def add(self, kind: str, values: Array | NDArray[np.int64] | Tensor) -> str:
        """The name under which values are found."""
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        content = tensor.contiguous().numpy()
        key = hashlib.sha256(f"{kind} {content.dtype} {content.shape}".encode() + content.tobytes()).hexdigest()
        if key not in self._known:
            self._known[key] = f"{kind}{len(self.buffers)}"
            self.buffers[self._known[key]] = tensor.contiguous()
        return self._known[key]


@dataclass(frozen=True)
class Group:
    """A table of a field or of a test function on some cells.

    Attributes:
        values: `(num_variants, rows, num_dofs)`.
        dofs: `(num_dofs, num_entities)`.
        variants: `(num_entities,)`.
        turns: How the cells turn the basis functions.
        node: The scalar that it gives, or is multiplied by.
    """

    values: Array
    dofs: NDArray[np.int64]
    variants: NDArray[np.int64]
    turns: Orientation | None
    node: int

    def values_of(self, x: Array) -> Array:
        """The table times local coefficients `(num_dofs, num_entities)`: `(rows, num_entities)`."""
        if self.turns is not None:
            x = np.einsum("eji,je->ie", self.turns.matrices[self.turns.numbers], x)
        if len(self.values) == 1:
            return np.asarray(self.values[0] @ x)
        return np.einsum("eqn,ne->qe", self.values[self.variants], x)


def fixed_values(
    graph: ScalarGraph, wanted: Sequence[int], leaf: Callable[[Any], Tensor], weights: Tensor
) -> dict[int, Tensor | float]:
    """The values of nodes that do not vary with the inputs.

    Args:
        graph: The nodes.
        wanted: Which.
        leaf: Gives the value of a leaf.
        weights: Of the quadrature points.

    Returns:
        Tensors `(points or 1, num_entities or 1, 1)`, and numbers.
    """
    known: dict[int, Tensor] = {}

    def compute(k: int) -> Tensor:
        node = graph.nodes[k]
        if node.op == "leaf":
            return leaf(node.data)
        if node.op == "number":
            return weights.new_full((1, 1, 1), float(node.data))  # type: ignore[arg-type]
        operands = [known[arg] for arg in node.args]
        if node.op == "integral":
            return torch.einsum("q,qeb->eb", weights, operands[0])[None]
        if node.op == "power":
            return operands[0] ** float(node.data)  # type: ignore[arg-type]
        return OPERATIONS[node.op](*operands)

    required, stack = set[int](), list(wanted)
    while stack:
        k = stack.pop()
        if k not in required:
            required.add(k)
            stack.extend(graph.nodes[k].args)
    for k in sorted(required):  # operands have lower numbers
        known[k] = compute(k)
    return {k: float(graph.nodes[k].data) if graph.nodes[k].op == "number" else known[k] for k in wanted}  # type: ignore[arg-type]


class Emission:
    """Collects the parts of a program.

    Args:
        store: Takes the buffers.
        graph: The nodes.
        size: Number of cells or facets.
        weights: Of the quadrature points.
    """

    def __init__(self, store: Store, graph: ScalarGraph, size: int, weights: Array) -> None:
        self._store = store
        self._graph = graph
        self._size = size
        self._weights = weights
        self._gathers: dict[Gather, int] = {}
        self._reads: dict[tuple[Any, ...], list[Group]] = {}
        self._entries: list[tuple[int, Entry]] = []
        self._slots: dict[int, int] = {}

    def _gather(self, source: int, dofs: str) -> int:
        return self._gathers.setdefault(Gather(source, dofs), len(self._gathers))

    def entry(self, node: int, source: int, entry: int) -> None:
        """A node is an entry of a Constant."""
        self._entries.append((node, Entry(self._gather(source, ""), entry)))

    def read(self, node: int, source: int, group: Group) -> None:
        """A node is a field at the points."""
        key = self._gather(source, self._store.add("dofs", group.dofs)), *self._layout(group)
        self._reads.setdefault(key, []).append(group)

    def _layout(self, group: Group) -> tuple[str, tuple[str, ...]]:
        """Names of the variants, empty where there is one table for all, and of the orientation."""
        variants = self._store.add("variants", group.variants) if len(group.values) > 1 else ""
        turns = group.turns
        if turns is None:
            return variants, ()
        if turns.is_diagonal:
            signs = np.diagonal(turns.matrices, axis1=1, axis2=2)[turns.numbers]
            return variants, (self._store.add("signs", np.ascontiguousarray(signs.T[..., None])),)
        return variants, (self._store.add("matrices", turns.matrices), self._store.add("turns", turns.numbers))

    def _stacked(self, groups: Sequence[Group]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The tables of groups, one below the other, and where each is."""
        ends = np.cumsum([0, *[group.values.shape[1] for group in groups]]).tolist()
        values = np.concatenate([group.values for group in groups], axis=1)
        return self._store.add("table", values[0] if len(values) == 1 else values), tuple(itertools.pairwise(ends))

    def program(self, live: Sequence[int], fixed: Mapping[int, Tensor | float], outputs: Sequence[Group]) -> Program:
        """The program.

        Args:
            live: Nodes to compute, in order.
            fixed: Values of the nodes that they use and that do not vary.
            outputs: What comes out.
        """
        reads = []
        for (gather, variants, turns), groups in self._reads.items():
            table, rows = self._stacked(groups)
            reads.append(Read(gather, table, variants, turns, rows))
            self._number(group.node for group in groups)
        self._number(node for node, _ in self._entries)
        tensors = {k: value for k, value in fixed.items() if isinstance(value, Tensor)}
        self._number(tensors)
        steps = self._steps(live, fixed, outputs)
        writes: dict[tuple[str, str, tuple[str, ...]], list[Group]] = {}
        for group in outputs:
            writes.setdefault((self._store.add("dofs", group.dofs), *self._layout(group)), []).append(group)
        return Program(
            size=self._size,
            points=len(self._weights),
            weights=self._store.add("weights", self._weights[None]),
            gathers=tuple(self._gathers),
            reads=tuple(reads),
            entries=tuple(entry for _, entry in self._entries),
            fixed=tuple(self._store.add("fixed", value) for value in tensors.values()),
            steps=tuple(steps),
            writes=tuple(self._write(key, groups) for key, groups in writes.items()),
        )

    def _number(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            self._slots[node] = len(self._slots)

    def _write(self, key: tuple[str, str, tuple[str, ...]], groups: Sequence[Group]) -> Write:
        dofs, variants, turns = key
        table, rows = self._stacked(groups)
        return Write(dofs, table, variants, turns, tuple(self._slots[group.node] for group in groups), rows)

    def _steps(self, live: Sequence[int], fixed: Mapping[int, Tensor | float], outputs: Sequence[Group]) -> list[Step]:
        """One step for each node, but for products that are added on the way and numbers that a step takes."""
        nodes = self._graph.nodes
        uses: dict[int, int] = {}
        for used in [arg for k in live for arg in nodes[k].args] + [group.node for group in outputs]:
            uses[used] = uses.get(used, 0) + 1
        steps: list[Step] = []

        def put(node: int, step: Step) -> None:
            steps.append(step)
            self._slots[node] = len(self._slots)

        def slot(k: int) -> int:
            if k not in self._slots:
                put(k, Step("number", (), float(fixed[k])))
            return self._slots[k]

        merged = {k for k in live if self._is_mergeable(k, uses)}
        absorbed = set[int]()
        for k in live:
            if nodes[k].op == "add" and self._with_number(nodes[k], fixed) is None:
                absorbed.update([arg for arg in nodes[k].args if arg in merged][-1:])
        for k in live:
            if k in self._slots or k in absorbed:
                continue
            node = nodes[k]
            number = self._with_number(node, fixed)
            if number is not None:
                put(k, Step(number[0], (slot(number[1]),), number[2]))
            elif node.op == "add" and any(arg in absorbed for arg in node.args):
                inner = next(arg for arg in node.args if arg in absorbed)
                (outer,) = [arg for arg in node.args if arg != inner]
                put(k, Step("addcmul", (slot(outer), *(slot(arg) for arg in nodes[inner].args)), None))
            else:
                operands = tuple(slot(arg) for arg in node.args)
                put(k, Step(node.op, operands, float(node.data) if node.op == "power" else None))  # type: ignore[arg-type]
        for group in outputs:
            slot(group.node)
        return steps

    def _is_mergeable(self, k: int, uses: Mapping[int, int]) -> bool:
        """Whether a product is used once and has no number in it."""
        node = self._graph.nodes[k]
        return node.op == "mul" and uses.get(k) == 1 and all(self._graph.value(arg) is None for arg in node.args)

    def _with_number(self, node: Node, fixed: Mapping[int, Tensor | float]) -> tuple[str, int, float] | None:
        """A product or sum of a node and a number: the operation, the node and the number."""
        if node.op in ("mul", "add"):
            for number, other in (node.args, node.args[::-1]):
                value = fixed.get(number)
                if isinstance(value, float):
                    return ("scale" if node.op == "mul" else "shift"), other, value
        return None
