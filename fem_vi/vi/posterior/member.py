"""The distribution that a posterior stands for."""

from __future__ import annotations

import inspect

from torch import nn
from torch.distributions import Distribution

from fem_vi.errors import InvalidInput


def distribution_of(posterior: nn.Module) -> Distribution:
    """The distribution at the present parameters.

    Args:
        posterior: Module whose `forward()` is a distribution.

    Raises:
        InvalidInput: Where it wants arguments, as q(m | y) does, or returns something else.

    MPI: As `posterior()` is.
    """
    name = type(posterior).__name__
    try:
        inspect.signature(posterior.forward).bind()
    except TypeError as error:
        raise InvalidInput(
            f"posterior is a {name}, whose forward takes arguments; that of a posterior takes none and returns a distribution. "
            "Of an amortised one take model.at(y), for one y, or an objective over data, such as ExpectedELBO()."
        ) from error
    q = posterior()
    if not isinstance(q, Distribution):
        raise InvalidInput(f"posterior is a {name}, whose forward returned a {type(q).__name__}; it must return a distribution.")
    return q
