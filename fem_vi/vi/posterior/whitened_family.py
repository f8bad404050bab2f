"""What the families have in common: a prior, and how they are copied; and for the normal ones a whitened mean."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import nn

from fem_vi.errors import InvalidInput
from fem_vi.vi.posterior.whitened import WhitenedNormal
from fem_vi.vi.prior import FieldPrior, check_prior
from fem_vi.vi.start import Linearisation


class FamilyOverPrior(nn.Module):
    """A module whose `forward()` is a distribution relative to a prior.

    A deep copy has parameters of its own and shares the prior. A pickle is refused.

    Args:
        prior: Prior of m.

    Attributes:
        prior: That prior.

    Raises:
        InvalidInput: Where `prior` is no prior.

    MPI: Not collective.
    """

    def __init__(self, prior: FieldPrior) -> None:
        super().__init__()
        check_prior(prior)
        self.prior = prior

    def __deepcopy__(self, memo: dict[int, Any]) -> FamilyOverPrior:
        memo[id(self.prior)] = self.prior  # solvers on a mesh; and a divergence is closed between a q and its own prior
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise InvalidInput(
            f"a {type(self).__name__} cannot be pickled: its prior holds solvers that live on a mesh. Save its state_dict(), and "
            "load that with load_state_dict() into a new one. For a copy in this process use copy.deepcopy."
        )


class WhitenedFamily(FamilyOverPrior):
    """A module whose `forward()` is a `WhitenedNormal`, with its mean at first that of the prior.

    Args:
        prior: Prior of m.

    Attributes:
        prior: That prior.
        mu: Whitened mean, `(n_owned,)`.

    Raises:
        InvalidInput: Where `prior` is no prior.

    MPI: Not collective.
    """

    def __init__(self, prior: FieldPrior) -> None:
        super().__init__(prior)
        self.mu = nn.Parameter(torch.zeros(prior.event_shape, dtype=torch.float64))

    def __call__(self) -> WhitenedNormal:
        """The distribution at the present parameters."""
        return super().__call__()

    def start_at(self, linearisation: Linearisation) -> None:
        """Take a linearised posterior. Collective."""
        raise NotImplementedError

    def is_fresh(self) -> bool:
        """Whether it is still centred at the prior mean. Collective."""
        return not bool(self.prior.all_sum(self.mu.detach().abs().sum()))
