"""The state of a fit as named global tensors, in an order that does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fem_vi.errors import RunFolderError
from fem_vi.vi.prior import FieldPrior


def is_field(posterior: nn.Module, name: str) -> bool:
    """Whether the parameter of this name is a field tensor: listed in the module's `fields`. All others are replicated."""
    return name in getattr(posterior, "fields", ())


def gather_parameters(posterior: nn.Module, prior: FieldPrior) -> dict[str, Tensor]:
    """Parameters and buffers by name, replicated, field tensors in the prior's partition-independent order.

    MPI: Collective.
    """
    return gather_state(posterior, prior, posterior.state_dict())


def gather_state(posterior: nn.Module, prior: FieldPrior, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of the posterior, its own or one that was kept, replicated. Collective."""
    return {name: (prior.gather(value) if is_field(posterior, name) else value).clone() for name, value in state.items()}


@torch.no_grad()
def scatter_parameters(posterior: nn.Module, prior: FieldPrior, tensors: dict[str, Tensor]) -> None:
    """Set parameters and buffers from `gather_parameters`.

    Raises:
        RunFolderError: Where names or shapes are not those of the posterior.

    MPI: Collective.
    """
    state = posterior.state_dict()
    if set(state) != set(tensors):
        raise RunFolderError(f"the stored posterior has {sorted(tensors)}; this one has {sorted(state)}. Is it another family?")
    for name, value in state.items():
        width = (*value.shape[:-1], prior.num_global) if is_field(posterior, name) else tuple(value.shape)
        if tuple(tensors[name].shape) != width:
            raise RunFolderError(f"stored {name} has shape {tuple(tensors[name].shape)}; this posterior needs {width}.")
        value.copy_(prior.scatter(tensors[name]) if is_field(posterior, name) else tensors[name])


def gather_optimizer(optimizer: torch.optim.Optimizer, posterior: nn.Module, prior: FieldPrior) -> dict[str, Tensor]:
    """Every tensor of the optimiser's state, by parameter and name, replicated, whatever its groups are. Collective."""
    gathered = {}
    for name, parameter in posterior.named_parameters():
        values = optimizer.state.get(parameter, {})
        for key in sorted(values):
            if isinstance(values[key], Tensor):
                field = is_field(posterior, name) and values[key].shape == parameter.shape
                gathered[f"{name}/{key}"] = (prior.gather(values[key]) if field else values[key]).clone()
    return gathered


def scatter_optimizer(
    optimizer: torch.optim.Optimizer, posterior: nn.Module, prior: FieldPrior, tensors: dict[str, Tensor]
) -> None:
    """Restore what `gather_optimizer` gave; settings (learning rates and so on) stay those of `optimizer`. Collective."""
    for name, parameter in posterior.named_parameters():
        values = {}
        for full, value in sorted(tensors.items()):
            owner, _, key = full.rpartition("/")
            if owner != name:
                continue
            field = is_field(posterior, name) and value.ndim > 0 and value.shape[:-1] == parameter.shape[:-1]
            # A fused step reads what it is given as it lies in memory; a part of a field may come in another order of axes.
            values[key] = (prior.scatter(value) if field else value).contiguous()
        if values:
            optimizer.state[parameter].update(values)  # load_state_dict would cast what is in single precision, as in NAdam
