"""The part of a mesh that some test functions reach, and forms that are assembled there and nowhere else.

DOLFINx makes a form from what has been compiled and a list of entities for each of its integrals, in 5 us. The list that it makes
for an integral without a tag cannot be replaced, so these integrals are given a tag that no other has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import ufl
from dolfinx import fem
from numpy.typing import NDArray

from fem_vi.errors import UnsupportedForm
from fem_vi.pde import _compat
from fem_vi.pde.inputs import Coefficients, local_size

Entities = NDArray[np.int32]
Tagged = tuple[int, Entities]
_WIDTHS = {"cell": 1, "exterior_facet": 2, "interior_facet": 4}
"""Numbers that name an entity: a cell, perhaps with a facet of it, perhaps with the same of the cell on the other side."""


@dataclass(frozen=True)
class Reach:
    """What some test functions reach.

    Attributes:
        number: Counts the choices of one region.
        entities: For each kind of integral, the entities of each tag, their numbers one after another.
    """

    number: int
    entities: dict[Any, list[Tagged]]


class Region:
    """A part of the mesh, chosen anew whenever other test functions are asked for.

    Args:
        form: The UFL form whose integrals, and whose derivatives' integrals, are to be restricted.
        space: The space of its test function.

    Raises:
        UnsupportedForm: Where the form has integrals other than those over cells and facets.

    MPI: Collective.
    """

    def __init__(self, form: ufl.Form, space: Any) -> None:
        tags = [tag for integral in form.integrals() for tag in _tags(integral)]
        self._free = 1 + max((tag for tag in tags if isinstance(tag, int)), default=0)
        found = find_entities(form)
        self._whole: dict[Any, list[Tagged]] = {
            kind: sorted((self._free if tag == -1 else tag, entities.ravel()) for tag, entities in tags.items())
            for kind, tags in found.items()
        }
        self._marks = fem.Function(space)
        self._mark = Coefficients(self._marks)
        self._cells_of = cells_of_dofs(space)
        self._number = 0
        self.reach = Reach(0, self._whole)

    def find(self, rows: NDArray[np.int64]) -> Reach:
        """What the test functions of some owned rows reach, also on other ranks.

        Args:
            rows: Owned dofs, unrolled.

        MPI: Collective.
        """
        marks = np.zeros(self._mark.owned.size)
        marks[rows] = 1.0
        self._mark.load(marks)
        visited = np.zeros(self._cells_of.shape[1], dtype=bool)
        visited[self._cells_of[np.flatnonzero(self._mark.array)].indices] = True
        self._number += 1
        return Reach(
            self._number,
            {
                kind: [(tag, _touching(visited, found, _WIDTHS[kind.name])) for tag, found in tags]
                for kind, tags in self._whole.items()
            },
        )

    def select(self, reach: Reach) -> None:
        """Assemble there from now on. Not collective."""
        self.reach = reach

    def compile(self, form: ufl.Form) -> Callable[[], fem.Form]:
        """Compile a form once; what is returned gives it as it is to be assembled now. Collective."""
        data = {kind.name: tags for kind, tags in self._whole.items()}
        integrals = []
        for integral in form.integrals():
            tags = tuple(self._free if isinstance(tag, str) else tag for tag in _tags(integral))
            integrals.append(
                integral.reconstruct(
                    subdomain_id=tags if len(tags) > 1 else tags[0], subdomain_data=data[integral.integral_type()]
                )
            )
        return _RegionForm(self, ufl.Form(integrals))


class _RegionForm:
    """A compiled form whose integrals all have a tag, made again where its region has chosen another part of the mesh."""

    def __init__(self, region: Region, form: ufl.Form) -> None:
        self._region = region
        self._compiled = fem.form(form)
        self._symbols = self._compiled._cpp_object.coefficients, [constant._cpp_object for constant in form.constants()]
        self._current, self._number = self._compiled, 0

    def __call__(self) -> fem.Form:
        reach = self._region.reach
        if reach.number != self._number:
            self._current = _compat.restricted_form(self._compiled, self._symbols, reach.entities)
            self._number = reach.number
        return self._current


def find_entities(form: ufl.Form) -> dict[Any, dict[int, Entities]]:
    """What the integrals of a form run over: the entities of each tag (-1 for all of the mesh), by kind of integral.

    DOLFINx is asked, with a form of the same measures that is compiled in no time.

    Returns:
        For each kind and tag `(n, 1)` cells, `(n, 2)` cells and their facets, or `(n, 4)` two of these on both sides.

    Raises:
        UnsupportedForm: Where the form has integrals other than those over cells and facets.

    MPI: Collective.
    """
    for integral in form.integrals():
        if integral.integral_type() not in _WIDTHS:
            raise UnsupportedForm(
                f"The form has an integral of the kind {integral.integral_type()}; rows= and logdet take integrals over cells "
                "and facets only."
            )
    one = fem.Constant(form.ufl_domain(), 1.0)
    measures = [integral.reconstruct(integrand=one, metadata={"quadrature_degree": 0}) for integral in form.integrals()]
    out: dict[Any, dict[int, Entities]] = {}
    for kind, _, tag, entities in _compat.integral_domains(fem.form(ufl.Form(measures))):
        out.setdefault(kind, {})[tag] = np.array(entities, dtype=np.int32).reshape(-1, _WIDTHS[kind.name])
    return out


def _tags(integral: Any) -> tuple[int | str, ...]:
    given = integral.subdomain_id()
    return tuple(given) if isinstance(given, tuple) else (given,)


def _touching(visited: NDArray[np.bool_], entities: Entities, width: int) -> Entities:
    """Those of some entities one of whose cells is visited."""
    rows = entities.reshape(-1, width)
    return np.ascontiguousarray(rows[visited[rows[:, ::2]].any(axis=1)]).ravel()


def cells_of_dofs(space: Any) -> scipy.sparse.csr_array:
    """The local cells, ghosts included, that each local unrolled dof belongs to, `(num_dofs, num_cells)`. Not collective."""
    dofmap, bs = space.dofmap.list, space.dofmap.bs
    dofs = (np.asarray(dofmap)[:, :, None] * bs + np.arange(bs)).reshape(len(dofmap), -1)
    cells = np.repeat(np.arange(len(dofs)), dofs.shape[1])
    size = local_size(space)[1]
    return scipy.sparse.csr_array((np.ones(dofs.size, dtype=bool), (dofs.ravel(), cells)), shape=(size, len(dofs)))
