"""A residual times the inverse of its Jacobian at a reference: A0^-1 r(u, m).

Entries of r scale with the mesh and the coefficients; those of A0^-1 r are errors of the state, as far as A0 is the Jacobian. A0
is constant, so that A0^-1 is a linear map with the adjoint A0^-T, and derivatives of any order are those of r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fem_vi.bridge.call import check_finite, plan
from fem_vi.bridge.layout import as_numpy
from fem_vi.bridge.linear import apply_linear
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all
from fem_vi.pde.inputs import Array
from fem_vi.pde.petsc_options import Option
from fem_vi.pde.reference import ReferenceJacobian
from fem_vi.pde.weak_form import WeakForm


class PreconditionedResidual:
    """A0^-1 r(u, m, ...), called like the residual; made by `Residual.precondition`.

    Args:
        residual: r.
        pde: Its weak form.
        reference: One tensor for each input, without batch axes.
        state: Owned coefficients of the reference state, `(n_owned,)`; None where the form is linear in its state.
        petsc_options: As for `Solve`.

    Call:
        `preconditioned(u, *inputs)`: as the residual.

    Raises:
        InvalidInput: On every rank, where the reference does not fit the weak form.
        SolveFailed: On every rank, where A0 is singular or a solver did not converge.

    MPI: Collective, forward and backward.

    Example:
        >>> preconditioned = residual.precondition(reference=prior.mean)
        >>> loss = fem_vi.all_sum(preconditioned(u, m).square().sum(-1), mesh.comm)
    """

    def __init__(
        self,
        residual: Callable[..., Tensor],
        pde: WeakForm,
        *,
        reference: Sequence[Tensor],
        state: Tensor | None,
        petsc_options: Mapping[str, Option],
    ) -> None:
        self._residual = residual
        self._shape = pde.unknown.shape
        self._pde = pde
        with raise_on_all(pde.comm):
            values = _checked(pde, reference, state)
        self._jacobian = ReferenceJacobian(pde, values, petsc_options)

    def __call__(self, u: Tensor, *inputs: Tensor) -> Tensor:
        """Evaluate; see the class. Collective."""
        return self.apply(self._residual(u, *inputs))

    def apply(self, r: Tensor) -> Tensor:
        """A0^-1 r, differentiable to any order.

        Args:
            r: Field tensor in the layout of the residual, `(*batch, n_owned)`, float64.

        Returns:
            The same shape.

        Raises:
            InvalidInput: On every rank, where r has another last axis.
            SolveFailed: On every rank, where a solver did not converge.

        MPI: Collective, forward and backward.
        """
        with raise_on_all(self._pde.comm):
            if r.ndim == 0 or r.shape[-1:] != self._shape or r.dtype is not torch.float64:
                raise InvalidInput(
                    f"PreconditionedResidual.apply: r has shape {tuple(r.shape)} and type {r.dtype}; its last axis must be "
                    f"{self._shape[0]}, as this rank owns so many rows, in float64."
                )
        return apply_linear(self._map(self._jacobian.solve), self._map(self._jacobian.solve_transposed), r)

    @staticmethod
    def _map(solve: Callable[[Array], Array]) -> Callable[[Tensor], Tensor]:
        def of_tensor(x: Tensor) -> Tensor:
            rows = as_numpy(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
            return torch.from_numpy(solve(rows).reshape(x.shape)).to(x.device)

        return of_tensor


def _checked(pde: WeakForm, reference: Sequence[Tensor], state: Tensor | None) -> list[Array | None]:
    """The reference as arrays. Not collective."""
    if state is None and not pde.is_linear:
        raise InvalidInput(
            "precondition: the form is not linear in its state, so that the Jacobian depends on it; give a reference state too, "
            "state=u0, such as that of Solve at the reference."
        )
    name, given = "precondition", list(pde.inputs)
    tensors: list[Tensor] = list(reference)
    batch, _ = plan(name, tensors, given)
    check_finite(name, tensors, given)
    if state is not None:
        batch = (*batch, *plan(name, [state], [pde.unknown])[0])
        check_finite(name, [state], [pde.unknown])
    if batch:
        raise InvalidInput("precondition: the reference has batch axes; there is one reference for all samples.")
    arrays = [as_numpy(x).reshape(-1) for x in tensors]
    return [None if state is None else as_numpy(state), *arrays]
