"""Whose ranks an argument belongs to, so that a wrong one is refused on all of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ufl
from dolfinx import fem
from mpi4py import MPI
from ufl.core.expr import Expr
from ufl.domain import extract_domains

from fem_vi.arguments import instance
from fem_vi.parallel import raise_on_all


def agreed(*given: object) -> AbstractContextManager[None]:
    """Run rank-local checks of arguments so that an error on one rank is raised on all; see `raise_on_all`.

    Args:
        given: Arguments as the user passed them, of any type, or lists of them: the ranks are those of the first mesh that is
            found in them. Where there is none, an error is this rank's own: nobody can know which others would wait.

    MPI: Collective over those ranks.

    Example:
        >>> with agreed(state, F):
        ...     check(F)
    """
    comm = ranks_of(*given)
    return nullcontext() if comm is None else raise_on_all(comm)


def ranks_of(*given: object) -> MPI.Comm | None:
    """The communicator of the first mesh that is found in some objects; None where there is none. Not collective."""
    for each in given:
        comm = ranks_of(*each) if isinstance(each, list | tuple) else _communicator(each)
        if comm is not None:
            return comm
    return None


def _communicator(given: object) -> MPI.Comm | None:
    mesh: Any = given
    if isinstance(given, fem.Function):
        mesh = given.function_space.mesh
    elif isinstance(given, ufl.Form | Expr):
        domains = given.ufl_domains() if isinstance(given, ufl.Form) else extract_domains(given)
        mesh = next((domain.ufl_cargo() for domain in domains), None)
    elif isinstance(given, fem.FunctionSpace):
        mesh = given.mesh
    comm = getattr(mesh, "comm", None)
    return comm if isinstance(comm, MPI.Comm) else None


def check_space(name: str, V: object) -> None:
    """Refuse what is no function space. Not collective.

    Raises:
        InvalidInput: Naming it.
    """
    instance(name, V, fem.FunctionSpace, way_out='Make one with dolfinx.fem.functionspace(mesh, ("Lagrange", 1)).')
