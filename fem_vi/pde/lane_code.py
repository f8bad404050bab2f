"""FFCx's code trees as C in which what depends on a sample is a vector with one lane for each sample.

FFCx describes the body of `tabulate_tensor` by LNodes: declarations, loops, assignments, expressions. Whatever depends on a
coefficient or Constant, directly or through temporaries, becomes a vector (`vec`), a condition on it a mask. Tables, weights and
geometry, which all samples share, stay scalars.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ffcx.codegeneration.lnodes as L
import numpy as np

from fem_vi.errors import UnsupportedForm
from fem_vi.pde.lane_factors import without_invariants
from fem_vi.pde.lane_rank import with_fewer_columns
from fem_vi.pde.lane_tree import is_scope, names, walk

_UNARY = {
    "sqrt": "sqrt", "cos": "cos", "sin": "sin", "tan": "tan", "acos": "acos", "asin": "asin", "atan": "atan", "cosh": "cosh",
    "sinh": "sinh", "tanh": "tanh", "exp": "exp", "ln": "log", "erf": "erf", "abs": "fabs",
}  # fmt: skip
_BINARY = {"atan_2": "atan2", "atan2": "atan2", "power": "pow", "min_value": "fmin", "max_value": "fmax"}
_BESSEL = {"bessel_j": "jn", "bessel_y": "yn"}
_CONDITIONS = (L.EQ, L.NE, L.LT, L.LE, L.GT, L.GE, L.And, L.Or, L.Not)
_LARGEST_POWER = 8  # by products; the error of each is half a unit in the last place
_LONGEST_UNROLLED = 10  # iterations: all dofs of P2 on tetrahedra
_MOST_INNER = 64  # iterations of two loops, one inside the other: element matrices of trilinear functions
_MOST_UNROLLED = 1200  # statements of all iterations that the C compiler is asked to unroll


def lane_symbols(tree: Any, batched: frozenset[str]) -> set[str]:
    """The names of all variables that depend on some of them.

    Args:
        tree: Body of a function.
        batched: Names that depend on the sample.
    """
    flows: list[tuple[str, set[str]]] = []
    for node in walk(tree):
        if isinstance(node, L.VariableDecl) and node.value is not None:
            flows.append((node.symbol.name, names(node.value)))
        elif isinstance(node, L.AssignOp):
            flows.append((_target(node.lhs), names(node.rhs)))
    lanes = set(batched)
    while True:
        found = {target for target, sources in flows if target not in lanes and not sources.isdisjoint(lanes)}
        if not found:
            return lanes
        lanes |= found


def _target(node: Any) -> str:
    return str((node.array if isinstance(node, L.ArrayAccess) else node).name)


class LaneFormatter:
    """C for one function body.

    Args:
        tree: The body.
        batched: Names of those of its arguments that depend on the sample.

    Attributes:
        functions: Names of the C functions that are used on lanes.
    """

    def __init__(self, tree: Any, batched: frozenset[str]) -> None:
        self._tree = with_fewer_columns(without_invariants(tree, lane_symbols(tree, batched)))
        self._lanes = lane_symbols(self._tree, batched)
        self._tables: dict[str, np.ndarray[Any, Any]] = {}
        self._indices: dict[str, int] = {}  # of the loops that are being unrolled
        self._num_repeated = 0  # statements that the C compiler adds where it unrolls loops
        self.functions: set[str] = set()

    def body(self) -> str:
        """The statements of the body.

        Raises:
            UnsupportedForm: Naming a node that has no translation.
        """
        return self._statement(self._tree)

    def _is_lane(self, node: Any) -> bool:
        return any(isinstance(below, L.Symbol) and below.name in self._lanes for below in walk(node))

    def _statement(self, s: Any) -> str:
        if isinstance(s, L.Section):
            body = "".join(map(self._statement, s.statements))
            return "".join(map(self._statement, s.declarations)) + (f"{{\n{body}}}\n" if is_scope(s) else body)
        if isinstance(s, L.StatementList):
            return "".join(self._statement(x) for x in s.statements)
        if isinstance(s, L.Comment):
            return ""
        if isinstance(s, L.ArrayDecl):
            return self._array(s)
        if isinstance(s, L.VariableDecl):
            return self._variable(s)
        if isinstance(s, L.ForRange):
            return self._for(s)
        if isinstance(s, L.AssignOp):
            if isinstance(s, L.AssignAdd) and self._known(s.rhs) == 0:
                return ""
            value = self._lane(s.rhs) if _target(s.lhs) in self._lanes else self._scalar(s.rhs)
            return f"{self._scalar(s.lhs)} {s.op} {value};\n"
        if isinstance(s, L.Statement):
            return self._statement(s.expr)
        raise UnsupportedForm(f"CompiledKernel does not know FFCx's {type(s).__name__}; AssembledKernel takes the form.")

    def _for(self, s: Any) -> str:
        """A loop; a short one unrolled, so that zeros and ones of the tables drop out of it.

        Coefficients are finite, and an integrand that is not reaches the dofs whose table entries are not zero: no value that is
        not finite is lost.
        """
        begin, end = self._known(s.begin), self._known(s.end)
        if (
            not isinstance(s.index, L.Symbol)
            or begin is None
            or end is None
            or end - begin > _LONGEST_UNROLLED
            or (end - begin) * self._num_inner(s.body) > _MOST_INNER
            or _declares(s.body)
        ):
            name = self._scalar(s.index)
            head = f"for (int {name} = {self._scalar(s.begin)}; {name} < {self._scalar(s.end)}; ++{name})"
            others, self._num_repeated = self._num_repeated, 0
            body = self._statement(s.body)
            count = 0 if begin is None or end is None else int(end - begin)
            size = body.count(";") + self._num_repeated
            unrolled = count > 1 and count * size <= _MOST_UNROLLED
            pragma = f"#pragma GCC unroll {count}\n" if unrolled else ""
            self._num_repeated += others + (count - 1) * size * unrolled
            return f"{pragma}{head} {{\n{body}}}\n"
        parts = []
        for i in range(int(begin), int(end)):
            self._indices[s.index.name] = i
            parts.append(self._statement(s.body))
        del self._indices[s.index.name]
        return "".join(parts)

    def _num_inner(self, body: Any) -> float:
        """Iterations of the longest loop inside a loop."""
        loops = [below for below in walk(body) if isinstance(below, L.ForRange)]
        return max(((self._known(loop.end) or 0) - (self._known(loop.begin) or 0) for loop in loops), default=1)

    def _known(self, node: Any) -> float | int | None:
        """The value of an expression, where it is the same for all cells and points."""
        if isinstance(node, L.LiteralFloat | L.LiteralInt):
            return node.value if isinstance(node.value, float) else int(node.value)
        if isinstance(node, L.Symbol):
            return self._indices.get(node.name)
        if isinstance(node, L.MultiIndex):
            return self._known(node.global_index)
        if isinstance(node, L.ArrayAccess):
            table = self._tables.get(_target(node))
            if table is None:
                return None
            indices = [self._known(i) for i in node.indices]
            entries = np.asarray(table[tuple(slice(None) if i is None else int(i) for i in indices)])
            return entries.flat[0].item() if np.all(entries == entries.flat[0]) else None
        if isinstance(node, L.Sum | L.Product | L.Add | L.Mul):
            values = [self._known(x) for x in _terms(node)]
            if isinstance(node, L.Product | L.Mul) and 0 in values:
                return 0
            if any(value is None for value in values):
                return None
            return sum(values) if isinstance(node, L.Sum | L.Add) else math.prod(values)  # type: ignore[arg-type]
        return None

    def _product(self, node: Any, operand: Callable[[Any], str]) -> str:
        """Factors without those that are one, or a sign."""
        factors, sign = [], 1
        for x in _terms(node):
            value = self._known(x)
            sign = -sign if value == -1 else sign
            if value is None or abs(value) != 1:
                factors.append(x)
        text = " * ".join(operand(x) for x in factors)
        if len(factors) == 1 and sign < 0:
            return f"-{text}"
        return f"-({text})" if sign < 0 else text

    def _array(self, s: Any) -> str:
        name, dims = s.symbol.name, "".join(f"[{n}]" for n in s.sizes)
        kind = "vec" if name in self._lanes else "double"
        if s.values is None:
            return f"{kind} {name}{dims};\n"
        values = np.asarray(s.values)
        if s.const and name not in self._lanes:
            kind = "int" if values.dtype.kind in "iub" else "double"
            self._tables[name] = values
            return f"static const {kind} {name}{dims} = {_initialiser(values)};\n"
        if np.any(values):
            raise UnsupportedForm("CompiledKernel does not know FFCx's batched tables; AssembledKernel takes the form.")
        return f"{kind} {name}{dims} = {{}};\n"

    def _variable(self, s: Any) -> str:
        name, is_condition = s.symbol.name, s.symbol.dtype == L.DataType.BOOL
        if name in self._lanes:
            value = self._mask(s.value) if is_condition else self._lane(s.value)
            return f"{'mask' if is_condition else 'vec'} {name} = {value};\n"
        kind = "int" if is_condition or s.symbol.dtype == L.DataType.INT else "double"
        return f"{kind} {name} = {self._scalar(s.value)};\n"

    def _lane(self, node: Any) -> str:
        """An expression whose value is a vector."""
        if not self._is_lane(node):
            return f"spread({self._scalar(node)})"
        return self._expression(node)

    def _mask(self, node: Any) -> str:
        """A condition whose value is a mask."""
        return self._expression(node) if self._is_lane(node) else f"spread_mask({self._scalar(node)})"

    def _scalar(self, node: Any) -> str:
        """An expression as it is, whatever its type."""
        return self._expression(node)

    def _operand(self, node: Any) -> str:
        """An operand of an arithmetic operation on vectors; C spreads scalars of the same type."""
        if isinstance(node, L.LiteralInt):
            return f"{int(node.value)}.0"
        text = self._expression(node)
        return text if isinstance(node, L.LExprTerminal | L.ArrayAccess | L.MathFunction) else f"({text})"

    def _expression(self, node: Any) -> str:
        lane = self._is_lane(node)
        if isinstance(node, L.Symbol):
            return str(self._indices.get(node.name, node.name))
        if isinstance(node, L.LiteralFloat | L.LiteralInt):
            return _number(node.value)
        if isinstance(node, L.MultiIndex):
            return self._expression(node.global_index)
        if not lane and (known := self._known(node)) is not None:
            return _number(known)
        if isinstance(node, L.ArrayAccess):
            return self._expression(node.array) + "".join(f"[{self._expression(i)}]" for i in node.indices)
        if isinstance(node, L.MathFunction):
            return self._function(node, lane)
        if isinstance(node, L.Conditional):
            return self._conditional(node, lane)
        if isinstance(node, _CONDITIONS):
            return self._condition(node, lane)
        operand = self._operand if lane else self._grouped
        if isinstance(node, L.Neg):
            return f"-{operand(node.arg)}"
        if isinstance(node, L.Product | L.Mul) and any(abs(self._known(x) or 0) == 1 for x in _terms(node)):
            return self._product(node, operand)
        if isinstance(node, L.NaryOp):
            return f" {node.op} ".join(operand(x) for x in node.args)
        if isinstance(node, L.Add | L.Sub | L.Mul | L.Div):
            return f"{operand(node.lhs)} {node.op} {operand(node.rhs)}"
        raise UnsupportedForm(f"CompiledKernel does not know FFCx's {type(node).__name__}; AssembledKernel takes the form.")

    def _grouped(self, node: Any) -> str:
        text = self._expression(node)
        return text if isinstance(node, L.LExprTerminal | L.ArrayAccess | L.MathFunction) and text[0] != "-" else f"({text})"

    def _conditional(self, node: Any, lane: bool) -> str:
        if not lane:
            return f"{self._grouped(node.condition)} ? {self._grouped(node.true)} : {self._grouped(node.false)}"
        return f"choose({self._mask(node.condition)}, {self._lane(node.true)}, {self._lane(node.false)})"

    def _condition(self, node: Any, lane: bool) -> str:
        if not lane:
            if isinstance(node, L.Not):
                return f"!{self._grouped(node.arg)}"
            return f"{self._grouped(node.lhs)} {node.op} {self._grouped(node.rhs)}"
        if isinstance(node, L.Not):
            return f"~({self._mask(node.arg)})"
        if isinstance(node, L.And | L.Or):
            return f"({self._mask(node.lhs)}) {node.op[0]} ({self._mask(node.rhs)})"
        return f"({self._lane(node.lhs)}) {node.op} ({self._lane(node.rhs)})"

    def _function(self, node: Any, lane: bool) -> str:
        name = _UNARY.get(node.function) or _BINARY.get(node.function) or _BESSEL.get(node.function)
        if name is None:
            raise UnsupportedForm(f"CompiledKernel does not know UFL's function {node.function}; AssembledKernel takes the form.")
        if not lane:
            return f"{name}({', '.join(self._expression(x) for x in node.args)})"
        if name == "pow" and not self._is_lane(node.args[1]) and (known := self._power(*node.args)):
            return known
        self.functions.add(name)
        if name in _BESSEL.values():
            return f"lanes_{name}({self._scalar(node.args[0])}, {self._lane(node.args[1])})"
        return f"lanes_{name}({', '.join(self._lane(x) for x in node.args)})"

    def _power(self, base: Any, exponent: Any) -> str | None:
        """A power with a small integer, or a half, for its exponent, without a call of pow."""
        if not isinstance(exponent, L.LiteralFloat | L.LiteralInt):
            return None
        value = float(exponent.value)
        size = abs(value)
        if size == 0.5:
            self.functions.add("sqrt")
            root = f"lanes_sqrt({self._lane(base)})"
        elif size.is_integer() and 1 <= size <= _LARGEST_POWER:
            root = f"power_{int(size)}({self._lane(base)})"
        else:
            return None
        return root if value > 0 else f"(1.0 / {root})"


def _terms(node: Any) -> list[Any]:
    """The operands of a sum or product."""
    return list(node.args) if isinstance(node, L.NaryOp) else [node.lhs, node.rhs]


def _declares(node: Any) -> bool:
    return any(isinstance(below, L.Declaration) for below in walk(node))


def _number(value: Any) -> str:
    if isinstance(value, float):
        text = repr(float(value))  # numpy's numbers have another repr
        return text if value >= 0 else f"({text})"
    return str(int(value)) if value >= 0 else f"({int(value)})"


def _initialiser(values: np.ndarray[Any, Any]) -> str:
    if values.ndim == 0:
        return repr(values.item())
    return "{" + ", ".join(_initialiser(v) for v in values) + "}"
