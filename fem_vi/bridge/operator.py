"""What all differentiable operators share: checked inputs, batch axes that broadcast, and saved state for each call.

An operator is a function of tensors. Each call saves what its backward needs on its own graph node; nothing is read
from "the last call". `fem_vi.bridge.derivatives` tells torch how its maps compose.
"""

from __future__ import annotations

import itertools
import math
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor
from torch.autograd import forward_ad

from fem_vi.bridge.batch import Argument
from fem_vi.bridge.call import Call, check_finite, is_finite, plan
from fem_vi.bridge.derivatives import apply
from fem_vi.bridge.layout import as_numpy
from fem_vi.errors import InvalidInput, NotFinite, UnsupportedDerivative
from fem_vi.parallel import all_values, any_rank, any_rank_each, raise_on_all
from fem_vi.pde.coordinates import CoordinateInput
from fem_vi.pde.inputs import Array, FrozenMesh

_calls = itertools.count()
_one_at_a_time = threading.RLock()  # PETSc is not safe for threads, and operators write to Functions of their own


@dataclass(frozen=True)
class Bend:
    """What a curvature is taken of, each `(num_samples, n_out)`, and the tangents of the inputs, row by row as the inputs."""

    lam: Array
    out: Array
    out_dot: Array
    tangents: list[Array]


class BatchedOperator(ABC):
    """A differentiable function y = f(x) of field tensors and replicated tensors, evaluated sample by sample.

    A subclass gives f and three maps that torch composes to every first and second derivative:

        pullback      g -> g . df/dx
        pushforward   dx -> df/dx . dx
        curvature     lam, dx -> d/dx (lam . df/dx . dx)

    Args:
        mesh: DOLFINx mesh that it is built on.
        inputs: What the operator takes, in order.
        output_shape: Shape of one sample's output.
    """

    def __init__(self, mesh: Any, inputs: Sequence[Argument], output_shape: tuple[int, ...]) -> None:
        self.comm: MPI.Comm = mesh.comm
        self._mesh = FrozenMesh(mesh)
        self.inputs = tuple(inputs)
        self._output_shape = output_shape
        self._output_size = math.prod(output_shape)
        self._moving = [(k, given) for k, given in enumerate(self.inputs) if isinstance(given, CoordinateInput)]

    @abstractmethod
    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        """Outputs of all samples, `(num_samples, n_out)`. Collective."""

    @abstractmethod
    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> Array:
        """The pullback: add each sample's gradients to `grads[k][call.rows[k][sample]]`. Collective.

        Returns:
            lam, `(num_samples, n_out)`: what `_curvature` is to be given in place of g.
        """

    def _pushforward(self, call: Call, flat: Sequence[Array], out: Array, tangents: Sequence[Array]) -> Array:
        """Tangents of the outputs, `(num_samples, n_out)`, for tangents of the inputs, row by row as the inputs. Collective."""
        raise self.refusal("first derivatives in reverse mode only")

    def _curvature(self, call: Call, flat: Sequence[Array], bend: Bend, at_out: Array, grads: Sequence[Array]) -> None:
        """Add the derivatives of lam . df/dx . dx: for the inputs to `grads`, for the output to `at_out`.

        An implicit function takes its output for an independent variable here; an explicit one has nothing to add to
        `at_out`. Collective.
        """
        raise self.refusal("first derivatives in reverse mode only")

    @abstractmethod
    def _check_state(self) -> None:
        """Refuse to run where what was fixed has changed. Not collective."""

    def _check_values(self, inputs: Sequence[Tensor]) -> None:
        """Refuse inputs that are not finite, here or in `_forward`. Not collective."""
        check_finite(self._name, inputs, self.inputs)

    def _create_grad(self, x: Array) -> Array:
        """What the gradient of an input is added to."""
        return np.zeros_like(x)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Evaluate.

        Args:
            inputs: One tensor for each input: `(*batch, n_owned)` for a Function, `(*batch, *shape)` replicated for a
                Constant. Batch axes broadcast. float32 is cast to float64; a CUDA tensor is copied to the host and the
                result back to its device.

        Returns:
            float64, batch axes first.

        Raises:
            InvalidInput: On every rank, before any work: wrong number, shape or type, values that are not finite, batch
                axes that do not broadcast or differ between ranks.

        MPI: Collective.
        """
        keep = torch.is_grad_enabled() and any(_is_differentiated(x) for x in inputs)
        if all(not isinstance(x, Tensor) or (x.is_cpu and x.dtype is not torch.float32) for x in inputs):
            return apply(self, keep, inputs)
        device = next((x.device for x in inputs if isinstance(x, Tensor) and not x.is_cpu), torch.device("cpu"))
        return apply(self, keep, [_on_host(x) for x in inputs]).to(device)

    def evaluate(self, keep: bool, inputs: Sequence[Tensor]) -> tuple[Call, Tensor]:
        """Check the inputs and evaluate f. Collective."""
        with raise_on_all(self.comm):
            self._mesh.check_unchanged()
            self._check_state()
            batch, rows = plan(self._name, inputs, self.inputs)
            self._check_values(inputs)
        self._check_ranks(batch, inputs)
        call = Call(next(_calls), batch, rows, keep)
        flat = self._flat(call, inputs)
        if self._moving:
            self._exclusively(self._check_cells, flat)
        values = self._exclusively(self._forward, call, flat)
        return call, torch.from_numpy(values.reshape((*batch, *self._output_shape)))

    def pull_back(
        self, call: Call, g: Tensor, out: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Array, list[Tensor | None]]:
        """lam, `(num_samples, n_out)`, and the gradients of the inputs that want one, each in its shape. Collective."""
        self._check_mesh()
        flat = self._flat(call, inputs)
        grads = [self._create_grad(x) if want else None for x, want in zip(flat, wanted, strict=True)]
        lam = self._exclusively(self._backward, call, flat, self._rows(call, out), self._rows(call, g), grads)
        return lam, [
            None if row is None else torch.from_numpy(row.reshape(x.shape)) for row, x in zip(grads, inputs, strict=True)
        ]

    def push_forward(self, call: Call, out: Tensor, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
        """The tangent of the output. Collective."""
        self._check_mesh()
        values = self._exclusively(
            self._pushforward, call, self._flat(call, inputs), self._rows(call, out), self._flat(call, tangents)
        )
        return torch.from_numpy(values.reshape(out.shape))

    def bend(
        self, call: Call, lam: Tensor, out: Tensor, out_dot: Tensor, inputs: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The curvature: for the output, and for all inputs. Collective."""
        self._check_mesh()
        flat = self._flat(call, inputs)
        grads = [self._create_grad(x) for x in flat]
        bend = Bend(self._rows(call, lam), self._rows(call, out), self._rows(call, out_dot), self._flat(call, tangents))
        at_out = np.zeros_like(bend.out)
        self._exclusively(self._curvature, call, flat, bend, at_out, grads)
        return (
            torch.from_numpy(at_out.reshape(out.shape)),
            [torch.from_numpy(row.reshape(x.shape)) for row, x in zip(grads, inputs, strict=True)],
        )

    def _exclusively(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run what writes to Functions of its own, one thread at a time; a mesh that it moves is moved back."""
        with _one_at_a_time:
            try:
                return work(*args)
            finally:
                for _, given in self._moving:
                    given.restore()

    def _check_cells(self, flat: Sequence[Array]) -> None:
        """Refuse coordinates that turn cells inside out. Collective."""
        for position, given in self._moving:
            for values in flat[position]:
                given.load(values)
                with raise_on_all(self.comm):
                    given.check_cells()

    def call(self, inputs: Sequence[Tensor]) -> Call:
        """The plan of a call whose inputs have been checked, each by itself; its samples may be differentiated. Collective."""
        batch, rows = plan(self._name, inputs, self.inputs)
        self._check_batch(batch)
        return Call(next(_calls), batch, rows, keep=True)

    def _check_finite(self, out: Array) -> None:
        """Refuse outputs, `(num_samples, n_out)`, that are not finite. Collective."""
        if any_rank(self.comm, not is_finite(out)):
            wrong = np.flatnonzero(any_rank_each(self.comm, np.any(~np.isfinite(out), axis=1)))
            raise NotFinite(f"{self._name}: the form has no finite value for samples {wrong[:10].tolist()} of {len(out)}.")

    def _check_mesh(self) -> None:
        with raise_on_all(self.comm):
            self._mesh.check_unchanged()

    def _flat(self, call: Call, tensors: Sequence[Tensor]) -> list[Array]:
        """The values of each input, or of its tangent, one row for each sample that it has."""
        flat = call.flat(tensors, self.inputs)
        return flat if self._takes_columns else [np.ascontiguousarray(x) for x in flat]

    def _rows(self, call: Call, out: Tensor) -> Array:
        """The values of a tensor in the shape of the output, one row for each sample."""
        rows = as_numpy(out).reshape(call.num_samples, self._output_size)
        return rows if self._takes_columns else np.ascontiguousarray(rows)

    @property
    def _takes_columns(self) -> bool:
        """Whether values may be given as they are where the samples of each entry follow each other in memory."""
        return False

    @property
    def _name(self) -> str:
        return type(self).__name__

    def refusal(self, what: str) -> UnsupportedDerivative:
        """The error for a derivative that is not there; `what` says what is."""
        return UnsupportedDerivative(
            f"{self._name} has {what}; another derivative was asked for. Detach what is not to be differentiated again."
        )

    def _check_ranks(self, batch: tuple[int, ...], inputs: Sequence[Tensor]) -> None:
        """Refuse batches, or values of Constants, that differ between ranks. Collective."""
        if self.comm.size == 1:
            return
        constants = [as_numpy(x).tobytes() for x, given in zip(inputs, self.inputs, strict=True) if not given.is_field]
        self._check_batch(batch)
        if not constants:
            return
        seen = all_values(self.comm, [zlib.crc32(values) for values in constants])
        if any(other != seen[0] for other in seen):
            raise InvalidInput(
                f"{self._name}: the values of a Constant differ between ranks; they must be replicated. Seed all ranks alike."
            )

    def _check_batch(self, batch: tuple[int, ...]) -> None:
        """Refuse batches that differ between ranks. Collective."""
        seen = all_values(self.comm, batch)
        if any(other != seen[0] for other in seen):
            raise InvalidInput(
                f"{self._name}: the batch axes differ between ranks: {seen}. Does torch.func.jacfwd or hessian go through a "
                "field tensor? Ranks own parts of different lengths; go through fem_vi.distribute."
            )


def _is_differentiated(x: object) -> bool:
    return isinstance(x, Tensor) and (x.requires_grad or forward_ad.unpack_dual(x).tangent is not None)


def _on_host(x: Tensor) -> Tensor:
    """A tensor of single or double precision as one of double precision on the host; anything else as it is, to be refused."""
    takes = isinstance(x, Tensor) and x.dtype in (torch.float64, torch.float32)
    return x.to(device="cpu", dtype=torch.float64) if takes else x
