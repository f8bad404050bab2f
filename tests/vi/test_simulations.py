"""Simulated pairs on disk: the same for any number of ranks, and whole after whatever happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from fem_vi.errors import InvalidInput, RunFolderError
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.simulations import simulate
from tests.vi.helpers import F64, Affine, numbers, split_pair

SCRIPT = """
import os, signal, sys, torch
from fem_vi.vi.simulations import simulate
from tests.vi.helpers import Affine
problem = Affine.create().problem()
forward, calls = problem.forward, []
def fatal(m):
    calls.append(1)
    if len(calls) == 5:  # the first call only describes the problem
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(m)
problem.forward = fatal
simulate(problem, 40, path=sys.argv[1], shard=8)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_pairs_are_draws_and_their_predictions():
    problem = Affine.create().problem()
    pairs = simulate(problem, 5000, shard=1000)
    assert len(pairs) == 5000
    torch.testing.assert_close(pairs.prediction, problem.forward(problem.prior.unwhiten(pairs.xi)))
    assert float(pairs.xi.mean(0).abs().max()) < 4 / 5000**0.5
    torch.testing.assert_close(pairs.xi.T @ pairs.xi / 5000, torch.eye(5, dtype=F64), rtol=0, atol=6 / 5000**0.5)
    assert len(pairs.xi.unique(dim=0)) == 5000  # no shard is that of another


def test_a_killed_simulation_goes_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "killed").glob("shard-*.safetensors"))) == 3
    problem = Affine.create().problem()
    resumed = simulate(problem, 40, path=tmp_path / "killed", shard=8)
    assert problem.cost.forward == 16  # the two shards that were missing
    whole = simulate(Affine.create().problem(), 40, path=tmp_path / "whole", shard=8)
    assert torch.equal(resumed.xi, whole.xi)
    assert torch.equal(resumed.prediction, whole.prediction)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", [b"", b"not a shard", None])
def test_a_damaged_shard_is_made_again(tmp_path, damage):
    first = simulate(Affine.create().problem(), 24, path=tmp_path, shard=8)
    sound = files(tmp_path)
    target = tmp_path / "shard-00001.safetensors"
    if damage is None:
        target.unlink()
    else:
        target.write_bytes(damage)
    problem = Affine.create().problem()
    with pytest.warns(UserWarning, match="It is simulated again"):
        again = simulate(problem, 24, path=tmp_path, shard=8)
    assert problem.cost.forward == 8
    assert torch.equal(first.prediction, again.prediction)
    assert files(tmp_path) == sound


def test_what_is_complete_is_read_and_more_is_added(tmp_path):
    small = simulate(Affine.create().problem(), 20, path=tmp_path, shard=8)
    problem = Affine.create().problem()
    assert torch.equal(simulate(problem, 20, path=tmp_path, shard=8).xi, small.xi)
    assert problem.cost.forward == 0
    large = simulate(problem, 33, path=tmp_path, shard=8)
    assert problem.cost.forward == 16
    assert torch.equal(large.xi[:20], small.xi)
    assert torch.equal(simulate(Affine.create().problem(), 33, shard=8).prediction, large.prediction)


def test_the_state_of_the_generator_stays():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    simulate(Affine.create().problem(), 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_differ():
    assert not torch.equal(simulate(Affine.create().problem(), 10).xi, simulate(Affine.create().problem(), 10, seed=1).xi)


def test_refuses_what_does_not_belong_together(tmp_path):
    problem = Affine.create().problem()
    simulate(problem, 8, path=tmp_path / "there", shard=8)
    with pytest.raises(RunFolderError, match="has seed 0; this simulation has 1"):
        simulate(problem, 8, path=tmp_path / "there", shard=8, seed=1)
    with pytest.raises(RunFolderError, match="has shard 8; this simulation has 4"):
        simulate(problem, 8, path=tmp_path / "there", shard=4)
    with pytest.raises(RunFolderError, match=r"of another problem: they differ in num_data \(3 there, 4 here\)"):
        simulate(Affine.create(num_data=4).problem(), 8, path=tmp_path / "there", shard=8)
    with pytest.raises(RunFolderError, match="they differ in the forward map"):
        simulate(Affine.create(seed=7).problem(), 8, path=tmp_path / "there", shard=8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match="holds something else than simulations"):
        simulate(problem, 8, path=tmp_path / "other")
    with pytest.raises(InvalidInput, match="count is 1"):
        simulate(problem, 1)
    with pytest.raises(InvalidInput, match="problem is 3"):
        simulate(3, 8)


@pytest.mark.mpi
def test_unknowns_split_over_ranks(tmp_path):
    ours, alone = split_pair()
    pairs = simulate(ours, 12, path=tmp_path / "split", shard=8)
    reference = simulate(alone, 12, shard=8)
    assert torch.equal(pairs.xi, reference.xi)
    torch.testing.assert_close(pairs.prediction, reference.prediction, rtol=1e-12, atol=1e-12)


@pytest.mark.mpi
def test_ranks_share_out_the_shards(tmp_path):
    problem = Affine.create().problem()
    pairs = simulate(problem, 40, path=tmp_path / "shared", shard=8, share=MPI.COMM_WORLD)
    size = MPI.COMM_WORLD.size
    assert problem.cost.forward == 8 * len(range(MPI.COMM_WORLD.rank, 5, size))
    reference = simulate(Affine.create().problem(), 40, shard=8)
    assert torch.equal(pairs.xi, reference.xi)
    assert torch.equal(pairs.prediction, reference.prediction)


@pytest.mark.mpi
def test_an_error_on_one_rank_is_raised_on_all(tmp_path):
    prior = GaussianVector(torch.zeros(2))
    last = MPI.COMM_WORLD.size - 1

    def forward(m):
        if MPI.COMM_WORLD.rank == last and len(m.shape) == 2:
            raise InvalidInput("no such permeability")
        return m @ numbers(1, 2, 3)

    problem = InverseProblem(prior, forward, GaussianNoise(0.1), torch.zeros(3))
    with pytest.raises(InvalidInput, match="no such permeability"):
        simulate(problem, 40, path=tmp_path / "failing", shard=8, share=MPI.COMM_WORLD)
