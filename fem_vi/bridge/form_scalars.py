"""UFL integrands as scalars: tensors fall apart into components, and what the test function multiplies is collected.

A form is linear in its test function v. Every integrand is thus a sum of a reference component of v or of its derivative, times a
scalar that does not know v; those scalars are what is computed at the quadrature points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ufl import classes

from fem_vi.bridge.scalar_graph import ScalarGraph
from fem_vi.bridge.ufl_torch import OPERATION_NAMES
from fem_vi.errors import UnsupportedForm

Component = tuple[int, ...]


@dataclass(frozen=True)
class Terminal:
    """A component of a terminal, or of its derivative in reference coordinates.

    Attributes:
        symbol: The terminal.
        component: Its component.
        directions: What it is differentiated by, sorted.
        side: 0, or 1 on the second side of an interior facet.
    """

    symbol: Any
    component: Component
    directions: Component
    side: int


class Leaves(Protocol):
    """Where terminals get their nodes."""

    def node(self, terminal: Terminal) -> int:
        """A terminal other than the test function."""

    def test(self, terminal: Terminal) -> TestKey:
        """What stands for a component of the test function, or of its derivative."""


TestKey = tuple[int, int, Component]
"""Side, reference component, directions."""

Value = int | dict[TestKey, int]
"""A scalar without the test function, or the factors of its components."""


class Scalars:
    """The scalars of one integrand.

    Args:
        graph: Where nodes go.
        leaves: Where terminals get theirs.
    """

    def __init__(self, graph: ScalarGraph, leaves: Leaves) -> None:
        self._graph = graph
        self._leaves = leaves
        self._memo: dict[Any, Value] = {}

    def factors(self, integrand: Any) -> dict[TestKey, int]:
        """What each component of the test function, or of its derivative, is multiplied by.

        Raises:
            UnsupportedForm: Naming a node that has no value.
        """
        value = self._value(integrand, (), {})
        if isinstance(value, dict):
            return {key: k for key, k in value.items() if k != self._graph.zero}
        if value == self._graph.zero:
            return {}
        raise UnsupportedForm("an integral of the form does not contain the test function.")

    def _value(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        """A component of an expression, where its free indices have values."""
        key = expr, component, tuple(free[index] for index in getattr(expr, "ufl_free_indices", ()))
        if key not in self._memo:
            self._memo[key] = self._compute(expr, component, free)
        return self._memo[key]

    def _compute(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        for kind, rule in _RULES.items():
            if isinstance(expr, kind):
                return rule(self, expr, component, free)
        name = OPERATION_NAMES.get(type(expr))
        if name is None:
            raise _unsupported(expr)
        operands = [self._without_test(operand, component, free, expr) for operand in expr.ufl_operands]
        return self._graph.apply(name, *operands)

    def _without_test(self, expr: Any, component: Component, free: Mapping[int, int], node: Any) -> int:
        value = self._value(expr, component, free)
        if isinstance(value, dict):
            raise UnsupportedForm(f"the form is not linear in its test function, which is an operand of {type(node).__name__}.")
        return value

    def _indexed(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        operand, indices = expr.ufl_operands
        return self._value(operand, tuple(_number(index, free) for index in indices), free)

    def _component_tensor(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        operand, indices = expr.ufl_operands
        bound = dict(zip((index.count() for index in indices), component, strict=True))
        return self._value(operand, (), {**free, **bound})

    def _list_tensor(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        return self._value(expr.ufl_operands[component[0]], component[1:], free)

    def _index_sum(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        operand, (index,) = expr.ufl_operands
        return self._sum(self._value(operand, component, {**free, index.count(): k}) for k in range(expr.dimension()))

    def _add(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        return self._sum(self._value(operand, component, free) for operand in expr.ufl_operands)

    def _sum(self, values: Any) -> Value:
        plain: list[int] = []
        linear: dict[TestKey, list[int]] = {}
        for value in values:
            if isinstance(value, dict):
                for key, k in value.items():
                    linear.setdefault(key, []).append(k)
            else:
                plain.append(value)
        if not linear:
            return self._graph.sum(plain)
        if any(k != self._graph.zero for k in plain):
            raise UnsupportedForm("the form is not linear in its test function: a sum has a term without it.")
        return {key: self._graph.sum(terms) for key, terms in linear.items()}

    def _product(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        a, b = (self._value(operand, (), free) for operand in expr.ufl_operands)
        if isinstance(a, dict) and isinstance(b, dict):
            raise UnsupportedForm("the form is not linear in its test function: a product has it in both factors.")
        if isinstance(b, dict):
            a, b = b, a
        return self._scaled(a, lambda k: self._graph.product(k, b))  # type: ignore[arg-type]

    def _division(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        over = self._without_test(expr.ufl_operands[1], (), free, expr)
        return self._scaled(self._value(expr.ufl_operands[0], (), free), lambda k: self._graph.quotient(k, over))

    def _power(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        base, exponent = (self._without_test(operand, (), free, expr) for operand in expr.ufl_operands)
        return self._graph.power(base, exponent)

    def _scaled(self, value: Value, factor: Callable[[int], int]) -> Value:
        return {key: factor(k) for key, k in value.items()} if isinstance(value, dict) else factor(value)

    def _conditional(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        condition, yes, no = expr.ufl_operands
        when = self._without_test(condition, (), free, expr)
        a, b = self._value(yes, component, free), self._value(no, component, free)
        if not isinstance(a, dict) and not isinstance(b, dict):
            return self._graph.choice(when, a, b)
        if any(not isinstance(x, dict) and x != self._graph.zero for x in (a, b)):
            raise UnsupportedForm(
                "the form is not linear in its test function: one branch of a Conditional has it, the other not."
            )
        first, second = (x if isinstance(x, dict) else {} for x in (a, b))
        zero = self._graph.zero
        return {
            key: self._graph.choice(when, first.get(key, zero), second.get(key, zero)) for key in dict.fromkeys([*first, *second])
        }

    def _variable(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        return self._value(expr.ufl_operands[0], component, free)

    def _zero(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        return self._graph.zero

    def _identity(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        return self._graph.one if component[0] == component[1] else self._graph.zero

    def _permutation(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        pairs = [(a, b) for k, a in enumerate(component) for b in component[k + 1 :]]
        if any(a == b for a, b in pairs):
            return self._graph.zero
        return self._graph.number(-1.0 if sum(a > b for a, b in pairs) % 2 else 1.0)

    def _number(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        return self._graph.number(float(expr))

    def _weight(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        return self._graph.one  # every integrand is proportional to it; it is put into the tables

    def _terminal(self, expr: Any, component: Component, free: Mapping[int, int]) -> Value:
        terminal = _stripped(expr, component)
        if isinstance(terminal.symbol, classes.Argument):
            return {self._leaves.test(terminal): self._graph.one}
        return self._leaves.node(terminal)


def _number(index: Any, free: Mapping[int, int]) -> int:
    return int(index) if isinstance(index, classes.FixedIndex) else free[index.count()]


def _stripped(expr: Any, component: Component) -> Terminal:
    """A terminal without restrictions and derivatives, and these."""
    node, directions, side = expr, [], 0
    while not node._ufl_is_terminal_:
        if isinstance(node, classes.ReferenceGrad):
            directions.append(component[-1])
            component = component[:-1]
        elif isinstance(node, classes.NegativeRestricted):
            side = 1
        elif not isinstance(node, classes.PositiveRestricted | classes.ReferenceValue):
            raise _unsupported(node)
        node = node.ufl_operands[0]
    return Terminal(node, component, tuple(sorted(directions)), side)


def _unsupported(node: Any) -> UnsupportedForm:
    return UnsupportedForm(
        f"TorchKernel has no torch operation for the UFL node {type(node).__name__} ({node}). Use AssembledKernel()."
    )


_Rule = Callable[[Scalars, Any, Component, Mapping[int, int]], Value]
_RULES: dict[Any, _Rule] = {
    classes.Indexed: Scalars._indexed,
    classes.ComponentTensor: Scalars._component_tensor,
    classes.ListTensor: Scalars._list_tensor,
    classes.IndexSum: Scalars._index_sum,
    classes.Sum: Scalars._add,
    classes.Product: Scalars._product,
    classes.Division: Scalars._division,
    classes.Power: Scalars._power,
    classes.Conditional: Scalars._conditional,
    classes.Variable: Scalars._variable,
    classes.Zero: Scalars._zero,
    classes.Identity: Scalars._identity,
    classes.PermutationSymbol: Scalars._permutation,
    classes.RealValue: Scalars._number,
    classes.QuadratureWeight: Scalars._weight,
    (classes.Restricted, classes.ReferenceGrad, classes.ReferenceValue, classes.Terminal): Scalars._terminal,
}
