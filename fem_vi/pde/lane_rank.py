"""Tables of low rank: derivatives of basis functions that depend on each other are evaluated at fewer of them.

The derivatives of n basis functions at the quadrature points, T_qi, span fewer than n functions: those of the six quadratic
functions on a triangle are three linear ones. With some of the columns of T for a basis, T_qi = sum_k T_q,p(k) C_ki, a
coefficient's derivative

    sum_i T_qi w_i = sum_k T_q,p(k) (C w)_k

takes fewer operations at each point, C w being computed once for a cell; and so do sums over points, sum_q f_q T_qi.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ffcx.codegeneration.lnodes as L
import numpy as np
import scipy.linalg

from fem_vi.pde.inputs import Array
from fem_vi.pde.lane_tree import as_section, children, flat, is_quadrature_loop, names, operands, product, text, walk

_RANK_TOLERANCE = 1e-10
_DENOMINATOR = 24  # entries of C are sought among multiples of 1 / 24
_EXACT = 1e-11


@dataclass(frozen=True)
class LowRank:
    """T_qi = sum_k T_q,p(k) C_ki.

    Attributes:
        pivots: p.
        weights: C.
    """

    pivots: tuple[int, ...]
    weights: Array


def low_rank(table: Array) -> LowRank | None:
    """The decomposition of a table, `(num_points, n)`; None where it saves nothing."""
    num_points, n = table.shape
    _, r, order = scipy.linalg.qr(table, mode="economic", pivoting=True)
    diagonal = np.abs(np.diag(r))
    rank = int(np.sum(diagonal > _RANK_TOLERANCE * max(diagonal[0], 1e-300)))
    weights = np.empty((rank, n))
    weights[:, order] = np.hstack([np.eye(rank), scipy.linalg.solve_triangular(r[:rank, :rank], r[:rank, rank:])])
    rounded = np.round(_DENOMINATOR * weights) / _DENOMINATOR
    weights[...] = np.where(np.abs(weights - rounded) < _EXACT, rounded, weights)
    columns = int(np.sum(np.any(np.abs(table) > 0, axis=0)))  # columns of zeros cost nothing as it is
    saved, spent = num_points * (columns - rank), int(np.sum(weights != 0)) - rank
    return LowRank(tuple(int(k) for k in order[:rank]), weights) if saved > 2 * spent else None


def with_fewer_columns(tree: Any) -> Any:
    """The same body with fewer operations for each point."""
    tables = {
        node.symbol.name: np.asarray(node.values)
        for node in walk(tree)
        if isinstance(node, L.ArrayDecl) and node.values is not None
    }
    ranks = {
        name: found
        for name, values in tables.items()
        if values.ndim == 4 and values.shape[:2] == (1, 1) and min(values.shape[2:]) > 1 and (found := low_rank(values[0, 0]))
    }
    statements: list[Any] = []
    for number, node in enumerate(flat(tree)):
        if ranks and is_quadrature_loop(node):
            statements += _Points(node, f"rank_{number}", ranks).rewritten()
        else:
            statements.append(node)
    return L.StatementList(statements)


@dataclass
class _Points:
    """One loop over quadrature points.

    Args:
        node: The loop.
        prefix: Of the names of its temporaries.
        ranks: Tables that have a decomposition.
    """

    node: Any
    prefix: str
    ranks: dict[str, LowRank]
    before: list[Any] = field(default_factory=list)
    after: list[Any] = field(default_factory=list)
    known: dict[str, list[Any]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def rewritten(self) -> list[Any]:
        """What takes the place of the loop."""
        body = list(self._body(self.node.body))
        return [*self.before, L.ForRange(self.node.index, self.node.begin, self.node.end, body), *self.after]

    def _body(self, body: Any) -> Iterator[Any]:
        for node in flat(body):
            if isinstance(node, L.Section):
                yield from as_section(node, list(self._body(L.StatementList(node.statements))))
            elif isinstance(node, L.ForRange) and isinstance(node.index, L.Symbol):
                yield from self._loop(node)
            else:
                yield node

    def _loop(self, node: Any) -> Iterator[Any]:
        """A loop over dofs: statements whose table has a decomposition leave it."""
        kept = []
        for statement in flat(node.body):
            replaced = self._statement(statement, node.index)
            if replaced is None:
                kept.append(statement)
            else:
                yield from replaced
        if kept:
            yield L.ForRange(node.index, node.begin, node.end, kept)

    def _statement(self, statement: Any, index: Any) -> list[Any] | None:
        inner = getattr(statement, "expr", None)
        if not isinstance(inner, L.AssignAdd):
            return None
        factors = operands(inner.rhs)
        table = next((x for x in factors if isinstance(x, L.ArrayAccess) and x.array.name in self.ranks), None)
        if table is None or names(table.indices[3]) != {index.name} or names(table.indices[2]) != {self.node.index.name}:
            return None
        rest = [x for x in factors if x is not table]
        if isinstance(inner.lhs, L.Symbol):
            return self._value(inner.lhs, table, rest, index)
        if index.name in set().union(*map(names, rest)):
            return None
        return self._test(inner.lhs, table, rest, index)

    def _value(self, target: Any, table: Any, rest: list[Any], index: Any) -> list[Any]:
        """w_d += w_i T_qi becomes w_d += (C w)_k T_q,p(k)."""
        found = self.ranks[table.array.name]
        key = f"{table.array.name} of {' '.join(map(text, rest))}"
        if key not in self.known:
            self.known[key] = [self._symbol() for _ in found.pivots]
            for symbol, row in zip(self.known[key], found.weights, strict=True):
                terms = [
                    product([L.LiteralFloat(float(c)), *(at(x, index.name, i) for x in rest)])
                    for i, c in enumerate(row)
                    if c != 0
                ]
                self.before.append(L.VariableDecl(symbol, L.Sum(terms)))
        return [L.AssignAdd(target, L.Product([y, x])) for y, x in zip(self.known[key], self._columns(table), strict=True)]

    def _test(self, target: Any, table: Any, rest: list[Any], index: Any) -> list[Any]:
        """A_i += f T_qi becomes s_k += f T_q,p(k), and A_i += sum_k s_k C_ki after the loop."""
        found = self.ranks[table.array.name]
        key = f"sums of {table.array.name} with {' '.join(map(text, rest))}"
        new = []
        if key not in self.known:
            self.known[key] = [self._symbol() for _ in found.pivots]
            self.before += [L.VariableDecl(symbol, 0.0) for symbol in self.known[key]]
            new = [
                L.AssignAdd(symbol, product([*rest, x])) for symbol, x in zip(self.known[key], self._columns(table), strict=True)
            ]
        for i in range(found.weights.shape[1]):
            terms = [
                L.Product([L.LiteralFloat(float(row[i])), symbol])
                for symbol, row in zip(self.known[key], found.weights, strict=True)
                if row[i] != 0
            ]
            if terms:
                self.after.append(L.AssignAdd(at(target, index.name, i), L.Sum(terms)))
        return new

    def _columns(self, table: Any) -> list[Any]:
        return [L.ArrayAccess(table.array, (*table.indices[:3], L.LiteralInt(k))) for k in self.ranks[table.array.name].pivots]

    def _symbol(self) -> Any:
        return L.Symbol(f"{self.prefix}_{next(self.numbers)}", dtype=L.DataType.SCALAR)


def at(node: Any, name: str, value: int) -> Any:
    """An array access, or an expression of indices, with a number in place of a loop's index."""
    if isinstance(node, L.Symbol):
        return L.LiteralInt(value) if node.name == name else node
    if isinstance(node, L.ArrayAccess):
        return L.ArrayAccess(node.array, tuple(at(i, name, value) for i in node.indices))
    if isinstance(node, L.MultiIndex):
        return at(node.global_index, name, value)
    if isinstance(node, L.NaryOp):
        return type(node)([at(x, name, value) for x in node.args])
    if isinstance(node, L.BinOp):
        return type(node)(at(node.lhs, name, value), at(node.rhs, name, value))
    if list(children(node)):
        raise NotImplementedError(f"{type(node).__name__} in an index")
    return node
