"""Rational powers against the power itself, and against what is known of the best ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ellipj, ellipk

import fem_vi
from fem_vi.pde.rational import rational_power


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.75, 1.25, 1.9])
@pytest.mark.parametrize("upper", [1e2, 1e5])
def test_error_is_what_is_stated_and_falls_fast(beta: float, upper: float) -> None:
    power = rational_power(beta, upper, 1e-3)
    x = np.geomspace(1.0, upper, 5001)
    error = np.log(power(x)) + beta * np.log(x)
    assert np.abs(error).max() == pytest.approx(power.error, rel=1e-2)
    assert power.error <= 1e-3
    rate = 2.0 * np.pi**2 / np.log(16.0 * upper)
    assert power.error < 4.0 * np.exp(-rate * len(power.poles)), "the rate of the best rational functions"
    assert min(power.zeros + power.poles) > 0.0


def test_the_inverse_root_is_that_of_zolotarev() -> None:
    """For x^(-1/2) the best poles are known, in terms of elliptic functions."""
    upper, m = 1e3, 4
    power = rational_power(0.5, upper, 1.5e-3)
    assert len(power.poles) == m
    modulus = 1.0 - 1.0 / upper
    sn, cn, _, _ = ellipj(np.arange(1, 2 * m + 1) * ellipk(modulus) / (2 * m + 1), modulus)
    best = np.sort((sn / cn) ** 2)
    assert np.allclose(np.sort(power.poles + power.zeros), best, rtol=0.02)


def test_whole_powers_are_exact_and_too_much_is_refused() -> None:
    power = rational_power(2.0, 1e5, 1e-3)
    assert (power.whole, power.poles, power.error) == (2, (), 0.0)
    with pytest.raises(fem_vi.InvalidInput, match="whole power"):
        rational_power(0.5, 1e40, 5e-4)
