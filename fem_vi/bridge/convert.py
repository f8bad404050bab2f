"""Between DOLFINx Functions and field tensors."""

from __future__ import annotations

from typing import Any

import torch
from dolfinx import fem
from torch import Tensor

from fem_vi.arguments import instance
from fem_vi.bridge.layout import OWNED, as_numpy, check_last_axis
from fem_vi.errors import InvalidInput
from fem_vi.pde.agree import agreed, check_space
from fem_vi.pde.inputs import load_owned, local_size


def to_tensor(function: fem.Function) -> Tensor:
    """A copy of the coefficients of a Function that this rank owns.

    Args:
        function: In any space.

    Returns:
        Field tensor, `(n_owned,)`, float64.

    Raises:
        InvalidInput: For anything but a Function.

    MPI: Not collective.
    """
    instance("to_tensor: function", function, fem.Function)
    return torch.tensor(function.x.array[: local_size(function.function_space)[0]], dtype=torch.float64)


def to_function(x: Tensor, V: Any, *, name: str = "f") -> fem.Function:
    """A new Function with the coefficients of a field tensor, ghosts included.

    Args:
        x: Field tensor, `(n_owned,)`.
        V: Its function space.
        name: Name of the Function, in files and plots.

    Raises:
        InvalidInput: Where a type or the shape is wrong.

    MPI: Collective.
    """
    with agreed(V):
        check_space("to_function: V", V)
        check_last_axis("to_function: x", x, local_size(V)[0], OWNED)
        if tuple(x.shape) != (local_size(V)[0],):
            raise InvalidInput(f"to_function: x has shape {tuple(x.shape)}; this rank owns {local_size(V)[0]} coefficients of V.")
    function = fem.Function(V, name=name)
    load_owned(function, as_numpy(x))
    return function
