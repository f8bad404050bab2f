"""`TorchResidual`: a weak-form residual that torch alone evaluates.

The module imports neither FEniCSx nor MPI, so that a residual that was written to a file runs where they are missing. All that a
residual is lies in its buffers: tensors, and a plan in JSON of what is done with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fem_vi.bridge.batch import batch_axes
from fem_vi.bridge.torch_plan import Plan, buffer_names, decoded, encoded
from fem_vi.bridge.torch_program import Part
from fem_vi.errors import InvalidInput

PLAN = "plan_json"
VALUES_AT_ONCE = {"cpu": 2**18}
"""Values of the largest intermediate that are computed together: on a CPU they should stay in its cache."""
_VALUES_ELSEWHERE = 2**27


class Exchange(Protocol):
    """The way from what a rank owns to what it reads, and back; differentiable."""

    def check(self, batch: tuple[int, ...]) -> None:
        """Refuse batches that differ between ranks."""

    def to_local(self, source: int, x: Tensor) -> Tensor:
        """Rows of a tensor with those of ghosts after them; a replicated tensor for use in local arithmetic."""

    def to_owned(self, r: Tensor) -> Tensor:
        """Owned rows of the residual, with what other ranks have added to them."""


class TorchResidual(nn.Module):
    """r = residual(u, m, ...) by torch operations; differentiable to any order.

    Made by `Residual(pde, kernel=TorchKernel())` or `load_residual`. `to(...)` moves it to a device or to float32;
    `state_dict()` holds all that it is, and `from_state_dict` makes it from that.

    Args:
        plan: What is done.
        buffers: The tensors that the plan names.
        exchange: Where the mesh has several ranks.

    Call:
        `residual(u, *inputs)`: see `Residual`. The result has the module's type; the tensors are cast to it and must lie on its
        device. No value is looked at: what is not finite goes through, as in torch's own functions. It runs under
        `torch.func.vmap`, `grad`, `jvp` and, on one rank, `torch.compile`.

    Raises:
        InvalidInput: Wrong number, shape, type or device, batch axes that do not broadcast, or `rows=`.

    MPI: Collective where the mesh has several ranks, forward and backward.
    """

    def __init__(self, plan: Plan, buffers: Mapping[str, Tensor], exchange: Exchange | None = None) -> None:
        super().__init__()
        self.plan = plan
        self._exchange = exchange
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.register_buffer(PLAN, encoded(plan))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> TorchResidual:
        """The residual that has this state, on the device and in the type of its tensors.

        Raises:
            InvalidInput: Where the state is not that of a residual.
        """
        if not isinstance(state.get(PLAN), Tensor):
            raise InvalidInput("The state has no plan; it is not the state_dict() of a TorchResidual.")
        plan = decoded(state[PLAN])
        buffers = {name: value for name, value in state.items() if name != PLAN}
        missing = sorted(buffer_names(plan) - set(buffers))
        if missing:
            raise InvalidInput(f"The state lacks the tensors {missing}; it is not the whole state_dict() of a TorchResidual.")
        return cls(plan, buffers)

    @property
    def is_distributed(self) -> bool:
        """Whether other ranks hold parts of it."""
        return self._exchange is not None

    def extra_repr(self) -> str:
        """The tensors that it takes."""
        return ", ".join(f"{about.label}: {about.shape}" for about in self.plan.given)

    def forward(self, u: Tensor, *inputs: Tensor, rows: None = None) -> Tensor:
        """Evaluate; see the class."""
        if rows is not None:
            raise InvalidInput(
                "TorchResidual: rows= is for Residual, whose mesh tells which cells reach a row. Here all are evaluated: take "
                "residual(u, *inputs)[..., rows]."
            )
        given = [u, *inputs]
        axes, batch = self.check(*given)
        buffers = dict(self.named_buffers(recurse=False))
        offset = buffers[self.plan.offset]
        owned = [
            _column(x.to(offset.dtype), own, batch, about.size)
            for x, own, about in zip(given, axes, self.plan.given, strict=True)
        ]
        local = owned
        if self._exchange is not None:
            self._exchange.check(batch)
            local = [self._exchange.to_local(k, x) for k, x in enumerate(owned)]
        r = assemble(self.plan, buffers, local, math.prod(batch)) + offset
        if self._exchange is not None:
            r = self._exchange.to_owned(r)
        r = self._with_prescribed_rows(r, owned, local, buffers)
        return r.t().contiguous().reshape(*batch, r.shape[0])

    def check(self, *given: Tensor) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        """The batch axes of the tensors of a call, and of all together; see the class for what is refused. Not collective."""
        axes = batch_axes("Residual", given, self.plan.given)
        like = self.get_buffer(self.plan.offset)
        for x, about in zip(given, self.plan.given, strict=True):
            if x.device != like.device:
                raise InvalidInput(
                    f"Residual: {about.label} is on {x.device}, the residual on {like.device}. Move one of them: x.to(device), "
                    "TorchKernel(device=...), load_residual(path, device=...)."
                )
        return axes

    def _with_prescribed_rows(
        self, r: Tensor, owned: Sequence[Tensor], local: Sequence[Tensor], buffers: Mapping[str, Tensor]
    ) -> Tensor:
        plan = self.plan
        rows = buffers[plan.rows]
        if rows.numel() == 0 and not plan.prescribed:  # with one, the graph must be the same on ranks that have no such rows
            return r
        r = r.index_copy(0, rows, (owned[0].index_select(0, rows) - buffers[plan.values]).expand(-1, r.shape[1]))
        for source in plan.prescribed:
            h = local[source.source].index_select(0, buffers[source.entries])
            r = r.index_add(0, buffers[source.rows], -h.expand(-1, r.shape[1]))
        return r


def check_device(name: str, device: torch.device | str) -> None:
    """Refuse a device that is not there.

    Raises:
        InvalidInput: With what torch says of it.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(
            f"{name}: device is {device!r}, which torch cannot use here ({reason}); device='cpu' always works."
        ) from error


def _column(x: Tensor, own: tuple[int, ...], batch: tuple[int, ...], size: int) -> Tensor:
    """A tensor with samples last, `(size, samples)`; one sample where it has no batch axes."""
    if not any(n != 1 for n in own) and 0 not in batch:
        return x.reshape(size, 1)
    spread = x.reshape(*own, size).expand(*batch, size)
    return spread.reshape(math.prod(batch), size).t().contiguous()


def assemble(plan: Plan, buffers: Mapping[str, Tensor], columns: Sequence[Tensor], num_samples: int) -> Tensor:
    """The integrals that vary with the inputs, `(num_local, num_samples)`.

    Args:
        plan: What is done.
        buffers: Its tensors.
        columns: Local rows of each given tensor, `(size, num_samples or 1)`.
        num_samples: Length of the samples' axis.
    """
    if torch.compiler.is_compiling() or _transforms_are_active() or any(_has_tangent(x) for x in columns):
        return _all_at_once(plan, buffers, columns, num_samples)
    out: Tensor = _Assemble.apply(plan, buffers, num_samples, *columns)
    return out


def _all_at_once(plan: Plan, buffers: Mapping[str, Tensor], columns: Sequence[Tensor], num_samples: int) -> Tensor:
    """The integrals by functions that torch differentiates and transforms."""
    out = buffers[plan.offset].new_zeros(plan.num_local, num_samples)
    for program in plan.programs:
        part = Part(program, buffers, 0, program.size)
        for write, values in zip(program.writes, part.compute(part.gather(columns)), strict=True):
            out = part.add_rows(out, write.dofs, values)
    return out


def _parts(plan: Plan, buffers: Mapping[str, Tensor], num_samples: int) -> list[Part]:
    """The cells of all programs, some at a time."""
    at_once = VALUES_AT_ONCE.get(buffers[plan.offset].device.type, _VALUES_ELSEWHERE)
    parts = []
    for program in plan.programs:
        step = max(1, at_once // (program.points * max(1, num_samples)))
        parts += [Part(program, buffers, at, min(at + step, program.size)) for at in range(0, program.size, step)]
    return parts


class _Assemble(torch.autograd.Function):
    """The integrals, some cells at a time, so that intermediates stay in the cache and none is kept for the backward.

    The backward computes them again, and multiplies with the Jacobian of one part after another. Where it will be differentiated
    itself, it goes through torch's own graph of all cells.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, buffers: Mapping[str, Tensor], num_samples: int, *columns: Tensor) -> Tensor:
        ctx.plan, ctx.buffers = plan, buffers
        ctx.save_for_backward(*columns)
        out = buffers[plan.offset].new_zeros(plan.num_local, num_samples)
        for part in _parts(plan, buffers, num_samples):
            for write, values in zip(part.program.writes, part.compute(part.gather(columns)), strict=True):
                part.add_rows_(out, write.dofs, values)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        columns, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():  # create_graph=True
            apart = [
                x.view_as(x) for x in columns
            ]  # so that one input's gradient does not run through another that it is made of
            out = _all_at_once(ctx.plan, ctx.buffers, apart, g.shape[1])
            chosen = [x for x, want in zip(apart, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(out, chosen, g, create_graph=True, allow_unused=True))
            return None, None, None, *(next(found) if want else None for want in wanted)
        grads = [torch.zeros_like(x) if want else None for x, want in zip(columns, wanted, strict=True)]
        for part in _parts(ctx.plan, ctx.buffers, g.shape[1]):
            _pull_back(part, columns, g, grads)
        return None, None, None, *grads


def _pull_back(part: Part, columns: Sequence[Tensor], g: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Add one part's share of the gradients."""
    gathers = part.program.gathers
    gathered = part.gather([x.detach() for x in columns])
    chosen = [k for k, gather in enumerate(gathers) if grads[gather.source] is not None]
    if not chosen:
        return
    with torch.enable_grad():
        for k in chosen:
            gathered[k].requires_grad_()
        outputs = part.compute(gathered)
        pairs = [
            (y, part.take_rows(g, write.dofs)) for y, write in zip(outputs, part.program.writes, strict=True) if y.requires_grad
        ]
        if not pairs:
            return
        # What does not vary between samples meets the sum of their cotangents.
        lam = [x if x.shape == y.shape else x.sum(-1, keepdim=True) for y, x in pairs]
        found = torch.autograd.grad([y for y, _ in pairs], [gathered[k] for k in chosen], lam, allow_unused=True)
    for k, value in zip(chosen, found, strict=True):
        grad = grads[gathers[k].source]
        if value is None or grad is None:
            continue
        if gathers[k].dofs:
            part.add_rows_(grad, gathers[k].dofs, value)
        else:
            grad += value


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


_transforms_are_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
