"""Likelihoods against densities written out, conjugate answers, and every way they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from mpi4py import MPI
from scipy import stats
from torch.distributions import LogNormal, MultivariateNormal, StudentT

from fem_vi.errors import InvalidInput
from fem_vi.vi.correlated_noise import CorrelatedNoise, LowRankNoise
from fem_vi.vi.diagnostics import diagnose
from fem_vi.vi.divergence import ForwardKL, ImportanceWeighted, JensenShannon, Renyi
from fem_vi.vi.fit import fit
from fem_vi.vi.laplace import laplace
from fem_vi.vi.lbfgs import LBFGS
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.mcmc.chains import sample
from fem_vi.vi.mcmc.hmc import HMC
from fem_vi.vi.mcmc.smc import smc
from fem_vi.vi.minibatch import MinibatchProblem
from fem_vi.vi.multiplicative_noise import MultiplicativeNoise
from fem_vi.vi.objective import ELBO, TotalDerivative
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.start import GaussNewton, PresentParameters
from fem_vi.vi.student_noise import StudentNoise
from fem_vi.vi.transform import GammaPrior, LogNormalPrior, UniformPrior
from fem_vi.vi.unknown_scale import UnknownScale
from tests.vi.helpers import F64, numbers

SCALES = torch.tensor([0.5, 1.0, 2.0, 0.8], dtype=F64)
FACTOR = numbers(8, 4, 2)
COVARIANCE = torch.diag(SCALES.square()) + FACTOR @ FACTOR.T


def with_scale(noise, s):
    """UnknownScale's density at a given scale, as of a noise without."""
    return lambda y, prediction: UnknownScale(noise).log_prob(y, torch.cat([prediction, s[..., None]], -1))


LOG_SCALE = numbers(9, 3, 2)
# log p(y | prediction) of each likelihood, and the same from torch.distributions. Predictions and data are positive.
DENSITIES = {
    "full": (CorrelatedNoise(COVARIANCE).log_prob, lambda y, f: MultivariateNormal(f, COVARIANCE).log_prob(y)),
    "low rank": (LowRankNoise(SCALES, FACTOR).log_prob, lambda y, f: MultivariateNormal(f, COVARIANCE).log_prob(y)),
    "student": (StudentNoise(SCALES, df=3.0).log_prob, lambda y, f: StudentT(3.0, f, SCALES).log_prob(y).sum(-1)),
    "cauchy": (StudentNoise(0.7, df=1.0).log_prob, lambda y, f: StudentT(1.0, f, 0.7 + 0 * f).log_prob(y).sum(-1)),
    "log-normal": (
        MultiplicativeNoise(GaussianNoise(SCALES)).log_prob,
        lambda y, f: LogNormal(f.log(), SCALES).log_prob(y).sum(-1),
    ),
    "unknown scale": (
        with_scale(GaussianNoise(SCALES), LOG_SCALE),
        lambda y, f: MultivariateNormal(f, scale_tril=torch.diag_embed(SCALES * LOG_SCALE.exp()[..., None])).log_prob(y),
    ),
    "unknown scale of correlated noise": (
        with_scale(CorrelatedNoise(COVARIANCE), LOG_SCALE),
        lambda y, f: MultivariateNormal(f, COVARIANCE * (2 * LOG_SCALE).exp()[..., None, None]).log_prob(y),
    ),
    "multiplicative noise of unknown scale": (
        lambda y, f: MultiplicativeNoise(UnknownScale(GaussianNoise(SCALES))).log_prob(
            y, torch.cat([f, LOG_SCALE[..., None]], -1)
        ),
        lambda y, f: LogNormal(f.log(), SCALES * LOG_SCALE.exp()[..., None]).log_prob(y).sum(-1),
    ),
}
NOISES = {
    "full": CorrelatedNoise(COVARIANCE),
    "low rank": LowRankNoise(SCALES, FACTOR),
    "low rank, one std": LowRankNoise(0.3, FACTOR),
    "student": StudentNoise(SCALES, df=6.0),
    "log-normal": MultiplicativeNoise(GaussianNoise(0.2)),
    "unknown scale": UnknownScale(CorrelatedNoise(COVARIANCE)),
    "multiplicative, unknown scale": MultiplicativeNoise(UnknownScale(GaussianNoise(1.0))),
}


@pytest.mark.parametrize("name", list(DENSITIES))
def test_density_is_the_textbook_one(name):
    ours, textbook = DENSITIES[name]
    y, prediction = numbers(1, 4).abs() + 0.1, (numbers(2, 3, 2, 4).abs() + 0.1).requires_grad_()
    torch.testing.assert_close(ours(y, prediction), textbook(y, prediction))
    (mine,) = torch.autograd.grad(ours(y, prediction).sum(), prediction)
    (theirs,) = torch.autograd.grad(textbook(y, prediction).sum(), prediction)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", list(NOISES))
def test_samples_standardise_to_white_noise(name):
    noise = NOISES[name]
    prediction = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=F64)
    if "unknown" in name:
        prediction = torch.cat([prediction, torch.tensor([-0.7], dtype=F64)])
    torch.manual_seed(0)
    prediction = prediction.expand(20_000, -1)
    y = noise.sample(prediction)
    assert y.shape == (20_000, 4)
    z = noise.standardise(y, prediction)
    # Standard errors are 1 / sqrt(20000) = 0.007 for means and covariances, 0.01 for variances.
    assert float(z.mean(0).abs().max()) < 0.03
    assert float((torch.cov(z.T) - torch.eye(4)).abs().max()) < 0.05


@pytest.mark.parametrize("df", [2.0, 4.0, 30.0])
def test_student_residuals_are_nearly_normal(df):
    noise = StudentNoise(2.0, df=df)
    for probability in (1e-4, 0.01, 0.2, 0.7, 0.99):
        quantile = torch.tensor([2.0 * stats.t.ppf(probability, df)], dtype=F64)
        z = float(noise.standardise(quantile, torch.zeros(1, dtype=F64)))
        assert z == pytest.approx(stats.norm.ppf(probability), rel=0.06 if df == 2.0 else 0.03)
    t = torch.linspace(-1.0, 1.0, 200_001, dtype=F64)[1:-1]
    t = t / (1.0 - t.square())  # the whole line
    density = torch.from_numpy(stats.t.pdf(t.numpy(), df))
    variance = torch.trapezoid(noise.standardise(2.0 * t, torch.zeros_like(t)).square() * density, t)
    assert float(variance) == pytest.approx(1.0, abs=0.02)
    r = torch.tensor([0.0, 1e-9, 0.01, 3.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: noise.standardise(r, torch.zeros_like(r)), r)
    assert torch.autograd.gradgradcheck(lambda r: noise.standardise(r, torch.zeros_like(r)), r)


def test_multiplicative_noise_has_no_density_at_negative_predictions():
    noise = MultiplicativeNoise(GaussianNoise(0.1))
    prediction = torch.tensor([[1.0, 2.0], [1.0, -2.0]], dtype=F64, requires_grad=True)
    density = noise.log_prob(torch.ones(2, dtype=F64), prediction)
    assert bool(torch.isfinite(density[0]))
    assert float(density[1].detach()) == -math.inf
    (gradient,) = torch.autograd.grad(density[0], prediction)
    assert bool(torch.isfinite(gradient).all())


# Unknown noise: normal-gamma


class NormalGamma:
    """y_i ~ N(mu, 1 / tau), mu | tau ~ N(1, 1 / (2 tau)), tau ~ Gamma(3, 2), by textbook formulas."""

    mean, kappa, shape, rate = 1.0, 2.0, 3.0, 2.0
    y = torch.tensor([0.3, 1.9, 2.2, -0.4, 1.1, 2.8, 1.4, 0.9], dtype=F64)

    def __init__(self) -> None:
        n, average = len(self.y), float(self.y.mean())
        self.kappa_n, self.shape_n = self.kappa + n, self.shape + n / 2
        self.mean_n = (self.kappa * self.mean + n * average) / self.kappa_n
        scatter = float((self.y - average).square().sum()) + self.kappa * n * (average - self.mean) ** 2 / self.kappa_n
        self.rate_n = self.rate + 0.5 * scatter
        self.log_evidence = (
            math.lgamma(self.shape_n)
            - math.lgamma(self.shape)
            + self.shape * math.log(self.rate)
            - self.shape_n * math.log(self.rate_n)
            + 0.5 * math.log(self.kappa / self.kappa_n)
            - 0.5 * n * math.log(2 * math.pi)
        )

    def unknowns(self, m):
        """tau and mu from standard normal numbers."""
        tau = GammaPrior(self.shape, self.rate)(m[..., 0])
        return tau, self.mean + m[..., 1] / (self.kappa * tau).sqrt()

    def problem(self):
        def forward(m):
            tau, mu = self.unknowns(m)
            return torch.cat([mu[..., None].expand(*mu.shape, len(self.y)), -0.5 * tau.log()[..., None]], -1)

        return InverseProblem(GaussianVector(torch.zeros(2)), forward, UnknownScale(GaussianNoise(1.0)), self.y)


def test_unknown_noise_is_the_conjugate_answer():
    exact = NormalGamma()
    samples = sample(exact.problem(), HMC(), chains=200, draws=60, warmup=100, seed=2)
    tau, mu = exact.unknowns(samples.m)
    a, b, k = exact.shape_n, exact.rate_n, exact.kappa_n
    expected = {"tau": a / b, "tau^2": a * (a + 1) / b**2, "mu": exact.mean_n, "(mu - mean)^2": b / (k * (a - 1))}
    for name, values in (("tau", tau), ("tau^2", tau.square()), ("mu", mu), ("(mu - mean)^2", (mu - exact.mean_n).square())):
        chains = values.mean(1)
        error = float(chains.std()) / math.sqrt(len(chains))
        assert abs(float(chains.mean()) - expected[name]) < 3.5 * error, name
        assert error < 0.02 * abs(expected[name]), name
    # The whole law: the precision's 5, 50 and 95 % quantiles leave that much below.
    for probability in (0.05, 0.5, 0.95):
        below = (tau < stats.gamma.ppf(probability, a, scale=1 / b)).double().mean(1)
        assert abs(float(below.mean()) - probability) < 4 * float(below.std()) / math.sqrt(len(below))


def test_evidence_of_unknown_noise_is_the_conjugate_answer():
    exact = NormalGamma()
    tempered = smc(exact.problem(), particles=250, islands=8)
    assert abs(tempered.log_evidence - exact.log_evidence) < 4.5 * tempered.log_evidence_error
    assert tempered.log_evidence_error < 0.05


def test_unknown_noise_is_fitted_and_diagnosed():
    exact = NormalGamma()
    problem = exact.problem()
    start, optimizer = PresentParameters(), lambda parameters: torch.optim.Adam(parameters, lr=0.05)
    run = fit(problem, FullRankNormal(problem.prior), ELBO(samples=8), steps=200, start=start, optimizer=optimizer)
    diagnosis = diagnose(problem, run.posterior, samples=1000)
    assert -0.02 < exact.log_evidence - diagnosis.elbo < 0.3
    assert diagnosis.log_evidence == pytest.approx(exact.log_evidence, abs=0.05)
    assert "close to the exact one" in diagnosis.verdict
    assert "own predictions" in diagnosis.verdict


# Robustness: what Student's t is for


def test_an_outlier_moves_a_student_posterior_little():
    y = torch.tensor([0.9, 1.1, 1.0, 1.05, 50.0], dtype=F64)
    prior = GaussianVector(torch.zeros(1), covariance=torch.tensor([[100.0]]))
    means = {}
    for noise in (GaussianNoise(0.1), StudentNoise(0.1, df=3.0)):
        problem = InverseProblem(prior, lambda m: m.expand(*m.shape[:-1], 5), noise, y)
        line = torch.linspace(-20.0, 60.0, 80_001, dtype=F64)[:, None]
        means[type(noise)] = float((problem.log_joint(line).softmax(0) @ line).squeeze())
    assert means[GaussianNoise] == pytest.approx(float(y.mean()), abs=0.1)
    assert means[StudentNoise] == pytest.approx(1.0, abs=0.05)


# Minibatches


def many_data(size: int, noise=None, comm: MPI.Comm = MPI.COMM_SELF) -> MinibatchProblem:
    A, y = numbers(3, 60, 2), numbers(4, 60)
    prior = GaussianVector(torch.zeros(2), comm=comm)
    return MinibatchProblem(prior, lambda m, index: m @ A[index].T, noise or GaussianNoise(0.5 + torch.rand(60)), y, size=size)


@pytest.mark.parametrize("noise", [None, StudentNoise(torch.linspace(0.5, 1.5, 60)), GaussianNoise(0.3)])
def test_minibatches_are_unbiased(noise):
    problem = many_data(7, noise)
    m = numbers(5, 2)
    torch.manual_seed(3)
    estimates = torch.stack([problem.log_likelihood(m) for _ in range(4000)])
    exact = float(problem.whole().log_likelihood(m))
    error = float(estimates.std()) / math.sqrt(len(estimates))
    assert error < 0.05 * abs(exact)
    assert abs(float(estimates.mean()) - exact) < 3.5 * error
    assert float(many_data(60, noise).log_likelihood(m) if noise else exact) == pytest.approx(exact)


def test_a_fit_to_minibatches_nears_the_exact_posterior():
    problem = many_data(20, GaussianNoise(1.0))
    whole = problem.whole()
    exact = FullRankNormal(problem.prior)
    GaussNewton()(whole, exact)
    run = fit(
        problem, FullRankNormal(problem.prior), ELBO(samples=8), steps=400, optimizer=lambda p: torch.optim.Adam(p, lr=0.03)
    )
    q = run.posterior().mean.detach() - exact().mean.detach()
    assert float((q / exact().variance.detach().sqrt()).abs().max()) < 0.5
    diagnosis = diagnose(problem, run.posterior, samples=500)  # with all data
    assert diagnosis.khat < 0.7


def test_minibatches_are_refused_where_one_batch_or_a_power_of_it_would_stand_for_the_data():
    problem = many_data(4, GaussianNoise(0.3))
    posterior = FullRankNormal(problem.prior)
    with pytest.raises(InvalidInput, match=r"one batch of a MinibatchProblem.*problem\.whole"):
        fit(problem, posterior, ELBO(samples=8, gradient=TotalDerivative()), steps=3, optimizer=LBFGS())
    for objective in (ImportanceWeighted(k=4), Renyi(0.5), JensenShannon(), ForwardKL()):
        with pytest.raises(InvalidInput, match=r"averages powers.*MinibatchProblem"):
            fit(problem, posterior, objective, steps=3, start=PresentParameters())


def test_the_mode_of_a_minibatch_problem_is_that_of_all_data():
    A, y = numbers(3, 60, 2), numbers(4, 60)
    prior = GaussianVector(torch.zeros(2))
    problem = MinibatchProblem(prior, lambda m, index: (m @ A[index].T).exp(), GaussianNoise(0.3), y.abs(), size=3)
    wanted = laplace(problem.whole())
    for seed in range(3):
        torch.manual_seed(seed)
        found = laplace(problem)
        assert found.report.search.converged
        torch.testing.assert_close(found.mu, wanted.mu, rtol=1e-6, atol=1e-8)


@pytest.mark.mpi
def test_all_ranks_draw_the_same_minibatch():
    comm = MPI.COMM_WORLD
    problem = many_data(5, GaussianNoise(0.3), comm)
    torch.manual_seed(comm.rank)
    values = comm.allgather(float(problem.log_likelihood(torch.ones(2, dtype=F64))))
    assert values == [values[0]] * comm.size


def test_minibatches_refuse():
    with pytest.raises(InvalidInput, match="size is 61; there are 60 data"):
        many_data(61)
    with pytest.raises(InvalidInput, match="not independent"):
        many_data(5, CorrelatedNoise(torch.eye(60)))
    with pytest.raises(InvalidInput, match=r"problem.whole\(\)"):
        sample(many_data(5), HMC(), draws=5)
    with pytest.raises(InvalidInput, match=r"problem.whole\(\)"):
        smc(many_data(5), particles=5)


# Parameters that are not normal


@pytest.mark.parametrize(
    ("transform", "law"),
    [
        (LogNormalPrior(median=2.0, factor=1.5), stats.lognorm(math.log(1.5), scale=2.0)),
        (UniformPrior(-1.0, 3.0), stats.uniform(-1.0, 4.0)),
        (GammaPrior(0.7, 3.0), stats.gamma(0.7, scale=1 / 3.0)),
        (GammaPrior(40.0, 0.1), stats.gamma(40.0, scale=10.0)),
    ],
)
def test_transforms_have_the_laws_they_name(transform, law):
    xi = torch.linspace(-5.0, 5.0, 21, dtype=F64).requires_grad_()
    x = transform(xi)
    below = law.cdf(x.detach().numpy())
    torch.testing.assert_close(torch.from_numpy(below), torch.special.ndtr(xi.detach()), rtol=1e-8, atol=1e-14)
    assert torch.autograd.gradcheck(transform, xi)
    assert torch.autograd.gradgradcheck(transform, xi)
    if not isinstance(transform, GammaPrior):
        torch.testing.assert_close(transform.inverse(x), xi, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CorrelatedNoise(torch.ones(2, 3)), r"shape \(2, 3\)"),
        (lambda: CorrelatedNoise(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "not symmetric"),
        (lambda: CorrelatedNoise(torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "not positive definite"),
        (lambda: LowRankNoise(0.1, torch.ones(3)), r"factor has shape \(3,\)"),
        (lambda: LowRankNoise(torch.ones(2), torch.ones(3, 1)), "2 entries and factor 3 rows"),
        (lambda: LowRankNoise(0.0, torch.ones(3, 1)), "std is 0.0"),
        (lambda: StudentNoise(-1.0), "scale is -1.0"),
        (lambda: StudentNoise(1.0, df=0.0), "df is 0.0"),
        (lambda: MultiplicativeNoise(GaussianNoise), "noise is"),
        (lambda: MultiplicativeNoise(0.1), "noise is 0.1"),
        (lambda: UnknownScale(MultiplicativeNoise(GaussianNoise(1.0))), r"MultiplicativeNoise\(UnknownScale"),
        (lambda: GammaPrior(0.0, 1.0), "GammaPrior: shape"),
        (lambda: LogNormalPrior(1.0, 1.0), "above 1"),
        (lambda: UniformPrior(2.0, 1.0), "low below high"),
    ],
)
def test_refuses(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


@pytest.mark.parametrize(
    ("noise", "y", "words"),
    [
        (CorrelatedNoise(torch.eye(3)), torch.ones(2), "covariance is of 3 data; y has 2"),
        (LowRankNoise(1.0, torch.ones(3, 1)), torch.ones(2), "factor is of 3 data; y has 2"),
        (StudentNoise(torch.ones(3)), torch.ones(2), "scale has 3 entries; y has 2"),
        (MultiplicativeNoise(GaussianNoise(1.0)), torch.tensor([1.0, -0.5]), r"y is -0.5 at \[1\] \(1 of 2 data\)"),
        (UnknownScale(GaussianNoise(torch.ones(3))), torch.ones(2), "std has 3 entries"),
    ],
)
def test_problems_refuse_data_that_do_not_fit(noise, y, words):
    with pytest.raises(InvalidInput, match=words):
        InverseProblem(GaussianVector(torch.zeros(2)), lambda m: m, noise, y)


def test_a_forward_map_without_the_scale_is_told():
    problem = InverseProblem(GaussianVector(torch.zeros(2)), lambda m: m, UnknownScale(GaussianNoise(1.0)), torch.zeros(2))
    with pytest.raises(InvalidInput, match=r"with 2 data it must be \(4, 3\)"):
        problem.log_likelihood(torch.zeros(4, 2))


@pytest.mark.mpi
@pytest.mark.parametrize("which", ["covariance", "df", "inner"])
def test_noise_that_differs_between_ranks(which):
    comm = MPI.COMM_WORLD
    last = 1.0 + (comm.rank == comm.size - 1 and comm.size > 1)
    noise = {
        "covariance": CorrelatedNoise(last * torch.eye(2)),
        "df": StudentNoise(1.0, df=2.0 * last),
        "inner": UnknownScale(GaussianNoise(last)),
    }[which]

    def build():
        return InverseProblem(GaussianVector(torch.zeros(3), comm=comm), lambda m: m, noise, torch.zeros(2))

    if comm.size == 1:
        assert build().likelihood is noise
        return
    with pytest.raises(InvalidInput, match=f"on rank {comm.size - 1} differs from rank 0"):
        build()
