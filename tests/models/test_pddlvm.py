"""PDDLVM against what is known in closed form: the best normal q(u | z) of a linear PDE, its inverse, its bound."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from fem_vi.models import PDDLVM, Plain, Preconditioned, SolutionUnits, VirtualELBO
from tests.helpers import CASES

pytestmark = pytest.mark.timeout(400)  # each trains for some CPU seconds, which may be long ones on a shared machine
F64 = torch.float64
COMM = MPI.COMM_WORLD
ELEMENTS = 6
ONE = torch.ones((), dtype=F64)


@dataclass(frozen=True)
class Rod:
    """-(exp(m) u')' = f on (-1, 1), u(-1) = 0, u(1) = h; its unknowns, and matrices by hand."""

    pde: fem_vi.WeakForm
    comm: MPI.Comm

    @staticmethod
    def create(comm: MPI.Comm = MPI.COMM_SELF, elements: int = ELEMENTS) -> Rod:
        msh = mesh.create_interval(comm, elements, [-1.0, 1.0])
        V = fem.functionspace(msh, ("Lagrange", 1))
        u, v = fem.Function(V), ufl.TestFunction(V)
        m, f, h = (fem.Constant(msh, 0.0) for _ in range(3))
        F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - f * v * ufl.dx
        left, right = (fem.locate_dofs_geometrical(V, partial(lambda at, x: np.isclose(x[0], at), at)) for at in (-1.0, 1.0))
        bcs = [fem.dirichletbc(0.0, left, V), fem.dirichletbc(h, right, V)]
        return Rod(fem_vi.WeakForm(F, state=u, inputs=[m, f, h], bcs=bcs), comm)

    def matrix(self, m: Tensor) -> Tensor:
        """A(m) at the inner nodes, `(*batch, n, n)`."""
        n = ELEMENTS - 1
        second = (
            2 * torch.eye(n, dtype=F64) - torch.eye(n, dtype=F64).roll(1, 0).tril() - torch.eye(n, dtype=F64).roll(-1, 0).triu()
        )
        return ELEMENTS / 2 * second * m.exp()[..., None, None]

    def source_prior(self) -> fem_vi.GaussianVector:
        return fem_vi.GaussianVector(torch.tensor([1.0, 0.3], dtype=F64), comm=self.comm)

    def coefficient_prior(self) -> fem_vi.GaussianVector:
        return fem_vi.GaussianVector(torch.zeros(1, dtype=F64), comm=self.comm)


def of_source(z: Tensor) -> tuple[Tensor, ...]:
    return 0 * ONE, z[..., 0], z[..., 1]


def of_coefficient(z: Tensor) -> tuple[Tensor, ...]:
    return z[..., 0], ONE, 0 * ONE


class Proportional(nn.Module):
    """N(w / kappa, L L' / kappa^2): the family that holds the exact q(u | z) where z = log kappa."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(ELEMENTS - 1, dtype=F64))
        self.log_diagonal = nn.Parameter(torch.full((ELEMENTS - 1,), -2.0, dtype=F64))
        self.below = nn.Parameter(torch.zeros(ELEMENTS - 1, ELEMENTS - 1, dtype=F64))

    def forward(self, z: Tensor) -> MultivariateNormal:
        resistance = torch.exp(-z)
        L = self.below.tril(-1) + torch.diag(self.log_diagonal.exp())
        return MultivariateNormal(resistance * self.w, scale_tril=resistance[..., None] * L)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "full": lambda: fem_vi.FullHead(2, ELEMENTS - 1, std=0.03),
    "low rank": lambda: fem_vi.LowRankCovarianceHead(2, ELEMENTS - 1, rank=ELEMENTS - 1, std=0.1),
    "one direction": lambda: fem_vi.LowRankCovarianceHead(2, ELEMENTS - 1, rank=1, std=0.1),
    "mean field": lambda: fem_vi.DiagonalHead(2, ELEMENTS - 1, std=0.003),
}
STAGES = ((0.05, 200, fem_vi.TotalDerivative()), (0.02, 500, fem_vi.PathDerivative()))
# By quadrature in u there is no noise left, of no family, and Adam is all that is between a fit and the optimum.
QUADRATURE_STAGES = {
    "full": ((0.1, 500),),
    "low rank": ((0.1, 400), (0.03, 300)),
    "one direction": ((0.05, 1300),),
    "mean field": ((0.1, 500),),
}


def fitted(model: PDDLVM, samples: int = 64, stages=STAGES) -> fem_vi.Run:
    for lr, steps, gradient in stages:
        objective = VirtualELBO(samples=samples, gradient=gradient)
        run = fem_vi.fit(model.problem, model, objective, steps=steps, optimizer=fem_vi.Adam(lr))
    return run


def relative(x: Tensor, exact: Tensor) -> float:
    return float(((x - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def test_exact_where_the_operator_varies() -> None:
    """q(u | z) = N(A(z)^-1 f, eps^2 (A'A)^-1) to rounding, once the path derivative has no noise left."""
    torch.manual_seed(0)
    rod, eps = Rod.create(), 0.1
    model = PDDLVM(
        rod.pde, prior=rod.coefficient_prior(), inputs=of_coefficient, forward=Proportional(), eps=fem_vi.FixedEps(eps)
    )
    fitted(model)
    z = torch.linspace(-2.0, 2.0, 5, dtype=F64)[:, None]
    A = rod.matrix(z[:, 0])
    q = model.coordinates_given(z)
    assert relative(model.predict(z).mean, fem_vi.Solve(rod.pde)(*of_coefficient(z))) < 1e-3
    assert relative(q.variance, eps**2 * torch.linalg.inv(A.mT @ A).diagonal(dim1=-2, dim2=-1)) < 0.02
    torch.testing.assert_close(q.covariance_matrix, eps**2 * torch.linalg.inv(A.mT @ A), rtol=0.02, atol=1e-8)


def best_covariance(head: str, precision: Tensor) -> Tensor:
    """The covariance of the normal nearest to N(0, precision^-1), in KL(q || p), among those that a head can be."""
    if head == "mean field":
        return torch.diag(1.0 / precision.diagonal())
    if head != "one direction":
        return torch.linalg.inv(precision)
    generator = torch.Generator().manual_seed(0)
    n = len(precision)
    w = torch.randn(n, dtype=F64, generator=generator).requires_grad_()
    log_variance = torch.zeros(n, dtype=F64, requires_grad=True)
    steps = torch.optim.LBFGS([w, log_variance], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def divergence() -> Tensor:
        steps.zero_grad()
        S = torch.outer(w, w) + torch.diag(log_variance.exp())
        value = 0.5 * (precision * S).sum() - 0.5 * torch.linalg.slogdet(S)[1]
        value.backward()
        return value

    steps.step(divergence)
    return (torch.outer(w, w) + torch.diag(log_variance.exp())).detach()


@pytest.mark.parametrize("head", HEADS)
def test_exact_where_sources_and_boundary_values_vary(head: str) -> None:
    """An affine network of z holds the exact mean; of the covariance a head has what is nearest in its family, at every node.

    For a linear PDE log p(r = 0 | u, z) is quadratic in u, so that eight z a step, each with a quadrature, do.
    """
    torch.manual_seed(0)
    rod, eps = Rod.create(), 0.01 if head == "mean field" else 0.1
    model = PDDLVM(
        rod.pde, prior=rod.source_prior(), inputs=of_source, forward=HEADS[head](), eps=fem_vi.FixedEps(eps), measure=Plain()
    )
    for lr, steps in QUADRATURE_STAGES[head]:
        objective = VirtualELBO(samples=8, states=fem_vi.SphericalRadial(), gradient=fem_vi.TotalDerivative())
        run = fem_vi.fit(model.problem, model, objective, steps=steps, optimizer=fem_vi.Adam(lr))
    z = rod.source_prior().unwhiten(torch.tensor([[0.0, 0.0], [1.0, -1.0], [-1.0, 1.0], [2.0, 0.0]], dtype=F64))
    A = rod.matrix(0 * ONE)
    best = best_covariance(head, A.T @ A / eps**2)
    moments = model.predict(z)
    assert relative(moments.mean, fem_vi.Solve(rod.pde)(*of_source(z))) < 1e-3
    assert float((moments.std[:, 1:-1].square() / best.diagonal() - 1).abs().max()) < 0.02
    # The bound is the evidence of r = 0 less the divergence that the family cannot avoid.
    divergence = 0.5 * float((A.T @ A / eps**2 * best).sum() - torch.linalg.slogdet(A.T @ A @ best / eps**2)[1] - len(A))
    assert run.history[-1].elbo == pytest.approx(-float(torch.linalg.slogdet(A)[1]) - divergence, abs=1e-3)


def test_every_kind_of_draw_has_the_same_expectation() -> None:
    """Of a bound that is not quadratic in u: single draws, quadrature with all directions, and with two of five, by gradients."""
    rod = Rod.create()
    heads = {name: HEADS[name] for name in ("full", "low rank", "mean field")}
    heads["precision"] = lambda: fem_vi.LowRankPrecisionHead(2, ELEMENTS - 1, rank=2, std=0.3)
    for name, head in heads.items():
        torch.manual_seed(3)
        model = PDDLVM(
            rod.pde,
            prior=rod.source_prior(),
            inputs=of_source,
            forward=head(),
            inverse=nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), fem_vi.FullHead(8, 2)).double(),
            eps=fem_vi.FixedEps(0.3),
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        means, errors = [], []
        for states, samples in ((fem_vi.OneDraw(), 64), (fem_vi.SphericalRadial(), 16), (fem_vi.SphericalRadial(2), 16)):
            for gradient in (fem_vi.PathDerivative(), fem_vi.TotalDerivative()):
                draws = []
                for _ in range(30):
                    model.zero_grad()
                    terms = VirtualELBO(samples=samples, states=states, gradient=gradient)(model.problem, model)
                    terms.loss.backward()
                    slopes = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
                    slope = torch.cat(slopes)
                    draws.append(torch.stack([terms.elbo, slope.sum(), slope[0], slope[len(slope) // 2]]))
                each = torch.stack(draws)
                means.append(each.mean(0))
                errors.append(each.std(0) / len(each) ** 0.5)
        for mean, error in zip(means[1:], errors[1:], strict=True):
            off = (mean - means[0]).abs() / (error.square() + errors[0].square()).sqrt()
            assert float(off.max()) < 5.0, (name, off)


def test_solution_units_leave_the_errors_of_the_state() -> None:
    """r = u - u(z): the best q is N(u(z), eps^2 I) for every z, and the bound is zero, as no determinant is left."""
    torch.manual_seed(0)
    rod = Rod.create()

    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(ELEMENTS - 1, dtype=F64))
            self.log_std = nn.Parameter(torch.zeros(ELEMENTS - 1, dtype=F64))

        def forward(self, z: Tensor) -> Independent:
            return Independent(Normal(torch.exp(-z) * self.w, self.log_std.exp().expand(*z.shape[:-1], -1)), 1)

    model = PDDLVM(
        rod.pde,
        prior=rod.coefficient_prior(),
        inputs=of_coefficient,
        forward=Exact(),
        eps=fem_vi.FixedEps(0.1),
        measure=SolutionUnits(),
    )
    run = fitted(model, samples=8, stages=((0.1, 60, fem_vi.TotalDerivative()), (0.03, 150, fem_vi.PathDerivative())))
    assert run.history[-1].elbo == pytest.approx(0.0, abs=0.02)
    q = model.coordinates_given(torch.tensor([[-1.0], [1.0]], dtype=F64))
    torch.testing.assert_close(q.stddev, torch.full((2, ELEMENTS - 1), 0.1, dtype=F64), rtol=0.02, atol=0)
    assert run.cost.forward == 150 * 8, "a solve for each z"
    assert run.cost.backward == 0


def test_inverse_network_finds_the_conditional_of_z_given_u() -> None:
    """Where u = G z + g + N(0, S), p(z | u) is normal with an affine mean, which an affine network can be."""
    torch.manual_seed(0)
    rod = Rod.create()
    n = ELEMENTS - 1
    A = rod.matrix(0 * ONE)
    solve = fem_vi.Solve(rod.pde)
    G = solve(*of_source(torch.eye(2, dtype=F64)))[:, 1:-1].T  # whitened z is z - (1, 0.3)
    g = solve(*of_source(rod.source_prior().mean))[1:-1]
    S = 0.3**2 * torch.linalg.inv(A.T @ A)

    class Given(nn.Module):
        def forward(self, xi: Tensor) -> MultivariateNormal:
            return MultivariateNormal(xi @ G.T + g, S)

    model = PDDLVM(
        rod.pde,
        prior=rod.source_prior(),
        inputs=of_source,
        forward=Given(),
        inverse=fem_vi.FullHead(n, 2),
        eps=fem_vi.FixedEps(0.3),
    )
    stages = ((0.1, 300, fem_vi.TotalDerivative()), (0.02, 300, fem_vi.TotalDerivative()))
    fitted(model, samples=256, stages=stages)
    precision = torch.eye(2, dtype=F64) + G.T @ torch.linalg.inv(S) @ G
    z = rod.source_prior().unwhiten(torch.tensor([[0.5, -1.0], [-1.0, 1.0]], dtype=F64))
    u = solve(*of_source(z))
    exact = (u[:, 1:-1] - g) @ torch.linalg.inv(S) @ G @ torch.linalg.inv(precision)
    q = model.invert(u)
    scale = torch.linalg.inv(precision).diagonal().sqrt()
    assert float(((q.mean - exact) / scale).abs().max()) < 0.1
    torch.testing.assert_close(q.covariance_matrix, torch.linalg.inv(precision).expand(2, 2, 2), rtol=0.1, atol=0.01)


def test_learned_eps_is_the_size_of_the_residual_that_is_left() -> None:
    """A network whose mean is off by d, whatever it does: eps^2 becomes |A d|^2 / n."""
    torch.manual_seed(0)
    rod = Rod.create()
    A = rod.matrix(0 * ONE)
    off = torch.tensor([0.02, -0.01, 0.03, 0.0, 0.01], dtype=F64)
    solve = fem_vi.Solve(rod.pde)
    exact = solve(0 * ONE, ONE, 0.3 * ONE)[1:-1]

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = fem_vi.FullHead(1, ELEMENTS - 1, std=0.05)

        def forward(self, z: Tensor) -> MultivariateNormal:
            q = self.head(0 * z[..., :1])
            return MultivariateNormal(exact + off + 0 * q.mean, scale_tril=q.scale_tril)

    model = PDDLVM(
        rod.pde,
        prior=rod.source_prior(),
        inputs=lambda z: (0 * z[..., 0], ONE, 0.3 * ONE),
        forward=Stubborn(),
        eps=fem_vi.LearnedEps(first=0.5),
    )
    fitted(model, samples=256, stages=((0.03, 500, fem_vi.TotalDerivative()),))
    assert float(model.noise.log_eps().exp()) == pytest.approx(float((A @ off).square().mean().sqrt()), rel=0.05)


def test_annealed_eps_goes_down_with_the_steps_and_is_part_of_the_state(tmp_path: Path) -> None:
    rod = Rod.create()

    def model() -> PDDLVM:
        torch.manual_seed(0)
        eps = fem_vi.AnnealedEps(first=1.0, last=0.01, steps=4)
        return PDDLVM(rod.pde, prior=rod.source_prior(), inputs=of_source, forward=HEADS["full"](), eps=eps)

    one, two = model(), model()
    seen = []
    callbacks = [lambda row: seen.append(float(one.noise.log_eps().exp()))]
    run = partial(fem_vi.fit, objective=VirtualELBO(samples=4), optimizer=fem_vi.Adam(0.01))
    run(one.problem, one, steps=6, callbacks=callbacks, schedule=fem_vi.ConstantRate())
    assert seen == pytest.approx([10**-0.5, 0.1, 10**-1.5, 0.01, 0.01, 0.01])
    one.save(tmp_path / "one")
    assert float(two.noise.log_eps()) == 0.0
    two.load(tmp_path / "one")
    assert float(two.noise.log_eps().exp()) == pytest.approx(0.01)
    with torch.no_grad():
        VirtualELBO(samples=4)(one.problem, one)
    assert int(one.noise.count) == 6, "an evaluation without gradients, as in a line search, is no step"


@pytest.mark.parametrize("name", ["log_diffusion", "reaction", "elasticity", "navier_stokes", "hyperelasticity", "discontinuous"])
def test_takes_any_weak_form(name: str) -> None:
    """Some steps of both networks; the residual that is left goes down, Dirichlet dofs are exact."""
    torch.manual_seed(0)
    case = CASES[name](MPI.COMM_SELF)
    prior = fem_vi.GaussianVector(torch.zeros(2, dtype=F64))

    def inputs(z: Tensor) -> tuple[Tensor, ...]:
        first = case.values[0] * (1 + 0.1 * z[..., 0].reshape(*z.shape[:-1], *[1] * case.values[0].ndim))
        return first, *case.values[1:]

    solution = fem_vi.Solve(case.pde)(*case.values)
    offset = solution + 0.02 * solution.abs().max() * torch.sin(torch.arange(len(solution), dtype=F64))
    state = fem_vi.Nodal(scale=float(solution.abs().max()), offset=offset)
    size = state.create(case.pde).size
    model = PDDLVM(
        case.pde,
        prior=prior,
        inputs=inputs,
        forward=fem_vi.DiagonalHead(2, size, std=0.02),
        inverse=fem_vi.DiagonalHead(size, 2),
        state=state,
        eps=fem_vi.FixedEps(0.01),
        measure=Preconditioned(tuple(case.values), state=solution),
    )
    run = fem_vi.fit(model.problem, model, VirtualELBO(samples=8), steps=40, optimizer=fem_vi.Adam(1e-2))
    elbo = [row.elbo for row in run.history]
    assert np.mean(elbo[-8:]) > np.mean(elbo[:8]) + 0.5
    assert run.cost.solves == 0
    z = prior.rsample(torch.Size([2]))
    r = model.residual(model.sample(z, 3), *inputs(z))
    assert r.shape == (3, 2, len(solution))
    assert float(r[..., torch.from_numpy(case.pde.boundary.owned).long()].abs().sum()) < 1e-10


def replicated_model(comm: MPI.Comm) -> PDDLVM:
    """A model on a mesh of triangles, with a field that has a few modes; the same numbers on any ranks."""
    msh = mesh.create_unit_square(comm, 4, 3)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
    left = fem.locate_dofs_geometrical(V, lambda x: np.isclose(x[0], 0.0))
    pde = fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(0.1, left, V)])
    prior = fem_vi.KarhunenLoeveField(V, fem_vi.Exponential(0.5, 0.4), truncation=fem_vi.Modes(3))
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh()).double()
    forward, inverse = nn.Sequential(layers, fem_vi.DiagonalHead(8, 16, std=0.1)), fem_vi.FullHead(16, 3)
    with torch.no_grad():
        for parameter in (*forward[1].parameters(), *inverse.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    return PDDLVM(
        pde,
        prior=prior,
        inputs=prior.field,
        forward=forward,
        inverse=inverse,
        eps=fem_vi.LearnedEps(),
        measure=Preconditioned(prior.field_mean),
    )


@pytest.mark.mpi
@pytest.mark.parametrize("states", [fem_vi.OneDraw(), fem_vi.SphericalRadial(2)], ids=repr)
def test_a_fit_is_the_same_on_any_number_of_ranks(states: fem_vi.OneDraw | fem_vi.SphericalRadial, tmp_path: Path) -> None:
    runs = []
    for comm in (COMM, MPI.COMM_SELF):
        model = replicated_model(comm)
        objective = VirtualELBO(samples=4, states=states)
        run = fem_vi.fit(model.problem, model, objective, steps=3, optimizer=fem_vi.Adam(0.01), seed=3)
        runs.append([(row.elbo, row.grad_norm) for row in run.history])
        z = torch.tensor([[0.3, -1.0, 0.5]], dtype=F64)
        moments = model.predict(z)
        runs[-1].append(float(fem_vi.all_sum((moments.mean.square() + moments.std).sum(), comm)))
        runs[-1].append(model.invert(moments.mean).mean.tolist())
        folder = Path(COMM.bcast(str(tmp_path)))
        if comm is COMM:
            model.save(folder / "model")
        else:
            other = replicated_model(comm)
            other.load(folder / "model")
            torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(*runs, strict=True):
        assert np.ravel(ours) == pytest.approx(np.ravel(theirs), rel=1e-8)


def test_a_fit_that_was_interrupted_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole, parts = replicated_model(MPI.COMM_SELF), replicated_model(MPI.COMM_SELF)
    options = {"objective": VirtualELBO(samples=4), "optimizer": fem_vi.Adam(0.01), "schedule": fem_vi.ConstantRate()}
    fem_vi.fit(whole.problem, whole, steps=6, **options)
    fem_vi.fit(parts.problem, parts, steps=3, path=tmp_path / "run", **options)
    again = replicated_model(MPI.COMM_SELF)
    run = fem_vi.fit(again.problem, again, steps=6, path=tmp_path / "run", resume=True, **options)
    assert len(run.history) == 6
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    other = Rod.create()
    model = PDDLVM(other.pde, prior=other.source_prior(), inputs=of_source, forward=HEADS["full"]())
    with pytest.raises(RunFolderError, match="is of a run"):
        fem_vi.fit(model.problem, model, steps=6, path=tmp_path / "run", resume=True, **options)


def test_a_damaged_file_or_one_of_another_model_is_refused(tmp_path: Path) -> None:
    model = replicated_model(MPI.COMM_SELF)
    model.save(tmp_path / "model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rod = Rod.create()
    other = PDDLVM(rod.pde, prior=rod.source_prior(), inputs=of_source, forward=HEADS["full"]())
    with pytest.raises(RunFolderError, match=r"unknowns \(3 there, 2 here\)"):
        other.load(tmp_path / "model")
    with pytest.raises(RunFolderError, match=r"nothing\.safetensors cannot be read: No such file"):
        model.load(tmp_path / "nothing")
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(RunFolderError, match="damaged"):
        model.load(tmp_path / "model")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert "sha256" in json.loads((tmp_path / "model.json").read_text())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"forward": fem_vi.FullHead(2, 4)}, r"event shape \(4,\); they must be \(2,\) and \(5,\)"),
        ({"forward": nn.Linear(2, 5).double()}, "forward returned Tensor; it must return a torch Distribution"),
        ({"forward": None}, "forward is None"),
        ({"inverse": fem_vi.FullHead(5, 3)}, r"inverse took shape \(2, 5\)"),
        ({"eps": 0.1}, "eps is 0.1"),
        ({"eps": fem_vi.FixedEps}, "eps is"),
        ({"measure": Plain}, "measure is"),
        ({"state": "nodal"}, "state is 'nodal'"),
        ({"prior": 3}, "prior is 3"),
    ],
)
def test_refuses(change: dict, words: str) -> None:
    rod = Rod.create()
    given = {"prior": rod.source_prior(), "inputs": of_source, "forward": HEADS["full"](), **change}
    with pytest.raises(InvalidInput, match=words):
        PDDLVM(rod.pde, **given)


def test_refuses_what_does_not_fit_together() -> None:
    rod = Rod.create()
    one, two = (PDDLVM(rod.pde, prior=rod.source_prior(), inputs=of_source, forward=HEADS["full"]()) for _ in range(2))
    with pytest.raises(InvalidInput, match="own virtual data"):
        fem_vi.fit(one.problem, two, VirtualELBO(), steps=1)
    with pytest.raises(InvalidInput, match="no inverse network"):
        one.invert(torch.zeros(ELEMENTS + 1, dtype=F64))
    with pytest.raises(InvalidInput, match="samples is 0"):
        VirtualELBO(samples=0)
    with pytest.raises(InvalidInput, match="states is 'one'"):
        VirtualELBO(states="one")
    with pytest.raises(InvalidInput, match="directions is 0"):
        fem_vi.SphericalRadial(0)
    with pytest.raises(InvalidInput, match="6 directions; the noise has 5 entries"):
        VirtualELBO(states=fem_vi.SphericalRadial(6))(one.problem, one)
    flow = fem_vi.FlowHead(2, ELEMENTS - 1, transform=fem_vi.NeuralSpline(transforms=1, passes=2))
    bent = PDDLVM(rod.pde, prior=rod.source_prior(), inputs=of_source, forward=flow)
    assert math.isfinite(float(VirtualELBO(samples=2)(bent.problem, bent).elbo))
    with pytest.raises(InvalidInput, match="returned ConditionalFlow, and SphericalRadial"):
        VirtualELBO(states=fem_vi.SphericalRadial())(bent.problem, bent)
    with pytest.raises(InvalidInput, match="eps goes down"):
        fem_vi.AnnealedEps(first=0.1, last=1.0)
    with pytest.raises(InvalidInput, match="above least"):
        fem_vi.LearnedEps(first=1e-6, least=1e-6)
    assert math.isfinite(float(one.log_virtual(torch.zeros(ELEMENTS + 1, dtype=F64), *of_source(torch.zeros(2, dtype=F64)))))
