"""The data stage of a PDDLVM: the Kalman answer, an offset that all data share, and the determinant that r = 0 leaves behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal

import fem_vi
from fem_vi.errors import InvalidInput, RunFolderError
from fem_vi.models import (
    PDDLVM,
    AdditiveError,
    DataStage,
    FromNetwork,
    FromResidual,
    Plain,
    RecordedELBO,
    SolutionUnits,
    Uncorrected,
    WithLogdet,
)
from tests.models.test_pddlvm import ELEMENTS, F64, ONE, Rod, of_source, replicated_model

pytestmark = pytest.mark.timeout(400)  # each trains for some CPU seconds, which may be long ones on a shared machine
COMM = MPI.COMM_WORLD


class Given(nn.Module):
    """N(G xi + g, S), with a parameter that no stage should change."""

    def __init__(self, G: Tensor, g: Tensor, S: Tensor) -> None:
        super().__init__()
        self.G, self.g, self.S = nn.Parameter(G), g, S

    def forward(self, xi: Tensor) -> MultivariateNormal:
        return MultivariateNormal(xi @ self.G.T + self.g, self.S)


def affine() -> tuple[PDDLVM, Given]:
    """The rod with unknown source and boundary value, and the exact q(u | z)."""
    rod = Rod.create()
    solve = fem_vi.Solve(rod.pde)
    A = rod.matrix(0 * ONE)
    g = solve(*of_source(rod.source_prior().mean))[1:-1]
    G = solve(*of_source(rod.source_prior().mean + torch.eye(2, dtype=F64)))[:, 1:-1].T - g[:, None]
    given = Given(G, g, 0.1**2 * torch.linalg.inv(A.T @ A))
    model = PDDLVM(rod.pde, prior=rod.source_prior(), inputs=of_source, forward=given, eps=fem_vi.FixedEps(0.1))
    return model, given


def observe(u: Tensor) -> Tensor:
    return u[..., [2, 4]]


@pytest.mark.parametrize("state", [FromNetwork(), FromResidual(Uncorrected())], ids=["network", "residual"])
def test_encoder_is_the_kalman_gain_and_the_decoder_finds_a_common_offset(state: FromNetwork | FromResidual) -> None:
    """Here A does not depend on z, so that both models of u are the same."""
    torch.manual_seed(0)
    model, given = affine()
    before = given.G.detach().clone()
    if isinstance(state, FromResidual):
        model.requires_grad_(False)
    H, noise, offset = given.G.detach()[[1, 3]], 0.5, torch.tensor([0.4, -0.2], dtype=F64)
    spread = given.S[[1, 3]][:, [1, 3]] + noise**2 * torch.eye(2, dtype=F64)
    S_y = H @ H.T + spread
    y = given.g[[1, 3]] + offset + MultivariateNormal(torch.zeros(2, dtype=F64), S_y).sample((50,))
    decoder = AdditiveError(2)
    stage = DataStage(
        model,
        y,
        encoder=fem_vi.FullHead(2, 2),
        observe=observe,
        likelihood=fem_vi.GaussianNoise(noise),
        decoder=decoder,
        state=state,
    )
    for lr, steps in ((0.05, 150), (0.02, 150)):
        fem_vi.fit(stage.problem, stage, RecordedELBO(samples=2), steps=steps, optimizer=fem_vi.Adam(lr))
    best = y.mean(0) - given.g[[1, 3]]  # the most likely offset: S_y is the same for all data sets
    torch.testing.assert_close(decoder.bias.detach(), best, rtol=0, atol=0.02 * float(S_y.diagonal().sqrt().max()))
    gain = H.T @ torch.linalg.inv(S_y)
    q = stage.posterior(y)
    exact = (y - y.mean(0)) @ gain.T
    covariance = torch.eye(2, dtype=F64) - gain @ H
    assert float((q.mean - exact).norm() / exact.norm()) < 0.02
    torch.testing.assert_close(q.covariance_matrix[0], covariance, rtol=0.05, atol=0.003)
    torch.testing.assert_close(given.G.detach(), before, rtol=0, atol=0, msg="the physics is not fitted to data")


class ExactRod(nn.Module):
    """The best q(u | z) for z = log kappa: of the plain residual, or of one in solution units."""

    def __init__(self, w: Tensor, inverse: Tensor, eps: float, *, plain: bool) -> None:
        super().__init__()
        self.w, self.root, self.eps, self.plain = w, torch.linalg.cholesky(inverse @ inverse.T), eps, plain

    def forward(self, z: Tensor) -> MultivariateNormal | Independent:
        resistance = torch.exp(-z)
        if self.plain:
            return MultivariateNormal(resistance * self.w, scale_tril=self.eps * resistance[..., None] * self.root)
        return Independent(Normal(resistance * self.w, torch.full_like(self.w, self.eps)), 1)


@pytest.mark.parametrize(
    ("measure", "correction", "mean", "sd"),
    [
        (Plain(), Uncorrected(), -0.141, 0.082),
        (Plain(), WithLogdet(), 0.015, 0.102),
        (SolutionUnits(), Uncorrected(), 0.015, 0.102),
    ],
    ids=["uncorrected", "with logdet", "solution units"],
)
def test_the_determinant(measure: Plain | SolutionUnits, correction: Uncorrected | WithLogdet, mean: float, sd: float) -> None:
    """-(e^z u')' = 1 on 20 elements, the datum of z = 0; numbers by quadrature, see tests/bridge/test_residual_posterior.py."""
    torch.manual_seed(0)
    elements, eps = 20, 1e-4
    msh = mesh.create_interval(MPI.COMM_SELF, elements, [-1.0, 1.0])
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Constant(msh, 0.0), ufl.TestFunction(V)
    ends = fem.locate_dofs_geometrical(V, lambda x: np.isclose(abs(x[0]), 1.0))
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(0.0, ends, V)])
    solution = fem_vi.Solve(pde)(0 * ONE)[1:-1]
    n = elements - 1
    K = elements / 2 * (2 * torch.eye(n, dtype=F64) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1))
    forward = ExactRod(solution, torch.linalg.inv(K.to(F64)), eps, plain=isinstance(measure, Plain))
    model = PDDLVM(
        pde,
        prior=fem_vi.GaussianVector(torch.zeros(1, dtype=F64)),
        inputs=lambda z: z[..., 0],
        forward=forward,
        eps=fem_vi.FixedEps(eps),
        measure=measure,
    )
    observation = fem_vi.PointObservation(V, [[0.0]])
    stage = DataStage(
        model,
        torch.tensor([[0.5]], dtype=F64),
        encoder=fem_vi.DiagonalHead(1, 1, std=0.1),
        observe=observation,
        likelihood=fem_vi.GaussianNoise(0.05),
        state=FromResidual(correction),
    )
    fem_vi.fit(stage.problem, stage, RecordedELBO(samples=8), steps=120, optimizer=fem_vi.Adam(0.03))
    q = stage.posterior(stage.problem.y[0])
    assert float(q.mean) == pytest.approx(mean, abs=0.01)
    assert float(q.stddev) == pytest.approx(sd, abs=0.008)


def recorded(comm: MPI.Comm) -> DataStage:
    """A stage over the model that is the same on any ranks."""
    model = replicated_model(comm)
    observation = fem_vi.PointObservation(model.pde.space, [[0.3, 0.4], [0.7, 0.6]])
    y = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(5)
    return DataStage(
        model,
        y,
        encoder=fem_vi.FullHead(2, 3),
        observe=observation,
        likelihood=fem_vi.GaussianNoise(0.3),
        decoder=AdditiveError(2, hidden=3),
        state=FromResidual(WithLogdet(fem_vi.StochasticLogdet(probes=2, steps=8)) if comm.size > 1 else Uncorrected()),
    )


@pytest.mark.mpi
@pytest.mark.parametrize("state", [FromNetwork(), FromResidual(Uncorrected())], ids=["network", "residual"])
def test_a_stage_is_the_same_on_any_number_of_ranks(state: FromNetwork | FromResidual, tmp_path: Path) -> None:
    runs = []
    folder = Path(COMM.bcast(str(tmp_path)))
    for comm in (COMM, MPI.COMM_SELF):
        stage = recorded(comm)
        stage.state = state
        objective = RecordedELBO(samples=2, batch=3)
        run = fem_vi.fit(stage.problem, stage, objective, steps=3, optimizer=fem_vi.Adam(0.01), seed=3)
        runs.append([value for row in run.history for value in (row.elbo, row.grad_norm)])
        if comm is COMM:
            stage.save(folder / "stage")
        else:
            other = recorded(comm)
            other.state = state
            other.load(folder / "stage")
            torch.testing.assert_close(other.state_dict(), stage.state_dict(), rtol=1e-8, atol=1e-12)
    assert runs[0] == pytest.approx(runs[1], rel=1e-8)


def test_refuses(tmp_path: Path) -> None:
    model, _ = affine()
    y = torch.zeros(4, 2, dtype=F64)
    given = {"encoder": fem_vi.FullHead(2, 2), "observe": observe, "likelihood": fem_vi.GaussianNoise(0.1)}
    for change, words in (
        ({"encoder": fem_vi.FullHead(2, 3)}, r"encoder took shape \(2, 2\)"),
        ({"encoder": None}, "encoder is None"),
        ({"likelihood": 0.1}, "likelihood is 0.1"),
        ({"likelihood": fem_vi.GaussianNoise(torch.ones(3))}, "std has 3 entries"),
        ({"decoder": 1}, "decoder is 1"),
        ({"state": FromResidual}, "state is"),
    ):
        with pytest.raises(InvalidInput, match=words):
            DataStage(model, y, **{**given, **change})
    with pytest.raises(InvalidInput, match=r"y has shape \(2,\)"):
        DataStage(model, y[0], **given)
    with pytest.raises(InvalidInput, match="correction is"):
        FromResidual(WithLogdet)
    one, two = DataStage(model, y, **given), DataStage(model, y, **given, state=FromResidual(Uncorrected()))
    with pytest.raises(InvalidInput, match="own data"):
        fem_vi.fit(one.problem, two, RecordedELBO(), steps=1)
    with pytest.raises(InvalidInput, match="batch is 9; there are 4"):
        fem_vi.fit(one.problem, one, RecordedELBO(batch=9), steps=1)
    one.save(tmp_path / "one")
    with pytest.raises(RunFolderError, match="state"):
        two.load(tmp_path / "one")
    rod = Rod.create()
    solved = PDDLVM(
        rod.pde,
        prior=rod.source_prior(),
        inputs=of_source,
        forward=fem_vi.FullHead(2, ELEMENTS - 1),
        measure=SolutionUnits(),
    )
    with pytest.raises(InvalidInput, match="no determinant is left"):
        DataStage(solved, y, **given, state=FromResidual(WithLogdet()))
