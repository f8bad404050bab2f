"""What the families have in common: a prior, and how they are copied; and for the normal ones a whitened mean."""

from __future__ import annotations

import torch
from torch import nn

from fem_vi.vi.posterior.on_mesh import LivesOnMesh
from fem_vi.vi.posterior.whitened import WhitenedNormal
from fem_vi.vi.prior import FieldPrior, check_prior
from fem_vi.vi.start import Linearisation


class FamilyOverPrior(LivesOnMesh):
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

    shared: tuple[str, ...] = ("prior",)  # a divergence is closed between a q and its own prior

    def __init__(self, prior: FieldPrior) -> None:
        super().__init__()
        check_prior(prior)
        self.prior = prior


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
