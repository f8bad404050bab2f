"""Kernels: who evaluates the integrals of a residual and of its derivatives, for all samples of a call at once.

A kernel is chosen by a frozen dataclass, such as `AssembledKernel()`, whose `create` builds what evaluates one weak form.
A `BatchKernel` works on NumPy arrays. Of Dirichlet conditions it knows only that what is prescribed has no test function: with
r_i = F(u, m; phi_i), at all dofs, and lam zero at the prescribed ones,

    residual      x -> r                       vjp        lam -> lam . dr/dx
    jvp           dx -> dr/dx . dx             curvature  lam, dx -> d/dx (lam . dr/dx . dx)

where x stands for the state and the inputs together. All kernels give the same numbers, up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fem_vi.pde.adjoint import ResidualVjp
from fem_vi.pde.assemble import VectorForm
from fem_vi.pde.inputs import Array
from fem_vi.pde.region import Region
from fem_vi.pde.tangent import ResidualTangent
from fem_vi.pde.weak_form import WeakForm

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Samples:
    """The values of a state and of inputs for some samples; samples may share rows.

    Attributes:
        values: For the state and then for each input, `(num_rows, size)`: owned coefficients, or entries of a Constant.
        rows: For each of them, the row of its values that each sample reads, `(num_samples,)`.
    """

    values: Sequence[Array]
    rows: Sequence[Rows]

    @property
    def num(self) -> int:
        """The number of samples."""
        return len(self.rows[0])

    def one(self, sample: int) -> list[Array]:
        """The values that one sample reads."""
        return [values[rows[sample]] for values, rows in zip(self.values, self.rows, strict=True)]


class BatchKernel(ABC):
    """A weak form's integrals, for all samples of a call at once.

    MPI: All methods are collective. Fields are owned; what is given for a Constant is replicated, and what comes back for it
        is replicated and complete.

    Attributes:
        takes_columns: Whether it wants values as they are where the samples of each entry follow each other in memory; otherwise
            each row is contiguous.
    """

    takes_columns: bool = False

    @property
    def checks(self) -> frozenset[int]:
        """Which values `residual` looks at, by position in `Samples`."""
        return frozenset()

    @abstractmethod
    def residual(self, at: Samples) -> tuple[Array, bool]:
        """F(u, m; phi_i), `(num_samples, n_owned)`, and whether that and the values in `checks` are known to be finite here."""

    @abstractmethod
    def vjp(self, at: Samples, lam: Array, grads: Sequence[Array | None]) -> None:
        """Write lam . dr/dx to `grads`.

        Args:
            at: Where.
            lam: `(num_samples, n_owned)`; what it is at prescribed dofs does not matter.
            grads: For the state and each input, in the shape of its values, what each sample's gradient is written to, in the
                row that the sample reads, those of several samples added up; None where it is not wanted.
        """

    @abstractmethod
    def jvp(self, at: Samples, tangents: Sequence[Array]) -> Array:
        """dr/dx . dx, `(num_samples, n_owned)`, for tangents in the shapes of the values, read by the same rows."""

    @abstractmethod
    def curvature(self, at: Samples, lam: Array, tangents: Sequence[Array], grads: Sequence[Array]) -> None:
        """Write d/dx (lam . dr/dx . dx) to `grads`; arguments as in `vjp` and `jvp`."""


class Kernel(Protocol):
    """The choice of a kernel."""

    def create(self, pde: WeakForm) -> Any:
        """What evaluates the residual of a weak form: a `BatchKernel`, or a function of tensors `(u, *inputs)`. Collective."""


@dataclass(frozen=True)
class AssembledKernel:
    """DOLFINx assembles, one sample after another: takes every form that DOLFINx takes, and is what others are held against."""

    def create(self, pde: WeakForm) -> BatchKernel:
        """See `Kernel.create`."""
        return AssembledResidual(pde)


class AssembledResidual(BatchKernel):
    """The kernel that `AssembledKernel` creates.

    Args:
        pde: The weak form.
        region: The part of the mesh that is visited; all of it, where this is None.
    """

    def __init__(self, pde: WeakForm, region: Region | None = None) -> None:
        self._given = [pde.unknown, *pde.inputs]
        self._pde = pde
        self._region = region
        self._form = VectorForm(pde.form, region)
        self._vjp = ResidualVjp(pde, region=region)

    @cached_property
    def _tangent(self) -> ResidualTangent:
        return ResidualTangent(self._pde, self._region)

    def _load(self, at: Samples, sample: int) -> None:
        for given, values in zip(self._given, at.one(sample), strict=True):
            given.load(values)

    def _tested(self, lam: Array) -> Array:
        """One sample's lam, zero where there is no test function."""
        tested = lam.copy()
        tested[self._pde.boundary.owned] = 0.0
        return tested

    def residual(self, at: Samples) -> tuple[Array, bool]:
        """See `BatchKernel.residual`."""
        out = np.empty((at.num, self._pde.unknown.size))
        for sample in range(at.num):
            self._load(at, sample)
            out[sample] = self._form.assemble()
        return out, False

    def vjp(self, at: Samples, lam: Array, grads: Sequence[Array | None]) -> None:
        """See `BatchKernel.vjp`."""
        wanted = [k for k, grad in enumerate(grads) if grad is not None and (k == 0 or k - 1 in self._vjp.inputs)]
        _clear(grads)
        for sample in range(at.num):
            self._load(at, sample)
            self._vjp.load(self._tested(lam[sample]))
            for k in wanted:
                part = self._vjp.state() if k == 0 else self._vjp.input(k - 1)
                grads[k][at.rows[k][sample]] += part  # type: ignore[index]

    def jvp(self, at: Samples, tangents: Sequence[Array]) -> Array:
        """See `BatchKernel.jvp`."""
        out = np.empty((at.num, self._pde.unknown.size))
        along = Samples(tangents, at.rows)
        for sample in range(at.num):
            self._load(at, sample)
            du, *dm = along.one(sample)
            self._tangent.load(du, dm)
            out[sample] = self._tangent.vector()
        return out

    def curvature(self, at: Samples, lam: Array, tangents: Sequence[Array], grads: Sequence[Array]) -> None:
        """See `BatchKernel.curvature`."""
        along = Samples(tangents, at.rows)
        _clear(grads)
        for sample in range(at.num):
            self._load(at, sample)
            du, *dm = along.one(sample)
            self._tangent.load(du, dm)
            self._tangent.load_test(self._tested(lam[sample]))
            for k, grad in enumerate(grads):
                grad[at.rows[k][sample]] += self._tangent.gradient(k)


def _clear(grads: Sequence[Array | None]) -> None:
    for grad in grads:
        if grad is not None:
            grad.fill(0.0)
