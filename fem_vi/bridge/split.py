"""`Split`: the parts of a mixed or vector field, as field tensors of their own spaces."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fem_vi.bridge.layout import OWNED, check_last_axis, num_owned
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all
from fem_vi.pde.agree import agreed, check_space


class Split:
    """velocity, pressure = split(u): a field tensor for each part of a mixed space, or for each component of a vector space.

    A part holds the coefficients that belong to `W.sub(i)`, in the order of the collapsed space `split.spaces[i]`: it can be
    observed, written or plotted there. Parts are copies, differentiable to any order.

    Args:
        W: Function space with sub-spaces.

    Call:
        `split(u)`: u is a field tensor `(*batch, n_owned)` of W; returns a tuple of field tensors `(*batch, n_owned_i)`, in the
        order of the element's parts. With `names=["velocity", "pressure"]` it is a named tuple.

    Raises:
        InvalidInput: Where W has no parts, u has the wrong shape, or the names do not fit.

    Attributes:
        spaces: The collapsed space of each part.

    MPI: Collective when built; a call moves no data between ranks, but its checks are collective.

    Example:
        >>> velocity, pressure = fem_vi.Split(W)(u)
        >>> flow = solve.split(u, names=["velocity", "pressure"])
        >>> flow.pressure
    """

    def __init__(self, W: Any) -> None:
        with agreed(W):
            check_space("Split: W", W)
        self._comm = W.mesh.comm
        self._num_owned = num_owned(W)
        if W.num_sub_spaces == 0:
            raise InvalidInput("Split: the space has no parts; it takes mixed and vector spaces.")
        collapsed = [W.sub(part).collapse() for part in range(W.num_sub_spaces)]
        self.spaces = tuple(space for space, _ in collapsed)
        parents = [np.ravel(dofs)[: num_owned(space)] for space, dofs in collapsed]
        self._parents = [torch.from_numpy(np.asarray(dofs, dtype=np.int64)) for dofs in parents]

    def __call__(self, u: Tensor, *, names: Sequence[str] | None = None) -> tuple[Tensor, ...]:
        """The parts of a field; see the class. Collective."""
        with raise_on_all(self._comm):
            check_last_axis("Split: u", u, self._num_owned, OWNED)
            kind = None if names is None else _named(names, len(self.spaces))
        parts = tuple(u.index_select(-1, dofs.to(u.device)) for dofs in self._parents)
        return parts if kind is None else kind(*parts)


def _named(names: Sequence[str], expected: int) -> Any:
    """A class of named tuples."""
    if isinstance(names, str) or len(names) != expected:
        raise InvalidInput(f"Split: names is {names!r}; it must be a list of {expected} names, one for each part.")
    try:
        return namedtuple("Parts", names)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"Split: names is {names!r}: {error}.") from error
