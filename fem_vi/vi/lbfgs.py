"""L-BFGS with common random numbers, over parameters that may be spread over ranks.

torch's own L-BFGS takes inner products on each rank alone, which lets ranks that hold parts of a field go apart; here they are
sums over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fem_vi.arguments import positive, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.objective import Objective, PathDerivative
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.state import is_field


@dataclass(frozen=True)
class LBFGS:
    """Quasi-Newton steps on the objective with one draw of noise for the whole fit, which makes it a function to minimise.

    For many samples: the minimiser is that of their mean, not of the expectation, off by O(1 / sqrt(samples)), and families with
    more parameters than samples times data can fit the draw. Take an objective with `TotalDerivative()` or `AnalyticKL()`, whose
    gradient is that of the draw, and `schedule=ConstantRate()`. A step costs an evaluation with gradient, and one without at its
    start and for each try of the line search.

    Attributes:
        lr: First try of each line search.
        pairs: Pairs of steps and changes of the gradient that are kept.
        tries: Most halvings in a line search.

    References:
        Nocedal (1980), Updating quasi-Newton matrices with limited storage.
    """

    lr: float = 1.0
    pairs: int = 10
    tries: int = 12

    def __post_init__(self) -> None:
        positive("LBFGS: lr", self.lr)
        whole("LBFGS: pairs", self.pairs, least=1)
        whole("LBFGS: tries", self.tries, least=1)

    def create(self, posterior: nn.Module, prior: FieldPrior, objective: Objective) -> LBFGSSteps:
        """The optimiser of a posterior.

        Raises:
            InvalidInput: Where the objective's gradient is not that of its draw.
        """
        gradient = getattr(getattr(objective, "source", objective), "gradient", None)
        if isinstance(gradient, PathDerivative):
            raise InvalidInput(
                "LBFGS minimises one draw of the objective, and PathDerivative() is not its gradient but one of the same mean. "
                "Give the objective gradient=TotalDerivative()."
            )
        return LBFGSSteps(posterior, prior, self)


class LBFGSSteps(torch.optim.Optimizer):
    """L-BFGS steps of one posterior, with a line search for sufficient decrease.

    Args:
        posterior: What is fitted.
        prior: Sums over ranks.
        choice: Settings.

    MPI: Steps are collective.
    """

    def __init__(self, posterior: nn.Module, prior: FieldPrior, choice: LBFGS) -> None:
        named = [(name, value) for name, value in posterior.named_parameters()]
        self._prior, self._choice = prior, choice
        self._fields = [is_field(posterior, name) for name, _ in named]
        self._values = [value for _, value in named]
        super().__init__(self._values, {"lr": choice.lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients that the parameters hold.

        Args:
            closure: Evaluates the loss at the parameters as they are; with the first call, at the present ones.
        """
        assert closure is not None
        gradient = [torch.zeros_like(value) if value.grad is None else value.grad.clone() for value in self._values]
        self._remember(gradient)
        direction = self._direction(gradient)
        slope = self._dot(gradient, direction)
        if slope >= 0:  # what is remembered does not fit here
            direction, slope = [-g for g in gradient], -self._dot(gradient, gradient)
        if slope == 0:
            return
        first = closure()
        before = [value.detach().clone() for value in self._values]
        length = float(self.param_groups[0]["lr"])
        if not self._pairs():
            length = min(length, 1.0 / (-slope) ** 0.5)
        for _ in range(self._choice.tries):
            for value, start, move in zip(self._values, before, direction, strict=True):
                value.copy_(start + length * move)
            if closure() <= first + 1e-4 * length * slope:
                break
            length *= 0.5
        else:
            for value, start in zip(self._values, before, strict=True):
                value.copy_(start)
            for value in self._values:  # start anew from steepest descent
                self.state[value].clear()
            return
        for value, start, old in zip(self._values, before, gradient, strict=True):
            self.state[value]["start"], self.state[value]["gradient"] = start, old

    def _dot(self, a: list[Tensor], b: list[Tensor]) -> float:
        zero = torch.zeros((), dtype=torch.float64)
        products = [(x * y).sum() for x, y in zip(a, b, strict=True)]
        owned = sum((p for p, field in zip(products, self._fields, strict=True) if field), zero)
        shared = sum((p for p, field in zip(products, self._fields, strict=True) if not field), zero)
        return float(self._prior.all_sum(owned) + shared)

    def _pairs(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Steps and changes of the gradient, the oldest first."""
        count = 0
        while f"s{count:03d}" in self.state[self._values[0]]:
            count += 1
        return [
            ([self.state[v][f"s{k:03d}"] for v in self._values], [self.state[v][f"y{k:03d}"] for v in self._values])
            for k in range(count)
        ]

    def _remember(self, gradient: list[Tensor]) -> None:
        """Add the pair that the last step made, where the loss curves upwards along it."""
        if "start" not in self.state[self._values[0]]:
            return
        s = [value - self.state[value]["start"] for value in self._values]
        y = [g - self.state[value]["gradient"] for g, value in zip(gradient, self._values, strict=True)]
        if self._dot(s, y) <= 1e-10 * self._dot(y, y) ** 0.5 * self._dot(s, s) ** 0.5:
            return
        pairs = [*self._pairs(), (s, y)][-self._choice.pairs :]
        for k, (moves, changes) in enumerate(pairs):
            for value, move, change in zip(self._values, moves, changes, strict=True):
                self.state[value][f"s{k:03d}"], self.state[value][f"y{k:03d}"] = move, change

    def _direction(self, gradient: list[Tensor]) -> list[Tensor]:
        """Minus the inverse Hessian of the pairs times the gradient: the two-loop recursion."""
        pairs = self._pairs()
        d = [-g for g in gradient]
        weights: list[tuple[float, float]] = []
        for s, y in reversed(pairs):
            rho = 1.0 / self._dot(s, y)
            alpha = rho * self._dot(s, d)
            weights.append((rho, alpha))
            d = [x - alpha * change for x, change in zip(d, y, strict=True)]
        if pairs:
            s, y = pairs[-1]
            factor = self._dot(s, y) / self._dot(y, y)
            d = [factor * x for x in d]
        for (s, y), (rho, alpha) in zip(pairs, reversed(weights), strict=True):
            beta = rho * self._dot(y, d)
            d = [x + (alpha - beta) * move for x, move in zip(d, s, strict=True)]
        return d

    def __repr__(self) -> str:
        return repr(self._choice)
