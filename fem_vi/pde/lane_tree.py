"""FFCx's code trees, LNodes: what is below what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ffcx.codegeneration.lnodes as L


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


def names(node: Any) -> set[str]:
    """The names of all symbols of an expression."""
    return {below.name for below in walk(node) if isinstance(below, L.Symbol)}


def is_scope(section: Any) -> bool:
    """Whether the statements of a section have arrays of their own, whose names other sections use too."""
    return any(isinstance(below, L.ArrayDecl) for statement in section.statements for below in walk(statement))


def as_section(section: Any, statements: list[Any]) -> list[Any]:
    """What takes the place of a section when its statements become others."""
    if is_scope(section):
        return [L.Section(section.name, statements, section.declarations)]
    return [*section.declarations, *statements]


def flat(node: Any) -> Iterator[Any]:
    """Statements without lists of statements among them."""
    if isinstance(node, L.StatementList):
        for below in node.statements:
            yield from flat(below)
    else:
        yield node


def is_tensor(node: Any) -> bool:
    """Whether an expression is an entry of the element tensor."""
    return isinstance(node, L.ArrayAccess) and bool(node.array.name == "A")


def is_quadrature_loop(node: Any) -> bool:
    """Whether a statement is a loop over points that adds to the element tensor."""
    adds = (isinstance(below, L.AssignAdd) and is_tensor(below.lhs) for below in walk(node))
    return isinstance(node, L.ForRange) and isinstance(node.index, L.Symbol | L.MultiIndex) and any(adds)


def operands(node: Any) -> list[Any]:
    """The factors of a product, or the expression alone."""
    if isinstance(node, L.Product):
        return list(node.args)
    return [node.lhs, node.rhs] if isinstance(node, L.Mul) else [node]


def product(factors: list[Any]) -> Any:
    """The product of some factors, at least one."""
    return factors[0] if len(factors) == 1 else L.Product(factors)


def text(node: Any) -> str:
    """An expression spelled out: equal for equal expressions."""
    return " ".join([type(node).__name__, *(str(getattr(below, "name", getattr(below, "value", ""))) for below in walk(node))])
