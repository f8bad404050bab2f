"""w . r for weights w: an integral of one test function w in place of all of r."""

from __future__ import annotations

from typing import Any

import torch
import ufl
from dolfinx import fem
from torch import Tensor

from fem_vi.bridge.call import plan
from fem_vi.bridge.functional import Functional
from fem_vi.bridge.layout import all_sum, localise
from fem_vi.parallel import any_rank, raise_on_all
from fem_vi.pde.coordinates import CoordinateInput
from fem_vi.pde.inputs import Input
from fem_vi.pde.weak_form import WeakForm


class _WeightedForm(Functional):
    """F(u, m; w) as a function of w, u and those inputs that occur in it."""

    def __init__(self, pde: WeakForm, positions: tuple[int, ...]) -> None:
        w = fem.Function(pde.space, name="w")
        given: list[Input] = [pde.unknown, *(pde.inputs[k] for k in positions)]
        symbols = [source.given if isinstance(source, CoordinateInput) else source.symbol for source in given]
        super().__init__(ufl.replace(pde.form, {pde.test: w}), [w, *symbols])
        self._pde = pde
        for copy, label in zip(self._copies, ["w", *(source.label for source in given)], strict=True):
            copy.label = label

    @property
    def _name(self) -> str:
        return "Residual.weighted"

    def _check_state(self) -> None:
        self._pde.check_fixed()


class WeightedResidual:
    """w . r(u, m, ...) = F(u, m; w) + sum of w_i (u - h)_i over the prescribed dofs, where F takes w as zero there.

    Args:
        pde: The weak form.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm) -> None:
        self._pde = pde
        positions = pde.occurs_in(pde.form)
        self._form = _WeightedForm(pde, positions)
        self._positions = positions
        self._prescribed = torch.from_numpy(pde.boundary.owned.astype("int64"))
        self._free = torch.ones(pde.unknown.size, dtype=torch.float64)
        self._free[self._prescribed] = 0.0
        self._has_boundary = any_rank(pde.comm, pde.boundary.owned.size > 0)

    def __call__(self, w: Tensor, u: Tensor, *inputs: Tensor) -> Tensor:
        """See `Residual.weighted`. Collective."""
        pde = self._pde
        with raise_on_all(pde.comm):
            plan("Residual.weighted", (w, u, *inputs), [self._form.inputs[0], pde.unknown, *pde.inputs])
        used = [inputs[k] for k in self._positions]
        if not self._has_boundary:
            return self._form(w, u, *used)
        inside = self._form(w * self._free.to(w), u, *used)
        return inside + self._on_boundary(*(x.to(inside) for x in (w, u, *inputs)))

    def _on_boundary(self, w: Tensor, u: Tensor, *inputs: Tensor) -> Tensor:
        dofs, boundary = self._prescribed.to(w.device), self._pde.boundary
        gap = u[..., dofs] - torch.from_numpy(boundary.fixed).to(w)
        total: Any = (w[..., dofs] * gap).sum(-1)
        for source in boundary.sources:
            at, entries = (torch.from_numpy(x.astype("int64")).to(w.device) for x in source.owned)
            h = inputs[source.position]
            if not source.input.is_field:
                shape = source.input.shape
                h = localise(h, self._pde.comm).reshape(*h.shape[: h.ndim - len(shape)], source.input.size)
            total = total - (w[..., at] * h[..., entries]).sum(-1)
        return all_sum(total, self._pde.comm)
