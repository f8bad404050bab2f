"""`CompiledKernel`: the residual and its derivatives by C code of one's own, all samples of a batch at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import ufl
from dolfinx import fem

from fem_vi.errors import InvalidInput, UnsupportedForm
from fem_vi.pde._compat_ffcx import ENTITY_WIDTHS
from fem_vi.pde.batch_form import BatchForm, KernelMesh, Values, empty_like
from fem_vi.pde.block_gradient import block_gradient
from fem_vi.pde.coordinates import CoordinateInput
from fem_vi.pde.inputs import Array
from fem_vi.pde.kernels import BatchKernel, Samples
from fem_vi.pde.tangent import Tangent
from fem_vi.pde.weak_form import WeakForm


@dataclass(frozen=True)
class CompiledKernel:
    """C code for many samples at once, made of what FFCx generates for the form and its derivatives.

    Each SIMD lane of the processor works on a sample of its own, so that a cell's geometry, its tables and its dofs are read once
    for several samples; threads share the samples out. Code is compiled when it is first needed and kept on disk, beside FFCx's.
    Memory for one to four blocks of samples is kept for each thread. Fields whose samples lie side by side in memory, transposes
    of `(n, batch)` with a batch of whole blocks (a multiple of eight will do), are read and written where they are: quickest.

    Args:
        num_threads: Threads of each rank; the environment variable OMP_NUM_THREADS when None, else one. The numbers do not
            depend on it.

    Raises:
        InvalidInput: Where `num_threads` is not a positive number.
    """

    num_threads: int | None = None

    def __post_init__(self) -> None:
        given = self.num_threads
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise InvalidInput(f"num_threads is {given!r}; it must be a positive integer, or None for OMP_NUM_THREADS.")

    def create(self, pde: WeakForm) -> BatchKernel:
        """See `Kernel.create`.

        Raises:
            UnsupportedForm: Naming what this kernel cannot take.
            CompilerFailed: Where there is no C compiler.
        """
        kernel = CompiledResidual(pde, self.num_threads or threads_of_environment())
        kernel.compile_residual()
        return kernel


def threads_of_environment() -> int:
    """The number in the environment variable OMP_NUM_THREADS, else one."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return max(1, int(given)) if given.isdecimal() else 1


def _check(pde: WeakForm) -> None:
    for given in pde.inputs:
        if isinstance(given, CoordinateInput):
            raise UnsupportedForm(
                f"CompiledKernel cannot take {given.label}: the coordinates of the mesh are the same for all of its samples. "
                "Use fem_vi.AssembledKernel()."
            )
    for integral in pde.form.integrals():
        if integral.integral_type() not in ENTITY_WIDTHS:
            raise UnsupportedForm(
                f"CompiledKernel cannot integrate over {integral.integral_type()} entities, as in {integral}; it takes integrals "
                "over cells, exterior and interior facets. Use fem_vi.AssembledKernel()."
            )


class CompiledResidual(BatchKernel):
    """The kernel that `CompiledKernel` creates; each of its maps is compiled when it is first asked for.

    Args:
        pde: The weak form.
        num_threads: Threads of each rank.

    Raises:
        UnsupportedForm: On every rank, here or where a map is first asked for, naming what has no translation.
        CompilerFailed: Where there is no C compiler.

    Attributes:
        mesh: What its forms have in common.
    """

    takes_columns = True

    def __init__(self, pde: WeakForm, num_threads: int) -> None:
        _check(pde)
        self._pde = pde
        self._given = [pde.unknown, *pde.inputs]
        self._lam = fem.Function(pde.space)
        self.mesh = KernelMesh(pde.space.mesh, pde.form, num_threads)
        self._gradients: dict[tuple[int, ...], tuple[list[int], BatchForm | None]] = {}

    def _create(self, form: ufl.Form, blocks: Sequence[Any]) -> BatchForm | None:
        zeros = {self._lam: self._pde.boundary.dofs}
        return None if form.empty() else BatchForm(form, blocks, self._pde.fixed, self.mesh, zeros)

    def compile_residual(self) -> None:
        """Compile the residual now. Collective."""
        self._residual  # noqa: B018 - cached

    def compile_vjp(self, wanted: tuple[int, ...]) -> None:
        """Compile the gradients for the state, number 0, and the inputs, from 1, that are wanted. Collective."""
        if wanted not in self._gradients:
            self._gradients[wanted] = self._gradient(self._scalar, wanted)

    @cached_property
    def _residual(self) -> BatchForm | None:
        return self._create(self._pde.form, [self._pde.unknown])

    @cached_property
    def _tangent(self) -> Tangent:
        return Tangent(self._pde.form, self._given)

    @cached_property
    def _jvp(self) -> BatchForm | None:
        return self._create(self._tangent.form, [self._pde.unknown])

    @cached_property
    def _scalar(self) -> ufl.Form:
        return ufl.replace(self._pde.form, {self._pde.test: self._lam})

    @cached_property
    def _curvature(self) -> tuple[list[int], BatchForm | None]:
        return self._gradient(self._tangent.derivative(self._scalar), range(len(self._given)))

    def _gradient(self, form: ufl.Form, positions: Sequence[int]) -> tuple[list[int], BatchForm | None]:
        """The gradient of a 0-form for some of the inputs, and for which of them it is not zero."""
        found = [] if form.empty() else [k for k in positions if self._given[k].occurs_in(form)]
        if not found:
            return [], None
        blocks = [self._given[k] for k in found]
        return found, self._create(block_gradient(form, blocks), blocks)

    def _values(self, at: Samples, tangents: Sequence[Array] = (), lam: Array | None = None) -> dict[Any, Values]:
        values = {given.symbol: Values(x, rows) for given, x, rows in zip(self._given, at.values, at.rows, strict=True)}
        if tangents:
            for symbol, x, rows in zip(self._tangent.symbols, tangents, at.rows, strict=True):
                values[symbol] = Values(x, rows)
        if lam is not None:
            values[self._lam] = Values(lam, np.arange(at.num))
        return values

    @cached_property
    def checks(self) -> frozenset[int]:
        """See `BatchKernel.checks`."""
        form = self._residual
        return frozenset(k for k, given in enumerate(self._given) if form is not None and form.reads(given.symbol))

    def residual(self, at: Samples) -> tuple[Array, bool]:
        """See `BatchKernel.residual`."""
        out = empty_like(at.values[0], (at.num, self._pde.unknown.size))
        if self._residual is None:
            out.fill(0.0)
            return out, True
        return out, self._residual.write_checked(at.num, self._values(at), [Values(out, np.arange(at.num))])

    def vjp(self, at: Samples, lam: Array, grads: Sequence[Array | None]) -> None:
        """See `BatchKernel.vjp`."""
        wanted = tuple(k for k, grad in enumerate(grads) if grad is not None)
        self.compile_vjp(wanted)
        self._write(at, self._gradients[wanted], self._values(at, lam=lam), grads)

    def jvp(self, at: Samples, tangents: Sequence[Array]) -> Array:
        """See `BatchKernel.jvp`."""
        out = empty_like(at.values[0], (at.num, self._pde.unknown.size))
        if self._jvp is None:
            out.fill(0.0)
        else:
            self._jvp.write(at.num, self._values(at, tangents), [Values(out, np.arange(at.num))])
        return out

    def curvature(self, at: Samples, lam: Array, tangents: Sequence[Array], grads: Sequence[Array]) -> None:
        """See `BatchKernel.curvature`."""
        self._write(at, self._curvature, self._values(at, tangents, lam), grads)

    def _write(
        self, at: Samples, gradient: tuple[list[int], BatchForm | None], values: dict[Any, Values], grads: Sequence[Array | None]
    ) -> None:
        positions, form = gradient
        for k, grad in enumerate(grads):
            if grad is not None and k not in positions:
                grad.fill(0.0)
        if form is not None:
            form.write(at.num, values, [Values(grads[k], at.rows[k]) for k in positions])  # type: ignore[arg-type]
