"""`PiecewiseConstant`: fields with one unknown for each part of the mesh, as a differentiable function of a short vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dolfinx import mesh as dolfinx_mesh
from numpy.typing import NDArray
from torch import Tensor

from fem_vi.arguments import instance, whole
from fem_vi.bridge.layout import all_sum, check_last_axis, localise, num_owned
from fem_vi.errors import InvalidInput
from fem_vi.parallel import all_values, max_over_ranks, raise_on_all
from fem_vi.pde.agree import agreed, check_space
from fem_vi.pde.fields import lumped_mass


@dataclass(frozen=True)
class Tagged:
    """One part for each value of the tags of cells.

    Attributes:
        tags: DOLFINx MeshTags of cells, `read_mesh(...).cell_tags` for example; every cell has one.
    """

    tags: Any


@dataclass(frozen=True)
class Blocks:
    """Equal boxes that fill the bounding box of the mesh; a cell belongs to the one that its midpoint is in.

    Attributes:
        shape: How many along each axis, `(8, 8)` for example. They are numbered like the entries of an array of that shape.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        for count in self.shape:
            whole("Blocks: shape", count, least=1)


class PiecewiseConstant:
    """theta -> m: the value theta[k] in all cells of part k.

    Args:
        V: Scalar discontinuous Lagrange space of degree 0.
        parts: `Tagged(tags)` or `Blocks(shape)`.

    Attributes:
        labels: The tag of each part, ascending, or the number of each block.
        part: The part of each owned cell, `(n_owned,)`.
        volumes: The volume of each part, `(num_parts,)`, replicated.

    Call:
        `piecewise(theta)`: `(*batch, num_parts)`, replicated, to field tensors `(*batch, n_owned)`; differentiable.

    Raises:
        InvalidInput: Where V is another space, a cell has no tag, or a block has no cell.

    MPI: Collective; a call is not, its backward is.

    Example:
        >>> layers = PiecewiseConstant(fem.functionspace(data.mesh, ("DG", 0)), Tagged(data.cell_tags))
        >>> prior = GaussianVector(torch.zeros(layers.num_parts), comm=data.mesh.comm)
        >>> problem = InverseProblem(prior, lambda theta: observe(solve(layers(theta))), likelihood, y)
    """

    def __init__(self, V: Any, parts: Tagged | Blocks) -> None:
        with agreed(V):
            check_space("PiecewiseConstant: V", V)
            instance("PiecewiseConstant: parts", parts, Tagged, Blocks)
            _check_cell_space(V)
        self.V, self.comm = V, V.mesh.comm
        cells = np.arange(V.mesh.topology.index_map(V.mesh.topology.dim).size_local, dtype=np.int32)
        names = _tags_of(V, parts, cells) if isinstance(parts, Tagged) else _blocks_of(V, parts, cells)
        found = sorted({name for rank in all_values(self.comm, {int(name) for name in names}) for name in rank})
        if isinstance(parts, Blocks) and len(found) < math.prod(parts.shape):
            empty = sorted(set(range(math.prod(parts.shape))) - set(found))
            raise InvalidInput(f"PiecewiseConstant: blocks {empty[:10]} of {parts.shape} hold no midpoint of a cell; take fewer.")
        self.labels: tuple[int, ...] = tuple(found)
        part = np.empty(num_owned(V), dtype=np.int64)
        part[V.dofmap.list[cells, 0]] = np.searchsorted(found, names)
        self.part = torch.from_numpy(part)
        self.volumes = self._sum(torch.from_numpy(lumped_mass(V)))

    @property
    def num_parts(self) -> int:
        """The length of theta."""
        return len(self.labels)

    def __call__(self, theta: Tensor) -> Tensor:
        """The field of each vector theta.

        Raises:
            InvalidInput: Where the last axis of theta is another.
        """
        with raise_on_all(self.comm):
            check_last_axis("PiecewiseConstant: theta", theta, self.num_parts, "one for each part.")
        return localise(theta, self.comm)[..., self.part]

    def average(self, m: Tensor) -> Tensor:
        """The mean of a field over each part, `(*batch, num_parts)`, replicated; differentiable. Collective."""
        return self._sum(m * torch.from_numpy(lumped_mass(self.V))) / self.volumes

    def _sum(self, x: Tensor) -> Tensor:
        zeros = torch.zeros((*x.shape[:-1], self.num_parts), dtype=x.dtype)
        return all_sum(zeros.index_add(-1, self.part, x), self.comm)


def _check_cell_space(V: Any) -> None:
    element = V.ufl_element()
    family = getattr(getattr(element, "element_family", None), "name", "")
    if family != "P" or element.degree != 0 or V.value_shape != ():
        raise InvalidInput(
            f"PiecewiseConstant: V is {element}; it needs a scalar space with one unknown a cell: "
            'fem.functionspace(mesh, ("DG", 0)).'
        )


def _tags_of(V: Any, parts: Tagged, cells: NDArray[np.int32]) -> NDArray[np.int64]:
    """The tag of each owned cell."""
    tags, dim = parts.tags, V.mesh.topology.dim
    with raise_on_all(V.mesh.comm):
        if getattr(tags, "dim", None) != dim:
            raise InvalidInput(f"PiecewiseConstant: tags are {tags!r:.80}; they must be MeshTags of cells (dimension {dim}).")
        own = tags.indices < len(cells)
        names = np.full(len(cells), np.iinfo(np.int64).min)
        names[tags.indices[own]] = tags.values[own]
        if bare := int(np.count_nonzero(names == np.iinfo(np.int64).min)):
            raise InvalidInput(f"PiecewiseConstant: {bare} of {len(cells)} cells have no tag. Give each cell one.")
    return names


def _blocks_of(V: Any, parts: Blocks, cells: NDArray[np.int32]) -> NDArray[np.int64]:
    """The number of the block that has the midpoint of each owned cell."""
    mesh, comm = V.mesh, V.mesh.comm
    d = mesh.geometry.dim
    with raise_on_all(comm):
        if len(parts.shape) != d:
            raise InvalidInput(f"PiecewiseConstant: Blocks({parts.shape}) has {len(parts.shape)} axes; the mesh has {d}.")
    x = mesh.geometry.x[:, :d]
    low = -np.array([max_over_ranks(comm, float(np.max(-x[:, k], initial=-np.inf))) for k in range(d)])
    high = np.array([max_over_ranks(comm, float(np.max(x[:, k], initial=-np.inf))) for k in range(d)])
    midpoints = dolfinx_mesh.compute_midpoints(mesh, mesh.topology.dim, cells)[:, :d]
    scaled = (midpoints - low) / (high - low) * parts.shape
    index = np.clip(np.floor(scaled + 1e-9).astype(np.int64), 0, np.array(parts.shape) - 1)  # the same block on any partition
    return np.asarray(np.ravel_multi_index(tuple(index.T), parts.shape), dtype=np.int64)
