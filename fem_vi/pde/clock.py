"""Constants that `Evolve` sets itself in each step: the time of the new state, and the size of the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from dolfinx import fem

from fem_vi.errors import InvalidInput
from fem_vi.pde.inputs import Array
from fem_vi.pde.weak_form import WeakForm


def check_set_by_evolve(pde: WeakForm, given: fem.Function | fem.Constant, name: str) -> None:
    """What Evolve sets itself occurs in the weak form, and not among its inputs."""
    if given is pde.unknown.given:
        raise InvalidInput(f"Evolve: {name} is the state, which each step solves for; the old state is another Function.")
    if any(given is other.given for other in pde.inputs):
        raise InvalidInput(
            f"Evolve: {name} is among the inputs of the WeakForm. Evolve sets it in each step: take it out of inputs."
        )
    if not pde.fixes(given):
        raise InvalidInput(f"Evolve: {name} occurs neither in the form nor as the value of a Dirichlet condition.")


def create_clocks(
    pde: WeakForm,
    num_steps: int,
    *,
    time: fem.Constant | None,
    dt: fem.Constant | None,
    time_steps: float | Sequence[float] | None,
) -> list[tuple[fem.Constant, Array]]:
    """The Constants that Evolve sets itself, with their values in each step."""
    named = [(name, given) for name, given in (("time", time), ("dt", dt)) if given is not None]
    for name, given in named:
        if not isinstance(given, fem.Constant) or given.value.shape != ():
            raise InvalidInput(f"Evolve: {name} is {given!r}; it must be a scalar dolfinx.fem.Constant of the form.")
        check_set_by_evolve(pde, given, name)
    if not named:
        if time_steps is not None:
            raise InvalidInput("Evolve: time_steps is given without time or dt, the Constants that it would set.")
        return []
    if time_steps is None and dt is None:
        raise InvalidInput("Evolve: time is given without time_steps or dt, so that the size of a step is not known.")
    steps = np.asarray(float(dt.value) if time_steps is None and dt is not None else time_steps, dtype=np.float64)
    if steps.shape not in ((), (num_steps,)) or not np.all(np.isfinite(steps)) or not np.all(steps > 0):
        raise InvalidInput(f"Evolve: time_steps must be a positive number, or {num_steps} of them; given: {time_steps}.")
    sizes = np.broadcast_to(steps, (num_steps,)).copy()
    values = {"time": np.cumsum(sizes) + (0.0 if time is None else float(time.value)), "dt": sizes}
    return [(given, values[name]) for name, given in named]
