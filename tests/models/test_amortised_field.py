"""Amortised posteriors of a field whose unknowns are spread over ranks, with a solver in the loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from tests.vi.helpers import F64, numbers

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(300)]  # two copies of the problem: slow where cores are shared


def diffusion(comm: MPI.Comm) -> fem_vi.InverseProblem:
    """-div(exp(m) grad u) = 1 on the unit square, u = 0 on its boundary, seen at five points."""
    V = fem.functionspace(mesh.create_unit_square(comm, 3, 3), ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    domain = V.mesh
    domain.topology.create_connectivity(1, 2)
    rim = fem.locate_dofs_topological(V, 1, mesh.exterior_facet_indices(domain.topology))
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(0.0, rim, V)]))
    observe = fem_vi.PointObservation(V, [[0.3, 0.3], [0.7, 0.3], [0.5, 0.5], [0.3, 0.7], [0.7, 0.7]])
    prior = fem_vi.MaternField(V, std=1.0, length=0.5, variance=fem_vi.PlainVariance())
    return fem_vi.InverseProblem(prior, lambda m: observe(solve(m)), fem_vi.GaussianNoise(0.002), torch.full((5,), 0.05))


def trained(comm: MPI.Comm, **options) -> tuple[fem_vi.models.AmortisedInversion, fem_vi.Run]:
    problem = diffusion(comm)
    torch.manual_seed(0)
    head = partial(fem_vi.LowRankPrecisionHead, rank=3)
    model = fem_vi.models.AmortisedInversion(problem, fem_vi.DenseEncoder(5, hidden=(8,)), head=head)
    model.encoder.scale_by(0.05 + 0.02 * numbers(1, 50, 5))
    return model, fem_vi.fit(problem, model, fem_vi.ExpectedELBO(fem_vi.Fresh(2), samples=2), steps=2, **options)


def test_one_network_on_any_number_of_ranks(tmp_path):
    ours, run = trained(MPI.COMM_WORLD, path=tmp_path / "run")
    alone, reference = trained(MPI.COMM_SELF)
    assert [row.elbo for row in run.history] == pytest.approx([row.elbo for row in reference.history], rel=1e-7)
    for (name, value), other in zip(ours.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-8, msg=name)
    y = torch.full((2, 5), 0.05, dtype=F64)
    q, r = ours.posterior(y), alone.posterior(y)
    for one, other in ((q.mean, r.mean), (q.variance, r.variance)):
        torch.testing.assert_close(ours.prior.gather(one), alone.prior.gather(other), rtol=1e-6, atol=1e-8)
    torch.manual_seed(1)
    draws = q.sample((3,))
    assert draws.shape == (3, 2, ours.prior.event_shape[0])
    torch.testing.assert_close(q.log_prob(draws), r.log_prob(alone.prior.scatter(ours.prior.gather(draws))), rtol=1e-6, atol=1e-6)
    refined = ours.refine(y[0], fem_vi.ELBO(samples=2), steps=1, path=tmp_path / "refined")
    reference = alone.refine(y[0], fem_vi.ELBO(samples=2), steps=1)
    assert refined.history[-1].elbo == pytest.approx(reference.history[-1].elbo, rel=1e-6)
    assert (tmp_path / "refined" / "fields.xdmf").exists()
    assert not (tmp_path / "run" / "fields.xdmf").exists()  # its mean depends on the data
