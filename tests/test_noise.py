"""White noise by hashing: standard normal, independent in every direction, and the same for any subset of nodes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fem_vi.noise import standard_normal

NODES = np.arange(20_000, dtype=np.int64)


def test_subsets_of_nodes_and_samples_have_the_same_bits() -> None:
    whole = standard_normal(7, 5, NODES[:100])
    chosen = np.array([93, 4, 17], dtype=np.int64)
    assert np.array_equal(standard_normal(7, 3, chosen), whole[:3][:, chosen])
    assert standard_normal(7, 2, NODES[:0]).shape == (2, 0)


@pytest.mark.parametrize("key", [1, 2, 2**63, 2**62 - 1])
def test_moments_and_distribution_function(key: int) -> None:
    """Bounds are 4.5 standard errors of each moment for 80,000 independent normal numbers; the KS level is 1e-4."""
    x = standard_normal(key, 4, NODES).ravel()
    n = x.size
    assert np.isfinite(x).all()
    for moment, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((x**moment).mean() - mean) < 4.5 * np.sqrt(variance / n), moment
    assert stats.kstest(x, "norm").pvalue > 1e-4


def test_keys_samples_and_neighbouring_nodes_are_uncorrelated() -> None:
    """Correlations of independent series of length n are normal with standard deviation n^-1/2."""
    first, second = standard_normal(1, 3, NODES), standard_normal(2, 3, NODES)
    pairs = [
        (first[0], first[1]), (first[0], first[2]), (first[0], second[0]), (first[1], second[0]), (first[0], second[1]),
        (first[0][:-1], first[0][1:]), (first[0][:-2], first[0][2:]),
        (first[0][:-64], first[0][64:]), (first[0][:-1], first[1][1:]),
    ]  # fmt: skip
    for a, b in pairs:
        for f in (lambda x: x, np.square, np.abs):
            assert abs(np.corrcoef(f(a), f(b))[0, 1]) < 4.5 / np.sqrt(len(a))


def test_no_two_numbers_are_equal() -> None:
    x = np.concatenate([standard_normal(key, 2, NODES).ravel() for key in (1, 2)])
    assert len(np.unique(x)) == x.size
