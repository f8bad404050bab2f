"""Factors that do not change from point to point, taken out of FFCx's loop over quadrature points.

FFCx adds to each entry of the element tensor, point by point, a product such as

    A_i += (g . detJ . e_q . w_q) T_i(q)        g, detJ the same at all points of a cell; e_q, w_q, T_i(q) not

C may not reorder sums, so that a compiler cannot take g . detJ out. Where the table T_i does not vary either, as for gradients of
linear functions, one sum over q of e_q . w_q serves all i:

    A_i += (g . detJ . T_i) sum_q e_q . w_q
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import ffcx.codegeneration.lnodes as L

from fem_vi.pde.lane_tree import as_section, flat, is_quadrature_loop, is_tensor, names, operands, product, text, walk


def without_invariants(tree: Any, lanes: Set[str]) -> Any:
    """The same body with fewer operations for each point.

    Args:
        tree: Body of a function.
        lanes: Names of the variables that are vectors of samples.
    """
    statements: list[Any] = []
    for number, node in enumerate(flat(tree)):
        if is_quadrature_loop(node):
            statements += _Loop(node, number, lanes).rewritten()
        else:
            statements.append(node)
    return L.StatementList(statements)


class _Loop:
    """One loop over quadrature points.

    Args:
        node: The loop.
        number: Tells the names of its temporaries from those of other loops.
        lanes: Names of the variables that are vectors.
    """

    def __init__(self, node: Any, number: int, lanes: Set[str]) -> None:
        self._node = node
        self._lanes = lanes
        self._prefix = f"loop_{number}"
        self._defined: dict[str, Any] = {}
        self._varying = {node.index.name}
        for below in walk(node.body):
            if isinstance(below, L.VariableDecl):
                self._varying.add(below.symbol.name)
                self._defined[below.symbol.name] = below.value
            elif isinstance(below, L.Assign) and isinstance(below.lhs, L.Symbol):
                self._defined[below.lhs.name] = below.rhs
            elif isinstance(below, L.ForRange):
                self._varying.add(below.index.name)
            if isinstance(below, L.AssignAdd) and isinstance(below.lhs, L.Symbol):
                self._defined.pop(below.lhs.name, None)  # a sum, however it began
        self._before: dict[str, Any] = {}  # products that are the same at all points, and sums that begin with zero
        self._within: dict[str, Any] = {}  # products at a point, and sums over points
        self._factors_of: dict[str, tuple[list[Any], list[Any]]] = {}

    def rewritten(self) -> list[Any]:
        """What takes the place of the loop."""
        within, after = self._separate(self._node.body)
        if not self._within:
            return [self._node]
        first = next((k for k, node in enumerate(within) if any(map(_is_tensor_sum, walk(node)))), len(within))
        body = [*within[:first], *self._within.values(), *within[first:]]
        loop = L.ForRange(self._node.index, self._node.begin, self._node.end, body)
        return [*self._before.values(), loop, *after]

    def _separate(self, body: Any) -> tuple[list[Any], list[Any]]:
        """Statements with what is to be done at each point, and what afterwards."""
        within: list[Any] = []
        after: list[Any] = []
        for node in flat(body):
            if _is_tensor_sum(node):
                here, there = self._tensor_sum(node)
                within += here
                after += there
            elif isinstance(node, L.Section) and any(map(_is_tensor_sum, walk(node))):
                here, there = self._separate(L.StatementList(node.statements))
                within += as_section(node, here)
                after += there
            elif isinstance(node, L.ForRange) and any(map(_is_tensor_sum, walk(node))):
                for kept, parts in zip((within, after), self._separate(node.body), strict=True):
                    if parts:
                        kept.append(L.ForRange(node.index, node.begin, node.end, parts))
            else:
                within.append(node)
        return within, after

    def _tensor_sum(self, node: Any) -> tuple[list[Any], list[Any]]:
        """A_i += f . T_i, at each point or, where T_i does not vary, afterwards."""
        factors = operands(node.expr.rhs)
        f = next((x for x in factors if isinstance(x, L.Symbol)), None)
        fixed, varying = ([], []) if f is None else self._split(f)
        if not fixed or not varying:
            return [node], []
        rest = [x for x in factors if x is not f]
        if all(self._is_fixed(x) for x in rest):
            at_point = self._variable(self._within, "at_point", varying)
            whole = [self._variable(self._before, "fixed", fixed), self._sum(at_point), *rest]
            return [], [L.AssignAdd(node.expr.lhs, L.Product(whole))]
        if any(map(self._is_lane, fixed)):
            parts = [self._variable(self._before, "fixed", fixed), self._variable(self._within, "at_point", varying)]
            return [L.AssignAdd(node.expr.lhs, product([self._variable(self._within, "at_point", parts), *rest]))], []
        vectors, numbers = [x for x in varying if self._is_lane(x)], [x for x in varying if not self._is_lane(x)]
        scale = self._variable(self._within, "scale", [*fixed, *numbers])
        whole = [self._variable(self._within, "at_point", [*vectors, scale]), *rest]
        return [L.AssignAdd(node.expr.lhs, product(whole))], []

    def _is_lane(self, node: Any) -> bool:
        return not self._lanes.isdisjoint(names(node)) or any(name.startswith(self._prefix) for name in names(node))

    def _is_fixed(self, node: Any) -> bool:
        """Whether an expression has one value at all points; loops over dofs are not loops over points."""
        return self._node.index.name not in names(node) and not any(name in self._defined for name in names(node))

    def _split(self, f: Any) -> tuple[list[Any], list[Any]]:
        """The factors of a variable that are the same at all points, and those that are not."""
        if f.name not in self._factors_of:
            self._factors_of[f.name] = self._factors(self._defined.get(f.name, f))
        return self._factors_of[f.name]

    def _factors(self, node: Any) -> tuple[list[Any], list[Any]]:
        """The factors of an expression: fixed, and varying."""
        if isinstance(node, L.Symbol) and node.name in self._defined:
            fixed, varying = self._factors(self._defined[node.name])
            return (fixed, varying) if fixed and varying else ([], [node])
        if isinstance(node, L.Mul | L.Product):
            fixed, varying = [], []
            for x in operands(node):
                more_fixed, more_varying = self._factors(x)
                fixed += more_fixed
                varying += more_varying
            return fixed, varying
        if isinstance(node, L.Neg):
            fixed, varying = self._factors(node.arg)
            return [L.LiteralFloat(-1.0), *fixed], varying
        if isinstance(node, L.Div) and self._is_constant(node.rhs):
            fixed, varying = self._factors(node.lhs)
            return [*fixed, L.Div(L.LiteralFloat(1.0), node.rhs)], varying
        return ([node], []) if self._is_constant(node) else ([], [node])

    def _is_constant(self, node: Any) -> bool:
        return names(node).isdisjoint(self._varying)

    def _variable(self, where: dict[str, Any], name: str, factors: list[Any]) -> Any:
        """A variable for a product, the same for the same factors."""
        if len(factors) == 1 and isinstance(factors[0], L.Symbol):
            return factors[0]
        key = " ".join(sorted(map(text, factors)))
        if key not in where:
            dtype = L.DataType.SCALAR
            where[key] = L.VariableDecl(L.Symbol(f"{self._prefix}_{name}_{len(where)}", dtype=dtype), product(factors))
        return where[key].symbol

    def _sum(self, at_point: Any) -> Any:
        """A variable for the sum over all points."""
        key = f"sum of {at_point.name}"
        if key not in self._within:
            symbol = L.Symbol(f"{self._prefix}_sum_{len(self._before)}", dtype=L.DataType.SCALAR)
            self._before[key] = L.VariableDecl(symbol, 0.0)
            self._within[key] = L.Statement(L.AssignAdd(symbol, at_point))
        return self._before[key].symbol


def _is_tensor_sum(node: Any) -> bool:
    inner = node.expr if type(node) is L.Statement else None
    return isinstance(inner, L.AssignAdd) and is_tensor(inner.lhs)
