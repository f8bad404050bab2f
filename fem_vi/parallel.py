"""Ranks: a process grid, errors that every rank sees, and seeds that all ranks share.

Besides `fem_vi.bridge.layout` this is the only module that calls mpi4py directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from fem_vi import errors
from fem_vi.arguments import instance, whole

T = TypeVar("T")
_EXCHANGE = 7301  # the tag of messages of `exchange`


def _rebuild(name: str, message: str, rank: int) -> Exception:
    """The exception that a rank without an error of its own raises."""
    kind = getattr(errors, name, None)
    text = f"on rank {rank}: {message}"
    if isinstance(kind, type) and issubclass(kind, errors.FemViError):
        return kind(text)
    return errors.FailedOnAnotherRank(f"{name} {text}")


def agree_on_error(comm: MPI.Comm, error: Exception | None) -> None:
    """Raise on every rank if any rank has an error.

    A rank that has an error raises its own; the others raise one of the same class that quotes the lowest failing rank.

    Args:
        comm: Communicator whose ranks must agree.
        error: What went wrong on this rank, or None.

    Raises:
        FemViError: Where any rank passed an error.

    MPI: Collective.
    """
    if comm.size > 1:
        failed = comm.allreduce(comm.size if error is None else comm.rank, op=MPI.MIN)
        if failed < comm.size:
            report = (type(error).__name__, str(error)) if comm.rank == failed else None
            name, message = comm.bcast(report, root=failed)
            if error is None:
                raise _rebuild(name, message, failed)
    if error is not None:
        raise error


class raise_on_all:  # lower case: it is called like a function
    """Run rank-local checks so that an error on one rank is raised on all of them.

    The body must not contain collective calls: a rank that fails leaves it early.

    Args:
        comm: Communicator whose ranks must agree.

    Raises:
        FemViError: On every rank, where the body raised on any rank.

    MPI: Collective (one allreduce at the end of the block; none on one rank).

    Example:
        >>> with raise_on_all(mesh.comm):
        ...     check_shape(m, n_owned)
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm

    def __enter__(self) -> None:
        """Begin the checks."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Agree with the other ranks. What is no Exception, such as KeyboardInterrupt, goes its own way."""
        if error is None:
            agree_on_error(self._comm, None)
        elif isinstance(error, Exception):
            agree_on_error(self._comm, error)


def sum_over_ranks(comm: MPI.Comm, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The entrywise sum over ranks, replicated. Collective."""
    if comm.size == 1:
        return values
    local = np.ascontiguousarray(values, dtype=np.float64)
    total = np.empty_like(local)
    comm.Allreduce(local, total, op=MPI.SUM)
    return total


def min_over_ranks(comm: MPI.Comm, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The entrywise minimum over ranks, replicated. Collective."""
    lowest = np.empty_like(values)
    comm.Allreduce(np.ascontiguousarray(values), lowest, op=MPI.MIN)
    return lowest


def max_over_ranks(comm: MPI.Comm, value: float) -> float:
    """The largest value of any rank, replicated. Collective."""
    return float(comm.allreduce(value, op=MPI.MAX)) if comm.size > 1 else value


def all_values(comm: MPI.Comm, value: T) -> list[T]:
    """What each rank passed, in the order of ranks, replicated. Collective."""
    return comm.allgather(value) if comm.size > 1 else [value]


def fingerprint(comm: MPI.Comm, samples: Sequence[Sequence[NDArray[np.float64]]]) -> list[int]:
    """A number for the contents of some arrays: equal for equal contents, and by chance in 2^64 for others.

    Args:
        comm: Ranks that hold parts of the arrays.
        samples: Lists of arrays; one number for each list.

    Returns:
        Numbers that mean the same on every rank, in this process only.

    MPI: Collective.
    """
    local = [hash((comm.rank, *[array.tobytes() for array in arrays])) for arrays in samples]
    if comm.size == 1:
        return local
    total = np.empty(len(local), dtype=np.int64)
    comm.Allreduce(np.array(local, dtype=np.int64), total, op=MPI.SUM)
    return total.tolist()  # type: ignore[no-any-return]


def all_to_all(comm: MPI.Comm, values: Sequence[T]) -> list[T]:
    """What each rank has for this one, in the order of ranks; `values` is what this one has for each. Collective."""
    return comm.alltoall(values) if comm.size > 1 else list(values)


def exchange(
    comm: MPI.Comm, send: Mapping[int, NDArray[np.float64]], receive: Mapping[int, NDArray[np.float64]]
) -> Mapping[int, NDArray[np.float64]]:
    """Send arrays to some ranks and fill those that come from others, which expect one another. Collective for those ranks.

    Args:
        comm: Communicator.
        send: Contiguous arrays, by the rank that they go to.
        receive: Contiguous arrays of the right size, by the rank that they come from.

    Returns:
        `receive`, filled.
    """
    requests = [comm.Irecv(array, source=rank, tag=_EXCHANGE) for rank, array in receive.items()]
    requests += [comm.Isend(array, dest=rank, tag=_EXCHANGE) for rank, array in send.items()]
    MPI.Request.Waitall(requests)
    return receive


def any_rank(comm: MPI.Comm, flag: bool) -> bool:
    """Whether the flag is set on any rank. Collective."""
    return bool(comm.allreduce(flag, op=MPI.LOR)) if comm.size > 1 else flag


def any_rank_each(comm: MPI.Comm, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Entry by entry, whether a flag is set on any rank. Collective."""
    if comm.size == 1:
        return flags
    total = np.empty_like(flags)
    comm.Allreduce(np.ascontiguousarray(flags), total, op=MPI.LOR)
    return total


def shared_seed(comm: MPI.Comm, seed: int) -> int:
    """Rank 0's seed, on every rank.

    Args:
        comm: Communicator whose ranks draw the same numbers.
        seed: Any integer; only that of rank 0 counts.

    Returns:
        The seed of rank 0.

    MPI: Collective.
    """
    return int(comm.bcast(int(seed), root=0)) if comm.size > 1 else int(seed)


def same_ranks(one: MPI.Comm, other: MPI.Comm) -> bool:
    """Whether two communicators hold the same ranks in the same order. Not collective."""
    return one.size == other.size and MPI.Comm.Compare(one, other) in (MPI.IDENT, MPI.CONGRUENT)


@dataclass(frozen=True)
class ProcessGrid:
    """Two communicators over one set of ranks: some ranks share a mesh, the groups share out samples.

    Rank `r` of `comm` is rank `r % mesh_ranks` of its `mesh_comm`, and rank `r // mesh_ranks` of its `sample_comm`.

    Attributes:
        comm: All ranks.
        mesh_comm: The ranks that hold one copy of the mesh together.
        sample_comm: The ranks that hold the same part of the mesh, one in each copy.
    """

    comm: MPI.Comm
    mesh_comm: MPI.Comm
    sample_comm: MPI.Comm

    @staticmethod
    def create(comm: MPI.Comm, mesh_ranks: int | None = None) -> ProcessGrid:
        """Split `comm` into groups of `mesh_ranks` ranks.

        Args:
            comm: Communicator to split.
            mesh_ranks: Ranks that share one mesh; all of them when None.

        Raises:
            InvalidInput: Where `mesh_ranks` does not divide the number of ranks.

        MPI: Collective.
        """
        instance("ProcessGrid: comm", comm, MPI.Comm)
        ranks = comm.size if mesh_ranks is None else whole("ProcessGrid: mesh_ranks", mesh_ranks)
        if ranks < 1 or comm.size % ranks != 0:
            raise errors.InvalidInput(
                f"mesh_ranks is {ranks}; it must divide the {comm.size} ranks of the communicator. "
                "Start as many ranks as a multiple of it, or choose a divisor."
            )
        group, member = divmod(comm.rank, ranks)
        return ProcessGrid(comm, comm.Split(group, member), comm.Split(member, group))
