"""The slope of a flow's own log density where it has drawn, without its inverse.

A path derivative (`PathDerivative`) needs grad log q at the draws, for parameters held constant. Where the networks map noise to
samples, x_0 = eps and x_{l+1} = T_l(x_l), the density comes along with the draw,

    log q_{l+1}(x_{l+1}) = log q_l(x_l) - log |det J_l|,    J_l = dT_l / dx  at x_l,

and so does its slope, by the chain rule:

    J_l' g_{l+1} = g_l - grad log |det J_l|,    g_0 = -eps.

Of an autoregressive layer y_i = f(x_i; phi_i), phi = network(x), the Jacobian is triangular in the order of the unknowns,

    J = diag(df_i / dx_i) + sum_k (df_i / dphi_ik) (dphi_ik / dx).

The second term is a product of matrices backwards through the network. Its last layer, by far the widest, meets vectors that have
only those few phi_ik that belong to one i: all n rows of J cost a few passes, and not n.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fem_vi.vi.posterior.neural_spline import import_zuko

ELEMENTWISE = (nn.ReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Softplus, nn.Tanh, nn.Sigmoid)


class ForwardPath(nn.Module):
    """A flow of autoregressive layers, followed forwards with the slope of its log density.

    Args:
        transform: The layers, as zuko has them; `follows` says which will do.

    MPI: Not collective.

    References:
        Vaitl, Nicoli, Nakajima, Kessel (2022), Gradients should stay on path: better estimators of the reverse- and forward KL
        divergence for normalizing flows.
    """

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws.

        Args:
            eps: White noise, `(count, n)`.

        Returns:
            x, `(count, n)`; log q(x) but for a constant, `(count,)`; and, without a graph, its slope there, `(count, n)`.
        """
        with torch.enable_grad():  # type: ignore[no-untyped-call]
            x = eps if eps.requires_grad else eps.detach().requires_grad_()
            log_q, slope = -0.5 * eps.square().sum(-1), -eps.detach()
            for layer in self.transform.transforms:
                x, ladj, slope = _through(layer, x, slope)
                log_q = log_q - ladj
        return x, log_q, slope


def follows(transform: Any) -> bool:
    """Whether a flow of zuko has autoregressive layers alone, in an order, with networks of plain layers."""
    layers = getattr(transform, "transforms", ())
    if any(getattr(layer, "order", None) is None for layer in layers):
        return False
    return len(layers) > 0 and all(_is_plain(layer.hyper) for layer in layers)


def _is_plain(network: nn.Sequential) -> bool:
    """Whether masked linear layers and elementwise activations take turns, from one linear layer to another."""
    linear = [hasattr(part, "mask") for part in network]
    turns = linear[0] and linear[-1] and all(a != b for a, b in pairwise(linear))
    others = [part for part, is_linear in zip(network, linear, strict=True) if not is_linear]
    # One that works in place has overwritten what its derivative is taken with respect to.
    return turns and all(isinstance(part, ELEMENTWISE) and not getattr(part, "inplace", False) for part in others)


def _through(layer: Any, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T(x) and log |det J|, differentiable; and the slope of the log density behind the layer."""
    *inner, last = layer.hyper
    h, bends = x, []
    for part in inner:
        before, h = h, part(h)
        if not isinstance(part, nn.Linear):
            bends.append(_slopes(h, before)[0])
    n = x.shape[-1]
    phi, own = last(h).unflatten(-1, (n, layer.total)), x.clone()
    y, ladj = layer.univariate(*import_zuko().utils.unpack(phi, layer.shapes)).call_and_ladj(own)
    diagonal, by_phi = _slopes(y, own, phi)
    (by_x,) = _slopes(ladj, x)
    with torch.no_grad():
        rows = torch.einsum("bik,ikh->bih", by_phi, _weight(last).unflatten(0, (n, layer.total)))
        for part in reversed(inner):
            rows = rows @ _weight(part) if isinstance(part, nn.Linear) else rows * bends.pop()[:, None]
        sort = torch.argsort(layer.order, stable=True)
        transposed = (torch.diag_embed(diagonal) + rows)[:, sort][:, :, sort].mT
        solved = torch.linalg.solve_triangular(transposed, (slope - by_x)[:, sort, None], upper=True)[..., 0]
        behind = torch.empty_like(slope).index_copy_(1, sort, solved)
    return y, ladj.sum(-1), behind


def _slopes(y: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
    """Derivatives of the sum of y; the graph stays."""
    return torch.autograd.grad(y.sum(), x, retain_graph=True)


def _weight(linear: Any) -> Tensor:
    """The matrix of a masked linear layer."""
    weight: Tensor = linear.mask * linear.weight
    return weight
