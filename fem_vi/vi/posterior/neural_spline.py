"""Layers of neural splines, made by zuko."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from types import ModuleType

from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from fem_vi.arguments import positive, whole


def import_zuko() -> ModuleType:
    """Zuko, with the argument validation of torch's distributions left as it was: importing it turns that off everywhere."""
    if "zuko" not in sys.modules:
        names = ("_validate_args", "arg_constraints")
        before = {name: Distribution.__dict__[name] for name in names}
        import zuko.flows

        for name, value in before.items():
            setattr(Distribution, name, value)
    import zuko

    return zuko


@dataclass(frozen=True)
class NeuralSpline:
    """Autoregressive rational-quadratic splines on [-5, 5], the identity outside.

    Attributes:
        transforms: Layers, with the order of the unknowns reversed from one to the next.
        bins: Pieces of each spline.
        hidden: Width of the hidden layers of the networks that give the knots.
        passes: Passes of the direction that is not the networks' own; 2 makes it a coupling flow, None one for each unknown.

    References:
        Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows.
    """

    transforms: int = 4
    bins: int = 8
    hidden: tuple[int, ...] = (64, 64)
    passes: int | None = None

    def __post_init__(self) -> None:
        _check_layers(self)

    def __call__(self, features: int, context: int = 0) -> nn.Module:
        """The flow over so many unknowns, with so many numbers as context."""
        flows = import_zuko().flows
        flow: nn.Module = flows.NSF(
            features, context, transforms=self.transforms, bins=self.bins, passes=self.passes, hidden_features=self.hidden
        )
        return flow


@dataclass(frozen=True)
class AffineSpline:
    """Autoregressive layers y_i = t_i + exp(s_i) f_i(x_i): a rational-quadratic spline f_i, then a shift and a scale.

    The networks give t_i and s_i along with the knots, from the unknowns before. A spline is the identity outside of its box, and
    so cannot move a whole unknown or lengthen its tails where others say so; the shift and the scale can.

    Attributes:
        transforms: Layers, with the order of the unknowns reversed from one to the next.
        bins: Pieces of each spline.
        hidden: Width of the hidden layers of the networks.
        passes: Passes of the direction that is not the networks' own; 2 makes it a coupling flow, None one for each unknown.
        bound: Splines map [-bound, bound] onto itself.

    References:
        Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows.
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling (2016), Improved variational inference with inverse autoregressive
        flow.
    """

    transforms: int = 4
    bins: int = 8
    hidden: tuple[int, ...] = (64, 64)
    passes: int | None = None
    bound: float = 5.0

    def __post_init__(self) -> None:
        _check_layers(self)
        positive("AffineSpline: bound", self.bound)

    def __call__(self, features: int, context: int = 0) -> nn.Module:
        """The flow over so many unknowns, with so many numbers as context."""
        k = self.bins
        flow: nn.Module = import_zuko().flows.MAF(
            features,
            context,
            transforms=self.transforms,
            passes=self.passes,
            hidden_features=self.hidden,
            univariate=partial(_affine_spline, bound=self.bound),
            shapes=[(k,), (k,), (k - 1,), (), ()],
        )
        return flow


def _affine_spline(
    widths: Tensor, heights: Tensor, derivatives: Tensor, shift: Tensor, log_scale: Tensor, *, bound: float
) -> Transform:
    """One unknown's map, from what a network gave; the identity where that is zero."""
    transforms = import_zuko().transforms
    spline = transforms.MonotonicRQSTransform(widths, heights, derivatives, bound=bound)
    composed: Transform = transforms.ComposedTransform(spline, transforms.MonotonicAffineTransform(shift, log_scale))
    return composed


def _check_layers(spline: NeuralSpline | AffineSpline) -> None:
    name = type(spline).__name__
    whole(f"{name}: transforms", spline.transforms, least=1)
    whole(f"{name}: bins", spline.bins, least=2)
    for width in spline.hidden:
        whole(f"{name}: hidden: an entry", width, least=1)
    if spline.passes is not None:
        whole(f"{name}: passes", spline.passes, least=1)
