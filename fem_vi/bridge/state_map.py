"""Coordinates of a state: a few replicated numbers, such as the outputs of a network, to fields that keep Dirichlet conditions.

A map is affine, u = h(m) + offset + c E: c are the coordinates, `(*batch, size)`, the same on all ranks, the rows of E vanish at
the prescribed dofs, and h holds the prescribed values, those of inputs included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from fem_vi.arguments import instance, positive
from fem_vi.bridge.layout import all_sum, localise
from fem_vi.bridge.linear import apply_linear
from fem_vi.bridge.modes import combine
from fem_vi.errors import InvalidInput
from fem_vi.parallel import all_values, raise_on_all
from fem_vi.pde.fields import node_names
from fem_vi.pde.weak_form import WeakForm


class StateMap(Protocol):
    """From coordinates to fields and back."""

    @property
    def size(self) -> int:
        """Number of coordinates, on all ranks the same."""

    @property
    def log_volume(self) -> float:
        """Log of the volume that a unit cube of coordinates has among fields: log q(u) = log q(c) - log_volume."""

    @property
    def order(self) -> str:
        """What the order of the coordinates depends on, in words; empty where on nothing."""

    def lift(self, c: Tensor, *inputs: Tensor) -> Tensor:
        """The field of coordinates `(*batch, size)`, with the conditions of these inputs: `(*batch, n_owned)`. Collective."""

    def coordinates(self, u: Tensor) -> Tensor:
        """The coordinates of a field, or of what is nearest to it, `(*batch, size)`, replicated. Collective."""

    def deviation(self, q: Distribution) -> Tensor:
        """Pointwise standard deviation of the field whose coordinates are q's, `(*batch, n_owned)`. Collective."""


class _Map:
    """What both kinds share: the prescribed part of a field."""

    def __init__(self, pde: WeakForm, offset: Tensor | None) -> None:
        self._pde = pde
        self.comm = pde.comm
        n, owned = pde.unknown.size, torch.from_numpy(pde.boundary.owned.astype(np.int64))
        with raise_on_all(pde.comm):
            instance("offset", offset, Tensor, type(None))
            if offset is not None and offset.shape != (n,):
                raise InvalidInput(f"offset has shape {tuple(offset.shape)}; a field of the state has {n} owned entries here.")
            if offset is not None and not bool(offset.isfinite().all()):
                raise InvalidInput("offset contains values that are not finite.")
        free = torch.ones(n, dtype=torch.bool)
        free[owned] = False
        self._free = torch.nonzero(free).flatten()
        self._base = torch.zeros(n, dtype=torch.float64)
        if offset is not None:
            self._base[self._free] = offset.to(torch.float64)[self._free]
        self._base[owned] = torch.from_numpy(pde.boundary.fixed.copy())

    def _prescribed(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Offset and prescribed values, `(*batch, n_owned)` or `(n_owned,)`. Collective where values are inputs."""
        base = self._base
        for source in self._pde.boundary.sources:
            x = inputs[source.position]
            axes = x.shape[: x.ndim - len(source.input.shape)]
            flat = x.reshape(*axes, source.input.size)
            if not source.input.is_field:
                flat = localise(flat, self.comm)
            dofs, entries = (torch.from_numpy(k.astype(np.int64)) for k in source.owned)
            base = base.expand(*axes, -1) if base.ndim == 1 else base
            base = base.index_copy(-1, dofs, flat.index_select(-1, entries).to(torch.float64))
        return base


class _NodalMap(_Map):
    """c are the free coefficients, less an offset, in units of a scale."""

    def __init__(self, pde: WeakForm, given: Nodal) -> None:
        super().__init__(pde, given.offset)
        self._scale = given.scale
        self._positions, self.size, self.order = _positions(pde, self._free)
        self.log_volume = self.size * math.log(given.scale)

    def lift(self, c: Tensor, *inputs: Tensor) -> Tensor:
        placed = apply_linear(self._place, self._pick, localise(c, self.comm))
        return placed + self._prescribed(inputs)

    def _place(self, c: Tensor) -> Tensor:
        """Owned coefficients of coordinates `(*batch, size)`, zero where values are prescribed.

        With one batch axis, whole rows of the transpose are copied, which is also what lanes want: see `combine`.
        """
        return self._scale * _moved(c, self._positions, self._free, len(self._base))

    def _pick(self, g: Tensor) -> Tensor:
        """The adjoint of `_place`."""
        return self._scale * _moved(g, self._free, self._positions, self.size)

    def coordinates(self, u: Tensor) -> Tensor:
        own = (u - self._base).index_select(-1, self._free) / self._scale
        zero = own.new_zeros((*own.shape[:-1], self.size))
        return all_sum(zero.index_copy(-1, self._positions, own), self.comm)

    def deviation(self, q: Distribution) -> Tensor:
        own = self._scale * q.variance.sqrt().index_select(-1, self._positions)
        return own.new_zeros((*own.shape[:-1], len(self._base))).index_copy(-1, self._free, own)


class _ReducedMap(_Map):
    """c are coefficients of modes."""

    def __init__(self, pde: WeakForm, given: ReducedBasis) -> None:
        super().__init__(pde, given.offset)
        n = pde.unknown.size
        with raise_on_all(pde.comm):
            instance("modes", given.modes, Tensor)
            if given.modes.ndim != 2 or given.modes.shape[1] != n or len(given.modes) == 0:
                raise InvalidInput(f"modes have shape {tuple(given.modes.shape)}; expected (num_modes, {n}), {n} owned entries.")
            if not bool(given.modes.isfinite().all()):
                raise InvalidInput("modes contain values that are not finite.")
        self._modes = torch.zeros(given.modes.shape, dtype=torch.float64)
        self._modes[:, self._free] = given.modes.to(torch.float64)[:, self._free]
        self.size, self.order = len(self._modes), ""
        self._is_linear = not pde.boundary.sources and not bool(self._base.any())  # a field is its modes alone
        self._gram = all_sum(self._modes @ self._modes.T, self.comm)
        sign, logdet = torch.linalg.slogdet(self._gram)
        with raise_on_all(self.comm):
            if not (float(sign) > 0 and math.isfinite(float(logdet))):
                raise InvalidInput("modes are linearly dependent, once they vanish at the prescribed dofs. Leave some out.")
        self.log_volume = 0.5 * float(logdet)

    def lift(self, c: Tensor, *inputs: Tensor) -> Tensor:
        own = localise(c, self.comm)
        return combine(own, self._modes, None if self._is_linear else self._prescribed(inputs))

    def coordinates(self, u: Tensor) -> Tensor:
        moments = all_sum((u - self._base) @ self._modes.T, self.comm)
        rows = moments.reshape(-1, self.size)
        return torch.linalg.solve(self._gram, rows.T).T.reshape(moments.shape)

    def deviation(self, q: Distribution) -> Tensor:
        covariance = getattr(q, "covariance_matrix", None)
        if covariance is None:
            return (q.variance @ self._modes.square()).sqrt()
        return ((covariance @ self._modes) * self._modes).sum(-2).sqrt()


def _moved(x: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
    """Entries of the last axis at `source`, put at `target` of an axis of `size` zeros."""
    if x.ndim == 2:
        return x.new_zeros((size, len(x))).index_copy_(0, target, x.T.index_select(0, source)).T
    return x.new_zeros((*x.shape[:-1], size)).index_copy_(-1, target, x.index_select(-1, source))


@dataclass(frozen=True)
class Nodal:
    """Every free coefficient is a coordinate: u = offset + scale c wherever no value is prescribed.

    On scalar Lagrange spaces of degree one the order is that of the nodes in the mesh file, on any number of ranks; on other
    spaces it is DOLFINx's, which depends on the number of ranks.

    Attributes:
        scale: Size of what the state varies by, so that a network's outputs are about one.
        offset: Field tensor `(n_owned,)`, such as the state at a reference; None for zero.
    """

    scale: float = 1.0
    offset: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        positive("Nodal: scale", self.scale)

    def create(self, pde: WeakForm) -> StateMap:
        """The map for a weak form. Collective."""
        return _NodalMap(pde, self)


@dataclass(frozen=True)
class ReducedBasis:
    """The coordinates are coefficients of some modes: u = offset + sum_k c_k mode_k wherever no value is prescribed.

    Attributes:
        modes: Field tensors, `(num_modes, n_owned)`; what they have at prescribed dofs does not count.
        offset: Field tensor `(n_owned,)`; None for zero.
    """

    modes: Tensor = field(repr=False)
    offset: Tensor | None = field(default=None, repr=False)

    def create(self, pde: WeakForm) -> StateMap:
        """The map for a weak form. Collective."""
        return _ReducedMap(pde, self)


def _positions(pde: WeakForm, free: Tensor) -> tuple[Tensor, int, str]:
    """The coordinate of each owned free dof, how many there are on all ranks, and what that order depends on. Collective."""
    names, order = _dof_names(pde)
    own = names[free.numpy()]
    everyone = np.sort(np.concatenate(all_values(pde.comm, own)))
    return torch.from_numpy(np.searchsorted(everyone, own).astype(np.int64)), len(everyone), order


def _dof_names(pde: WeakForm) -> tuple[Any, str]:
    """A number for each owned dof; see `Nodal`."""
    V = pde.space
    element = V.ufl_element()
    family = getattr(getattr(element, "element_family", None), "name", "")
    if family == "P" and element.degree == 1 and not element.discontinuous and element.block_size == 1:
        return node_names(V), ""
    bs = V.dofmap.index_map_bs
    first, last = (bs * k for k in V.dofmap.index_map.local_range)
    return np.arange(first, last), f"{pde.comm.size} ranks"
