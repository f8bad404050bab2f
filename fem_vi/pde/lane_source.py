"""The C of a 1-form for many samples at once: FFCx's code on lanes, and loops over cells that gather, compute and scatter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ufl

from fem_vi.pde._compat_ffcx import ENTITY_WIDTHS, IntegralCode, generator_version
from fem_vi.pde.c_compiler import vector_symbol
from fem_vi.pde.lane_code import LaneFormatter
from fem_vi.pde.lane_runtime import HEAD, TAIL, scalar_function, vector_function

_TWO_ARGUMENTS = ("pow", "atan2")
_OF_THE_RUNTIME = {"sqrt", "fabs", "fmin", "fmax", "exp"}
_BESSEL = ("jn", "yn")
_SHORT = 150  # lines of a function body of which the compiler is asked for two versions
_PARAMETERS = "const Job *job, const Lanes *x, const Lanes *y"
_CALLS_OF_SHORT = "  if (count == 1) integrate_part_{0}(job, x, y, 0, 1);\n  else integrate_part_{0}(job, x, y, 0, count);"
_CALLS_OF_LONG = "  for (int64_t b = 0; b < count; ++b) integrate_part_{0}(job, x, y, b, b + 1);"


@dataclass(frozen=True)
class Layout:
    """How a cell's dofs lie in an element's tensor.

    Attributes:
        nodes: Entries of the cell in the dofmap.
        bs: Block size of the dofmap.
        is_transformed: Whether the dofs of a cell differ from those of its reference cell.
    """

    nodes: int
    bs: int
    is_transformed: bool

    @property
    def size(self) -> int:
        """Unrolled dofs of a cell."""
        return self.nodes * self.bs


@dataclass(frozen=True)
class Plan:
    """What the source of a form depends on besides the form.

    Attributes:
        coefficients: Layout of each coefficient of the form.
        num_constants: Entries of all Constants; they come after the coefficients.
        constants_vary: Whether Constants may differ between samples.
        blocks: Layout of each block of the result, in the order in which they follow each other in the element tensor.
        geometry_nodes: Nodes of a cell.
        facets: Facets of a cell.
    """

    coefficients: Sequence[Layout]
    num_constants: int
    constants_vary: bool
    blocks: Sequence[Layout]
    geometry_nodes: int
    facets: int


@dataclass(frozen=True)
class Contents:
    """What a compiled form expects; it is kept in its library.

    Attributes:
        read: Positions of the coefficients that it reads, in the order of its inputs.
        integrals: For each integral its kind and its subdomains.
    """

    read: tuple[int, ...]
    integrals: tuple[tuple[str, tuple[int, ...]], ...]

    @staticmethod
    def of(codes: Sequence[IntegralCode]) -> Contents:
        """What some integrals expect."""
        read = sorted({position for code in codes for position in code.offsets})
        return Contents(tuple(read), tuple((code.kind, code.ids) for code in codes))

    def spelled(self) -> str:
        """JSON."""
        return json.dumps([self.read, self.integrals])

    @staticmethod
    def spelt(text: str | bytes) -> Contents:
        """From JSON."""
        read, integrals = json.loads(text)
        return Contents(tuple(read), tuple((kind, tuple(ids)) for kind, ids in integrals))


def source(codes: Sequence[IntegralCode], plan: Plan) -> str:
    """A translation unit with the function `fem_vi_run` and the string `fem_vi_contents`.

    Raises:
        UnsupportedForm: Naming what has no translation.
    """
    contents = Contents.of(codes)
    functions: set[str] = set()
    loops = []
    for number, code in enumerate(codes):
        formatter = LaneFormatter(code.tree, frozenset({"w", "A", "c"} if plan.constants_vary else {"w", "A"}))
        body = formatter.body()
        loops += [_tabulate(number, body, plan), _loop(number, code, plan, contents.read, is_short=body.count("\n") < _SHORT)]
        functions |= formatter.functions
    num_in = len(contents.read) + (plan.num_constants > 0)
    head = [f"#define NUM_IN {num_in}", f"#define NUM_OUT {len(plan.blocks)}", HEAD]
    head.append(f"const char *const fem_vi_contents = {json.dumps(contents.spelled())};\n")
    calls = "".join(f"  integrate_{number}(job, x, y, count);\n" for number in range(len(codes)))
    integrate = f"static void integrate({_PARAMETERS}, int64_t count)\n{{\n{calls}}}\n"
    maths = [_mathematics(name) for name in sorted(functions - _OF_THE_RUNTIME)]
    return "\n".join([*head, *maths, *loops, integrate, TAIL])


def source_key(form: ufl.Form, plan: Plan) -> str:
    """All that the source depends on, in words; FFCx may name tables of one form differently in each process."""
    return "\0".join([form.signature(), generator_version(), str(plan), _generators()])


@cache
def _generators() -> str:
    """A hash of the modules that make the source."""
    files = sorted(Path(__file__).parent.glob("lane_*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _mathematics(name: str) -> str:
    symbol = None if name in _BESSEL else vector_symbol(name, 2 if name in _TWO_ARGUMENTS else 1)
    return vector_function(name, symbol) if symbol else scalar_function(name)


def _tabulate(number: int, body: str, plan: Plan) -> str:
    constant = "vec" if plan.constants_vary else "double"
    return (
        f"INLINE void tabulate_{number}(vec *restrict A, const vec *restrict w, const {constant} *restrict c,\n"
        "  const double *restrict coordinate_dofs, const int *restrict entity_local_index,\n"
        f"  const uint8_t *restrict quadrature_permutation)\n{{\n{body}}}\n"
    )


def _loop(number: int, code: IntegralCode, plan: Plan, read: Sequence[int], *, is_short: bool) -> str:
    """The loop over the entities of one integral, and inside it that over blocks; and what calls it.

    What depends on geometry alone is the same for all blocks. Where a function is short, that is much of its work, and it has a
    version for several blocks, which does it once, and one for a single block. Where it is long, it takes one block after
    another: the compiler would fill the stack with what is the same for all.
    """
    sides = 2 if code.kind == "interior_facet" else 1
    nodes, width = plan.geometry_nodes, ENTITY_WIDTHS[code.kind]
    cells = [f"entity[{2 * side}]" for side in range(sides)]
    facets = [f"entity[{2 * side + 1}]" if width > 1 else "0" for side in range(sides)]
    permutations = [
        f"job->permutations[(int64_t){cell} * {plan.facets} + {facet}]" if code.permutes else "0"
        for cell, facet in zip(cells, facets, strict=True)
    ]
    lines = [
        f"INLINE void integrate_part_{number}({_PARAMETERS}, int64_t first, int64_t last)\n{{",
        f"  const Entities *where = job->entities + {number};",
        "  for (int64_t n = 0; n < where->num; ++n) {",
        f"    const int32_t *entity = where->list + {width} * n;",
        f"    double cell_x[{3 * nodes * sides}];",
        *(f"    load_geometry(cell_x + {3 * nodes * side}, job, {cell}, {nodes});" for side, cell in enumerate(cells)),
        f"    const int facet[] = {{{', '.join(facets)}}};",
        f"    const uint8_t permutation[] = {{{', '.join(permutations)}}};",
        "    for (int64_t b = first; b < last; ++b) {",
        *_constants(plan, len(read)),
        f"      vec w[{max(1, _extent(code, plan, sides))}], A[{code.size}] = {{}};",
        *_gather(code, plan, cells, read),
        f"      tabulate_{number}(A, w, {'c' if plan.num_constants else '0'}, cell_x, facet, permutation);",
        *_scatter(plan, cells),
        "    }\n  }\n}\n",
        f"static void integrate_{number}({_PARAMETERS}, int64_t count)\n{{",
        (_CALLS_OF_SHORT if is_short else _CALLS_OF_LONG).format(number),
        "}\n",
    ]
    return "\n".join(lines)


def _extent(code: IntegralCode, plan: Plan, sides: int) -> int:
    return max((begin + sides * plan.coefficients[given].size for given, begin in code.offsets.items()), default=0)


def _constants(plan: Plan, position: int) -> list[str]:
    """The Constants, which no cell changes."""
    if not plan.num_constants:
        return []
    given = f"job->in[{position}]"
    if not plan.constants_vary:
        return [f"      const double *c = {given}.owned;"]
    return [
        f"      vec c[{plan.num_constants}];",
        f"      load(c, &{given}, x[{position}], b, 0, 1, {plan.num_constants}, 0);",
    ]


def _gather(code: IntegralCode, plan: Plan, cells: Sequence[str], read: Sequence[int]) -> list[str]:
    lines = []
    for number, given in enumerate(read):
        layout = plan.coefficients[given]
        for side, cell in enumerate(cells if given in code.offsets else ()):
            begin = code.offsets[given] + side * layout.size
            lines.append(f"      load(w + {begin}, job->in + {number}, x[{number}], b, {cell}, {_shape(layout)});")
    return lines


def _scatter(plan: Plan, cells: Sequence[str]) -> list[str]:
    lines, begin = [], 0
    for cell in cells:
        for position, layout in enumerate(plan.blocks):
            lines.append(f"      store(A + {begin}, job->out + {position}, y[{position}], b, {cell}, {_shape(layout)});")
            begin += layout.size
    return lines


def _shape(layout: Layout) -> str:
    return f"{layout.nodes}, {layout.bs}, {int(layout.is_transformed)}"
