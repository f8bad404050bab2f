"""Numbers that a user passes, as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fem_vi.errors import InvalidInput


def real_tensor(name: str, value: object) -> Tensor:
    """A float64 copy of numbers, without gradient.

    Args:
        name: How the error calls them.
        value: Tensor, array, number, or nested lists of numbers.

    Returns:
        The shape of `value`, on its device.

    Raises:
        InvalidInput: For complex numbers, and for what holds no numbers.
    """
    if not isinstance(value, Tensor):
        value = _from_array(name, value)
    if value.is_complex():
        raise InvalidInput(f"{name} is {value.dtype}; it must be real. Give real and imaginary parts as numbers of their own.")
    return value.detach().to(torch.float64, copy=True)


def _from_array(name: str, value: object) -> Tensor:
    try:
        array = np.array(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name} is a {type(value).__name__} that is no array of numbers: {error}") from error
    if array.dtype.kind not in "biufc":
        raise InvalidInput(f"{name} is {value!r:.60}; it must be a number, a tensor or an array of numbers.")
    return torch.from_numpy(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))
