"""PETSc options: a plain dictionary of the user's, completed, under a prefix of its own."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterable, Mapping
from types import NoneType

from petsc4py import PETSc

from fem_vi.arguments import instance
from fem_vi.pde import _compat

Option = str | int | float | bool | None
WORKSPACE = "mat_mumps_icntl_14"
"""By how many percent MUMPS's workspace exceeds what its analysis foresees."""
MOST_WORKSPACE = 1000
_counter = itertools.count()


def check_options(given: object) -> None:
    """Refuse what is no dict of options. Not collective.

    Raises:
        InvalidInput: Naming it.
    """
    instance(
        "petsc_options", given, Mapping, NoneType, way_out='Options go without prefix, {"ksp_type": "cg", "pc_type": "hypre"}.'
    )


def complete_options(given: Mapping[str, Option]) -> dict[str, Option]:
    """The given options over the defaults: LU by MUMPS (by PETSc itself where MUMPS is not there), tight tolerances."""
    options: dict[str, Option] = {"ksp_type": "preonly", "pc_type": "lu", **given}
    if options["pc_type"] in ("lu", "cholesky") and PETSc.Sys.hasExternalPackage("mumps"):
        options.setdefault("pc_factor_mat_solver_type", "mumps")
    if options["ksp_type"] != "preonly":
        options.setdefault("ksp_rtol", 1e-10)
    return options


class Options:
    """PETSc options under a prefix that no other object has.

    Args:
        given: Options, without prefix.
        watched: Those whose spelling is to be checked; all that are given, where this is None.
    """

    def __init__(self, given: Mapping[str, Option], watched: Iterable[str] | None = None) -> None:
        self.prefix = f"fem_vi_{next(_counter)}_"
        self._unchecked = list(given if watched is None else watched)
        names = [self.prefix + name for name in {**complete_options(given), WORKSPACE: None}]
        weakref.finalize(self, _forget, names)
        database = PETSc.Options()
        for name, value in complete_options(given).items():
            database.setValue(self.prefix + name, value)

    def grow_workspace(self) -> bool:
        """Let MUMPS take more memory than it foresees from its next set-up on; False where that has been tried far enough."""
        database, name = PETSc.Options(), self.prefix + WORKSPACE
        percent = max(20, database.getInt(name, 20))  # MUMPS's own default
        if percent >= MOST_WORKSPACE:
            return False
        database.setValue(name, 3 * percent)
        return True

    def warn_unused(self) -> None:
        """Warn once of options that PETSc did not read, which is how a misspelt one shows."""
        if not self._unchecked:
            return
        unused = [name for name in self._unchecked if not _compat.option_used(self.prefix + name)]
        self._unchecked = []
        if unused:
            warnings.warn(f"PETSc did not use the options {', '.join(unused)}; check their spelling.", stacklevel=2)


def _forget(names: list[str]) -> None:
    database = PETSc.Options()
    for name in names:
        database.delValue(name)
