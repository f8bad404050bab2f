"""An inverse problem whose likelihood is estimated from a few of many data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fem_vi.arguments import whole
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all, shared_seed
from fem_vi.vi.multiplicative_noise import part_of
from fem_vi.vi.prior import FieldPrior, check_prior
from fem_vi.vi.problem import InverseProblem, Likelihood
from fem_vi.vi.real_tensor import real_tensor


class MinibatchProblem(InverseProblem):
    """An inverse problem in which each evaluation sees `size` of the data, drawn anew without replacement.

        log p(y | m) ~ (num_data / size) sum_{i in batch} log p(y_i | m)

    is unbiased, and so are the ELBO and its gradient. For many experiments, each with a solve of its own, of which a step need
    run only a few. `fit` takes it; samplers and `diagnose` need all data: they refuse it, or use them.

    Args:
        prior: Prior of m.
        forward: Predicted data of some numbers, m `(*batch, n_owned)` and index `(k,)` to `(*batch, k)` (and what the likelihood
            asks for besides), differentiable and replicated.
        likelihood: Data must be independent under it.
        y: Data, `(num_data,)`, replicated.
        size: Data in each batch.

    Raises:
        InvalidInput: As `InverseProblem`; and where `size` is not between 1 and the number of data.

    MPI: Collective.

    Example:
        >>> problem = fem_vi.MinibatchProblem(prior, lambda m, index: observe(solve(m, loads[index])), noise, y, size=8)
    """

    def __init__(
        self, prior: FieldPrior, forward: Callable[[Tensor, Tensor], Tensor], likelihood: Likelihood, y: Tensor, *, size: int
    ) -> None:
        check_prior(prior)
        with raise_on_all(prior.comm):
            everything = torch.arange(real_tensor("y", y).numel())
        super().__init__(prior, lambda m: forward(m, everything), likelihood, y)
        with raise_on_all(prior.comm):
            self.size = whole("size", size, least=1)
            if self.size > len(self.y):
                raise InvalidInput(f"size is {size}; there are {len(self.y)} data.")
            part_of(likelihood, everything)  # refuses dependent data
        self._forward_of = forward

    def log_likelihood(self, m: Tensor) -> Tensor:
        """An unbiased estimate of log p(y | m) from a batch that all of `m` share.

        Args:
            m: Unknowns, `(*batch, n_owned)`.

        Returns:
            `(*batch,)`, replicated.

        MPI: Collective; the batch is drawn from torch's generator on rank 0.
        """
        key = shared_seed(self.prior.comm, int(torch.randint(2**62, ())))
        generator = torch.Generator().manual_seed(key)
        index = torch.randperm(len(self.y), generator=generator)[: self.size].sort().values
        noise = part_of(self.likelihood, index)
        prediction = self._predict(m, lambda m: self._forward_of(m, index), noise, self.size)
        return (len(self.y) / self.size) * noise.log_prob(self.y[index], prediction)

    def whole(self) -> InverseProblem:
        """The problem with all data, for samplers."""
        return InverseProblem(self.prior, self.forward, self.likelihood, self.y)
