"""How many numbers a forward map returns under a likelihood."""

from __future__ import annotations


def num_predicted(likelihood: object, num_data: int) -> int:
    """Last axis of predictions: one number for each datum, and what the likelihood asks for besides (`num_predicted`)."""
    asks = getattr(likelihood, "num_predicted", None)
    return num_data if asks is None else int(asks(num_data))
