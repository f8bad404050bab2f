"""UFL expressions as torch functions of the values of their terminals.

An expression is lowered first, so that derivatives stand on terminals only and tensor algebra is written with indices, and then
becomes a list of torch operations, once. A call runs the list: there is no UFL in it, and since every operation is torch's own,
it can be differentiated to any order, forwards and backwards, and vmapped.

The value of a UFL node with shape s and free indices i, j, ... is a tensor `(*sites, *s, dim_i, dim_j, ...)`, free indices in
UFL's order. Sites (samples, points, cells) are whatever axes the values of the terminals have in front; they broadcast.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from ufl import classes
from ufl.algorithms import expand_derivatives
from ufl.algorithms.remove_complex_nodes import remove_complex_nodes

from fem_vi.bridge.torch_program import OPERATIONS, Operation
from fem_vi.errors import UnsupportedForm


def lower(expr: Any) -> Any:
    """The same expression in real arithmetic, with tensor algebra in index notation and derivatives on terminals only.

    Raises:
        UnsupportedForm: Where UFL cannot do that.
    """
    try:
        return remove_complex_nodes(expand_derivatives(expr))
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise UnsupportedForm(f"UFL cannot expand the derivatives of the expression: {error}") from error


@dataclass(frozen=True)
class _Step:
    """One operation: its result goes to the end of the list of values."""

    run: Operation
    operands: tuple[int, ...]


class TorchExpression:
    """A lowered UFL expression as a function of the values of given nodes in it.

    Args:
        expr: Lowered UFL expression; see `lower`.
        given: Nodes whose values are passed in a call, such as Functions, their gradients, Constants and coordinates. What is
            below them is not looked at.

    Call:
        `expression(*values)`: a tensor `(*sites, *ufl_shape)` for each given node; returns `(*sites, *expr.ufl_shape)`, where
        sites are broadcast, and absent where no given node occurs.

    Raises:
        UnsupportedForm: When built, naming the node that has no value.

    MPI: Not collective.
    """

    def __init__(self, expr: Any, given: Sequence[Any]) -> None:
        self._steps: list[_Step] = []
        self._slots: dict[Any, int] = {node: k for k, node in enumerate(given)}
        self._num_given = len(given)
        for node in _post_order(expr, self._slots):
            operands = tuple(self._slots[operand] for operand in _value_operands(node))
            self._slots[node] = self._num_given + len(self._steps)
            self._steps.append(_Step(_operation(node), operands))
        self._result = self._slots[expr]

    def __call__(self, *values: Tensor) -> Tensor:
        """Evaluate; see the class."""
        if len(values) != self._num_given:
            raise TypeError(f"{self._num_given} values are expected; {len(values)} were given.")
        slots = list(values)
        like = values[0] if values else torch.zeros((), dtype=torch.float64)
        for step in self._steps:
            operands = [slots[k] for k in step.operands]
            slots.append(step.run(*operands) if operands else step.run().to(device=like.device, dtype=like.dtype))
        return slots[self._result]


def derivative_of(node: Any) -> tuple[Any, int]:
    """What a node is a derivative of, and of which order: (u, 2) for grad(grad(u)), (u, 0) for u."""
    order = 0
    while isinstance(node, classes.Grad):
        node, order = node.ufl_operands[0], order + 1
    return node, order


def terminals(expr: Any) -> list[Any]:
    """The Functions, derivatives of Functions, Constants and coordinates of a lowered expression, each once."""
    stack, seen, out = [expr], {expr}, []
    while stack:
        node = stack.pop()
        whole = isinstance(node, classes.Constant | classes.SpatialCoordinate)
        if whole or isinstance(derivative_of(node)[0], classes.Coefficient):
            out.append(node)
            continue
        new = [operand for operand in node.ufl_operands if operand not in seen]
        seen.update(new)
        stack.extend(new)
    return out


def _value_operands(node: Any) -> list[Any]:
    """The operands that have values; indices and labels do not."""
    return [operand for operand in node.ufl_operands if not isinstance(operand, classes.MultiIndex | classes.Label)]


def _post_order(expr: Any, known: dict[Any, int]) -> list[Any]:
    """Every node that is not known, each once, operands first."""
    order: dict[Any, None] = {}
    stack = [(expr, False)]
    while stack:
        node, ready = stack.pop()
        if node in known or node in order:
            continue
        if ready:
            order[node] = None
        else:
            stack.append((node, True))
            stack.extend((operand, False) for operand in reversed(_value_operands(node)))
    return list(order)


OPERATION_NAMES: dict[type, str] = {
    classes.Abs: "abs", classes.Sqrt: "sqrt", classes.Exp: "exp", classes.Ln: "log",
    classes.Cos: "cos", classes.Sin: "sin", classes.Tan: "tan", classes.Cosh: "cosh", classes.Sinh: "sinh",
    classes.Tanh: "tanh", classes.Acos: "acos", classes.Asin: "asin", classes.Atan: "atan",
    classes.Erf: "erf", classes.Atan2: "atan2", classes.MinValue: "minimum", classes.MaxValue: "maximum",
    classes.EQ: "eq", classes.NE: "ne", classes.LT: "lt", classes.LE: "le", classes.GT: "gt",
    classes.GE: "ge", classes.AndCondition: "logical_and", classes.OrCondition: "logical_or",
    classes.NotCondition: "logical_not", classes.Sum: "add",
}  # fmt: skip
"""What acts on each entry, with operands that have the same axes: names of torch's operations."""


def _operation(node: Any) -> Operation:
    """What computes the value of a node from those of its operands."""
    kind = type(node)
    if kind in OPERATION_NAMES:
        return OPERATIONS[OPERATION_NAMES[kind]]
    if isinstance(node, classes.Variable):
        return lambda x: x
    if isinstance(node, classes.Product | classes.Division):
        multiply = torch.mul if isinstance(node, classes.Product) else torch.div
        first, second = (_alignment(operand, node) for operand in node.ufl_operands)
        return partial(_aligned, multiply, first, second)
    if isinstance(node, classes.Power):
        exponent = node.ufl_operands[1]
        return partial(_power, float(exponent)) if isinstance(exponent, classes.RealValue) else torch.pow
    if isinstance(node, classes.Conditional):
        return partial(_where, len(node.ufl_shape) + len(node.ufl_free_indices))
    if isinstance(node, classes.ListTensor):
        return partial(_stack, -1 - len(node.ufl_shape[1:]) - len(node.ufl_free_indices))
    if isinstance(node, classes.Indexed):
        return partial(_indexed, *_index_plan(node))
    if isinstance(node, classes.ComponentTensor):
        bound = [index.count() for index in node.ufl_operands[1]]
        return _einsum(list(node.ufl_operands[0].ufl_free_indices), [*bound, *node.ufl_free_indices])
    if isinstance(node, classes.IndexSum):
        summand, (index,) = node.ufl_operands
        free = list(summand.ufl_free_indices)
        return partial(torch.sum, dim=free.index(index.count()) - len(free))
    if isinstance(node, classes.Identity):
        return partial(torch.eye, node.ufl_shape[0], dtype=torch.float64)
    if isinstance(node, classes.Zero):
        return partial(torch.zeros, (*node.ufl_shape, *node.ufl_index_dimensions), dtype=torch.float64)
    if isinstance(node, classes.RealValue):
        return partial(torch.tensor, float(node), dtype=torch.float64)
    raise UnsupportedForm(f"{type(node).__name__} ({node}) cannot be evaluated by torch.")


def _alignment(operand: Any, node: Any) -> tuple[Any, ...]:
    """What inserts axes into an operand's value where it lacks a free index of the node."""
    own = operand.ufl_free_indices
    return (Ellipsis, *[slice(None) if index in own else None for index in node.ufl_free_indices])


def _aligned(operation: Operation, first: tuple[Any, ...], second: tuple[Any, ...], a: Tensor, b: Tensor) -> Tensor:
    return operation(a[first], b[second])


def _power(exponent: float, x: Tensor, _: Tensor) -> Tensor:
    """A power whose exponent is a number, which torch takes faster."""
    return x**exponent


def _where(num_axes: int, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition[(Ellipsis, *[None] * num_axes)], x, y)


def _stack(dim: int, *parts: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*parts), dim)


def _index_plan(node: Any) -> tuple[tuple[Any, ...], Operation]:
    """How to take components: fixed indices first, and then the rest in order, repeated ones on the diagonal."""
    operand, indices = node.ufl_operands
    num_free = len(operand.ufl_free_indices)
    fixed = [int(index) if isinstance(index, classes.FixedIndex) else slice(None) for index in indices]
    labels = [index.count() for index in indices if not isinstance(index, classes.FixedIndex)]
    select = (Ellipsis, *fixed, *[slice(None)] * num_free)
    return select, _einsum([*labels, *operand.ufl_free_indices], list(node.ufl_free_indices))


def _indexed(select: tuple[Any, ...], rearrange: Operation, x: Tensor) -> Tensor:
    return rearrange(x[select])


def _einsum(before: list[int], after: list[int]) -> Operation:
    """What puts axes named `before` into the order `after`; equal names are the diagonal."""
    if before == after:
        return lambda x: x
    letters = dict(zip(dict.fromkeys(before), string.ascii_letters, strict=False))
    spec = f"...{''.join(letters[k] for k in before)}->...{''.join(letters[k] for k in after)}"
    return partial(torch.einsum, spec)
