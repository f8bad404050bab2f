"""Is an amortised posterior of the aquifer's sixteen modes calibrated? Takes minutes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

import fem_vi

DEMOS = Path(__file__).parents[2] / "demos"


@pytest.fixture(scope="module")
def problem() -> fem_vi.InverseProblem:
    """The demo's aquifer, with forty wells that always report."""
    sys.path.insert(0, str(DEMOS))
    try:
        import demo_amortised_aquifer as demo
    finally:
        sys.path.remove(str(DEMOS))
    data = fem_vi.read_mesh(DEMOS.parent / "meshes" / "aquifer.msh", MPI.COMM_SELF)
    flow = demo.aquifer_flow(data)
    field = fem_vi.MaternField(flow.coefficients, std=demo.STD, length=demo.LENGTH)
    prior = fem_vi.KarhunenLoeveField(flow.coefficients, field, truncation=fem_vi.Modes(16))
    wells = demo.possible_wells(data, flow)[:40]
    solve, observe = fem_vi.Solve(flow.pde), fem_vi.PointObservation(flow.heads, wells)
    noise = fem_vi.GaussianNoise(demo.NOISE)
    return fem_vi.InverseProblem(prior, lambda xi: observe(solve(prior.field(xi))), noise, torch.zeros(40))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ranks_of_all_modes_are_uniform(problem):
    simulations = fem_vi.simulate(problem, 4000)
    torch.manual_seed(0)
    model = fem_vi.models.AmortisedInversion(problem, fem_vi.KalmanEncoder(problem, simulations))
    run = fem_vi.fit(problem, model, fem_vi.ExpectedForwardKL(fem_vi.Stored(simulations, 64)), steps=1000)
    assert sum(row.kl for row in run.history[-50:]) / 50 > 15.0  # it is the posterior and not the prior that is calibrated

    def quantities(problem, xi):
        return torch.cat([xi, xi.square().sum(1, keepdim=True)], dim=1)

    calibration = fem_vi.calibrate(problem, lambda new, seed: model.posterior(new.y), repeats=300, quantities=quantities, seed=1)
    assert min(calibration.p_values) * 17 > 0.01, calibration  # seventeen chances
    for covered, level in zip(calibration.coverage, calibration.levels, strict=True):
        assert abs(covered - level) < 0.03
