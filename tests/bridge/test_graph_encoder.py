"""Fields on a mesh become features: the same however nodes are numbered and shared out, and enough to infer from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dolfinx import fem, mesh
from mpi4py import MPI

from fem_vi.bridge.field_prior import MaternField
from fem_vi.bridge.karhunen_loeve import KarhunenLoeveField, Modes
from fem_vi.bridge.layout import distribute, gather
from fem_vi.bridge.mesh_graph import mesh_graph
from fem_vi.errors import InvalidInput
from fem_vi.models import AmortisedInversion
from fem_vi.vi.amortised_objective import ExpectedForwardKL
from fem_vi.vi.data_sets import Stored
from fem_vi.vi.encoder.graph import GraphEncoder
from fem_vi.vi.fit import fit
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.optimizer import Adam
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.simulations import simulate
from tests.vi.helpers import F64, numbers


def square(cells: int = 6, degree: int = 1, comm: MPI.Comm = MPI.COMM_WORLD):
    return fem.functionspace(mesh.create_unit_square(comm, cells, cells), ("Lagrange", degree))


def fields(points: torch.Tensor) -> torch.Tensor:
    """Three smooth functions."""
    x, y = points[:, 0], points[:, 1]
    return torch.stack([torch.sin(3 * x + y), x * y**2, torch.cos(5 * y)])


def encoder_on(points: torch.Tensor, edges: torch.Tensor, **options) -> GraphEncoder:
    torch.manual_seed(0)
    encoder = GraphEncoder(points, edges, width=4, queries=5, features=6, **options)
    with torch.no_grad():
        for k, value in enumerate(encoder.parameters()):
            value += 0.1 * numbers(k, *value.shape)
    return encoder


def test_edges_are_those_of_the_triangles():
    points, edges = mesh_graph(square(comm=MPI.COMM_SELF))
    assert points.shape == (49, 3)
    assert edges.shape[1] == 2 * (3 * 36 + 2 * 6)  # edges of 6 x 6 squares with a diagonal each
    lengths = (points[edges[0]] - points[edges[1]]).norm(dim=1)
    assert sorted({round(float(each), 9) for each in lengths}) == pytest.approx([1 / 6, 2**0.5 / 6])
    assert torch.equal(edges.unique(dim=1), edges.flip(0).unique(dim=1))


def test_numbering_does_not_matter():
    points, edges = mesh_graph(square(comm=MPI.COMM_SELF))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(points)))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    y = fields(points)
    renumbered = encoder_on(points[order], place[edges])(fields(points[order]))
    torch.testing.assert_close(renumbered, encoder_on(points, edges)(y), rtol=1e-10, atol=1e-12)


def test_a_layer_sees_slopes_and_places():
    points, edges = mesh_graph(square(comm=MPI.COMM_SELF))
    encoder = encoder_on(points, edges)
    for operator, expected in zip(encoder.operators[1:], ([1.0, 0.0], [0.0, 1.0]), strict=True):
        inner = ((points[:, :2] > 0.01) & (points[:, :2] < 0.99)).all(1)
        slopes = torch.stack([(operator @ points[:, k, None])[inner, 0] for k in (0, 1)])
        # The first moment of the offsets of a field x is positive along its own axis, and weaker across.
        assert bool((slopes[expected.index(1.0)] > 1.5 * slopes[expected.index(0.0)].abs()).all())
        torch.testing.assert_close(operator @ torch.ones(49, 1, dtype=F64), torch.zeros(49, 1, dtype=F64))
    assert encoder(fields(points)).shape == (3, encoder.num_features)
    assert encoder(fields(points)[0]).shape == (encoder.num_features,)
    alone = torch.stack([encoder(row) for row in fields(points)])
    torch.testing.assert_close(alone, encoder(fields(points)))
    bump = torch.zeros(2, 49, dtype=F64)
    bump[0, 10], bump[1, 30] = 1.0, 1.0
    assert float((encoder(bump)[0] - encoder(bump)[1]).norm()) > 1e-3


def test_two_channels():
    points, edges = mesh_graph(square(comm=MPI.COMM_SELF))
    encoder = encoder_on(points, edges, channels=2)
    y = torch.cat([fields(points), 100.0 + 10.0 * fields(points).flip(0)]).reshape(2, 3, 49).movedim(0, -1).flatten(1)
    encoder.scale_by(y)
    assert encoder.std[1] == pytest.approx(10 * float(encoder.std[0]), rel=1e-9)
    assert encoder(y).shape == (3, encoder.num_features)


def test_learns_nearly_all_that_fields_tell():
    V = square(8, comm=MPI.COMM_SELF)
    prior = KarhunenLoeveField(V, MaternField(V, std=1.0, length=0.5), truncation=Modes(3))

    def forward(xi: torch.Tensor) -> torch.Tensor:
        return gather(prior.field(xi), V)

    problem = InverseProblem(prior, forward, GaussianNoise(1.0), torch.zeros(81))
    J = forward(torch.eye(3, dtype=F64)) - forward(torch.zeros(3, dtype=F64))
    exact = 0.5 * float(torch.logdet(torch.eye(3, dtype=F64) + J @ J.T))  # mean of log p(m | y) - log p(m)
    torch.manual_seed(0)
    model = AmortisedInversion(problem, GraphEncoder(*mesh_graph(V), width=8, layers=1, features=16))
    run = fit(problem, model, ExpectedForwardKL(Stored(simulate(problem, 2000), 64)), steps=120, optimizer=Adam(lr=0.02))
    told = sum(row.kl for row in run.history[-20:]) / 20
    assert 0.8 * exact < told < exact + 0.3
    # of 1280 data sets, whose terms have a standard deviation of about sqrt(3)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: mesh_graph(square(2, 2, MPI.COMM_SELF)), "scalar continuous Lagrange space of degree 1"),
        (lambda: GraphEncoder(torch.zeros(3), torch.zeros(2, 1)), r"points has shape \(3,\)"),
        (lambda: GraphEncoder(numbers(1, 3, 2), torch.tensor([[0], [3]])), "edges name node 3; there are 3"),
        (lambda: encoder_on(*mesh_graph(square(2, 1, MPI.COMM_SELF)))(torch.zeros(5)), r"y is \(5,\); it must be a tensor"),
    ],
)
def test_refuses(act, words):
    with pytest.raises(InvalidInput, match=words):
        act()


@pytest.mark.mpi
def test_one_graph_on_any_number_of_ranks():
    V, alone = square(), square(comm=MPI.COMM_SELF)
    points, edges = mesh_graph(V)
    reference, reference_edges = mesh_graph(alone)
    assert edges.shape == reference_edges.shape
    own = fields(torch.from_numpy(V.tabulate_dof_coordinates()[: V.dofmap.index_map.size_local]))
    torch.testing.assert_close(gather(own, V), fields(points))
    assert torch.equal(distribute(fields(points), V), own)
    ours, theirs = encoder_on(points, edges)(gather(own, V)), encoder_on(reference, reference_edges)(fields(reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
