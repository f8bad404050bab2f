"""The C of a 1-form for many samples at once: FFCx's code on lanes, and loops over cells that gather, compute and scatter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fem_vi.pde._compat_ffcx import ENTITY_WIDTHS, IntegralCode
from fem_vi.pde.c_compiler import vector_symbol
from fem_vi.pde.lane_code import LaneFormatter
from fem_vi.pde.lane_runtime import HEAD, TAIL, scalar_function, vector_function

_TWO_ARGUMENTS = ("pow", "atan2")
_OF_THE_RUNTIME = {"sqrt", "fabs", "fmin", "fmax", "exp"}
_BESSEL = ("jn", "yn")


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
    """What the source of a form depends on besides its integrals.

    Attributes:
        coefficients: Layout of each coefficient, in the order of the inputs.
        num_constants: Entries of all Constants; they come after the coefficients.
        constants_vary: Whether Constants may differ between samples.
        blocks: Layout of each block of the result, in the order in which they follow each other in the element tensor.
        geometry_nodes: Nodes of a cell.
        facets: Facets of a cell.
    """

    coefficients: Mapping[Any, Layout]
    num_constants: int
    constants_vary: bool
    blocks: Sequence[Layout]
    geometry_nodes: int
    facets: int


def source(codes: Sequence[IntegralCode], plan: Plan) -> str:
    """A translation unit with the function `fem_vi_run`."""
    functions: set[str] = set()
    loops = []
    for number, code in enumerate(codes):
        formatter = LaneFormatter(code.tree, frozenset({"w", "A", "c"} if plan.constants_vary else {"w", "A"}))
        loops += [_tabulate(number, formatter.body(), plan), _loop(number, code, plan)]
        functions |= formatter.functions
    num_in = len(plan.coefficients) + (plan.num_constants > 0)
    constants = [f"#define NUM_IN {num_in}", f"#define NUM_OUT {len(plan.blocks)}"]
    calls = "".join(f"  integrate_{number}(job, X, Y);\n" for number in range(len(codes)))
    integrate = f"static void integrate(const Job *job, vec *const *X, vec *const *Y)\n{{\n{calls}}}\n"
    maths = [_mathematics(name) for name in sorted(functions - _OF_THE_RUNTIME)]
    return "\n".join([*constants, HEAD, *maths, *loops, integrate, TAIL])


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


def _loop(number: int, code: IntegralCode, plan: Plan) -> str:
    """The loop over the entities of one integral."""
    sides = 2 if code.kind == "interior_facet" else 1
    nodes, width = plan.geometry_nodes, ENTITY_WIDTHS[code.kind]
    cells = [f"entity[{2 * side}]" for side in range(sides)]
    facets = [f"entity[{2 * side + 1}]" if width > 1 else "0" for side in range(sides)]
    permutations = [
        f"job->permutations[(int64_t){cell} * {plan.facets} + {facet}]" if code.permutes else "0"
        for cell, facet in zip(cells, facets, strict=True)
    ]
    lines = [
        f"static void integrate_{number}(const Job *job, vec *const *X, vec *const *Y)\n{{",
        f"  const Entities *where = job->entities + {number};",
        *_constants(plan),
        "  for (int64_t n = 0; n < where->num; ++n) {",
        f"    const int32_t *entity = where->list + {width} * n;",
        f"    double cell_x[{3 * nodes * sides}];",
        *(f"    load_geometry(cell_x + {3 * nodes * side}, job, {cell}, {nodes});" for side, cell in enumerate(cells)),
        f"    const int facet[] = {{{', '.join(facets)}}};",
        f"    const uint8_t permutation[] = {{{', '.join(permutations)}}};",
        f"    vec w[{max(1, _extent(code, plan, sides))}], A[{code.size}] = {{}};",
        *_gather(code, plan, cells),
        f"    tabulate_{number}(A, w, {'c' if plan.num_constants else '0'}, cell_x, facet, permutation);",
        *_scatter(plan, cells),
        "  }\n}\n",
    ]
    return "\n".join(lines)


def _extent(code: IntegralCode, plan: Plan, sides: int) -> int:
    return max((begin + sides * plan.coefficients[given].size for given, begin in code.offsets.items()), default=0)


def _constants(plan: Plan) -> list[str]:
    """The Constants, which no cell changes."""
    if not plan.num_constants:
        return []
    position, count = len(plan.coefficients), plan.num_constants
    if not plan.constants_vary:
        return [f"  const double *c = job->in[{position}].owned;"]
    return [
        f"  vec c[{count}];",
        f"  for (int i = 0; i < {count}; ++i)",
        f"    c[i] = job->in[{position}].rows ? X[{position}][i] : spread(job->in[{position}].owned[i]);",
    ]


def _gather(code: IntegralCode, plan: Plan, cells: Sequence[str]) -> list[str]:
    lines = []
    for position, (given, layout) in enumerate(plan.coefficients.items()):
        for side, cell in enumerate(cells if given in code.offsets else ()):
            begin = code.offsets[given] + side * layout.size
            lines.append(f"    load(w + {begin}, job->in + {position}, X[{position}], {cell}, {_shape(layout)});")
    return lines


def _scatter(plan: Plan, cells: Sequence[str]) -> list[str]:
    lines, begin = [], 0
    for cell in cells:
        for position, layout in enumerate(plan.blocks):
            lines.append(f"    store(A + {begin}, job->out + {position}, Y[{position}], {cell}, {_shape(layout)});")
            begin += layout.size
    return lines


def _shape(layout: Layout) -> str:
    return f"{layout.nodes}, {layout.bs}, {int(layout.is_transformed)}"
