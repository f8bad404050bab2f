"""log |det dr/du| against dense determinants, and its gradient against differences, for every weak form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.bridge.test_operators import fields_of, leaves
from tests.helpers import CASES, Case, boundary_dofs, everywhere, paired, square

COMM = MPI.COMM_WORLD
ON_RANKS = ["reaction", "elasticity", "discontinuous", "mixed_poisson", "moving_mesh"]
every_case = pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())


def at(case: Case) -> list[Tensor]:
    return [(0.3 * case.weights[-1]).clone().requires_grad_(), *leaves(case)]


@every_case
def test_value_is_that_of_the_dense_jacobian(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde)
    u, *inputs = (x.detach() for x in at(case))
    jacobian = torch.func.jacfwd(lambda u: residual(u, *inputs))(u)
    expected = float(torch.linalg.slogdet(jacobian)[1])
    assert float(residual.logdet(u, *inputs)) == pytest.approx(expected, rel=1e-10, abs=1e-9)


@every_case
def test_taylor_remainder_is_second_order(build: Callable[[MPI.Comm], Case]) -> None:
    case = build(MPI.COMM_SELF)
    residual, inputs = fem_vi.Residual(case.pde), at(case)
    start = residual.logdet(*inputs)
    gradients = torch.autograd.grad(start, inputs)
    directions = [0.3 * case.weights[-1], *case.weights[:-1]]
    slope = sum(paired(MPI.COMM_SELF, list(gradients), directions, [True, *fields_of(case)]))
    remainders = []
    for step in (1e-2, 5e-3, 2.5e-3):
        moved = [x.detach() + step * w for x, w in zip(inputs, directions, strict=True)]
        remainders.append(abs(float(residual.logdet(*moved)) - float(start.detach()) - step * slope))
    if max(remainders) < 1e-10:
        return  # the Jacobian does not see the inputs, or is exponential in them: the expansion is exact
    rates = np.log2(np.array(remainders[:-1]) / np.array(remainders[1:]))
    assert np.all(rates > 1.9), (remainders, rates)


@pytest.mark.mpi
@pytest.mark.parametrize("name", ON_RANKS)
def test_any_number_of_ranks_gives_the_same(name: str) -> None:
    numbers = []
    for comm in (COMM, MPI.COMM_SELF):
        case = CASES[name](comm)
        inputs = at(case)
        value = fem_vi.Residual(case.pde).logdet(*inputs)
        gradients = torch.autograd.grad(value, inputs)
        directions = [case.weights[-1], *case.weights[:-1]]
        numbers.append([float(value.detach()), *paired(comm, list(gradients), directions, [True, *fields_of(case)])])
    assert np.allclose(numbers[0], numbers[1], rtol=1e-8, atol=1e-9)


@pytest.mark.mpi
def test_batches_share_factorisations() -> None:
    case = CASES["log_diffusion"](COMM)
    residual = fem_vi.Residual(case.pde)
    u, m = at(case)
    batch = (torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)[:, None] * m.detach()).requires_grad_()
    g = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]], dtype=torch.float64)
    value = residual.logdet(torch.stack([u.detach(), -u.detach()])[:, None], batch)
    assert value.shape == (2, 3)
    assert residual._logdets[fem_vi.ExactLogdet()].num_factorisations == 2
    (gradient,) = torch.autograd.grad(value, batch, g)
    for k, row in enumerate(batch.detach()):
        alone = row.clone().requires_grad_()
        one = residual.logdet(u.detach(), alone)
        assert torch.allclose(one.expand(2), value[:, k], rtol=1e-12)
        (expected,) = torch.autograd.grad(one, alone, g[:, k].sum())
        assert torch.allclose(gradient[k], expected, rtol=1e-9, atol=1e-12)


def test_factors_that_are_not_kept_are_rebuilt() -> None:
    case = CASES["reaction"](MPI.COMM_SELF)
    residual, gradients = fem_vi.Residual(case.pde), []
    for method in (fem_vi.ExactLogdet(), fem_vi.ExactLogdet(factor_budget=0)):
        inputs = at(case)
        scales = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)[:, None]
        inputs[1] = (scales * inputs[1].detach()).requires_grad_()
        gradients.append(torch.autograd.grad(residual.logdet(*inputs, method=method).square().sum(), inputs))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_second_derivatives_and_forward_mode_are_refused() -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde)
    u, m = at(case)
    (g,) = torch.autograd.grad(residual.logdet(u, m), m, create_graph=True)
    with pytest.raises(fem_vi.UnsupportedDerivative, match="logdet"):
        torch.autograd.grad(g.sum(), m)
    with pytest.raises(fem_vi.UnsupportedDerivative, match="logdet"):
        torch.func.jvp(lambda m: residual.logdet(u.detach(), m), (m.detach(),), (m.detach(),))


def test_vmap_is_a_batch() -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde)
    u, m = (x.detach() for x in at(case))
    batch = torch.stack([m, 0.3 * m])
    assert torch.allclose(torch.func.vmap(lambda x: residual.logdet(u, x))(batch), residual.logdet(u, batch), rtol=1e-13)


@pytest.mark.mpi
def test_singular_jacobians_are_refused() -> None:
    """Constants are in the kernel of a Laplacian without Dirichlet conditions, and rate = 0 takes the rest away."""
    msh = square(COMM)
    V = fem.functionspace(msh, ("DG", 0))
    u, v, rate = fem.Function(V), ufl.TestFunction(V), fem.Constant(msh, 1.0)
    residual = fem_vi.Residual(fem_vi.WeakForm(rate * u * v * ufl.dx, state=u, inputs=[rate]))
    state = torch.zeros(V.dofmap.index_map.size_local, dtype=torch.float64)
    value = residual.logdet(state, torch.tensor(1.0, dtype=torch.float64))
    size = V.dofmap.index_map.size_global
    assert float(value) == pytest.approx(-size * np.log(size), rel=1e-12), "equal areas on the diagonal"
    with pytest.raises(fem_vi.SolveFailed, match=r"sample 1.*singular"):
        residual.logdet(state, torch.tensor([1.0, 0.0], dtype=torch.float64))


def diffusion(comm: MPI.Comm, n: int) -> tuple[fem_vi.Residual, Tensor, Tensor]:
    msh = square(comm, n)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)])
    m.interpolate(lambda x: np.sin(3 * x[0] - 2 * x[1]))
    values = fem_vi.to_tensor(m)
    return fem_vi.Residual(pde), torch.zeros_like(values), values


@pytest.mark.mpi
def test_stochastic_estimate_lies_within_its_standard_error() -> None:
    """Value: within 4 standard errors, which are near those of the spread of repeated estimates. Gradient: unbiased."""
    residual, u, m = diffusion(COMM, 9)
    exact_at, m = m.clone().requires_grad_(), m.requires_grad_()
    exact = residual.logdet(u, exact_at)
    (exact_slope,) = torch.autograd.grad(exact, exact_at)
    torch.manual_seed(3)
    method = fem_vi.StochasticLogdet(probes=8, steps=25)
    repeats = 20
    got = residual.estimate_logdet(u.expand(repeats, -1), m, method=method)
    values, errors = got.value.detach(), got.standard_error
    assert float(errors.min()) > 0.0
    assert float(values.std()) == pytest.approx(float(errors.mean()), rel=0.5)
    assert abs(float(values.mean()) - float(exact.detach())) < 4 * float(errors.mean()) / repeats**0.5
    slopes = [torch.autograd.grad(got.value[k], m, retain_graph=True)[0] for k in range(repeats)]
    along = torch.stack([fem_vi.all_sum((s * exact_slope).sum(), COMM) for s in slopes])
    expected = fem_vi.all_sum(exact_slope.square().sum(), COMM)
    assert abs(float(along.mean() - expected)) < 4 * float(along.std()) / repeats**0.5
    assert float(along.std()) < 0.5 * float(expected)


def test_lanczos_is_exact_where_its_space_is_exhausted() -> None:
    """As many steps as unknowns, and every sign in every probe alone: the trace has no error left but rounding."""
    from fem_vi.pde.stochastic_determinant import lanczos_log

    random = np.random.default_rng(0)
    root = random.standard_normal((6, 6))
    S = root @ root.T + np.eye(6)
    diagonals = lanczos_log(lambda x: x @ S, np.eye(6), 6, MPI.COMM_SELF)
    values, vectors = np.linalg.eigh(S)
    assert np.allclose(diagonals, np.diag(vectors @ np.diag(np.log(values)) @ vectors.T), rtol=1e-10)
    assert diagonals.sum() == pytest.approx(np.linalg.slogdet(S)[1], rel=1e-12)
    eigen = vectors[:, :1].T
    assert lanczos_log(lambda x: x @ S, eigen, 4, MPI.COMM_SELF)[0] == pytest.approx(np.log(values[0]), rel=1e-10)


@pytest.mark.parametrize(("name", "words"), [("reaction", "symmetric"), ("stokes", "positive")])
def test_stochastic_estimates_of_other_jacobians_are_refused(name: str, words: str) -> None:
    case = CASES[name](MPI.COMM_SELF)
    with pytest.raises(fem_vi.UnsupportedForm, match=f"{words}.*ExactLogdet"):
        fem_vi.Residual(case.pde).logdet(*at(case), method=fem_vi.StochasticLogdet())


def test_without_mumps_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fem_vi.pde.determinant.can_select", lambda: False)
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    with pytest.raises(fem_vi.UnsupportedForm, match="StochasticLogdet"):
        fem_vi.Residual(case.pde).logdet(*at(case))


def test_methods_are_checked() -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    with pytest.raises(fem_vi.InvalidInput, match="method"):
        fem_vi.Residual(case.pde).logdet(*at(case), method="exact")  # type: ignore[arg-type]
    with pytest.raises(fem_vi.InvalidInput, match="probes"):
        fem_vi.StochasticLogdet(probes=1)
