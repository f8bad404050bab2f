"""What the arguments of `MaternField` must be, or an error that names them. Not collective."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import ufl
from torch import Tensor

from fem_vi.arguments import described, is_number, positive
from fem_vi.errors import InvalidInput


def initial_number(name: str, value: float | Tensor) -> float:
    """A positive number whose gradient nobody expects."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise InvalidInput(f"MaternField: {name} requires a gradient. Build it with a number, then take prior.at({name}=...).")
    return positive(f"MaternField: {name}", value)


def hyperparameter(name: str, value: float | Tensor) -> float | Tensor:
    """A positive number, or such a tensor in double precision, with its gradient."""
    number = positive(f"MaternField.at: {name}", detached(value))
    return value.to(torch.float64) if isinstance(value, Tensor) else number


def detached(value: float | Tensor) -> float | Tensor:
    """The value without its gradient."""
    return value.detach() if isinstance(value, Tensor) else value


def smoothness(alpha: float, dimension: int) -> float:
    """nu = alpha - d / 2."""
    nu = positive("MaternField: alpha", alpha) - dimension / 2
    if not 0.0 < nu <= 8.0:
        raise InvalidInput(
            f"MaternField: alpha is {alpha:g}, so that nu = alpha - {dimension} / 2 = {nu:g}; it must be positive (else the "
            f"field has no pointwise variance) and at most 8. Take alpha above {dimension / 2:g}, such as 2."
        )
    return nu


def check_mean(mean: float | Tensor, size: int) -> None:
    """Refuse a mean that is neither a number nor a field tensor `(size,)`."""
    if isinstance(mean, Tensor) and mean.is_complex():
        raise InvalidInput(f"MaternField: mean is {mean.dtype}; it must be real.")
    fits = tuple(mean.shape) in ((), (size,)) if isinstance(mean, Tensor) else is_number(mean)
    if not fits:
        given = f"has shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else f"is {mean!r:.80}"
        raise InvalidInput(f"MaternField: mean {given}; it must be a number or have shape {(size,)} (owned).")
    if not bool(torch.isfinite(torch.as_tensor(mean)).all()):
        raise InvalidInput("MaternField: mean is not finite.")


def checked_range(lengths: tuple[float, float] | None, length: float) -> tuple[float, float]:
    """The shortest and the longest length; a fourth to four times `length` where none are given."""
    if not (lengths is None or (isinstance(lengths, tuple | list) and len(lengths) == 2)):
        raise InvalidInput(f"MaternField: lengths is {described(lengths)}; it must be (shortest, longest), or None.")
    low, high = (length / 4.0, length * 4.0) if lengths is None else (positive("MaternField: lengths", x) for x in lengths)
    if not low < high:
        raise InvalidInput(f"MaternField: lengths is {lengths}; it must be (shortest, longest).")
    return float(low), float(high)


def checked_metric(metric: Any, mesh: Any) -> Any:
    """The metric as a UFL tensor, or None."""
    if metric is None:
        return None
    d = mesh.geometry.dim
    if isinstance(metric, ufl.core.expr.Expr):
        if metric.ufl_shape != (d, d):
            raise InvalidInput(f"MaternField: metric has shape {metric.ufl_shape}; it must be {(d, d)}.")
        return metric
    try:
        array = np.asarray(metric, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"MaternField: metric is {described(metric)}; it must be a {d} x {d} matrix: {error}.") from error
    if array.shape != (d, d) or not np.allclose(array, array.T) or not np.linalg.eigvalsh(array).min() > 0.0:
        raise InvalidInput(f"MaternField: metric is {array.tolist()}; it must be a symmetric positive definite {d} x {d} matrix.")
    return ufl.as_matrix(array.tolist())
