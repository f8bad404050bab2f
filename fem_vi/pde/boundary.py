"""Dirichlet data as arrays: which dofs are prescribed, by which condition, and where their values come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from dolfinx import fem
from mpi4py import MPI
from numpy.typing import NDArray

from fem_vi.errors import InvalidInput
from fem_vi.parallel import any_rank, raise_on_all, sum_over_ranks
from fem_vi.pde import _compat
from fem_vi.pde.inputs import Array, ConstantInput, FunctionInput, Input, local_size

Dofs = NDArray[np.int32]


@dataclass(frozen=True)
class Source:
    """Prescribed dofs whose values are entries of an input: state dof `dofs[i]` takes entry `entries[i]` of it.

    Attributes:
        input: The input that holds the values.
        position: Which of the weak form's inputs it is.
        dofs: Local unrolled dofs of the state, ghosts included.
        entries: Local unrolled dofs of the input Function, or entries of the input Constant.
        num_owned: How many of `dofs`, from the front, this rank owns.
    """

    input: Input
    position: int
    dofs: Dofs
    entries: Dofs
    num_owned: int

    def values(self) -> Array:
        """Current values at `dofs`."""
        if isinstance(self.input, ConstantInput):
            return self.input.symbol.value.reshape(-1)[self.entries]  # type: ignore[no-any-return]
        return self.input.coefficients.array[self.entries]  # type: ignore[no-any-return]

    @property
    def owned(self) -> tuple[Dofs, Dofs]:
        """The owned ones of `dofs`, and their `entries`."""
        return self.dofs[: self.num_owned], self.entries[: self.num_owned]

    def push(self, given: Array, at_state: Array) -> None:
        """Write the entries of an input, or of a tangent of it, to the owned dofs of the state. Not collective."""
        dofs, entries = self.owned
        at_state[dofs] = given[entries]

    def gradient(self, at_state: Array, comm: MPI.Comm) -> Array:
        """The adjoint of `values`: a cotangent of the state's owned dofs, summed on to the entries of the input.

        Args:
            at_state: Owned entries of the state's cotangent, `(*batch, n_owned)`.
            comm: Communicator of the mesh.

        Returns:
            `(*batch, size)`: owned entries for a Function; replicated and complete for a Constant.

        MPI: Collective for a Constant.
        """
        dofs, entries = self.owned
        local = np.zeros((*at_state.shape[:-1], self.input.size))
        np.add.at(local.T, entries, at_state.T[dofs])
        return local if self.input.is_field else sum_over_ranks(comm, local)


class Boundary:
    """All Dirichlet conditions of a weak form on one state space.

    Where conditions overlap, the last one counts, as in DOLFINx.

    Attributes:
        bcs: The conditions, used by DOLFINx to mark rows and columns.
        dofs: Prescribed local unrolled dofs, ghosts included, sorted.
        owned: Those of `dofs` that this rank owns.
        sources: Where values are inputs.
        homogeneous: Whether every prescribed value is a constant zero, on all ranks.
    """

    def __init__(self, space: Any, bcs: Sequence[fem.DirichletBC], inputs: Sequence[Input]) -> None:
        owned, total = local_size(space)
        self.bcs = list(bcs)
        with raise_on_all(space.mesh.comm):
            for number, bc in enumerate(self.bcs):
                _check_condition(space, bc, number)
        last = np.full(total, -1, dtype=np.int32)
        for number, bc in enumerate(self.bcs):
            last[bc.dof_indices()[0]] = number
        self.dofs: Dofs = np.flatnonzero(last >= 0).astype(np.int32)
        self.owned: Dofs = self.dofs[self.dofs < owned]
        self._fixed = np.zeros(total)
        for bc in self.bcs:
            bc._cpp_object.set(self._fixed, None, 1.0)
        self.sources = self._find_sources(space, inputs, last)
        for source in self.sources:
            self._fixed[source.dofs] = 0.0
        fixed = [bc.g for bc in self.bcs if not _is_input(bc, inputs)]
        self._watched = [(value, _view(value), _view(value).tobytes()) for value in fixed]
        local = bool(self.sources) or bool(np.any(self._fixed))
        self.homogeneous = not any_rank(space.mesh.comm, local)

    def _find_sources(self, space: Any, inputs: Sequence[Input], last: NDArray[np.int32]) -> list[Source]:
        owned, _ = local_size(space)
        sources = []
        for number, bc in enumerate(self.bcs):
            dofs = np.unique(bc.dof_indices()[0])  # a caller's list may have a corner twice
            dofs = dofs[last[dofs] == number]
            num_owned = int((dofs < owned).sum())  # not DOLFINx's count: wrong for blocked spaces before 0.10
            for position, given in enumerate(inputs):
                if _is_input(bc, [given]):
                    sources.append(Source(given, position, dofs, _entries(space, bc, given, dofs), num_owned))
        return sources

    def apply(self, x: Array) -> None:
        """Write the prescribed values into a local array with ghosts. Not collective; inputs must be loaded."""
        x[self.dofs] = self._fixed[self.dofs]
        for source in self.sources:
            x[source.dofs] = source.values()

    def changed(self, besides: Sequence[fem.Function | fem.Constant] = ()) -> bool:
        """Whether the caller has changed a prescribed value that is no input, nor one of `besides`. Not collective."""
        known = [given._cpp_object for given in besides]
        changed = [value for value, now, frozen in self._watched if now.tobytes() != frozen]
        return any(all(value is not other for other in known) for value in changed)

    def values(self) -> Array:
        """Prescribed values at the owned prescribed dofs `owned`."""
        x = np.zeros_like(self._fixed)
        self.apply(x)
        return x[self.owned]

    @property
    def fixed(self) -> Array:
        """Those of `values` that are no inputs; zero elsewhere."""
        return self._fixed[self.owned]


def _view(value: Any) -> Array:
    """The numbers behind the C++ Function or Constant of a condition."""
    return np.asarray(value.x.array if hasattr(value, "x") else value.value)


def _is_input(bc: fem.DirichletBC, inputs: Sequence[Input]) -> bool:
    return any(bc.g is given.given._cpp_object for given in inputs)


def _check_condition(space: Any, bc: object, number: int) -> None:
    if not isinstance(bc, fem.DirichletBC):
        raise InvalidInput(f"bcs[{number}] is a {type(bc).__name__}; it must come from dolfinx.fem.dirichletbc.")
    same = bc.function_space is space._cpp_object or space._cpp_object.contains(bc.function_space)
    if not same:
        raise InvalidInput(
            f"bcs[{number}] is a condition on another function space than the state's; build it on the state's space."
        )
    if space.mesh.comm.size > 1 and np.any(np.diff(bc.dof_indices()[0]) < 0):
        raise InvalidInput(
            f"bcs[{number}] has dofs that are not sorted, which DOLFINx wants on several ranks; take numpy.unique."
        )


def _entries(space: Any, bc: fem.DirichletBC, given: Input, dofs: Dofs) -> Dofs:
    """Entry of the input that each prescribed dof of the state takes."""
    if isinstance(given, ConstantInput):
        return np.zeros_like(dofs) if given.size == 1 else (dofs % given.size).astype(np.int32)
    if _same_dofs(bc.function_space, given, space):
        return dofs
    parents = _compat.collapsed_parent_dofs(bc.function_space)
    entry_of = np.full(local_size(space)[1], -1, dtype=np.int32)
    entry_of[parents] = np.arange(parents.size, dtype=np.int32)
    entries: Dofs = entry_of[dofs]
    if np.any(entries < 0) or parents.size != local_size(given.space)[1]:
        raise InvalidInput(f"{given.label} is the value of a Dirichlet condition but does not live in the collapsed subspace.")
    return entries


def _same_dofs(bc_space: Any, given: FunctionInput, space: Any) -> bool:
    """Whether the value Function is numbered as the state is."""
    return bool(len(bc_space.component()) == 0 and local_size(given.space) == local_size(space))
