"""What a state equation evaluates for many samples at once, by C code of its own: Jacobians, right-hand sides and gradients.

The code is compiled when a batch with more than a `FEW` samples first asks for it. Where there is none, because the form has no
translation or the machine no compiler, DOLFINx assembles for one sample after another. The numbers are the same, up to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np

from fem_vi.errors import CompilerFailed, UnsupportedForm
from fem_vi.pde.batch_form import Values
from fem_vi.pde.batch_matrix import AT_ONCE, BatchMatrix
from fem_vi.pde.compiled import CompiledResidual, threads_of_environment
from fem_vi.pde.inputs import Array
from fem_vi.pde.kernels import Rows, Samples
from fem_vi.pde.matrix import Assemble, assemble_loaded
from fem_vi.pde.state import Systems
from fem_vi.pde.weak_form import WeakForm

T = TypeVar("T")

FEW = 4  # samples that DOLFINx assembles for


class Jacobians(Protocol):
    """The Jacobians of some samples."""

    def assembler(self, number: int) -> Assemble:
        """What assembles the Jacobian of one of them, whose inputs and state are loaded."""


class LoadedJacobians:
    """Assembled by DOLFINx, at what is loaded."""

    def assembler(self, number: int) -> Assemble:
        """See `Jacobians.assembler`."""
        return assemble_loaded


class BatchedJacobians:
    """Evaluated some at a time, with those beside one that is asked for.

    Args:
        matrix: The compiled Jacobian.
        values: For each Function and Constant that varies, its values, and the row that each sample reads.
        num: How many there are.
    """

    def __init__(self, matrix: BatchMatrix, values: Mapping[Any, Values], num: int) -> None:
        self._matrix = matrix
        self._values = values
        self._num = num
        self._first = num
        self._entries: Array = np.empty((0, 0))

    def assembler(self, number: int) -> Assemble:
        """See `Jacobians.assembler`; nothing need be loaded."""
        return lambda matrix: matrix.write(self._row(number))

    def _row(self, number: int) -> Array:
        first = number - number % AT_ONCE
        if first != self._first:
            last = min(first + AT_ONCE, self._num)
            given = {symbol: Values(x.values, x.rows[first:last]) for symbol, x in self._values.items()}
            self._entries, self._first = self._matrix.values(last - first, given), first
        return self._entries[number - first]  # type: ignore[no-any-return]


class SampleKernels:
    """The compiled kernels of a weak form's state equation.

    Args:
        pde: The weak form.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm) -> None:
        self._pde = pde
        self._gradients: dict[tuple[int, ...], bool] = {}

    @cached_property
    def _kernel(self) -> CompiledResidual | None:
        return _unless_refused(lambda: CompiledResidual(self._pde, threads_of_environment()))

    @cached_property
    def _matrix(self) -> BatchMatrix | None:
        pde, kernel = self._pde, self._kernel
        if kernel is None:
            return None
        return _unless_refused(lambda: BatchMatrix(pde.jacobian, pde.boundary, pde.fixed, kernel.mesh))

    @cached_property
    def _has_residual(self) -> bool:
        kernel = self._kernel
        return kernel is not None and _compiles(kernel.compile_residual)

    def take(self, num: int) -> bool:
        """Whether so many samples are worth the time that a compiler takes. Not collective."""
        return num > FEW

    def jacobians(self, num: int, flat: Sequence[Array], rows: Sequence[Rows], states: Array | None) -> Jacobians:
        """The Jacobians of some samples.

        Args:
            num: How many there are; see `take`.
            flat: The values of each input, `(num_rows, size)`.
            rows: For each input the row that each sample reads.
            states: For a form that is not linear, the states, `(num, n_owned)`.

        MPI: Collective.
        """
        if self._matrix is None:
            return LoadedJacobians()
        values = {given.symbol: Values(x, own) for given, x, own in zip(self._pde.inputs, flat, rows, strict=True)}
        if states is not None:
            values[self._pde.state] = Values(states, np.arange(num))
        return BatchedJacobians(self._matrix, values, num)

    def systems(self, num: int, flat: Sequence[Array], rows: Sequence[Rows]) -> Systems | None:
        """What is to be solved for the samples of a linear form: b = -F(u_D); None where there is no code for it.

        Args:
            num: How many there are.
            flat: The values of each input, `(num_rows, size)`.
            rows: For each input the row that each sample reads.

        MPI: Collective.
        """
        if not self.take(num) or not self._has_residual:
            return None
        assert self._kernel is not None
        boundary, size = self._pde.boundary, self._pde.unknown.size
        lifting = np.zeros((1 if boundary.homogeneous else num, size))
        lifting[:, boundary.owned] = boundary.fixed
        for source in boundary.sources:
            dofs, entries = source.owned
            lifting[:, dofs] = flat[source.position][rows[source.position]][:, entries]
        at = Samples([lifting, *flat], [np.arange(num) % len(lifting), *rows])
        b = -self._kernel.residual(at)[0]
        b[:, boundary.owned] = 0.0
        return Systems(None if boundary.homogeneous else lifting, b)

    def add_implicit(self, at: Samples, g: Array, lam: Array, grads: Sequence[Array | None]) -> bool:
        """`ResidualVjp.add_implicit` for many samples.

        Args:
            at: States and inputs; no two samples read the same state.
            g: Cotangents dL/du of the states, `(num_rows, n_owned)`.
            lam: (dF/du)^-T g of the samples, `(num_samples, n_owned)`.
            grads: For each input, what its gradient is added to, in the rows that the samples read; None where it is not wanted.

        Returns:
            Whether there is code for it; where there is none, nothing has been added.

        MPI: Collective.
        """
        if not self.take(at.num) or not self._has_gradients(grads):
            return False
        wanted = [grad is not None for grad in grads]
        if at.num == len(g):
            for grad, part in zip(grads, self._implicit(at, g, lam, wanted), strict=True):
                if grad is not None and part is not None:
                    grad += part
            return True
        # Some samples have no state: what is left of them reads rows of its own, of which no two are the same.
        alone = Samples([x[rows] for x, rows in zip(at.values, at.rows, strict=True)], [np.arange(at.num)] * len(at.rows))
        parts = self._implicit(alone, g[at.rows[0]], lam, wanted)
        for grad, part, rows in zip(grads, parts, at.rows[1:], strict=True):
            if grad is not None and part is not None:
                np.add.at(grad, rows, part)
        return True

    def _implicit(self, at: Samples, g: Array, lam: Array, wanted: Sequence[bool]) -> list[Array | None]:
        """The gradients that are wanted, in the shape of the values of the inputs."""
        assert self._kernel is not None
        parts = [np.empty(x.shape) if want else None for x, want in zip(at.values[1:], wanted, strict=True)]
        at_state = np.empty(g.shape) if self._prescribe(parts) else None
        self._kernel.vjp(at, -lam, [at_state, *parts])
        if at_state is None:
            return parts
        at_state += g
        for source in self._pde.boundary.sources:
            part = parts[source.position]
            if part is not None:
                np.add.at(part, at.rows[1 + source.position], source.gradient(at_state, self._pde.comm))
        return parts

    def _prescribe(self, grads: Sequence[Array | None]) -> bool:
        """Whether one of the inputs whose gradients are wanted holds values on the boundary."""
        return any(grads[source.position] is not None for source in self._pde.boundary.sources)

    def _has_gradients(self, grads: Sequence[Array | None]) -> bool:
        """Whether there is code for the gradients of the inputs that are wanted. Collective."""
        inputs = tuple(1 + k for k, grad in enumerate(grads) if grad is not None)
        wanted = (0, *inputs) if self._prescribe(grads) else inputs
        kernel = self._kernel
        if kernel is None:
            return False
        if wanted not in self._gradients:
            self._gradients[wanted] = _compiles(lambda: kernel.compile_vjp(wanted))
        return self._gradients[wanted]


def _unless_refused(create: Callable[[], T]) -> T | None:
    """What is created; None where there is no code for it, on all ranks alike. Collective."""
    try:
        return create()
    except UnsupportedForm:
        return None
    except CompilerFailed as error:
        warnings.warn(f"Samples are evaluated one after another, which takes longer: {error}", stacklevel=2)
        return None


def _compiles(work: Callable[[], None]) -> bool:
    """Whether there is code for something. Collective."""

    def compiled() -> bool:
        work()
        return True

    return _unless_refused(compiled) is not None
