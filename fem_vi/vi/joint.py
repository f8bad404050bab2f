"""Independent unknowns of several kinds as one prior, each by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import pad

from fem_vi.bridge import layout
from fem_vi.errors import InvalidInput
from fem_vi.parallel import same_ranks
from fem_vi.vi.prior import FieldPrior, GaussianVector, check_prior


class JointVector(GaussianVector):
    """Independent replicated unknowns of several kinds, one behind the other in m.

    A `GaussianVector` with names: whatever takes one, such as `FullRankNormal`, takes it.

    Args:
        parts: `GaussianVector`s by name, in the order in which they stand in m.

    Attributes:
        parts: Those priors.

    Raises:
        InvalidInput: Where there is no part, or one of another kind.

    MPI: As `GaussianVector`.

    Example:
        >>> prior = JointVector({"load": GaussianVector(torch.zeros(3)), "log_std": GaussianVector(torch.tensor([-3.0]))})
        >>> prior.split(m)["log_std"]
    """

    def __init__(self, parts: Mapping[str, GaussianVector]) -> None:
        self.parts = _checked_parts("JointVector", parts)
        for name, part in self.parts.items():
            if not isinstance(part, GaussianVector):
                raise InvalidInput(f"JointVector: {name} is a {type(part).__name__}; with fields among the parts use Joint.")
        factors = [
            part.unwhiten(torch.eye(part.num_global, dtype=torch.float64)).T - part.mean[:, None] for part in parts.values()
        ]
        mean = torch.cat([part.mean for part in parts.values()])
        super().__init__(mean, scale_tril=torch.block_diag(*factors).tril(), comm=_comm_of("JointVector", self.parts))

    def __repr__(self) -> str:
        return f"JointVector({', '.join(f'{name}: {part!r}' for name, part in self.parts.items())})"

    def split(self, m: Tensor) -> dict[str, Tensor]:
        """The parts of m by name, `(*batch, n)` each, replicated; differentiable."""
        sizes = [part.num_global for part in self.parts.values()]
        return dict(zip(self.parts, m.split(sizes, dim=-1), strict=True))


class Joint(Distribution):
    """Independent unknowns of several kinds, fields among them, one behind the other in m.

    Replicated parts are owned by rank 0, so that sums over ranks count them once; `split` gives them to every rank. A positive or
    bounded parameter is a part seen through a function of it, such as `LogNormalPrior`, in the forward map.

    Args:
        parts: Priors by name, such as `MaternField`, `GaussianVector` (with the mesh's communicator), in their order in m.

    Attributes:
        parts: Those priors.
        comm: The ranks that share the unknowns.

    Raises:
        InvalidInput: Where there is no part, one is no prior, or they live on different communicators.

    MPI: Not collective; its methods are. `m` is `(*batch, n_owned)`.

    Example:
        >>> noise = fem_vi.GaussianVector(torch.tensor([-4.0]), comm=V.mesh.comm)
        >>> prior = fem_vi.Joint({"log_k": fem_vi.MaternField(V, std=1.0, length=0.25), "log_std": noise})
        >>> def forward(m):
        ...     part = prior.split(m)
        ...     return torch.cat([observe(solve(part["log_k"])), part["log_std"]], dim=-1)
        >>> problem = fem_vi.InverseProblem(prior, forward, fem_vi.UnknownScale(fem_vi.GaussianNoise(1.0)), y)
    """

    arg_constraints = {}  # noqa: RUF012 - torch reads the attribute of the class
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, parts: Mapping[str, FieldPrior]) -> None:
        self.parts: dict[str, Any] = _checked_parts("Joint", parts)
        self.comm = _comm_of("Joint", self.parts)
        self._sizes = [self._owned(part) for part in self.parts.values()]
        super().__init__(event_shape=torch.Size([sum(self._sizes)]), validate_args=False)

    def __repr__(self) -> str:
        return f"Joint({', '.join(f'{name}: {part!r}' for name, part in self.parts.items())})"

    @property
    def num_global(self) -> int:
        """Number of unknowns on all ranks together."""
        return sum(part.num_global for part in self.parts.values())

    @property
    def mean(self) -> Tensor:
        """Prior mean, `(n_owned,)`."""
        return self._collect(lambda part: part.mean)

    @property
    def variance(self) -> Tensor:
        """Pointwise variance, `(n_owned,)`. Collective."""
        return self._collect(lambda part: part.variance)

    @property
    def whitening_logdet(self) -> Tensor:
        """Log |det C0^(1/2)|, scalar, replicated. Collective."""
        return torch.stack([part.whitening_logdet for part in self.parts.values()]).sum()

    def split(self, m: Tensor) -> dict[str, Tensor]:
        """The parts of m by name, as the forward map needs them; differentiable.

        Args:
            m: `(*batch, n_owned)`.

        Returns:
            Fields as field tensors, `(*batch, n_owned)` of the part; replicated parts on every rank, `(*batch, n)`.

        Raises:
            InvalidInput: Where the last axis is not that of m.

        MPI: Collective.
        """
        parts = dict(zip(self.parts, self._pieces(m), strict=True))
        return {name: self._everywhere(self.parts[name], piece) for name, piece in parts.items()}

    def white_noise(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Standard normal draws, `(*sample_shape, n_owned)`, the same numbers on any number of ranks. Collective."""
        return self._collect(lambda part: part.white_noise(sample_shape))

    def unwhiten(self, xi: Tensor) -> Tensor:
        """Mean + C0^(1/2) xi, part by part, `(*batch, n_owned)`; differentiable. Collective."""
        return self._each(xi, lambda part, piece: part.unwhiten(piece))

    def whiten(self, m: Tensor) -> Tensor:
        """The inverse of `unwhiten`. Collective."""
        return self._each(m, lambda part, piece: part.whiten(piece))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # type: ignore[override] # noqa: B008
        """Draws of m, `(*sample_shape, n_owned)`. Collective."""
        return self.unwhiten(self.white_noise(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Global log density of m, `(*batch,)`, replicated. Collective."""
        quadratic = self.all_sum(self.whiten(value).square().sum(-1))
        return -0.5 * (quadratic + self.num_global * math.log(2.0 * math.pi)) - self.whitening_logdet

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum of rank-local parts; see `fem_vi.all_sum`. Collective."""
        return layout.all_sum(x, self.comm)

    def localise(self, x: Tensor) -> Tensor:
        """A replicated tensor about to meet owned ones; see `fem_vi.localise`."""
        return layout.localise(x, self.comm)

    def gather(self, x: Tensor) -> Tensor:
        """`(*batch, n_owned)` to replicated `(*batch, num_global)`, part by part. Collective."""
        pieces = zip(self.parts.values(), self._pieces(x), strict=True)
        return torch.cat(
            [self._everywhere(part, piece) if _replicated(part) else part.gather(piece) for part, piece in pieces], dim=-1
        )

    def scatter(self, x: Tensor) -> Tensor:
        """The reverse of `gather`. Collective."""
        if x.ndim == 0 or x.shape[-1] != self.num_global:
            raise InvalidInput(f"scatter: x has shape {tuple(x.shape)}; its last axis must have {self.num_global} entries.")
        owned, first = [], 0
        for part in self.parts.values():
            piece = x[..., first : first + part.num_global]
            owned.append(self.localise(piece)[..., : self._owned(part)] if _replicated(part) else part.scatter(piece))
            first += part.num_global
        return torch.cat(owned, dim=-1)

    def write_fields(self, path: str | Path, fields: Mapping[str, Tensor]) -> None:
        """Write the parts that are fields on a mesh, each to a file of its own, named `<path>_<part>`. Collective."""
        pieces = {name: self._pieces(field) for name, field in fields.items()}
        target = Path(path)
        for k, (part_name, part) in enumerate(self.parts.items()):
            if hasattr(part, "write_fields"):
                mine = {name: piece[k] for name, piece in pieces.items()}
                part.write_fields(target.with_name(f"{target.stem}_{part_name}{target.suffix}"), mine)

    def _owned(self, part: FieldPrior) -> int:
        """Entries of a part that this rank owns."""
        return int(part.event_shape[0]) if not _replicated(part) or self.comm.rank == 0 else 0

    def _pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.ndim == 0 or x.shape[-1] != self.event_shape[0]:
            raise InvalidInput(f"Joint: m has shape {tuple(x.shape)}; its last axis must be {self.event_shape[0]} (owned).")
        return x.split(self._sizes, dim=-1)

    def _collect(self, value: Callable[[Any], Tensor]) -> Tensor:
        """What every part gives, one behind the other, replicated ones on rank 0 only."""
        return torch.cat([value(part)[..., : self._owned(part)] for part in self.parts.values()], dim=-1)

    def _each(self, x: Tensor, apply: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """A map of every part; replicated ones need no communication, and are mapped where they are owned."""
        pieces = zip(self.parts.values(), self._pieces(x), strict=True)
        return torch.cat(
            [apply(part, piece) if self._owned(part) or not _replicated(part) else piece for part, piece in pieces], -1
        )

    def _everywhere(self, part: FieldPrior, piece: Tensor) -> Tensor:
        """A field as it is; a replicated part on every rank."""
        if not _replicated(part):
            return piece
        return self.all_sum(pad(piece, (0, part.num_global - piece.shape[-1])))


def _replicated(part: object) -> bool:
    return isinstance(part, GaussianVector)


def _checked_parts(kind: str, parts: object) -> dict[str, Any]:
    if not isinstance(parts, Mapping) or not parts or not all(isinstance(name, str) for name in parts):
        raise InvalidInput(f"{kind}: parts is {parts!r:.80}; it must map names to priors, one at least.")
    for part in parts.values():
        check_prior(part)
    return dict(parts)


def _comm_of(kind: str, parts: Mapping[str, FieldPrior]) -> MPI.Comm:
    """The communicator that all parts share."""
    comms = {name: part.comm for name, part in parts.items()}
    first = next(iter(comms))
    for name, comm in comms.items():
        if not same_ranks(comm, comms[first]):
            raise InvalidInput(
                f"{kind}: {name} lives on {comm.size} ranks and {first} on {comms[first].size}. Make all parts on the "
                "communicator of the mesh: GaussianVector(..., comm=V.mesh.comm)."
            )
    return comms[first]
