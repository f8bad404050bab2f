"""Delayed acceptance: a cheap problem that is wrong must not show in the draws."""

from __future__ import annotations

import pytest
import torch

from fem_vi.errors import InvalidInput, SolveFailed
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.mcmc.chains import sample
from fem_vi.vi.mcmc.coordinates import Coordinates
from fem_vi.vi.mcmc.crowd import Crowd
from fem_vi.vi.mcmc.delayed import DelayedAcceptance
from fem_vi.vi.mcmc.hmc import HMC
from fem_vi.vi.mcmc.mala import MALA
from fem_vi.vi.mcmc.pcn import PCN
from fem_vi.vi.mcmc.smc import smc
from fem_vi.vi.mcmc.target import Target
from fem_vi.vi.mcmc.warm_up import KeepReference
from fem_vi.vi.minibatch import MinibatchProblem
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.randomness import private_generator
from tests.vi.helpers import Affine, numbers
from tests.vi.test_mcmc import banana, z_scores

KERNELS = {"pCN": PCN(step_size=0.9), "MALA": MALA(step_size=0.7), "HMC": HMC(step_size=0.6)}


def biased(affine: Affine) -> InverseProblem:
    """A model whose predictions are off by two thirds of the noise, and bent, under noise that is too large."""

    def forward(m: torch.Tensor) -> torch.Tensor:
        prediction = m @ affine.A.T + affine.b
        return prediction + 0.5 * affine.std + 0.2 * affine.std * torch.sin(prediction / affine.std)

    return InverseProblem(affine.prior, forward, GaussianNoise(1.3 * affine.std), affine.y)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("name", list(KERNELS))
def test_the_posterior_is_left_alone(name: str, temperature: float) -> None:
    # 10,000 exact draws of exp(T h) N(0, I), moved ten times: their moments stay within Monte Carlo errors. Those of the cheap
    # problem are a dozen errors away.
    affine = Affine.create(std=1.5)
    tempered = Affine(affine.prior, affine.A, affine.b, affine.std / temperature**0.5, affine.y).posterior()
    kernel, chains = DelayedAcceptance(biased(affine), KERNELS[name], subchain=2), 10_000
    with private_generator(1):
        m = tempered.sample((chains,))
        target = Target(
            affine.problem(), Coordinates(affine.prior), Crowd.create(affine.prior, chains, None, seed=2), gradient=False
        )
        state = target.begin(affine.prior.whiten(m))
        rates = []
        for _ in range(10):
            state, info = kernel.step(target, state, kernel.step_size, temperature=temperature)
            rates.append(float(info.acceptance.mean()))
    assert 0.5 < sum(rates) / 10 < 0.98
    assert float((state.m == m).all(-1).double().mean()) < 0.1
    root = torch.linalg.cholesky(tempered.covariance_matrix)
    white = torch.linalg.solve_triangular(root, (state.m - tempered.mean).T, upper=False)
    z = torch.cat([white.mean(1) * chains**0.5, (white.square().mean(1) - 1.0) * (chains / 2.0) ** 0.5])
    assert float(z.abs().max()) < 4.0
    assert float(z.square().mean()) < 2.5


def test_chains_find_the_posterior_where_those_of_the_cheap_problem_do_not() -> None:
    affine = Affine.create(std=0.6)
    exact, cheap = affine.posterior(), biased(affine)
    alone = sample(cheap, HMC(), chains=200, draws=40, warmup=100, seed=3)
    assert float(z_scores(alone, exact.mean, exact.variance).abs().max()) > 8.0
    samples = sample(affine.problem(), DelayedAcceptance(cheap, HMC()), chains=200, draws=60, warmup=100, seed=3)
    assert float(z_scores(samples, exact.mean, exact.variance).abs().max()) < 3.5
    # The warm-up steers by what the cheap problem accepts.
    assert samples.step_size == pytest.approx(alone.step_size, rel=0.3)
    torch.testing.assert_close(samples.log_joint, affine.problem().log_joint(samples.m))


def test_banana_by_quadrature_from_another_banana() -> None:
    problem, mean, variance, _ = banana()
    cheap = InverseProblem(problem.prior, lambda m: m[..., :1] + 0.9 * m[..., 1:].square(), GaussianNoise(0.6), problem.y)
    kernel = DelayedAcceptance(cheap, HMC(), subchain=2)
    samples = sample(problem, kernel, chains=200, draws=60, warmup=50, seed=1)
    assert float(z_scores(samples, mean, variance).abs().max()) < 3.5


def test_a_step_costs_one_forward_solve_and_the_cheap_problem_the_rest() -> None:
    affine = Affine.create()
    problem, cheap = affine.problem(), biased(affine)
    kernel = DelayedAcceptance(cheap, MALA(step_size=0.3), subchain=4)
    samples = sample(problem, kernel, chains=3, draws=10, warmup=5, adaptation=KeepReference())
    assert (samples.cost.forward, samples.cost.backward) == (16 * 3, 0)
    assert (cheap.cost.forward, cheap.cost.backward) == (
        76 * 3,
        76 * 3,
    )  # at the start, and in each of 15 steps the first state anew, and four others
    samples = sample(problem, DelayedAcceptance(cheap, PCN(step_size=0.3)), chains=3, draws=10, warmup=0)
    assert cheap.cost.backward == 76 * 3


def test_the_problem_itself_as_the_cheap_one_accepts_everything() -> None:
    problem = banana()[0]
    samples = sample(problem, DelayedAcceptance(problem, HMC()), chains=5, draws=20, warmup=20)
    assert float(samples.acceptance.min()) > 1 - 1e-9
    assert samples.acceptance.shape == (5, 20)
    assert repr(samples.kernel) == f"DelayedAcceptance({HMC()}, subchain=1)"


def test_evidence_of_the_full_problem_by_particles() -> None:
    affine = Affine.create()
    kernel = DelayedAcceptance(biased(affine), HMC(), subchain=2)
    tempered = smc(affine.problem(), kernel, particles=200, islands=10, moves=3, seed=2)
    assert abs(tempered.log_evidence - affine.log_evidence()) < 4 * tempered.log_evidence_error
    assert tempered.log_evidence_error < 0.1
    assert float(((tempered.mean - affine.posterior().mean) / tempered.mean_error).abs().max()) < 5.0


@pytest.mark.parametrize("which", ["cheap", "full"])
def test_where_a_model_fails_the_proposal_is_rejected(which: str) -> None:
    # No data: the posterior is N(0, 1), cut off at one where the full model fails there; that of the cheap one may not.
    def failing(m: torch.Tensor) -> torch.Tensor:
        if bool((m[..., 0] > 1.0).any()):
            raise SolveFailed("no solution above one.")
        return 0.0 * m

    prior = GaussianVector(torch.zeros(1))
    fails, fine = (InverseProblem(prior, forward, GaussianNoise(1.0), torch.zeros(1)) for forward in (failing, lambda m: 0.0 * m))
    problem, cheap = (fine, fails) if which == "cheap" else (fails, fine)
    kernel = DelayedAcceptance(cheap, PCN(step_size=0.5))
    samples = sample(problem, kernel, chains=6, draws=40, warmup=0, start=-torch.ones(6, 1))
    assert float(samples.m.max()) <= 1.0
    assert float(samples.m.std()) > 0.5
    if which == "full":
        assert samples.num_diverged > 0
    else:  # a chain that began where the cheap density is zero would stay there
        with pytest.raises(SolveFailed, match="no solution above one"):
            sample(problem, kernel, chains=2, draws=5, warmup=0, start=torch.full((2, 1), 2.0))
        infinite = InverseProblem(prior, lambda m: torch.where(m > 1.0, torch.inf, 0.0 * m), GaussianNoise(1.0), torch.zeros(1))
        with pytest.raises(InvalidInput, match=r"of cheap: .* of chains \[1\]"):
            sample(problem, DelayedAcceptance(infinite), chains=2, draws=5, start=torch.tensor([[0.0], [2.0]]))


def test_refuses() -> None:
    affine = Affine.create()
    problem = affine.problem()
    with pytest.raises(InvalidInput, match="cheap"):
        DelayedAcceptance(lambda m: m)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="kernel"):
        DelayedAcceptance(problem, DelayedAcceptance(problem))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="kernel"):
        DelayedAcceptance(problem, HMC)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="subchain is 0"):
        DelayedAcceptance(problem, subchain=0)
    other = Affine.create().problem()
    for run in (sample, smc):
        with pytest.raises(InvalidInput, match="must be one object"):
            run(problem, DelayedAcceptance(other))
    y = numbers(1, 20)
    estimated = MinibatchProblem(
        affine.prior, lambda m, rows: m[..., :1].expand(*m.shape[:-1], len(rows)), GaussianNoise(1.0), y, size=5
    )
    with pytest.raises(InvalidInput, match="MinibatchProblem"):
        sample(problem, DelayedAcceptance(estimated))
