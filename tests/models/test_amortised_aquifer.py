"""Is an amortised posterior of the aquifer's sixteen modes calibrated? Takes minutes."""

from __future__ import annotations

import sys
from functools import partial
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


def trained(problem: fem_vi.InverseProblem, simulations: fem_vi.Simulations) -> fem_vi.models.AmortisedInversion:
    """A normal distribution, then a flow that bends it, both from simulated pairs."""
    torch.manual_seed(0)
    pairs = fem_vi.ExpectedForwardKL(fem_vi.Stored(simulations, 256))
    normal = fem_vi.models.AmortisedInversion(problem, fem_vi.KalmanEncoder(problem, simulations, hidden=(256, 256, 256)))
    fem_vi.fit(problem, normal, pairs, steps=6000)
    coupling = fem_vi.NeuralSpline(transforms=2, passes=2)
    head = partial(fem_vi.FlowHead, transform=coupling, affine=lambda *sizes, std: normal.head)
    model = fem_vi.models.AmortisedInversion(problem, normal.encoder, head=head)
    fem_vi.fit(problem, model, pairs, steps=3000, optimizer=fem_vi.Adam(1e-3))
    return model


@pytest.fixture(scope="module")
def model(problem: fem_vi.InverseProblem) -> fem_vi.models.AmortisedInversion:
    return trained(problem, fem_vi.simulate(problem, 60_000, shard=4096))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_ranks_of_all_modes_are_uniform(problem, model):
    """Over a thousand data sets, each of the sixteen p-values is above 0.01.

    With an exact posterior one run in seven would have one of sixteen below. Seeds are fixed: a run is as the one before.

    Not asserted, since not reached: the rank of log p(y | m), which depends on the data, is 0.59 on average over 300 data sets
    (p = 0.004). Steps with the solver in the loop bring it to 0.56 (p = 0.09), and make the modes' posteriors too narrow.
    """
    unseen = fem_vi.simulate(problem, 2000, seed=1)
    torch.manual_seed(1)
    told = float(model.posterior(problem.likelihood.sample(unseen.prediction)).log_ratio(unseen.xi).mean())
    assert told > 19.7  # it is the posterior and not the prior that is calibrated: linear prediction tells 11.5 nats

    calibration = fem_vi.calibrate(
        problem, lambda new, seed: model.posterior(new.y), repeats=1000, quantities=lambda problem, xi: xi, seed=1
    )
    assert min(calibration.p_values) > 0.01, calibration
    for covered, level in zip(calibration.coverage, calibration.levels, strict=True):
        assert abs(covered - level) < 0.02
