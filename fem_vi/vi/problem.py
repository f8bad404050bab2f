"""An inverse problem: prior, forward map, likelihood and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from zlib import crc32

import torch
from torch import Tensor

from fem_vi.arguments import instance
from fem_vi.bridge.layout import all_sum, check_last_axis
from fem_vi.errors import InvalidInput
from fem_vi.parallel import all_values, raise_on_all
from fem_vi.vi.description import name_of, sketch
from fem_vi.vi.predicted import num_predicted
from fem_vi.vi.prior import FieldPrior, check_prior
from fem_vi.vi.real_tensor import real_tensor


@runtime_checkable
class Likelihood(Protocol):
    """What an inverse problem needs of a likelihood; `GaussianNoise` is one."""

    def check(self, y: Tensor) -> None:
        """Raise `InvalidInput` where the likelihood cannot take these data."""

    def log_prob(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Log p(y | prediction), `(*batch,)`."""

    def standardise(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Residuals with mean zero and variance one under the model, `(*batch, num_data)`."""

    def sample(self, prediction: Tensor) -> Tensor:
        """Data around a prediction, `(*batch, num_data)`."""


@dataclass
class Cost:
    """What a problem has cost so far: samples pushed through the forward map, and gradients pulled back.

    Attributes:
        forward: Samples solved forward.
        backward: Samples solved backward (adjoints).
    """

    forward: int = 0
    backward: int = 0

    @property
    def solves(self) -> int:
        """Forward and backward solves together."""
        return self.forward + self.backward


@runtime_checkable
class Problem(Protocol):
    """What `fit` needs of what a module is fitted to: an `InverseProblem`, or a stage in the training of a model."""

    @property
    def prior(self) -> FieldPrior:
        """Of the unknowns, whose layout that of the module's `fields` is."""

    @property
    def cost(self) -> Cost:
        """Samples solved so far."""

    def describe(self) -> dict[str, Any]:
        """What tells it from other problems, for config.json. Collective."""


class InverseProblem:
    """Which m, drawn from the prior, explain the data y = forward(m) + noise?

        log p(y, m) = log p(y | forward(m)) + log p(m)

    Args:
        prior: Prior of m: `MaternField` on a mesh, `GaussianVector` for a handful of parameters.
        forward: Predicted data, m `(*batch, n_owned)` to `(*batch, num_data)`, differentiable and replicated; a likelihood may
            ask for more numbers behind them (`UnknownScale`).
        likelihood: How data scatter around predictions, `GaussianNoise` for example.
        y: Data, `(num_data,)`, replicated.

    Attributes:
        cost: Samples solved so far; a running count.

    Raises:
        InvalidInput: Where an argument is of the wrong type, y is not a finite real vector, y or the noise differs between ranks,
            or y does not fit the likelihood.

    MPI: Collective.

    Example:
        >>> problem = InverseProblem(prior, lambda m: observe(solve(m)), GaussianNoise(0.01), y)
    """

    def __init__(self, prior: FieldPrior, forward: Callable[[Tensor], Tensor], likelihood: Likelihood, y: Tensor) -> None:
        check_prior(prior)
        with raise_on_all(prior.comm):
            instance("forward", forward, Callable)  # type: ignore[arg-type]
            instance("likelihood", likelihood, Likelihood)
            if isinstance(likelihood, type):
                raise InvalidInput(f"likelihood is the class {likelihood.__name__}; make one of it, such as GaussianNoise(0.1).")
        self.prior = prior
        self.forward = forward
        self.likelihood = likelihood
        self.y = _checked_data(prior, likelihood, y)
        self.cost = Cost()

    def describe(self) -> dict[str, Any]:
        """Prior, likelihood and data, for config.json."""
        noise = _tensors(self.likelihood)
        return {
            "prior": name_of(self.prior),
            "unknowns": self.prior.num_global,
            "likelihood": name_of(self.likelihood),
            "num_data": len(self.y),
            "data": sketch(self.y),
            "noise": sketch(torch.cat(noise)) if noise else None,
        }

    def predict(self, m: Tensor) -> Tensor:
        """Predicted data without noise.

        Args:
            m: Unknowns, `(*batch, n_owned)`.

        Returns:
            `(*batch, num_data)`, replicated.

        Raises:
            InvalidInput: Where m has the wrong shape, or the forward map returned no tensor, one of another shape or dtype, or
                NaN.

        MPI: Collective.
        """
        n_owned = self.prior.event_shape[0]
        with raise_on_all(self.prior.comm):
            check_last_axis("m", m, n_owned, "those of the prior.")
            if not m.is_floating_point():
                raise InvalidInput(f"m is {m.dtype}; it must be of floating-point numbers.")
        return self._predict(m, self.forward, self.likelihood, len(self.y))

    def _predict(self, m: Tensor, forward: Callable[[Tensor], Tensor], likelihood: Likelihood, num_data: int) -> Tensor:
        """What a forward map makes of m, checked and counted."""
        with raise_on_all(self.prior.comm):
            prediction = forward(m)
        expected = (*m.shape[:-1], num_predicted(likelihood, num_data))
        with raise_on_all(self.prior.comm):
            if not isinstance(prediction, Tensor):
                raise InvalidInput(
                    f"forward returned {type(prediction).__name__}; it must return a torch tensor of shape {expected}."
                )
            if prediction.shape != expected:
                raise InvalidInput(
                    f"forward took m of shape {tuple(m.shape)} and returned shape {tuple(prediction.shape)}; with {num_data} "
                    f"data it must be {expected}. Does it end in an observation, and keep the batch axes?"
                )
            if prediction.dtype not in (torch.float64, m.dtype):
                raise InvalidInput(f"forward took {m.dtype} and returned {prediction.dtype}; it must return torch.float64.")
            if bool(torch.isnan(prediction).any()):
                bad = int(torch.isnan(prediction).any(-1).sum())
                raise InvalidInput(
                    f"forward returned NaN for {bad} of {prediction[..., 0].numel()} samples. Does it divide by zero, or take a "
                    "root or logarithm of what can be negative?"
                )
        self._count(prediction)
        return prediction

    def _count(self, prediction: Tensor) -> None:
        samples = prediction[..., 0].numel()
        self.cost.forward += samples
        if prediction.requires_grad:
            cost = self.cost

            def count_backward(_: Tensor) -> None:
                cost.backward += samples

            prediction.register_hook(count_backward)

    def log_likelihood(self, m: Tensor) -> Tensor:
        """Log p(y | forward(m)).

        Args:
            m: Unknowns, `(*batch, n_owned)`.

        Returns:
            `(*batch,)`, replicated.

        MPI: Collective.
        """
        return self.likelihood.log_prob(self.y, self.predict(m))

    def log_joint(self, m: Tensor) -> Tensor:
        """Log p(y, m), the posterior's log density up to the evidence; `(*batch, n_owned)` to `(*batch,)`, replicated.

        MPI: Collective.
        """
        return self.log_likelihood(m) + self.prior.log_prob(m)


def _checked_data(prior: FieldPrior, likelihood: Likelihood, y: Tensor) -> Tensor:
    comm = prior.comm
    with raise_on_all(comm):
        y = real_tensor("y", y)
        if y.ndim != 1 or len(y) == 0:
            raise InvalidInput(f"y has shape {tuple(y.shape)}; an inverse problem takes data as one vector, (num_data,).")
        if not bool(torch.isfinite(y).all()):
            bad = torch.nonzero(~torch.isfinite(y)).flatten().tolist()
            raise InvalidInput(f"y is not finite at {bad[:10]} ({len(bad)} of {len(y)} data). Leave missing data out.")
        likelihood.check(y)
    counts = all_sum(torch.nn.functional.one_hot(torch.tensor(comm.rank), comm.size) * len(y), comm)
    if not bool((counts == counts[0]).all()):
        raise InvalidInput(f"y has {counts.tolist()} entries on ranks 0 to {comm.size - 1}; data must be the same on all ranks.")
    first = all_sum(y if comm.rank == 0 else torch.zeros_like(y), comm)
    with raise_on_all(comm):
        if not torch.equal(first, y):
            raise InvalidInput(
                f"y on rank {comm.rank} differs from rank 0 (largest difference {float((first - y).abs().max()):.3g}). "
                "Read or make the data with one seed on all ranks, or broadcast them."
            )
    contents = all_values(comm, _contents(likelihood))
    if contents.count(contents[0]) < comm.size:
        other = next(rank for rank, value in enumerate(contents) if value != contents[0])
        name = next((name for name in contents[0] if contents[other].get(name) != contents[0][name]), "kind")
        raise InvalidInput(f"the noise's {name} on rank {other} differs from rank 0; it must be the same on all ranks.")
    return y


def _contents(likelihood: object) -> dict[str, tuple[object, ...]]:
    """Every tensor and number of a likelihood by its name, and of likelihoods inside it, short enough to be compared."""
    found: dict[str, tuple[object, ...]] = {}
    for name, value in vars(likelihood).items():
        if isinstance(value, Tensor):
            found[name] = (tuple(value.shape), crc32(value.detach().cpu().numpy().tobytes()))
        elif isinstance(value, int | float):
            found[name] = (value,)
        elif isinstance(value, Likelihood):
            found[name] = (type(value).__name__,)
            found |= _contents(value)
    return found


def _tensors(likelihood: object) -> list[Tensor]:
    """All numbers that a likelihood holds, and likelihoods inside it, flat, in the order of their names."""
    found: list[Tensor] = []
    for _, value in sorted(getattr(likelihood, "__dict__", {}).items()):
        if isinstance(value, Tensor):
            found.append(value.detach().to("cpu", torch.float64).reshape(-1))
        elif isinstance(value, Likelihood):
            found += _tensors(value)
    return found
