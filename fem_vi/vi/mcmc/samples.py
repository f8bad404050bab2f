"""What a sampler returns: draws, what they cost, and how well the chains mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fem_vi.errors import InvalidInput
from fem_vi.vi.mcmc.chain_report import ChainReport, chain_report
from fem_vi.vi.problem import Cost, InverseProblem

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, repr=False)
class Samples:
    """Draws from a posterior, of several chains.

    Attributes:
        problem: Whose posterior.
        m: Unknowns, `(chains, draws, n_owned)`.
        log_joint: log p(y, m), `(chains, draws)`, replicated.
        log_likelihood: log p(y | m), `(chains, draws)`, replicated.
        acceptance: Probability with which each step after the warm-up was accepted, `(chains, steps)`, replicated.
        num_diverged: Steps after the warm-up whose proposal went where the forward map fails or the density all but vanishes.
        kernel: What moved the chains.
        step_size: Its angle after the warm-up.
        cost: Samples solved, warm-up included, over all groups of ranks. What a `DelayedAcceptance` asks its cheap problem is
            counted by that problem.
        seconds: Wall time, warm-up included.
        seed: Of the random numbers.
    """

    problem: InverseProblem
    m: Tensor
    log_joint: Tensor
    log_likelihood: Tensor
    acceptance: Tensor
    num_diverged: int
    kernel: Any
    step_size: float
    cost: Cost
    seconds: float
    seed: int

    def __repr__(self) -> str:
        chains, draws = self.log_joint.shape
        return f"Samples({chains} chains, {draws} draws, {self.problem.prior.num_global} unknowns, {self.cost.solves} solves)"

    @property
    def mean(self) -> Tensor:
        """Mean over chains and draws, `(n_owned,)`."""
        return self.m.mean((0, 1))

    @property
    def variance(self) -> Tensor:
        """Variance over chains and draws, `(n_owned,)`."""
        return self.m.flatten(0, 1).var(0)

    def report(self) -> ChainReport:
        """Whether the chains have mixed, and how many independent draws they are worth. Collective."""
        return chain_report(self)

    def to_arviz(self, name: str = "m") -> xarray.DataTree:
        """The draws as ArviZ 1.x takes them: groups posterior, sample_stats and observed_data.

        Fields come whole, in the order of the mesh file: `(chain, draw, n_global)` numbers on every rank.

        Args:
            name: Of the variable.

        Returns:
            An `xarray.DataTree` for `arviz_stats.summary`, `arviz_plots.plot_trace` and so on.

        Raises:
            InvalidInput: Where the name is no text.

        MPI: Collective.

        Example:
            >>> arviz_plots.plot_trace(samples.to_arviz(), coords={"m_dim_0": [0, 100, 200]})  # of a field, a few unknowns
        """
        import arviz_base

        if not isinstance(name, str) or not name:
            raise InvalidInput(f"name is {name!r:.80}; it must be the name of a variable, such as 'm'.")
        thin = max(self.acceptance.shape[1] // self.log_joint.shape[1], 1)
        statistics = {
            "lp": self.log_joint.numpy(),
            "log_likelihood": self.log_likelihood.numpy(),
            "acceptance_rate": self.acceptance[:, thin - 1 :: thin][:, : self.log_joint.shape[1]].numpy(),
        }
        m = self.problem.prior.gather(self.m).numpy()
        groups = {"posterior": {name: m}, "sample_stats": statistics, "observed_data": {"y": self.problem.y.numpy()}}
        tree: xarray.DataTree = arviz_base.from_dict(groups)
        tree.attrs.update({"sampler": repr(self.kernel), "seed": self.seed, "solves": self.cost.solves})
        return tree
