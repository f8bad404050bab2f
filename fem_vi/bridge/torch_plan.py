"""What a `TorchResidual` does, as plain data: its programs and the rows of prescribed dofs; and the same as JSON.

Tensors are named; they are buffers of the module. The module imports nothing but torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fem_vi.bridge.torch_program import Entry, Gather, Program, Read, Step, Write
from fem_vi.errors import InvalidInput


@dataclass(frozen=True)
class Given:
    """A tensor that a residual takes, as it is on this rank.

    Attributes:
        label: How error messages call it.
        shape: Axes after the batch axes.
        size: Number of entries.
        is_field: Whether it is a field tensor; it is replicated otherwise.
        layout: Why the shape is what it is.
    """

    label: str
    shape: tuple[int, ...]
    size: int
    is_field: bool
    layout: str


@dataclass(frozen=True)
class Prescribed:
    """Rows u - h whose h is a given tensor.

    Attributes:
        source: Which one.
        rows: Buffer of the rows.
        entries: Buffer of the entries that they take.
    """

    source: int
    rows: str
    entries: str


@dataclass(frozen=True)
class Plan:
    """What a residual does.

    Attributes:
        given: The state and the inputs.
        num_local: Rows of the residual before those of ghosts are added to their owners.
        programs: The integrals.
        offset: Buffer of what does not vary with the inputs, `(num_local, 1)`.
        rows: Buffer of the prescribed rows.
        values: Buffer of the prescribed values, zero where they are given.
        prescribed: Where they are given.
    """

    given: tuple[Given, ...]
    num_local: int
    programs: tuple[Program, ...]
    offset: str
    rows: str
    values: str
    prescribed: tuple[Prescribed, ...]


_KINDS = {kind.__name__: kind for kind in (Given, Prescribed, Program, Gather, Read, Entry, Step, Write)}
_PARTS = {"given": "Given", "prescribed": "Prescribed", "programs": "Program", "gathers": "Gather", "reads": "Read"}
_PARTS |= {"entries": "Entry", "steps": "Step", "writes": "Write"}


def encoded(plan: Plan) -> Tensor:
    """A plan as bytes of JSON."""
    return torch.frombuffer(bytearray(json.dumps(dataclasses.asdict(plan)).encode()), dtype=torch.uint8)


def decoded(content: Tensor) -> Plan:
    """What `encoded` made.

    Raises:
        InvalidInput: Where that is no plan.
    """
    try:
        return Plan(**_restored(json.loads(bytes(content.cpu().numpy()))))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(
            f"The plan of the residual cannot be read ({error}); was it written by another version of fem_vi?"
        ) from error


def _restored(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass from JSON, where tuples are lists and dataclasses are objects."""
    out = {}
    for name, value in content.items():
        if name in _PARTS and isinstance(value, list):
            kind = _KINDS[_PARTS[name]]
            out[name] = tuple(kind(**_restored(part)) if isinstance(part, dict) else part for part in value)
        else:
            out[name] = _as_tuple(value)
    return out


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(part) for part in value) if isinstance(value, list) else value


def buffer_names(plan: Plan) -> set[str]:
    """The buffers that a plan names."""
    names = {plan.offset, plan.rows, plan.values}
    for source in plan.prescribed:
        names |= {source.rows, source.entries}
    for program in plan.programs:
        names |= {program.weights, *program.fixed, *(gather.dofs for gather in program.gathers)}
        for read in program.reads:
            names |= {read.table, read.variants, *read.orientation}
        for write in program.writes:
            names |= {write.dofs, write.table, write.variants, *write.orientation}
    return names - {""}
