"""Mixtures of normal families: posteriors with several modes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fem_vi.arguments import instance
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all, shared_seed
from fem_vi.vi.posterior.sampled import SampledDistribution
from fem_vi.vi.posterior.whitened import WhitenedNormal
from fem_vi.vi.posterior.whitened_family import FamilyOverPrior, WhitenedFamily
from fem_vi.vi.start import Linearisation

APART = 2.0
"""How far from the linearised posterior components start at most, in its standard deviations; half the square is lost in nats."""


class MixtureDistribution(SampledDistribution):
    """sum_k w_k q_k with normal q_k over one prior.

    Args:
        components: The q_k.
        log_weights: log w_k, `(K,)`, replicated.
    """

    def __init__(self, components: Sequence[WhitenedNormal], log_weights: Tensor) -> None:
        super().__init__(components[0].prior)
        self.components = tuple(components)
        self.log_weights = log_weights

    @property
    def mean(self) -> Tensor:
        """Mean of m, `(n_owned,)`: that of the components' means."""
        return self._average([q.mean for q in self.components])

    @property
    def variance(self) -> Tensor:
        """Pointwise variance of m, `(n_owned,)`: the components' variances, and how far their means lie apart."""
        mean = self.mean
        return self._average([q.variance + (q.mean - mean).square() for q in self.components])

    def _average(self, fields: Sequence[Tensor]) -> Tensor:
        """The weighted mean of a field of each component."""
        return self.prior.localise(self.log_weights.exp()) @ torch.stack(list(fields))

    def rsample_whitened(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Draws of xi, `(*sample_shape, n_owned)`, each from one component; they carry no gradient of the weights."""
        generator = torch.Generator().manual_seed(shared_seed(self.prior.comm, int(torch.randint(2**62, ()))))
        sample_shape = torch.Size(sample_shape)
        count = sample_shape.numel()
        chosen = torch.multinomial(self.log_weights.detach().exp(), count, replacement=True, generator=generator)
        rows = torch.cat([q.rsample_whitened(torch.Size([int((chosen == k).sum())])) for k, q in enumerate(self.components)])
        order = torch.argsort(torch.argsort(chosen, stable=True), stable=True)
        return rows[order].reshape(*sample_shape, *self.event_shape)

    def rsample_stratified(self, noise: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As many draws from each component, to be weighted: E_q[f] ~ sum_i weight_i f(xi_i), differentiable in the weights too.

        Args:
            noise: White noise for each component, `(count, n_owned)` each.

        Returns:
            xi, `(samples, n_owned)`, and weights that sum to one, `(samples,)`.
        """
        counts = torch.tensor([len(eps) for eps in noise])
        xi = torch.cat([q.push(eps) for q, eps in zip(self.components, noise, strict=True)])
        return xi, (self.log_weights.exp() / counts).repeat_interleave(counts)

    def log_ratio(self, xi: Tensor) -> Tensor:
        """Log q(m) - log p(m) at m = unwhiten(xi), `(*batch,)`, replicated."""
        ratios = torch.stack([q.log_ratio(xi) for q in self.components], dim=-1)
        return torch.logsumexp(ratios + self.log_weights, dim=-1)


class Mixture(FamilyOverPrior):
    """q(m) = sum_k w_k q_k(m), w = softmax(logits), of normal families over one prior.

    An objective draws as many samples from each component and weights them, so that its gradient with respect to w is exact and
    no component dies for want of samples; `samples` must be a multiple of K for equal shares. Components that start at one place
    stay together: `fit` starts them a little apart, at or towards draws from the linearised posterior; for known modes start each
    with `laplace`.

    Args:
        components: Normal families, of one prior; each is taken as it is, not copied.

    Attributes:
        components: Those.
        logits: Of the weights, `(K,)`, replicated; equal at first.
        fields: Names of the parameters that are field tensors.
        pairs: Names of the parameters with an entry for each pair of unknowns.

    Raises:
        InvalidInput: Where there are fewer than two components, one is no normal family or given twice, or their priors differ.

    MPI: Not collective; drawing samples is.

    References:
        Morningstar, Vikram, Ham, Gallagher, Dillon (2021), Automatic differentiation variational inference with mixtures.

    Example:
        >>> posterior = Mixture([FullRankNormal(prior) for _ in range(4)])
    """

    def __init__(self, components: Sequence[WhitenedFamily]) -> None:
        instance("Mixture: components", components, Sequence)
        for component in components:
            instance("Mixture: a component", component, WhitenedFamily)
        if len(components) < 2 or len({id(component) for component in components}) < len(components):
            raise InvalidInput(f"Mixture: components has {len(components)} entries; it takes two different families at least.")
        super().__init__(components[0].prior)
        with raise_on_all(self.prior.comm):
            if any(component.prior is not self.prior for component in components):
                raise InvalidInput("Mixture: the components have different priors; make all over one prior.")
        self.components = nn.ModuleList(components)
        self.logits = nn.Parameter(torch.zeros(len(components), dtype=torch.float64))
        self.fields = self._named("fields")
        self.pairs = self._named("pairs")

    def _named(self, kind: str) -> tuple[str, ...]:
        """The names that the components list under `kind`, as they are called here."""
        return tuple(f"components.{k}.{name}" for k, each in enumerate(self.components) for name in getattr(each, kind, ()))

    def __call__(self) -> MixtureDistribution:
        """The distribution at the present parameters."""
        return super().__call__()  # type: ignore[no-any-return]

    def forward(self) -> MixtureDistribution:
        """The distribution at the present parameters."""
        return MixtureDistribution([component() for component in self.components], torch.log_softmax(self.logits, dim=0))

    def start_at(self, linearisation: Linearisation) -> None:
        """Let all components take a linearised posterior, each moved towards a draw from it, about two deviations at most."""
        share = min(1.0, APART / self.prior.num_global**0.5)  # draws of n unknowns are sqrt(n) away from their mean
        with torch.no_grad():
            for component in self.components:
                component.start_at(linearisation)  # type: ignore[operator]
                component.mu.lerp_(component().rsample_whitened(), share)  # type: ignore[operator, union-attr]

    def is_fresh(self) -> bool:
        """Whether all components are still centred at the prior mean. Collective."""
        return all([component.is_fresh() for component in self.components])  # type: ignore[operator]
