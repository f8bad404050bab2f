"""What a likelihood may know beyond the protocol: numbers that it asks for besides data, and a curvature of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def num_predicted(likelihood: object, num_data: int) -> int:
    """Last axis of predictions: one number for each datum, and what the likelihood asks for besides (`num_predicted`)."""
    asks = getattr(likelihood, "num_predicted", None)
    return num_data if asks is None else int(asks(num_data))


def curvature_root(likelihood: Any, y: Tensor, prediction: Tensor) -> Tensor:
    """A function of the prediction with a Jacobian R such that R'R is about the Hessian of -log p(y | prediction).

    Its `curvature_root`, or standardised residuals where it has none: Gauss and Newton's method.

    Returns:
        `(*batch, rows)`.
    """
    root = getattr(likelihood, "curvature_root", likelihood.standardise)
    value: Tensor = root(y, prediction)
    return value
