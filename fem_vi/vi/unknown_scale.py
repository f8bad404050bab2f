"""Noise of unknown size, inferred with everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from fem_vi.errors import InvalidInput
from fem_vi.vi.likelihood import check_last_axes
from fem_vi.vi.multiplicative_noise import Noise, part_of
from fem_vi.vi.predicted import num_predicted


class UnknownScale:
    """Additive noise of known shape and unknown size, y = prediction + exp(s) * e.

        log p(y | prediction, s) = log p_e((y - prediction) exp(-s)) - num_data * s

    s is an unknown like any other. It has its place in the vector m, and so its prior: normal s is a log-normal standard
    deviation; `GammaPrior` makes a precision of Gamma distribution of a normal number. The forward map returns it last.

    Args:
        noise: The shape: `GaussianNoise(1.0)`, so that exp(s) is the standard deviation; `StudentNoise`, `CorrelatedNoise`,
            `LowRankNoise`.

    Attributes:
        noise: That noise.

    Raises:
        InvalidInput: Where it is no additive noise.

    MPI: Not collective; every tensor is replicated.

    Example:
        >>> def forward(m):                                        # the last entry of m is log std
        ...     return torch.cat([observe(solve(m[..., :-1])), m[..., -1:]], dim=-1)
        >>> problem = fem_vi.InverseProblem(prior, forward, fem_vi.UnknownScale(fem_vi.GaussianNoise(1.0)), y)
    """

    additive = False

    def __init__(self, noise: Noise) -> None:
        if isinstance(noise, type) or not getattr(noise, "additive", False):
            raise InvalidInput(
                f"noise is {noise!r:.80}; UnknownScale takes additive noise, such as GaussianNoise(1.0). Multiplicative noise of "
                "unknown size is MultiplicativeNoise(UnknownScale(GaussianNoise(1.0)))."
            )
        self.noise = noise

    def __repr__(self) -> str:
        return f"UnknownScale({self.noise!r})"

    def num_predicted(self, num_data: int) -> int:
        """One more than the data: s comes last."""
        return num_predicted(self.noise, num_data) + 1

    def check(self, y: Tensor) -> None:
        """As the noise that is scaled."""
        self.noise.check(y)

    def at(self, index: Tensor) -> UnknownScale:
        """The noise of some of the data, `(batch,)`."""
        return UnknownScale(part_of(self.noise, index))

    def standardise(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Residuals in units of the scaled noise, `(*batch, num_data)`."""
        shrunk, centre, _ = self._split(y, prediction)
        return self.noise.standardise(shrunk, centre)

    def curvature_root(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Rows whose Jacobian is a root of the Fisher information, `(*batch, num_data + 1)`.

        s and predictions are orthogonal in it, and s has two for each datum, or what noise that is not normal says
        (`scale_information`). The Jacobian of standardised residuals has half of that, and correlations that are not there.
        """
        information = float(getattr(self.noise, "scale_information", 2.0))
        centre, s = prediction[..., :-1], prediction[..., -1:]
        shrunk = centre + (y - centre) * (-s.detach()).exp()
        rows = self.noise.standardise(shrunk, centre)
        return torch.cat([rows, (information * y.shape[-1]) ** 0.5 * s], dim=-1)

    def log_prob(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Log p(y | prediction, s), `(*batch,)`, replicated.

        Args:
            y: Data, `(num_data,)` or `(*batch, num_data)`, replicated.
            prediction: Predicted data and s, `(*batch, num_data + 1)`, replicated.
        """
        shrunk, centre, s = self._split(y, prediction)
        return self.noise.log_prob(shrunk, centre) - y.shape[-1] * s

    def sample(self, prediction: Tensor) -> Tensor:
        """Noisy data, `(*batch, num_data)`, from torch's generator; see `GaussianNoise.sample`."""
        centre, s = prediction[..., :-1], prediction[..., -1:]
        return centre + s.exp() * (self.noise.sample(centre) - centre)

    def _split(self, y: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Data pulled towards their predictions by exp(-s), predictions, and s."""
        if prediction.ndim == 0:
            check_last_axes(y, prediction)
        centre, s = prediction[..., :-1], prediction[..., -1]
        check_last_axes(y, centre)
        return centre + (y - centre) * (-s)[..., None].exp(), centre, s
