"""`TorchKernel`: the integrals of a residual evaluated by torch operations, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fem_vi.bridge.ghosts import Ghosts
from fem_vi.bridge.layout import localise
from fem_vi.bridge.torch_form import Compiled, compile_form
from fem_vi.bridge.torch_plan import Given, Plan, Prescribed
from fem_vi.bridge.torch_residual import TorchResidual, assemble, check_device
from fem_vi.errors import InvalidInput
from fem_vi.parallel import all_values, raise_on_all
from fem_vi.pde.inputs import FrozenMesh, FunctionInput, local_size
from fem_vi.pde.weak_form import WeakForm


@dataclass(frozen=True)
class TorchKernel:
    """Torch evaluates: the residual is an `nn.Module` of torch operations, without FEniCSx in the loop.

    It is differentiable to any order in every input, runs under `torch.func.vmap`, `grad` and `jvp`, and can be moved to a
    machine without FEniCSx by `export_residual`. It takes integrals over cells, exterior and interior facets of meshes of one
    kind of cell (intervals, triangles, quadrilaterals, tetrahedra, hexahedra, straight or curved), elements of basix, Constants,
    and `coordinates(mesh)`. It looks at no values: what is not finite goes through, as in torch's own functions.

    Args:
        device: Where it lies; the tensors of a call must lie there too.
        dtype: torch.float64, or torch.float32: about half the time, and seven digits.

    Raises:
        InvalidInput: For another type, or a device that is not there.

    Example:
        >>> residual = fem_vi.Residual(pde, kernel=fem_vi.TorchKernel(device="cuda"))
        >>> fem_vi.export_residual(residual, "residual.safetensors")
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float64, torch.float32):
            raise InvalidInput(f"TorchKernel: dtype is {self.dtype}; it must be torch.float64 or torch.float32.")
        check_device("TorchKernel", self.device)

    def create(self, pde: WeakForm) -> TorchFunction:
        """See `Kernel.create`."""
        return TorchFunction(pde, create_module(pde).to(device=self.device, dtype=self.dtype))


class TorchFunction:
    """A `TorchResidual` on the mesh that it was made for: it refuses to go on where that, or what was fixed, has changed.

    Args:
        pde: The weak form.
        module: What evaluates it.
    """

    def __init__(self, pde: WeakForm, module: TorchResidual) -> None:
        self.pde = pde
        self.module = module
        self._mesh = FrozenMesh(pde.space.mesh)

    def __call__(self, u: Tensor, *inputs: Tensor) -> Tensor:
        """See `Residual`. Collective."""
        with raise_on_all(self.pde.comm):
            self._mesh.check_unchanged()
            self.pde.check_fixed()
            self.module.check(u, *inputs)
        out: Tensor = self.module(u, *inputs)
        return out


def create_module(pde: WeakForm) -> TorchResidual:
    """The torch operations of a weak form, in double precision on the host.

    Raises:
        UnsupportedForm: Naming what there is no torch operation for.

    MPI: Collective.
    """
    compiled = compile_form(pde)
    store, boundary = compiled.store, pde.boundary
    num_local = local_size(pde.space)[1]
    rows, values = store.add("rows", boundary.owned.astype(np.int64)), store.add("values", boundary.fixed[:, None])
    prescribed = []
    for source in boundary.sources:
        dofs, entries = (store.add("rows", numbers.astype(np.int64)) for numbers in source.owned)
        prescribed.append(Prescribed(1 + source.position, dofs, entries))
    offset = store.add("offset", _constant_part(compiled, num_local))
    given = tuple(Given(x.label, x.shape, x.size, x.is_field, x.layout) for x in (pde.unknown, *pde.inputs))
    plan = Plan(given, num_local, tuple(compiled.programs), offset, rows, values, tuple(prescribed))
    return TorchResidual(plan, store.buffers, Ranks(pde) if pde.comm.size > 1 else None)


def _constant_part(compiled: Compiled, num_local: int) -> Tensor:
    """The integrals that do not vary with the inputs, `(num_local, 1)`."""
    buffers = {**compiled.constant_store.buffers, "zero": torch.zeros(num_local, 1, dtype=torch.float64)}
    return assemble(Plan((), num_local, tuple(compiled.constant), "zero", "", "", ()), buffers, [], 1)


class Ranks:
    """See `Exchange`: ghosts of fields, and Constants that all ranks share.

    Args:
        pde: The weak form.

    MPI: Collective when built.
    """

    def __init__(self, pde: WeakForm) -> None:
        self._comm = pde.comm
        given = [pde.unknown, *pde.inputs]
        self._ghosts = [Ghosts(x.space) if isinstance(x, FunctionInput) else None for x in given]

    def check(self, batch: tuple[int, ...]) -> None:
        """Refuse batches that differ between ranks. Collective.

        Raises:
            InvalidInput: On every rank.
        """
        seen = all_values(self._comm, batch)
        if any(other != seen[0] for other in seen):
            raise InvalidInput(f"Residual: the batch axes differ between ranks: {seen}.")

    def to_local(self, source: int, x: Tensor) -> Tensor:
        """Rows with ghosts; or a Constant for use on this rank. Collective."""
        ghosts = self._ghosts[source]
        return localise(x, self._comm) if ghosts is None else ghosts.to_local(x)

    def to_owned(self, r: Tensor) -> Tensor:
        """Owned rows of the residual. Collective."""
        ghosts = self._ghosts[0]
        assert ghosts is not None  # the state is a Function
        return ghosts.to_owned(r)
