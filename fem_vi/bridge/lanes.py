"""A batch axis that `torch.func.vmap` adds to the tensors of an operator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fem_vi.bridge.batch import Argument


class Lanes:
    """The added axis, brought to the front of every tensor, before the batch axes that the call sees.

    Args:
        expected: What the operator takes.
        size: Length of the axis.
        inputs: The operator's tensors, with the axis where they have it.
        in_dims: Where each has it; None for not at all.
    """

    def __init__(self, expected: Sequence[Argument], size: int, inputs: Sequence[Tensor], in_dims: Sequence[int | None]) -> None:
        self._size = size
        self._events = [len(given.shape) for given in expected]
        self._shapes = [
            tuple(n for axis, n in enumerate(x.shape) if dim is None or axis != dim % x.ndim)
            for x, dim in zip(inputs, in_dims, strict=True)
        ]
        self._rank = max((len(own) - event for own, event in zip(self._shapes, self._events, strict=True)), default=0)

    def inputs(self, tensors: Sequence[Tensor], in_dims: Sequence[int | None], *, expand: bool = True) -> list[Tensor]:
        """Tensors in the shapes of the inputs; those without the axis broadcast, unless each lane is to have its own."""
        return [
            self._aligned(x, dim, own, event, expand)
            for x, dim, own, event in zip(tensors, in_dims, self._shapes, self._events, strict=True)
        ]

    def outputs(self, tensors: Sequence[Tensor], in_dims: Sequence[int | None]) -> list[Tensor]:
        """Tensors in the shape of the output."""
        return [
            x.expand(self._size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=True)
        ]

    def restore(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs, without the axes that were put in to align them."""
        return [None if grad is None else grad.reshape(self._size, *own) for grad, own in zip(grads, self._shapes, strict=True)]

    def _aligned(self, x: Tensor, dim: int | None, own: tuple[int, ...], event: int, expand: bool) -> Tensor:
        if dim is None and not expand:
            return x
        padded = (1,) * (self._rank - len(own) + event)
        first = x.expand(self._size, *own) if dim is None else x.movedim(dim, 0)
        return first.reshape(self._size, *padded, *own)
