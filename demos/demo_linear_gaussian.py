# # Start here: a posterior that is known, and four ways to find it
#
# A plate is heated by a source $m$ that we cannot see. Its temperature $u$ is measured at 25 points, with noise:
#
# $$-\Delta u = m, \quad u = 0 \text{ on the boundary}, \qquad y_i = u(x_i) + \varepsilon_i, \; \varepsilon \sim N(0, \sigma^2).$$
#
# Infinitely many sources explain 25 numbers. So we say what we believe beforehand, a prior: $m$ is a Gaussian field with a mean,
# a standard deviation and a correlation length. In its Karhunen-Loeve modes it is a vector of independent standard
# normal numbers, $\xi \sim N(0, I)$. The posterior $p(\xi \mid y)$ is what we may believe afterwards.
#
# Everything is linear here, $y = b + \sigma J \xi + \varepsilon$, and so the posterior is normal and known:
#
# $$p(\xi \mid y) = N(\mu, P^{-1}), \quad P = I + J^T J, \quad \mu = P^{-1} J^T (y - b) / \sigma,$$
#
# $$p(y) = N(b, \sigma^2 (I + J J^T)).$$
#
# Other equations leave no such formulas. Variational inference looks for the closest distribution $q$ of a family, by making the
# evidence lower bound as large as it can,
#
# $$\log p(y) \;\ge\; E_q[\log p(y, \xi) - \log q(\xi)],$$
#
# with equality where $q$ is the posterior. Here we can see how close each family comes, and what it gets wrong.
#
#     python demos/demo_linear_gaussian.py               # some ten seconds; the picture goes to runs/linear_gaussian
#     mpirun -n 2 python demos/demo_linear_gaussian.py   # the same on two ranks

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from rich.table import Table
from torch import Tensor, nn

import fem_vi

NOISE = 0.002  # standard deviation of a measured temperature; temperatures are about 0.02
SENSORS = np.stack(np.meshgrid(*2 * [np.linspace(0.1, 0.9, 5)]), axis=-1).reshape(-1, 2)


# ## The problem: prior, forward map, noise, data


@dataclass(frozen=True)
class Heating:
    """The inverse problem, and what we know beside it.

    Attributes:
        problem: Which coefficients of the source explain the data?
        truth: The coefficients behind the data.
        mean_total: All the heat that the mean source of the prior gives, its integral.
        slope: The derivative of the total for the coefficients.
    """

    problem: fem_vi.InverseProblem
    truth: Tensor
    mean_total: Tensor
    slope: Tensor

    def total(self, xi: Tensor) -> Tensor:
        """All the heat that sources give, `(*batch,)`, for coefficients `(*batch, num_modes)`."""
        return self.mean_total + xi @ self.slope


def heating(comm: MPI.Comm) -> Heating:
    """The equation in weak form; the forward map from coefficients to temperatures at the sensors; data from a random source."""
    plate = mesh.create_unit_square(comm, 32, 32)
    plate.topology.create_connectivity(1, 2)
    V = fem.functionspace(plate, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - m * v * ufl.dx
    cold = fem.dirichletbc(0.0, fem.locate_dofs_topological(V, 1, mesh.exterior_facet_indices(plate.topology)), V)

    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[cold]))
    observe = fem_vi.PointObservation(V, SENSORS)
    source = fem_vi.MaternField(V, std=1.0, length=0.25, mean=1.0)
    prior = fem_vi.KarhunenLoeveField(V, source, truncation=fem_vi.Energy(0.95))

    def forward(xi: Tensor) -> Tensor:
        return observe(solve(prior.field(xi)))

    torch.manual_seed(0)
    truth = prior.rsample()
    y = fem_vi.GaussianNoise(NOISE).sample(forward(truth))
    problem = fem_vi.InverseProblem(prior, forward, fem_vi.GaussianNoise(NOISE), y)

    total = fem_vi.Functional(m * ufl.dx, [m])
    mean_total = total(prior.field(torch.zeros_like(truth)))
    slope = total(prior.field(torch.eye(len(truth), dtype=torch.float64))) - mean_total
    return Heating(problem, truth, mean_total, slope)


# ## The answer


@dataclass(frozen=True)
class Exact:
    """The posterior N(mean, precision^-1) of the coefficients, and log p(y)."""

    mean: Tensor
    precision: Tensor
    covariance: Tensor
    log_evidence: Tensor


def exact_posterior(problem: fem_vi.InverseProblem) -> Exact:
    """The formulas above. One batch of solves, one for each coefficient, is the matrix of the forward map."""
    one = torch.eye(problem.prior.num_global, dtype=torch.float64)
    b = problem.forward(torch.zeros_like(one[0]))
    J = (problem.forward(one) - b).T / NOISE
    precision = one + J.T @ J
    covariance = torch.linalg.inv(precision)
    data_covariance = NOISE**2 * (torch.eye(len(b), dtype=torch.float64) + J @ J.T)
    return Exact(
        mean=covariance @ J.T @ (problem.y - b) / NOISE,
        precision=precision,
        covariance=covariance,
        log_evidence=torch.distributions.MultivariateNormal(b, data_covariance).log_prob(problem.y),
    )


# ## Four ways to find it
#
# Laplace's approximation goes to the most probable source and takes the curvature there: exact for linear maps. A full covariance
# matrix, fitted from the prior by natural gradients, has to find all of it from samples. The low-rank family holds that data have
# added precision in as many directions as there are data, which is true, and is what to take for fields with a million unknowns.
# The mean-field family takes the coefficients as independent, which they no longer are: data tie them together.


@dataclass(frozen=True)
class Way:
    """A fitted family, and how it was found; `elbos` holds the lower bound at each step of a fit."""

    name: str
    posterior: nn.Module
    elbos: list[float]
    solves: int


def fit_all(problem: fem_vi.InverseProblem) -> list[Way]:
    """Each family, fitted."""
    prior, rank = problem.prior, len(problem.y)
    found = fem_vi.laplace(problem)
    ways = [Way("Laplace", found, [], found.report.solves)]

    natural, prior_on = fem_vi.NaturalGradient(lr=0.5, most=1.0), fem_vi.PresentParameters()
    full = fem_vi.FullRankNormal(prior)
    run = fem_vi.fit(
        problem, full, fem_vi.ELBO(samples=64), steps=50, optimizer=natural, start=prior_on, schedule=lambda progress: 1.0
    )
    ways.append(Way("full rank", full, [row.elbo for row in run.history], run.cost.solves))

    for name, posterior in (("low rank", fem_vi.LowRankNormal(prior, rank)), ("mean field", fem_vi.MeanFieldNormal(prior))):
        run = fem_vi.fit(problem, posterior, fem_vi.ELBO(samples=64, noise=fem_vi.Antithetic()), steps=10)
        ways.append(Way(name, posterior, [row.elbo for row in run.history], run.cost.solves))
    return ways


# ## How close do they come?


@dataclass(frozen=True)
class Judgement:
    """A family against the exact posterior.

    Attributes:
        mean: Largest error of a coefficient's mean; each has standard deviation 1 in the prior.
        variance: Largest relative error of a coefficient's variance.
        gap: log p(y) less the evidence lower bound [nats]: the divergence of the family from the posterior.
        gap_error: Its standard error.
        totals: Total heat of 4,000 sources drawn from the family.
        ess: What fem_vi.diagnose says without knowing the answer: how many draws of the posterior 1,000 draws are worth.
    """

    mean: float
    variance: float
    gap: float
    gap_error: float
    totals: Tensor
    ess: float


@torch.no_grad()
def judge(posterior: nn.Module, plate: Heating, exact: Exact) -> Judgement:
    """Compare."""
    problem, q = plate.problem, posterior()
    diagnosis = fem_vi.diagnose(problem, posterior, samples=1000)
    return Judgement(
        mean=float((q.mean - exact.mean).abs().max()),
        variance=float((q.variance / exact.covariance.diagonal() - 1).abs().max()),
        gap=float(exact.log_evidence) - diagnosis.elbo,
        gap_error=diagnosis.elbo_error,
        totals=plate.total(q.rsample((4000,))),
        ess=diagnosis.ess,
    )


def main(arguments: argparse.Namespace) -> None:
    """Pose, fit, compare, draw, check."""
    comm = MPI.COMM_WORLD
    plate = heating(comm)
    problem = plate.problem
    exact = exact_posterior(problem)
    ways = fit_all(problem)
    torch.manual_seed(1)
    judged = [judge(way.posterior, plate, exact) for way in ways]

    title = f"Errors against the exact posterior: {problem.prior.num_global} coefficients, {len(problem.y)} data"
    caption = "gap: log p(y) less the bound, in nats; worth: of 1,000 draws; total heat: mean and standard deviation"
    table = Table(title=title, caption=caption)
    for column in ("", "mean", "variance", "gap", "worth", "total heat", "solves"):
        table.add_column(column)
    for way, its in zip(ways, judged, strict=True):
        total = f"{its.totals.mean():.3f} +- {its.totals.std():.3f}"
        table.add_row(
            way.name, f"{its.mean:.1e}", f"{its.variance:.1e}", f"{its.gap:.1e}", f"{its.ess:.0f}", total, f"{way.solves}"
        )
    average, spread = total_heat(plate, exact)
    table.add_row("exact", "", "", "", "", f"{average:.3f} +- {spread:.3f}", "")
    fem_vi.report(comm, table, f"log p(y) = {float(exact.log_evidence):.4f}. Picture: {arguments.out / 'linear_gaussian.png'}")
    fem_vi.save_figure(draw(plate, exact, ways, judged), arguments.out / "linear_gaussian.png", comm)

    # ## Check
    #
    # Three families contain the posterior, and find it: means, variances, and the evidence to a hundredth of a nat.
    laplace, full, low, mean_field = judged
    for its in (laplace, full, low):
        assert its.mean < 1e-3, its.mean
        assert its.variance < 1e-2, its.variance
        assert abs(its.gap) < 1e-2, its.gap

    # Independent coefficients cannot be the posterior. The best of them have the right mean, and variances of one over the
    # diagonal of the precision, too small; their divergence from the posterior is known as well. Each coefficient alone looks
    # good. The total, which depends on how they vary together, does not: its error bar is a third of what it should be.
    P = exact.precision
    expected = 0.5 * float(P.diagonal().log().sum() - torch.logdet(P))
    q = ways[-1].posterior()
    assert mean_field.mean < 0.05, mean_field.mean
    assert (q.variance * P.diagonal() - 1).abs().max() < 0.05
    assert abs(mean_field.gap - expected) < 5 * mean_field.gap_error + 0.05, (mean_field.gap, expected)
    assert float(mean_field.totals.std()) < 0.5 * spread
    assert mean_field.ess < 500 < min(its.ess for its in (laplace, full, low))


def total_heat(plate: Heating, exact: Exact) -> tuple[float, float]:
    """Mean and standard deviation of the total heat: a linear function of the coefficients."""
    return float(plate.total(exact.mean)), float((plate.slope @ exact.covariance @ plate.slope).sqrt())


# ## Picture


def field_sd(prior: fem_vi.KarhunenLoeveField, covariance: Tensor) -> Tensor:
    """Standard deviation at each node of a field whose coefficients have a covariance."""
    columns = torch.linalg.cholesky(covariance).T
    return (prior.field(columns) - prior.field(torch.zeros_like(columns[0]))).norm(dim=0)


def draw(plate: Heating, exact: Exact, ways: list[Way], judged: list[Judgement]) -> plt.Figure:
    """Source, mean, standard deviations; how natural gradients find the evidence; what is said about the total heat."""
    prior = plate.problem.prior
    figure = plt.figure(figsize=(14, 6.4), layout="constrained")
    axes = figure.subplot_mosaic(
        [["truth", "mean", "sd", "mean field"], ["gap", "gap", "total", "total"]], height_ratios=[1, 0.9]
    )
    source = {"cmap": "inferno", "vmin": -1.0, "vmax": 3.0}
    deviation = {"cmap": "magma", "vmin": 0.0, "vmax": 0.8}
    panels = {
        "truth": (prior.field(plate.truth), "true source, and sensors", source),
        "mean": (prior.field(exact.mean), "posterior mean", source),
        "sd": (field_sd(prior, exact.covariance), "standard deviation: exact", deviation),
        "mean field": (
            field_sd(prior, ways[-1].posterior().variance.detach().diag()),
            "standard deviation: mean field",
            deviation,
        ),
    }
    for name, (values, title, style) in panels.items():
        ax = axes[name]
        figure.colorbar(fem_vi.plot_field(ax, prior.V, values, **style), ax=ax, shrink=0.7, pad=0.02)
        ax.set_title(title)
        ax.axis("off")
    axes["truth"].plot(*SENSORS.T, "o", mfc="white", mec="black", ms=4, mew=0.8)

    gap = abs(float(exact.log_evidence) - np.array(ways[1].elbos))
    axes["gap"].semilogy(range(1, len(gap) + 1), gap, ".-")
    axes["gap"].set(
        xlabel="step of natural gradients, from the prior",
        ylabel="|log p(y) - bound| [nats]",
        title="full rank: the bound of 64 draws",
    )

    average, spread = total_heat(plate, exact)
    at = np.linspace(average - 4 * spread, average + 4 * spread, 200)
    density = np.exp(-0.5 * ((at - average) / spread) ** 2) / (spread * np.sqrt(2 * np.pi))
    axes["total"].plot(at, density, "k", label="exact")
    for k in (1, 3):
        axes["total"].hist(judged[k].totals.numpy(), bins=40, density=True, alpha=0.5, label=ways[k].name)
    axes["total"].axvline(float(plate.total(plate.truth)), color="tab:red", ls="--", label="truth")
    axes["total"].set(xlabel="total heat", ylabel="density", title="what each says about the total")
    axes["total"].legend(frameon=False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A posterior that is known, and four ways to find it.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "linear_gaussian")
    main(parser.parse_args())
