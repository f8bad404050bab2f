"""Pyro's NUTS, where Pyro is installed; and a clear word where it is not."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from mpi4py import MPI

from fem_vi.errors import InvalidInput
from fem_vi.vi.mcmc.nuts import pyro_nuts
from tests.vi.helpers import Affine, split_pair

has_pyro = importlib.util.find_spec("pyro") is not None


@pytest.mark.skipif(has_pyro, reason="Pyro is installed")
def test_without_pyro_it_says_how_to_get_it():
    with pytest.raises(InvalidInput, match="pip install pyro-ppl"):
        pyro_nuts(Affine.create().problem())


@pytest.mark.skipif(not has_pyro, reason="Pyro is not installed: pip install pyro-ppl")
def test_affine_posterior():
    affine = Affine.create(std=0.6)
    exact = affine.posterior()
    state, validation = torch.get_rng_state(), torch.distributions.Distribution._validate_args
    samples = pyro_nuts(affine.problem(), chains=3, draws=300, warmup=150, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.distributions.Distribution._validate_args == validation
    report = samples.report()
    assert report.rhat < 1.05
    z = (samples.mean - exact.mean) / (exact.variance / report.ess_bulk).sqrt()
    assert float(z.abs().max()) < 4.0
    assert float((samples.variance / exact.variance - 1).abs().max()) < 0.3
    torch.testing.assert_close(samples.log_joint, affine.problem().log_joint(samples.m))


@pytest.mark.mpi
@pytest.mark.skipif(not has_pyro or MPI.COMM_WORLD.size == 1, reason="needs Pyro and several ranks")
def test_fields_over_several_ranks_are_refused():
    with pytest.raises(InvalidInput, match="spread over"):
        pyro_nuts(split_pair()[0])
