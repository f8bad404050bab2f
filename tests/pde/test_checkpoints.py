"""Checkpointed loops: the right states in the right order, as few steps again as promised, as many states stored as allowed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checkpoint_schedules import optimal_steps_binomial

from fem_vi.pde.checkpoints import BinomialCheckpoints

every_size = pytest.mark.parametrize(
    ("num_steps", "num_stored"), [(n, s) for n in (1, 2, 3, 5, 8, 13, 40) for s in (1, 2, 3, 5, 12, 39, 60) if s <= max(n, 3)]
)


class Alive:
    """Creates states that know their step, and counts those that are alive."""

    def __init__(self) -> None:
        self.now = self.most = self.steps = 0

    def create(self, step: int) -> Any:
        state = np.array([float(step)])
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(state, self._gone)
        return state

    def _gone(self) -> None:
        self.now -= 1

    def advance(self, step: int, state: Any) -> Any:
        assert float(state[0]) == step
        self.steps += 1
        return self.create(step + 1)


def record(order: list[int]) -> Callable[[int, Any, Any], None]:
    def pull_back(step: int, old: Any, new: Any) -> None:
        assert (float(old[0]), float(new[0])) == (step, step + 1)
        order.append(step)

    return pull_back


@every_size
def test_each_step_is_reversed_once_with_its_own_states(num_steps: int, num_stored: int) -> None:
    checkpoints, alive, order = BinomialCheckpoints(num_steps, num_stored), Alive(), []
    stored = checkpoints.forward(alive.create(0), alive.advance)
    checkpoints.backward(stored, alive.advance, record(order))
    assert order == list(reversed(range(num_steps)))


@every_size
def test_steps_computed_again_are_those_of_the_optimal_schedule(num_steps: int, num_stored: int) -> None:
    checkpoints, alive = BinomialCheckpoints(num_steps, num_stored), Alive()
    stored = checkpoints.forward(alive.create(0), alive.advance)
    assert alive.steps == num_steps
    checkpoints.backward(stored, alive.advance, record([]))
    usable = min(num_stored, num_steps - 1)
    expected = optimal_steps_binomial(num_steps, usable) - num_steps - (num_steps - 1) if usable else 0
    assert alive.steps - num_steps == expected
    assert checkpoints.stores_all == (expected == 0)


@every_size
def test_no_more_states_are_alive_than_allowed(num_steps: int, num_stored: int) -> None:
    """Stored ones, the two that a step is between, and the one that is being made."""
    checkpoints, alive = BinomialCheckpoints(num_steps, num_stored), Alive()
    stored = checkpoints.forward(alive.create(0), alive.advance)
    assert alive.now <= num_stored + 2
    checkpoints.backward(stored, alive.advance, record([]))
    assert alive.most <= num_stored + 3


def test_one_hundred_steps_with_ten_stored_take_123_again() -> None:
    """r(n, s) = t n - C(s + t, t - 1) with C(s + t - 1, t - 1) < n <= C(s + t, t) (Griewank, Walther 2000), here t = 3."""
    checkpoints, alive = BinomialCheckpoints(100, 10), Alive()
    checkpoints.backward(checkpoints.forward(alive.create(0), alive.advance), alive.advance, record([]))
    assert alive.steps == 100 + (3 * 100 - 78) - 99
