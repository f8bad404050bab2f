"""White noise that does not depend on how a mesh is partitioned: a hash of (key, sample, node), made normal.

Each rank computes the entries that it owns, and only those; nothing is communicated. The hash is three rounds of the
finaliser of SplitMix64.

References:
    Steele, Lea, Flood (2014), Fast splittable pseudorandom number generators.
    Salmon, Moraes, Dror, Shaw (2011), Parallel random numbers: as easy as 1, 2, 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Words = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: Words) -> Words:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def standard_normal(key: int, num_samples: int, nodes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Independent standard normal numbers, one for each sample and node.

    Args:
        key: 64-bit key of the draw, replicated; not zero, for which row i of node j is row j of node i.
        num_samples: Rows.
        nodes: Names of the owned nodes that do not depend on the partition, `(n_owned,)`.

    Returns:
        `(num_samples, n_owned)`: the entry of a node depends on key, row and name only.

    MPI: Not collective.
    """
    with np.errstate(over="ignore"):
        start = _mix(np.full(num_samples, key % 2**64, dtype=np.uint64) + np.arange(num_samples, dtype=np.uint64) * _GOLDEN)
        words = _mix(_mix(start[:, None] + _mix(nodes.astype(np.uint64) * _GOLDEN)[None, :]) + _GOLDEN)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(ndtri(uniform))
