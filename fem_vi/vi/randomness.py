"""Random numbers that leave the user's generator as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def private_generator(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for a block, and leave it as it was found.

    Args:
        seed: The same on all ranks.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
