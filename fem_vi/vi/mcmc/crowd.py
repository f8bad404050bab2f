"""Chains or particles that move together as one batch, shared out over groups of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mpi4py import MPI
from torch import Tensor

from fem_vi.errors import FemViError, InvalidInput
from fem_vi.parallel import ProcessGrid, agree_on_error, all_values, same_ranks, shared_seed, sum_over_ranks
from fem_vi.vi.prior import FieldPrior


@dataclass(frozen=True)
class Crowd:
    """Which of `total` chains this rank's group moves, and the random numbers that all groups share.

    Random numbers are drawn for all chains and then cut, so that a chain does not depend on how many groups there are.

    Attributes:
        prior: Prior of the unknowns.
        total: Chains of all groups.
        first: First chain of this group.
        last: One past its last.
        grid: The groups, or None where there is one.
        seed: Of all random numbers, the same on all ranks.
        generator: Of those that are no white noise; a forward map that draws numbers does not disturb it.
    """

    prior: FieldPrior
    total: int
    first: int
    last: int
    grid: ProcessGrid | None
    seed: int
    generator: torch.Generator

    @staticmethod
    def create(prior: FieldPrior, total: int, grid: ProcessGrid | None, *, seed: int, unit: int = 1) -> Crowd:
        """Share out chains in blocks of `unit`.

        Args:
            prior: Prior of the unknowns.
            total: Chains of all groups, a multiple of `unit`.
            grid: Its `mesh_comm` must be the prior's communicator.
            seed: Of random numbers; that of rank 0 counts.
            unit: Chains that must stay together.

        Raises:
            InvalidInput: Where the grid does not fit the prior, or has more groups than there are blocks.

        MPI: Collective.
        """
        if grid is None:
            seed = shared_seed(prior.comm, seed)
            return Crowd(prior, total, 0, total, None, seed, torch.Generator().manual_seed(seed))
        error = None
        if not same_ranks(grid.mesh_comm, prior.comm):
            error = InvalidInput(
                f"grid: its mesh_comm has {grid.mesh_comm.size} ranks, and the prior lives on another communicator, with "
                f"{prior.comm.size}. Make the mesh on grid.mesh_comm, or pass comm=grid.mesh_comm to the prior."
            )
        elif total // unit < grid.sample_comm.size:
            error = InvalidInput(
                f"grid has {grid.sample_comm.size} groups of ranks, and there are {total // unit} chains or islands to share "
                "out. Take at least one for each group, or more ranks for each mesh."
            )
        agree_on_error(grid.comm, error)
        seed = shared_seed(grid.comm, seed)
        groups, group, blocks = grid.sample_comm.size, grid.sample_comm.rank, total // unit
        first, last = unit * (blocks * group // groups), unit * (blocks * (group + 1) // groups)
        return Crowd(prior, total, first, last, grid, seed, torch.Generator().manual_seed(seed))

    @property
    def size(self) -> int:
        """Chains of this group."""
        return self.last - self.first

    @property
    def comm(self) -> MPI.Comm:
        """All ranks that take part."""
        return self.prior.comm if self.grid is None else self.grid.comm

    def noise(self) -> Tensor:
        """Standard normal numbers, `(size, n_owned)`. Collective over the mesh."""
        return self.prior.white_noise(torch.Size([self.total]))[self.first : self.last]

    def uniform(self) -> Tensor:
        """Uniform numbers, one for each chain of this group, `(size,)`, replicated over the mesh."""
        return torch.rand(self.total, dtype=torch.float64, generator=self.generator)[self.first : self.last]

    def one_uniform(self) -> float:
        """A uniform number that all chains share."""
        return float(torch.rand((), dtype=torch.float64, generator=self.generator))

    def together(self, x: Tensor) -> Tensor:
        """The sum over groups of equally shaped numbers. Collective."""
        if self.grid is None:
            return x
        return torch.from_numpy(sum_over_ranks(self.grid.sample_comm, x.detach().numpy()))

    def collect(self, x: Tensor) -> Tensor:
        """Rows of all chains on every group, `(size, ...)` to `(total, ...)`. Collective."""
        if self.grid is None:
            return x
        return torch.cat([torch.from_numpy(part) for part in all_values(self.grid.sample_comm, x.detach().numpy())])

    def agree(self, error: FemViError | None) -> None:
        """Raise on every group where any has an error. Collective."""
        if self.grid is not None:
            agree_on_error(self.grid.sample_comm, error)
        if error is not None:
            raise error
