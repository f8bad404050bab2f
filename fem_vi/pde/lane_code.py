"""FFCx's code trees as C in which what depends on a sample is a vector with one lane for each sample.

FFCx describes the body of `tabulate_tensor` by LNodes: declarations, loops, assignments, expressions. Whatever depends on a
coefficient or Constant, directly or through temporaries, becomes a vector (`vec`), a condition on it a mask. Tables, weights and
geometry, which all samples share, stay scalars.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ffcx.codegeneration.lnodes as L
import numpy as np

from fem_vi.errors import UnsupportedForm

_UNARY = {
    "sqrt": "sqrt", "cos": "cos", "sin": "sin", "tan": "tan", "acos": "acos", "asin": "asin", "atan": "atan", "cosh": "cosh",
    "sinh": "sinh", "tanh": "tanh", "exp": "exp", "ln": "log", "erf": "erf", "abs": "fabs",
}  # fmt: skip
_BINARY = {"atan_2": "atan2", "power": "pow", "min_value": "fmin", "max_value": "fmax"}
_BESSEL = {"bessel_j": "jn", "bessel_y": "yn"}
_CONDITIONS = (L.EQ, L.NE, L.LT, L.LE, L.GT, L.GE, L.And, L.Or, L.Not)
_LARGEST_POWER = 8  # by products; the error of each is half a unit in the last place


def children(node: Any) -> Iterator[Any]:
    """The nodes below one node of an LNodes tree."""
    for name in ("declarations", "statements", "args", "indices"):
        yield from getattr(node, name, ())
    for name in ("value", "expr", "lhs", "rhs", "arg", "condition", "true", "false", "body", "array", "global_index"):
        below = getattr(node, name, None)
        if isinstance(below, L.LNode):
            yield below


def walk(node: Any) -> Iterator[Any]:
    """A node and all nodes below it."""
    yield node
    for below in children(node):
        yield from walk(below)


def lane_symbols(tree: Any, batched: frozenset[str]) -> set[str]:
    """The names of all variables that depend on some of them.

    Args:
        tree: Body of a function.
        batched: Names that depend on the sample.
    """
    flows: list[tuple[str, set[str]]] = []
    for node in walk(tree):
        if isinstance(node, L.VariableDecl) and node.value is not None:
            flows.append((node.symbol.name, _names(node.value)))
        elif isinstance(node, L.AssignOp):
            flows.append((_target(node.lhs), _names(node.rhs)))
    lanes = set(batched)
    while True:
        found = {target for target, sources in flows if target not in lanes and not sources.isdisjoint(lanes)}
        if not found:
            return lanes
        lanes |= found


def _names(node: Any) -> set[str]:
    return {below.name for below in walk(node) if isinstance(below, L.Symbol)}


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
        self._tree = tree
        self._lanes = lane_symbols(tree, batched)
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
            inner = "".join(self._statement(x) for x in s.statements)
            return "".join(self._statement(x) for x in s.declarations) + (f"{{\n{inner}}}\n" if inner else "")
        if isinstance(s, L.StatementList):
            return "".join(self._statement(x) for x in s.statements)
        if isinstance(s, L.Comment):
            return ""
        if isinstance(s, L.ArrayDecl):
            return self._array(s)
        if isinstance(s, L.VariableDecl):
            return self._variable(s)
        if isinstance(s, L.ForRange):
            i = self._scalar(s.index)
            head = f"for (int {i} = {self._scalar(s.begin)}; {i} < {self._scalar(s.end)}; ++{i})"
            return f"{head} {{\n{self._statement(s.body)}}}\n"
        if isinstance(s, L.AssignOp):
            value = self._lane(s.rhs) if _target(s.lhs) in self._lanes else self._scalar(s.rhs)
            return f"{self._scalar(s.lhs)} {s.op} {value};\n"
        if isinstance(s, L.Statement):
            return self._statement(s.expr)
        raise UnsupportedForm(f"CompiledKernel does not know FFCx's {type(s).__name__}; AssembledKernel takes the form.")

    def _array(self, s: Any) -> str:
        name, dims = s.symbol.name, "".join(f"[{n}]" for n in s.sizes)
        kind = "vec" if name in self._lanes else "double"
        if s.values is None:
            return f"{kind} {name}{dims};\n"
        values = np.asarray(s.values)
        if name not in self._lanes:
            kind = "int" if values.dtype.kind in "iub" else "double"
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
            return str(node.name)
        if isinstance(node, L.LiteralFloat | L.LiteralInt):
            return _number(node.value)
        if isinstance(node, L.MultiIndex):
            return self._expression(node.global_index)
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


def _number(value: Any) -> str:
    if isinstance(value, float):
        return repr(value) if value >= 0 else f"({value!r})"
    return str(int(value)) if value >= 0 else f"({int(value)})"


def _initialiser(values: np.ndarray[Any, Any]) -> str:
    if values.ndim == 0:
        return repr(values.item())
    return "{" + ", ".join(_initialiser(v) for v in values) + "}"
