"""The blocks of demos/demo_uncertainty_table.py: a posterior that no normal distribution fits, against long chains in a file."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

import fem_vi

DEMOS = Path(__file__).parent.parent / "demos"
STORED = DEMOS / "uncertainty_table" / "reference.json"


@cache
def demo(name: str = "demo_uncertainty_table") -> ModuleType:
    """A script of the demos as a module."""
    spec = importlib.util.spec_from_file_location(name, DEMOS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the script that makes the file imports the demo by its name
    spec.loader.exec_module(module)
    return module


@cache
def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text())  # type: ignore[no-any-return]


def problem(comm: MPI.Comm = MPI.COMM_SELF) -> fem_vi.InverseProblem:
    return demo().inverse_problem(comm, torch.tensor(stored()["y"], dtype=torch.float64))  # type: ignore[no-any-return]


@pytest.mark.mpi
def test_the_file_is_of_this_problem() -> None:
    # Densities and gradients when the file was made, on one rank; here with the mesh spread over all ranks.
    points = torch.tensor(stored()["check"]["points"], dtype=torch.float64, requires_grad=True)
    log_joint = problem(MPI.COMM_WORLD).log_joint(points)
    (gradient,) = torch.autograd.grad(log_joint.sum(), points)
    expected = torch.tensor(stored()["check"]["log_joint"], dtype=torch.float64)
    torch.testing.assert_close(log_joint.detach(), expected, rtol=1e-8, atol=1e-6)
    torch.testing.assert_close(gradient, torch.tensor(stored()["check"]["gradient"], dtype=torch.float64), rtol=1e-4, atol=1e-3)


def test_the_data_are_made_again_from_the_planted_field() -> None:
    demo()
    y = demo("make_uncertainty_reference").make_data()
    torch.testing.assert_close(y, torch.tensor(stored()["y"], dtype=torch.float64), rtol=0.0, atol=1e-9)


def test_the_chains_of_the_file_are_long_enough_and_agree_with_the_particles() -> None:
    hmc, smc = stored()["hmc"], stored()["smc"]
    # Reached: 1.003, and 12,000. The slowest unknown has a long tail; a second set of chains must agree, of larger steps and an
    # R-hat of 1.02.
    assert hmc["rhat"] < 1.01
    assert min(hmc["ess_bulk"], hmc["ess_tail"]) > 5000
    again = stored()["again"]
    assert (np.abs(np.array(again["mean"]) - hmc["mean"]) < 0.05 * np.array(hmc["sd"])).all()
    np.testing.assert_allclose(again["sd"], hmc["sd"], rtol=0.06)
    # Pyro's NUTS, whose chains are fewer and shorter (R-hat 1.011, 511 effective draws): another code for the same density.
    nuts = stored()["nuts"]
    assert min(nuts["ess_bulk"], nuts["ess_tail"]) > 400
    assert (np.abs(np.array(nuts["mean"]) - hmc["mean"]) < 0.15 * np.array(hmc["sd"])).all()
    np.testing.assert_allclose(nuts["sd"], hmc["sd"], rtol=0.1)
    # HMC as it comes, from draws of the prior: the same moments, and mixed.
    plain = stored()["plain"]
    assert plain["rhat"] < 1.01
    assert min(plain["ess_bulk"], plain["ess_tail"]) > 1000
    assert (np.abs(np.array(plain["mean"]) - hmc["mean"]) < 0.1 * np.array(hmc["sd"])).all()
    np.testing.assert_allclose(plain["sd"], hmc["sd"], rtol=0.06)
    assert smc["error"] < 0.2
    levels, quantiles = np.array(hmc["levels"]), np.array(hmc["quantiles"])
    assert quantiles.shape == (len(levels), 64)
    assert (np.diff(quantiles, axis=0) > 0).all()
    shift = (np.array(smc["mean"]) - np.array(hmc["mean"])) / np.array(hmc["sd"])
    assert np.sqrt((shift**2).mean()) < 0.2


def test_mass_of_a_band() -> None:
    exact = demo().Reference.read(STORED)
    low, high = exact.quantiles[[3, -4]]
    np.testing.assert_allclose(exact.mass(low, high), 0.95, atol=1e-12)
    np.testing.assert_allclose(exact.mass(low, low), 0.0, atol=1e-12)
    np.testing.assert_allclose(exact.mass(low - 100, high + 100), 1.0, atol=1e-12)


def test_rows_of_the_long_fits() -> None:
    exact = demo().Reference.read(STORED)
    rows = {row["name"]: demo().Row(**row) for row in json.loads((DEMOS / "uncertainty_table" / "rows.json").read_text())}
    demo().check(exact, rows)
    # Solves of the full model: asked for were a hundredth of HMC's for a full-rank normal at its own optimum, a tenth for a flow.
    as_it_comes, after_a_fit = exact.solves
    assert 290_000 < as_it_comes < 310_000
    assert 100_000 < after_a_fit < 105_000
    assert rows["full-rank by ROM"].solves < 0.01 * after_a_fit
    assert rows["flow by ROM"].solves < 0.02 * after_a_fit
    # A fit of 250,000 solves finds the optimum 8.0 nats away. By 4,096 draws that all share, 827 solves leave 0.20 nats, with
    # an error of 0.02, and the 25,827 of a fit to the full model 0.60.
    assert exact.log_evidence - rows["full-rank by ROM"].elbo < 8.2
    assert rows["full-rank by ROM"].elbo > rows["full-rank"].elbo
    assert exact.log_evidence - rows["flow by ROM"].elbo < 2.0  # reached: 1.84
    assert rows["flow by ROM"].khat < demo().LIMIT
    shift = {name: np.abs(np.array(row.mean) - exact.mean) / exact.sd for name, row in rows.items()}
    ratio = {name: np.array(row.sd) / exact.sd for name, row in rows.items()}
    # Asked for, and reached by all 64 blocks: means within 0.15 sd, ratios from 0.85 to 1.15; after the chains 0.05 sd.
    assert shift["flow by ROM"].max() < 0.15
    assert np.sqrt((shift["flow by ROM"] ** 2).mean()) < 0.05
    assert ((ratio["flow by ROM"] > 0.85) & (ratio["flow by ROM"] < 1.15)).all()
    assert shift["flow, corrected"].max() < 0.05
    assert ((ratio["flow, corrected"] > 0.95) & (ratio["flow, corrected"] < 1.05)).all()
    assert rows["flow, corrected"].solves < 0.1 * after_a_fit
    assert all(row.seconds is not None for row in rows.values())


def test_normal_distributions_are_flagged_without_the_file() -> None:
    posed = problem()
    mean_field = fem_vi.MeanFieldNormal(posed.prior)
    fem_vi.fit(posed, mean_field, fem_vi.ELBO(samples=16), steps=60, optimizer=demo().ADAM, start=demo().NEWTON)
    for posterior in (fem_vi.laplace(posed, mode=demo().NEWTON), mean_field):
        diagnosis = fem_vi.diagnose(posed, posterior, samples=200)
        assert diagnosis.khat > diagnosis.khat_limit
        assert "Do not trust this posterior" in diagnosis.verdict
        assert stored()["smc"]["log_evidence"] - diagnosis.elbo > 8.0


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_flow_comes_near_the_evidence_and_a_few_steps_in_its_coordinates_correct_the_rest() -> None:
    exact = demo().Reference.read(STORED)
    posed = problem()
    laplace = fem_vi.laplace(posed, mode=demo().NEWTON)
    known = demo().Reduction(posed)
    normal = demo().reduced_full_rank(known, laplace, demo().FULL.full_rank, None)
    assert known.cost[0] + laplace.report.solves < 0.01 * exact.solves[1]
    flow = demo().reduced_flow(known, normal, demo().FULL.flow, None)
    rows = [demo().row_of_family(name, posed, q, cost=(0, None)) for name, q in (("full-rank", normal), ("flow", flow))]
    gaps = [exact.log_evidence - row.elbo for row in rows]
    assert 7.5 < gaps[0] < 8.5
    assert 0.0 < gaps[1] < 2.3
    grid = fem_vi.ProcessGrid.create(MPI.COMM_SELF, 1)
    samples = demo().corrected(known, flow, demo().FULL, grid)
    shift = (samples.mean.numpy() - exact.mean) / exact.sd
    assert np.sqrt((shift**2).mean()) < 0.05
