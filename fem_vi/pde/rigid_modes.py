"""Rigid body modes: what elasticity hardly resists, and what algebraic multigrid must therefore be told."""

from __future__ import annotations

from typing import Any

import numpy as np

from fem_vi.parallel import sum_over_ranks
from fem_vi.pde.inputs import Array


def rigid_modes(V: Any) -> Array:
    """Translations and infinitesimal rotations, orthonormal over all ranks.

    Args:
        V: Blocked Lagrange space with as many components as the geometry has dimensions.

    Returns:
        Owned coefficients, `(num_modes, n_owned)`, with 1, 3 or 6 modes in 1, 2 or 3 dimensions.

    MPI: Collective.

    References:
        Vanek, Mandel, Brezina (1996), Algebraic multigrid by smoothed aggregation.
    """
    dim = V.mesh.geometry.dim
    x = V.tabulate_dof_coordinates()[: V.dofmap.index_map.size_local, :dim]
    centre = sum_over_ranks(V.mesh.comm, x.sum(axis=0)) / V.dofmap.index_map.size_global
    x = x - centre
    pairs = [(i, j) for i in range(dim) for j in range(i)]
    modes = np.zeros((dim + len(pairs), len(x), dim))
    for i in range(dim):
        modes[i, :, i] = 1.0
    for mode, (i, j) in zip(modes[dim:], pairs, strict=True):
        mode[:, i] = x[:, j]
        mode[:, j] = -x[:, i]
    return _orthonormal(modes.reshape(len(modes), -1), V.mesh.comm)


def _orthonormal(rows: Array, comm: Any) -> Array:
    """Rows that span the same space, by the Cholesky factor of their Gram matrix; twice, for orthogonality to rounding."""
    for _ in range(2):
        gram = sum_over_ranks(comm, rows @ rows.T)
        scale = np.sqrt(np.diag(gram))
        factor = np.linalg.cholesky(gram / np.outer(scale, scale))
        rows = np.asarray(np.linalg.solve(factor, rows / scale[:, None]), dtype=np.float64)
    return rows
