"""An integrand as a graph of scalars, each once, in an order of multiplication that is cheap.

A node is a number, a leaf or an operation on nodes. What matters for the cost of an operation is how its result varies: from
point to point or not, and with the inputs or not. What does not vary with the inputs is *fixed*: it is computed once. Products
are sorted by that, so that factors which are small are multiplied before those which are large, and a sum over quadrature
points is drawn past all that is the same at every point.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

_HARMLESS = {"reciprocal": 1.0, "sqrt": 1.0, "log": 1.0, "power": 1.0, "pow": 1.0, "atan2": 1.0}
_HARMLESS |= {"exp": 0.0, "sinh": 0.0, "cosh": 0.0, "tan": 0.0, "acos": 0.0, "asin": 0.0}
"""Operations whose values or slopes can be infinite, and an operand where they are not."""


@dataclass(frozen=True)
class Node:
    """A scalar.

    Attributes:
        op: "number", "leaf", "integral" (the weighted sum over points) or the name of an operation.
        args: Operands.
        data: The number, or what the leaf is, or the exponent of "power".
        fixed: Whether it is the same whatever the inputs.
        points: Whether it differs between quadrature points.
    """

    op: str
    args: tuple[int, ...]
    data: Hashable
    fixed: bool
    points: bool


class ScalarGraph:
    """Nodes by number; equal ones are the same.

    Args:
        total: The sum of the quadrature weights.

    Attributes:
        nodes: Operands come before what uses them.
    """

    def __init__(self, total: float) -> None:
        self.nodes: list[Node] = []
        self._known: dict[tuple[str, tuple[int, ...], Hashable], int] = {}
        self._total = total
        self.zero, self.one = self.number(0.0), self.number(1.0)

    def _add_node(self, op: str, args: tuple[int, ...], data: Hashable, *, fixed: bool, points: bool) -> int:
        key = (op, args, data)
        if key not in self._known:
            self._known[key] = len(self.nodes)
            self.nodes.append(Node(op, args, data, fixed, points))
        return self._known[key]

    def leaf(self, data: Hashable, *, fixed: bool, points: bool) -> int:
        """A value that comes from outside."""
        return self._add_node("leaf", (), data, fixed=fixed, points=points)

    def number(self, value: float) -> int:
        """A constant."""
        return self._add_node("number", (), value, fixed=True, points=False)

    def value(self, k: int) -> float | None:
        """The value of a number; None for other nodes."""
        node = self.nodes[k]
        return float(node.data) if node.op == "number" else None  # type: ignore[arg-type]

    def apply(self, op: str, *args: int, data: Hashable = None) -> int:
        """An operation without rules of its own."""
        fixed = all(self.nodes[k].fixed for k in args)
        return self._add_node(op, args, data, fixed=fixed, points=any(self.nodes[k].points for k in args))

    def sum(self, terms: Iterable[int]) -> int:
        """The sum of nodes, numbers first."""
        constant, rest = 0.0, []
        for term in terms:
            value = self.value(term)
            if value is None:
                rest.append(term)
            else:
                constant += value
        if constant != 0.0 or not rest:
            rest.append(self.number(constant))
        rest.sort(key=self._cost)
        total = rest[0]
        for term in rest[1:]:
            total = self.apply("add", total, term)
        return total

    def product(self, *factors: int) -> int:
        """The product of nodes: fixed ones first, then those which are the same at all points, then the others."""
        flat = sorted(self._factors(factors), key=self._cost)
        number = math.prod(self.value(k) or 0.0 for k in flat if self.nodes[k].op == "number")
        if number == 0.0:
            return self.zero
        groups: dict[tuple[bool, bool], list[int]] = {}
        for k in flat:
            if self.nodes[k].op != "number":
                groups.setdefault((not self.nodes[k].fixed, self.nodes[k].points), []).append(k)
        fixed = groups.pop((False, False), []) + groups.pop((False, True), [])
        chains = [[self.number(number)] * (number != 1.0) + fixed, *[groups[key] for key in sorted(groups)]]
        parts = [self._chain(chain) for chain in chains if chain]
        return self._chain(parts) if parts else self.one

    def _chain(self, factors: list[int]) -> int:
        total = factors[0]
        for factor in factors[1:]:
            total = self.apply("mul", total, factor)
        return total

    def _factors(self, factors: Iterable[int]) -> Iterable[int]:
        for k in factors:
            if self.nodes[k].op == "mul":
                yield from self._factors(self.nodes[k].args)
            else:
                yield k

    def _cost(self, k: int) -> tuple[bool, bool, bool, int]:
        node = self.nodes[k]
        return node.op != "number", not node.fixed, node.points, k

    def quotient(self, a: int, b: int) -> int:
        """a / b."""
        value = self.value(b)
        if value is not None and value != 0.0:
            return self.product(self.number(1.0 / value), a)
        return self.product(a, self.apply("reciprocal", b))

    def power(self, base: int, exponent: int) -> int:
        """A power; small whole exponents are products."""
        value = self.value(exponent)
        if value is None:
            return self.apply("pow", base, exponent)
        if value in (0.0, 1.0, 2.0, 3.0):
            return self.product(*[base] * int(value))
        if value == -1.0:
            return self.quotient(self.one, base)
        return self.apply("sqrt", base) if value == 0.5 else self.apply("power", base, data=value)

    def choice(self, when: int, yes: int, no: int) -> int:
        """One node or another, such that the gradient of the one that is not taken does no harm.

        Where it is infinite, zero times it is not a number: ln(x) where x > 0, zero elsewhere, has no gradient at x = 0 in
        reverse mode. Operations that can do that get a harmless operand where they are not taken.
        """
        return self.apply("where", when, self._guarded(yes, when, True, {}), self._guarded(no, when, False, {}))

    def _guarded(self, k: int, when: int, taken: bool, known: dict[int, int]) -> int:
        node = self.nodes[k]
        if not node.args or k == when:
            return k
        if k not in known:
            args = [self._guarded(arg, when, taken, known) for arg in node.args]
            if node.op in _HARMLESS:
                safe = self.number(_HARMLESS[node.op])
                position = 1 if node.op == "atan2" else 0
                args[position] = self.apply("where", when, *((args[position], safe) if taken else (safe, args[position])))
            changed = tuple(args) != node.args
            known[k] = self.apply(node.op, *args, data=node.data) if changed else k
        return known[k]

    def integral(self, k: int) -> int:
        """The weighted sum over the quadrature points."""
        if not self.nodes[k].points:
            return self.product(self.number(self._total), k)
        factors = list(self._factors([k]))
        outside = [f for f in factors if not self.nodes[f].points]
        inside = self.product(*[f for f in factors if self.nodes[f].points])
        if self.nodes[inside].op == "add":
            terms = list(self._terms(inside))
            if any(self._has_outer_factor(term) for term in terms):
                return self.product(*outside, self.sum(self.integral(term) for term in terms))
        return self.product(*outside, self.apply_integral(inside))

    def apply_integral(self, k: int) -> int:
        """The sum over points of a node that varies in all its factors."""
        return self._add_node("integral", (k,), None, fixed=self.nodes[k].fixed, points=False)

    def _terms(self, k: int) -> Iterable[int]:
        if self.nodes[k].op == "add":
            for term in self.nodes[k].args:
                yield from self._terms(term)
        else:
            yield k

    def _has_outer_factor(self, k: int) -> bool:
        return any(not self.nodes[f].points for f in self._factors([k]))

    def reachable(self, roots: Iterable[int]) -> list[int]:
        """The nodes that the roots need and that vary with the inputs, in an order in which they can be computed."""
        order: dict[int, None] = {}
        stack = [(k, False) for k in reversed(list(roots))]
        while stack:
            k, ready = stack.pop()
            if k in order or self.nodes[k].fixed:
                continue
            if ready:
                order[k] = None
            else:
                stack.append((k, True))
                stack.extend((arg, False) for arg in reversed(self.nodes[k].args))
        return list(order)
