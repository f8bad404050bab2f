"""Owned and replicated tensors, and the four differentiable ways between them.

A *field tensor* has shape `(*batch, n_owned)`: the coefficients that this rank owns. Everything else is *replicated*:
identical on all ranks. A loss is a replicated scalar, and each rank calls `backward` on its copy of the same number.
The gradient of a replicated tensor is replicated and complete; the gradient of a field tensor is owned.

That convention fixes the adjoint of each crossing:

    all_sum   x_r -> y = sum_r x_r         y is replicated, so is dL/dy, and dL/dx_r = dL/dy: no communication
    localise  y -> y, used in local sums   each rank sees its part of dL/dy; the whole is the sum over ranks
    distribute  x -> the owned slice of x  the adjoint of a slice is a gather
    gather    the reverse of distribute    the adjoint is the slice
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from fem_vi.arguments import described, instance
from fem_vi.bridge.linear import apply_linear
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all

OWNED = "the coefficients that this rank owns. Use fem_vi.distribute to slice a replicated vector."


@runtime_checkable
class FunctionSpace(Protocol):
    """What this module needs of a `dolfinx.fem.FunctionSpace`."""

    dofmap: Any
    mesh: Any


def check_last_axis(name: str, x: object, size: int, meaning: str) -> None:
    """Refuse what is no real tensor with so many entries along its last axis. Not collective.

    Args:
        name: How the error calls it.
        x: What the user passed.
        size: The entries that the last axis must have.
        meaning: Whose they are, and what to do where there are others.

    Raises:
        InvalidInput: Naming type, dtype or shape.
    """
    if not isinstance(x, Tensor):
        raise InvalidInput(f"{name} is {described(x)}; it must be a torch tensor.")
    if x.is_complex():
        raise InvalidInput(f"{name} is {x.dtype}; it must be real. Give real and imaginary parts as tensors of their own.")
    if x.ndim == 0 or x.shape[-1] != size:
        raise InvalidInput(f"{name} has shape {tuple(x.shape)}; its last axis must have {size} entries, {meaning}")


def _check_space(name: str, V: object) -> None:
    instance(f"{name}: V", V, FunctionSpace, way_out='It is dolfinx.fem.functionspace(mesh, ("Lagrange", 1)), for example.')


def _check_summed(name: str, x: object, comm: object) -> None:
    instance(f"{name}: comm", comm, MPI.Comm, way_out="Take mesh.comm.")
    instance(f"{name}: x", x, Tensor)


def _sum_over_ranks(x: Tensor, comm: MPI.Comm) -> Tensor:
    if comm.size == 1:
        return x.clone()  # not a view: what is done to the sum in place must not reach x on any number of ranks
    total = x.detach().to("cpu").contiguous().clone()
    comm.Allreduce(MPI.IN_PLACE, total.numpy(), op=MPI.SUM)
    return total.to(x.device)


def all_sum(x: Tensor, comm: MPI.Comm) -> Tensor:
    """The sum of `x` over all ranks, differentiable.

    A plain torch reduction over a field tensor is local to its rank:

        >>> wrong = (u * u).sum()                       # each rank has another number
        >>> right = all_sum((u * u).sum(), mesh.comm)   # every rank has the global one

    Args:
        x: Any shape, the same on every rank; a rank-local part of a sum.
        comm: Communicator of the mesh.

    Returns:
        The sum, shape of `x`, replicated.

    MPI: Collective forward, not collective backward.
    """
    _check_summed("all_sum", x, comm)
    return apply_linear(lambda local: _sum_over_ranks(local, comm), torch.clone, x)


def localise(x: Tensor, comm: MPI.Comm) -> Tensor:
    """A replicated tensor, about to be used in arithmetic with field tensors.

    The value does not change. The gradient that comes back from rank-local arithmetic is only this rank's part;
    this operator completes it.

        >>> field = localise(scale, mesh.comm) * u      # scale: replicated parameter; u: field tensor

    Args:
        x: Any shape, replicated.
        comm: Communicator of the mesh.

    Returns:
        The same values.

    MPI: Not collective forward, collective backward.
    """
    _check_summed("localise", x, comm)
    return apply_linear(torch.clone, lambda part: _sum_over_ranks(part, comm), x)


def num_owned(V: FunctionSpace) -> int:
    """Coefficients of a Function in V that this rank owns: the last axis of its field tensors."""
    return int(V.dofmap.index_map.size_local * V.dofmap.index_map_bs)


def num_global(V: FunctionSpace) -> int:
    """Coefficients of a Function in V on all ranks together."""
    return int(V.dofmap.index_map.size_global * V.dofmap.index_map_bs)


def owned_range(V: FunctionSpace) -> tuple[int, int]:
    """First and one past the last global number of the coefficients that this rank owns."""
    first, last = V.dofmap.index_map.local_range
    bs = V.dofmap.index_map_bs
    return int(first * bs), int(last * bs)


def distribute(x: Tensor, V: FunctionSpace) -> Tensor:
    """This rank's part of a replicated vector of coefficients.

    Args:
        x: Coefficients in DOLFINx's global order, `(*batch, n_global)`, replicated.
        V: Function space of the coefficients.

    Returns:
        Field tensor, `(*batch, n_owned)`.

    Raises:
        InvalidInput: Where the last axis of `x` does not have `n_global` entries.

    MPI: Collective.
    """
    _check_space("distribute", V)
    comm = V.mesh.comm
    with raise_on_all(comm):
        check_last_axis("distribute: x", x, num_global(V), "the coefficients that all ranks own together.")
    first, last = owned_range(V)
    return localise(x, comm)[..., first:last]


def gather(x: Tensor, V: FunctionSpace) -> Tensor:
    """All coefficients of a field on every rank, in DOLFINx's global order.

    Args:
        x: Field tensor, `(*batch, n_owned)`.
        V: Function space of the coefficients.

    Returns:
        `(*batch, n_global)`, replicated.

    Raises:
        InvalidInput: Where the last axis of `x` does not have `n_owned` entries.

    MPI: Collective.
    """
    _check_space("gather", V)
    comm = V.mesh.comm
    first, last = owned_range(V)
    with raise_on_all(comm):
        check_last_axis("gather: x", x, last - first, OWNED)
    return all_sum(torch.nn.functional.pad(x, (first, num_global(V) - last)), comm)


def as_numpy(x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A float64 NumPy view (or copy, where the type or device differs) of a tensor's values."""
    if x.dtype is not torch.float64:
        x = x.to(torch.float64)
    return x.numpy(force=True)
