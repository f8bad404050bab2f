"""The graph of a mesh: nodes, and edges between nodes of one cell."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fem_vi.bridge.layout import as_numpy, gather, num_owned
from fem_vi.parallel import all_values
from fem_vi.pde.fields import check_vertex_space


def mesh_graph(V: Any) -> tuple[Tensor, Tensor]:
    """Nodes and edges of a mesh, for a `GraphEncoder` that reads fields on it.

    Args:
        V: Scalar continuous Lagrange space of degree 1.

    Returns:
        Coordinates of the nodes, `(n_global, 3)`, and edges as pairs of nodes, each in both directions, `(2, num_edges)`; both in
        the order of `gather(u, V)`, replicated.

    Raises:
        InvalidInput: Where V is another space.

    MPI: Collective.

    Example:
        >>> encoder = fem_vi.GraphEncoder(*fem_vi.mesh_graph(V))
    """
    check_vertex_space(V)
    points = V.tabulate_dof_coordinates()[: num_owned(V)]
    everywhere = as_numpy(gather(torch.from_numpy(points.T.copy()), V)).T.copy()
    cells = V.dofmap.list[: V.mesh.topology.index_map(V.mesh.topology.dim).size_local]
    nodes = V.dofmap.index_map.local_to_global(np.ascontiguousarray(cells.ravel(), dtype=np.int32)).reshape(cells.shape)
    own = np.concatenate([nodes[:, pair] for pair in permutations(range(cells.shape[1]), 2)])
    edges = np.unique(np.concatenate(all_values(V.mesh.comm, np.unique(own, axis=0))), axis=0)
    return torch.from_numpy(everywhere), torch.from_numpy(edges.T.astype(np.int64))
