"""First-order optimisers and learning-rate schedules, as values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fem_vi.arguments import instance, is_number, positive
from fem_vi.errors import InvalidInput
from fem_vi.vi.description import name_of

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Adam:
    """Adam; elementwise, so that each rank updates what it owns.

    Attributes:
        lr: Learning rate, in whitened coordinates.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment, in nats per whitened unit.
        pair_lr: Learning rate of parameters with an entry for each pair of unknowns, such as `FullRankNormal.below`; None for
            `lr`.

    References:
        Kingma, Ba (2015), Adam: a method for stochastic optimization.
    """

    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    pair_lr: float | None = None

    def __post_init__(self) -> None:
        positive("Adam: lr", self.lr)
        positive("Adam: eps", self.eps)
        if self.pair_lr is not None:
            positive("Adam: pair_lr", self.pair_lr)

    def __repr__(self) -> str:
        pair = "" if self.pair_lr is None else f", pair_lr={self.pair_lr}"
        return f"Adam(lr={self.lr}, betas={self.betas}, eps={self.eps}{pair})"

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A torch optimiser of these parameters: one pass over each, where torch has that."""
        given = list(parameters)
        return self._of_groups([{"params": given}] if given else [])

    def create(self, posterior: nn.Module) -> torch.optim.Optimizer:
        """A torch optimiser of a posterior, with `pair_lr` for the parameters that its `pairs` names."""
        if self.pair_lr is None:
            return self(posterior.parameters())
        pairs = getattr(posterior, "pairs", ())
        groups: list[dict[str, Any]] = [{"params": [], "lr": self.lr}, {"params": [], "lr": self.pair_lr}]
        for name, parameter in posterior.named_parameters():
            groups[name in pairs]["params"].append(parameter)
        return self._of_groups([group for group in groups if group["params"]])

    def _of_groups(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        given = [x for group in groups for x in group["params"]]
        # One pass reads parameters, gradients and moments as they lie in memory, which must be in the same way: row by row.
        fused = all(x.is_contiguous() and x.device.type in ("cpu", "cuda") for x in given) and len(given) > 0
        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)


@dataclass(frozen=True)
class Clipped:
    """An optimiser that never sees a gradient longer than a bound: longer ones are shortened, their direction kept.

    For networks whose heads have exponential scales, and for the first steps far from the data, where one sample can have a
    gradient a thousand times longer than all others. The length is that over all parameters on all ranks, `grad_norm` in the
    history, which shows it as it was.

    Attributes:
        optimizer: Makes the torch optimiser; None takes the one that `fit` takes by default.
        norm: The bound, in the unit of the history's `grad_norm`.

    References:
        Pascanu, Mikolov, Bengio (2013), On the difficulty of training recurrent neural networks.

    Example:
        >>> fem_vi.fit(problem, posterior, fem_vi.ELBO(), steps=1000, optimizer=fem_vi.Clipped(fem_vi.Adam(1e-3), norm=10.0))
    """

    optimizer: OptimizerFactory | None = None
    norm: float = 10.0

    def __post_init__(self) -> None:
        if self.optimizer is not None:
            instance("Clipped: optimizer", self.optimizer, Callable)  # type: ignore[arg-type]
        positive("Clipped: norm", self.norm)

    def __repr__(self) -> str:
        return f"Clipped(optimizer={name_of(self.optimizer)}, norm={self.norm!r})"


@dataclass(frozen=True)
class Cosine:
    """Learning rate from its full value to `final` of it over the fit, along half a cosine.

    Attributes:
        final: Fraction of the learning rate that is left at the end.
    """

    final: float = 0.01

    def __post_init__(self) -> None:
        if not (is_number(self.final) and self.final >= 0):
            raise InvalidInput(f"Cosine: final is {self.final!r:.80}; it must be a number, not negative.")

    def __call__(self, progress: float) -> float:
        """Factor on the learning rate after a fraction `progress` of the steps."""
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class ConstantRate:
    """The same learning rate throughout."""

    def __call__(self, progress: float) -> float:
        """One."""
        return 1.0


def default_optimizer(posterior: nn.Module, num_unknowns: int, *, linearised: bool) -> Adam:
    """The posterior's own, or Adam with steps of one length in whitened coordinates, whatever the number of unknowns.

    A posterior has its own where it has a method `default_optimizer()`.

    A step of Adam moves each of n entries by up to `lr`, all of them by `lr sqrt(n)`, while the entries of a gradient shrink
    like 1 / sqrt(n) as a mesh is refined: `lr` and `eps` that do so too make a fit independent of the mesh. The entries of a
    dense factor, one for each pair of unknowns, change it by up to n times their step: theirs shrinks like 1 / n.

    A fit from the linearised posterior is nearly there. It takes small steps, and an `eps` of the order of gradients that no
    longer matter, without which Adam would turn rounding errors at an exact posterior into full steps.

    Args:
        posterior: What will be fitted.
        num_unknowns: On all ranks together.
        linearised: Whether the fit starts from the linearised posterior.
    """
    own: Callable[[], Adam] | None = getattr(posterior, "default_optimizer", None)
    if own is not None:
        return own()
    root = math.sqrt(num_unknowns)
    lr, eps = (0.003 / root, 0.2 / root) if linearised else (0.5 / root, Adam.eps)
    return Adam(lr=lr, eps=eps, pair_lr=lr / root if getattr(posterior, "pairs", ()) else None)


@torch.no_grad()
def shorten(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients by a factor."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the learning rate that each parameter group was made with by `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
