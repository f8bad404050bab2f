"""In which units a residual is measured: which r is virtually observed to be zero, up to N(0, eps^2 I)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fem_vi.bridge.residual import Residual

ResidualFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Plain:
    """The weak-form residual as it is: one entry a test function.

    For small problems: its entries scale with the mesh and the coefficients, so that eps has no unit that one could name, and
    networks learn slowly where A is ill conditioned.
    """

    def create(self, residual: Residual) -> ResidualFunction:
        """The function r(u, *inputs)."""
        return residual


@dataclass(frozen=True)
class Preconditioned:
    """A0^-1 r with the Jacobian A0 at a reference, factorised once: eps is, roughly, an error of the state at a node.

    A step then takes a product of each residual with A0^-1, and no other linear solve. It changes nothing about the factor
    1 / |det A(z)|, since A0 is constant.

    Attributes:
        reference: The inputs of the reference, without batch axes: a tensor, or a tuple of one for each input.
        state: The reference state, for a form that is not linear in its state.
    """

    reference: Tensor | tuple[Tensor, ...] = field(default=(), repr=False)
    state: Tensor | None = field(default=None, repr=False)

    def create(self, residual: Residual) -> ResidualFunction:
        """A0^-1 r(u, *inputs). Collective."""
        return residual.precondition(reference=self.reference, state=self.state)


@dataclass(frozen=True)
class SolutionUnits:
    """A(z)^-1 r with A the Jacobian at each sample: eps is an error of the state, and there is no factor 1 / |det A(z)|.

    The price is a solve for each sample of z: the model is no longer trained by residuals alone.
    """

    def create(self, residual: Residual) -> ResidualFunction:
        """A(u, z)^-1 r(u, *inputs)."""
        return residual.in_solution_units


Measure = Plain | Preconditioned | SolutionUnits
