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
