"""Modules that hold solvers: what becomes of those where a module is copied or pickled."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, Self, SupportsIndex

from torch import nn

from fem_vi.errors import InvalidInput


class LivesOnMesh(nn.Module):
    """A module with parts that live on a mesh. A deep copy has parameters of its own and shares those; a pickle is refused.

    Attributes:
        shared: Names of those parts.
    """

    shared: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for name in self.shared:
            part = getattr(self, name)
            memo[id(part)] = part
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise InvalidInput(
            f"a {type(self).__name__} cannot be pickled: it holds solvers that live on a mesh. Save its state_dict(), and "
            "load that with load_state_dict() into a new one. For a copy in this process use copy.deepcopy."
        )
