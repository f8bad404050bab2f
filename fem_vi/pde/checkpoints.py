"""A loop over time steps that is walked forward and then backward, with only some of its states stored.

Going backward over step k takes the states u_k and u_{k+1}, for k = T-1, ..., 0. What is not stored is computed again from the
nearest stored state before it. The library checkpoint_schedules says which states to store, and where to restart, so that
the fewest steps are computed again. Its schedules expect each step to be run once more right before it is reversed, to
store what the reversal needs. Here that is the pair of states, and u_{k+1} is at hand from the step reversed before: those
runs are left out, which leaves

    optimal_steps_binomial(T, s) - T - (T - 1)

steps to compute again with s stored states.

References:
    Griewank, Walther (2000), Algorithm 799: revolve.
    Maddison (2024), Step-based checkpointing with high-level algorithmic differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from checkpoint_schedules import Copy, EndForward, EndReverse, Forward, Move, MultistageCheckpointSchedule, Reverse

from fem_vi.pde.inputs import Array

Advance = Callable[[int, Array], Array]
"""`advance(k, u_k)` returns u_{k+1}, an array of its own."""
PullBack = Callable[[int, Array, Array], None]
"""`pull_back(k, u_k, u_{k+1})` takes the adjoint from the end of step k to its start."""
Stored = dict[int, Array]
"""States that a walk forward leaves for the walk backward, by number: the last two, and others as the schedule says."""


@dataclass(frozen=True)
class BinomialCheckpoints:
    """Both ways over a loop of time steps.

    Attributes:
        num_steps: T, at least 1.
        num_stored: States stored at a time, at least 1, u_0 included (the caller's array, no copy). Three more are in use.
    """

    num_steps: int
    num_stored: int

    @property
    def stores_all(self) -> bool:
        """Whether no step is computed again."""
        return self.num_stored >= self.num_steps - 1

    def forward(self, u0: Array, advance: Advance) -> Stored:
        """Take all steps, storing states on the way."""
        stored: Stored = {}
        old = new = u0
        for action in self._actions():
            if isinstance(action, EndForward):
                break
            if action.write_ics:
                stored[action.n0] = new
            for step in range(action.n0, action.n1):
                old, new = new, advance(step, new)
        return {**stored, self.num_steps - 1: old, self.num_steps: new}

    def backward(self, stored: Stored, advance: Advance, pull_back: PullBack) -> None:
        """Walk back over all steps; what is stored is given up on the way."""
        old, new = stored.pop(self.num_steps - 1), stored.pop(self.num_steps)
        actions = self._actions()
        while not isinstance(next(actions), EndForward):
            pass
        for action in actions:
            if isinstance(action, Reverse):
                pull_back(action.n0, old, new)
                new = old
            elif isinstance(action, Move):
                old = stored.pop(action.n)
            elif isinstance(action, Copy):
                old = stored[action.n]
            elif isinstance(action, Forward) and not action.write_adj_deps:
                if action.write_ics:
                    stored[action.n0] = old
                for step in range(action.n0, action.n1):
                    old = advance(step, old)

    def _actions(self) -> Iterator[Any]:
        for action in MultistageCheckpointSchedule(self.num_steps, self.num_stored, 0):
            if isinstance(action, EndReverse):
                return
            yield action
