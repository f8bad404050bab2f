# # Whose error bars can be trusted?
#
# A plate of 64 blocks, each of one unknown conductivity $e^{x_k}$, is heated evenly and held at zero at its edge. The temperature
# is measured at 169 points. Which conductivities explain it?
#
# $$-\nabla \cdot (e^x \nabla u) = 10, \quad u = 0 \text{ on the edge}, \quad x \sim N(0, 4 I), \quad y = B u + N(0, 0.05^2 I).$$
#
# A block that conducts well is nearly isothermal, however well it conducts: the data bound $x_k$ from below and hardly from
# above. The posterior is skewed and curved, and no normal distribution comes near it. Here the methods of the package answer the
# same question, and long chains (make_uncertainty_reference.py) tell who is right:
#
# - Laplace's approximation, and normal families: mean-field, low-rank, full-rank;
# - a normalizing flow over the full-rank normal, whose layers may stretch the tail of one unknown where others say so, and a few
#   Hamiltonian steps in its coordinates that correct what is left;
# - Hamiltonian Monte Carlo, Pyro's NUTS and tempered sequential Monte Carlo, whose numbers are in the file.
#
# After Aristoff, Bangerth (2023), A benchmark for the Bayesian inversion of coefficients in partial differential equations.
#
#     python demos/demo_uncertainty_table.py              # a minute: short fits
#     mpirun -n 2 python demos/demo_uncertainty_table.py  # the same; chains are shared out over two ranks
#     python demos/demo_uncertainty_table.py --full       # long fits, for a quarter of an hour; they go on after an interruption

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from rich.box import SIMPLE_HEAD
from rich.table import Table

import fem_vi

HERE = Path(__file__).parent
CELLS, BLOCKS = 32, (8, 8)  # squares along an edge; blocks of one conductivity
STD, NOISE, SOURCE = 2.0, 0.05, 10.0  # of the prior of x; of a measurement; heat
GRID = np.arange(1, 14) / 14
SENSORS = np.stack(np.meshgrid(GRID, GRID, indexing="ij"), axis=-1).reshape(-1, 2)
BAND = (0.025, 0.975)
CAPTION = (
    "Solves: forward and adjoint. Gap: of the ELBO from the log evidence, in nats. Means: off by so many standard deviations, "
    "root mean square (worst). Bands: share of the posterior inside the 95 % bands, mean (worst block)."
)
LIMIT = 1 - 1 / np.log10(1000)  # k-hat up to which the 1,000 draws of a diagnosis are enough


# ## The equation, in weak form


def forward_map(comm: MPI.Comm, cells: int = CELLS, degree: int = 1) -> Callable[[torch.Tensor], torch.Tensor]:
    """Log-conductivities of the blocks `(*batch, 64)` to temperatures at the sensors `(*batch, 169)`."""
    plate = mesh.create_unit_square(comm, cells, cells, mesh.CellType.quadrilateral)
    V, C = fem.functionspace(plate, ("Lagrange", degree)), fem.functionspace(plate, ("DG", 0))
    u, x, v = fem.Function(V), fem.Function(C, name="x"), ufl.TestFunction(V)
    F = ufl.exp(x) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - SOURCE * v * ufl.dx

    plate.topology.create_connectivity(1, 2)
    edge = fem.locate_dofs_topological(V, 1, mesh.exterior_facet_indices(plate.topology))
    pde = fem_vi.WeakForm(F, state=u, inputs=[x], bcs=[fem.dirichletbc(0.0, edge, V)])

    # On one rank PETSc's own Cholesky is quicker than MUMPS for a matrix as small as this.
    own = {"pc_type": "cholesky", "pc_factor_mat_solver_type": "petsc", "pc_factor_mat_ordering_type": "nd"}
    solve = fem_vi.Solve(pde, petsc_options=own if comm.size == 1 else None)
    blocks, observe = fem_vi.PiecewiseConstant(C, fem_vi.Blocks(BLOCKS)), fem_vi.PointObservation(V, SENSORS)
    return lambda theta: observe(solve(blocks(theta)))


def planted_field() -> torch.Tensor:
    """The field behind the data: a piece that conducts ten times worse, and one that conducts ten times better."""
    x = torch.zeros(BLOCKS, dtype=torch.float64)
    x[1:3, 4:7], x[4:7, 1:3] = -np.log(10.0), np.log(10.0)
    return x.flatten()


def inverse_problem(comm: MPI.Comm, y: torch.Tensor) -> fem_vi.InverseProblem:
    """Which x explain the data y?"""
    n = int(np.prod(BLOCKS))
    prior = fem_vi.GaussianVector(torch.zeros(n), covariance=STD**2 * torch.eye(n), comm=comm)
    return fem_vi.InverseProblem(prior, forward_map(comm), fem_vi.GaussianNoise(NOISE), y)


# ## What is known from long chains


@dataclass(frozen=True)
class Row:
    """What a method says, and what it costs: `band` are the ends of the central 95 % of each unknown, `(2, 64)`."""

    name: str
    solves: int
    seconds: float | None
    elbo: float | None
    khat: float | None
    mean: list[float]
    sd: list[float]
    band: list[list[float]]

    def cells(self, exact: "Reference") -> list[str]:
        """The row in words."""
        shift = np.abs(np.array(self.mean) - exact.mean) / exact.sd
        ratio, mass = np.array(self.sd) / exact.sd, exact.mass(*np.array(self.band))
        return [
            self.name,
            f"{self.solves:,}",
            "-" if self.seconds is None else f"{self.seconds:.0f}",
            "-" if self.elbo is None else f"{exact.log_evidence - self.elbo:.1f}",
            "-" if self.khat is None else f"{self.khat:.2f}",
            f"{np.sqrt((shift**2).mean()):.2f} ({shift.max():.2f})",
            f"{ratio.min():.2f}-{ratio.max():.2f}",
            f"{100 * mass.mean():.0f} % ({100 * mass.min():.0f} %)",
        ]


@dataclass(frozen=True)
class Reference:
    """The posterior by long chains: `levels` are those of `quantiles` `(levels, 64)`; `log_evidence` is by SMC.

    `solves` are those that HMC needs for what 1,000 independent draws are worth, in the slowest unknown.
    """

    y: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    levels: np.ndarray
    quantiles: np.ndarray
    log_evidence: float
    solves: float
    rows: list[Row]

    @staticmethod
    def read(path: Path) -> "Reference":
        """From the file that make_uncertainty_reference.py writes."""
        content = json.loads(path.read_text())
        hmc, smc, nuts = content["hmc"], content["smc"], content["nuts"]
        arrays = (np.array(value) for value in (content["y"], hmc["mean"], hmc["sd"], hmc["levels"], hmc["quantiles"]))
        hmc["band"] = [hmc["quantiles"][hmc["levels"].index(level)] for level in BAND]
        rows = [
            Row(name.upper(), part["solves"], part["cpu_seconds"], None, None, part["mean"], part["sd"], part["band"])
            for name, part in (("smc", smc), ("nuts", nuts), ("hmc", hmc))
        ]
        return Reference(*arrays, smc["log_evidence"], 1000 * hmc["solves"] / hmc["ess_bulk"], rows)

    def mass(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """How much of the posterior lies between two values of each unknown, `(64,)`."""
        levels, ends = np.concatenate([[0.0], self.levels, [1.0]]), zip(self.quantiles.T, low, high, strict=True)
        spans = []
        for q, *band in ends:
            knots = np.concatenate([[q[0] - 2 * (q[1] - q[0])], q, [q[-1] + 2 * (q[-1] - q[-2])]])
            spans.append(np.diff(np.interp(band, knots, levels))[0])
        return np.array(spans)


def as_table(rows: list[Row], exact: Reference, title: str) -> Table:
    """All methods, one below the other."""
    table = Table(title=title, caption=CAPTION, box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("method", "solves", "CPU s", "gap", "k-hat", "means off", "sd ratio", "bands hold"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells(exact))
    return table


# ## The methods


@dataclass(frozen=True)
class Budget:
    """Steps of 32 samples for the fits; chains, and their Hamiltonian steps, that correct the flow."""

    normal: int
    flow: int
    chains: int
    corrective: int


SHORT = Budget(normal=70, flow=120, chains=64, corrective=4)
FULL = Budget(normal=400, flow=6000, chains=128, corrective=48)
NEWTON = fem_vi.NewtonCG(rtol=1e-3, iterations=20)
ADAM, SLOW_ADAM = fem_vi.Adam(lr=1e-2), fem_vi.Adam(lr=2e-3)


def row_of_draws(name: str, draws: torch.Tensor, *, cost: tuple[int, float | None]) -> Row:
    """The row of a method that leaves draws `(..., 64)`."""
    x = draws.reshape(-1, draws.shape[-1])
    band = torch.quantile(x, torch.tensor(BAND, dtype=x.dtype), dim=0)
    return Row(name, *cost, None, None, x.mean(0).tolist(), x.std(0).tolist(), band.tolist())


def row_of_family(
    name: str, problem: fem_vi.InverseProblem, posterior: torch.nn.Module, *, cost: tuple[int, float | None]
) -> Row:
    """The row of a variational family: from 8,000 draws, and its diagnosis."""
    torch.manual_seed(3)
    with torch.no_grad():
        draws = posterior().rsample((8000,))
    diagnosis = fem_vi.diagnose(problem, posterior)
    return replace(row_of_draws(name, draws, cost=cost), elbo=diagnosis.elbo, khat=diagnosis.khat)


def fitted(problem: fem_vi.InverseProblem, q: torch.nn.Module, steps: int, path: Path | None = None) -> tuple[int, float | None]:
    """Fit a posterior, a normal one from Laplace's approximation; the solves and seconds that it took.

    With a path an interrupted fit goes on; its seconds are then not known.
    """
    is_flow = isinstance(q, fem_vi.Flow)
    optimizer, start = (SLOW_ADAM, fem_vi.PresentParameters()) if is_flow else (ADAM, NEWTON)
    began, before = time.process_time(), problem.cost.solves
    run = fem_vi.fit(
        problem, q, fem_vi.ELBO(samples=32), steps=steps, optimizer=optimizer, start=start, path=path, resume=path is not None
    )
    is_whole = problem.cost.solves - before >= run.cost.solves
    return run.cost.solves, time.process_time() - began if is_whole else None


def normal_rows(problem: fem_vi.InverseProblem, steps: int, out: Path | None) -> tuple[list[Row], dict[str, torch.nn.Module]]:
    """Laplace, mean-field, low-rank, full-rank."""
    began = time.process_time()
    q = fem_vi.laplace(problem, mode=NEWTON)
    posteriors: dict[str, torch.nn.Module] = {
        "Laplace": q,
        "mean-field": fem_vi.MeanFieldNormal(problem.prior),
        "low-rank 48": fem_vi.LowRankNormal(problem.prior, rank=48),
        "full-rank": fem_vi.FullRankNormal(problem.prior),
    }
    costs: dict[str, tuple[int, float | None]] = {"Laplace": (q.report.solves, time.process_time() - began)}
    for name in list(posteriors)[1:]:
        costs[name] = fitted(problem, posteriors[name], steps, None if out is None else out / name)
    return [row_of_family(name, problem, q, cost=costs[name]) for name, q in posteriors.items()], posteriors


def create_flow(normal: torch.nn.Module) -> fem_vi.Flow:
    """Four autoregressive layers over a fitted normal, each a spline, a shift and a scale."""
    torch.manual_seed(0)
    return fem_vi.Flow(normal.prior, fem_vi.AffineSpline(transforms=4, bins=8, hidden=(192,)), affine=normal)


def added(*costs: tuple[int, float | None]) -> tuple[int, float | None]:
    """Solves and seconds together."""
    solves, seconds = zip(*costs, strict=True)
    return sum(solves), None if None in seconds else sum(seconds)


def corrected(problem: fem_vi.InverseProblem, flow: fem_vi.Flow, budget: Budget, grid: fem_vi.ProcessGrid) -> fem_vi.Samples:
    """Many short chains in the coordinates of a flow, from draws of the flow."""
    kernel, steps = fem_vi.HMC(step_size=0.3), budget.corrective
    return fem_vi.sample(problem, kernel, chains=budget.chains, draws=steps, warmup=steps // 4, reference=flow, grid=grid, seed=5)


# ## All of them


def main(arguments: argparse.Namespace) -> None:
    """Infer, compare, draw."""
    torch.set_num_threads(1)
    budget = FULL if arguments.full else SHORT
    grid = fem_vi.ProcessGrid.create(MPI.COMM_WORLD, 1)  # a mesh on each rank; samplers share their chains out
    out = arguments.out / f"rank-{grid.comm.rank}" if arguments.full else None
    exact = Reference.read(arguments.reference / "reference.json")
    problem = inverse_problem(grid.mesh_comm, torch.from_numpy(exact.y))

    rows, posteriors = normal_rows(problem, budget.normal, out)
    flow = posteriors["flow"] = create_flow(posteriors["full-rank"])
    cost = fitted(problem, flow, budget.flow, None if out is None else out / "flow")
    cost = added((rows[-1].solves, rows[-1].seconds), cost)
    rows.append(row_of_family("flow", problem, flow, cost=cost))
    began = time.process_time()
    samples = corrected(problem, flow, budget, grid)
    cost = added(cost, (samples.cost.solves, time.process_time() - began))
    rows.append(row_of_draws("flow, corrected", samples.m, cost=cost))
    rows += exact.rows

    fem_vi.report(
        grid.comm,
        as_table(rows, exact, "64 unknowns, 169 data"),
        f"Whether to trust a fit, its k-hat says alone: below {LIMIT:.2f}. HMC needs {exact.solves:,.0f} solves for what 1,000 "
        "independent draws are worth.",
    )
    stored = arguments.reference / "rows.json"
    if arguments.full and grid.comm.rank == 0:
        stored.write_text(json.dumps([shortened(row) for row in rows[: -len(exact.rows)]]) + "\n")
    elif not arguments.full:
        long_rows = [Row(**row) for row in json.loads(stored.read_text())]
        fem_vi.report(grid.comm, as_table(long_rows + exact.rows, exact, "With long fits (--full), from the file"))

    fem_vi.save_figure(draw(exact, rows, posteriors), arguments.out / "uncertainty_table.png", grid.comm)
    fem_vi.report(grid.comm, f"Picture: {arguments.out / 'uncertainty_table.png'}")
    check(exact, {row.name: row for row in rows})


def shortened(row: Row) -> dict[str, object]:
    """A row for the file, numbers with five digits."""
    return json.loads(json.dumps(asdict(row)), parse_float=lambda text: float(f"{float(text):.5g}"))


# ## Check
#
# The diagnosis needs no reference, and yet flags every normal distribution; the flow has left most of their gap behind; and a few
# Hamiltonian steps in its coordinates bring means and spreads to those of the long chains.


def check(exact: Reference, rows: dict[str, Row]) -> None:
    """What the table must show."""
    normals = ("Laplace", "mean-field", "low-rank 48", "full-rank")
    gaps = {name: exact.log_evidence - row.elbo for name, row in rows.items() if row.elbo is not None}
    for name in normals:
        assert rows[name].khat > LIMIT, f"{name} is not flagged"
        assert 0.6 * gaps[name] > gaps["flow"] > 0.0, gaps
    errors = {name: np.abs(np.array(row.mean) - exact.mean) / exact.sd for name, row in rows.items()}
    assert errors["flow, corrected"].mean() < errors["full-rank"].mean(), errors


# ## Picture


def draw(exact: Reference, rows: list[Row], posteriors: dict[str, torch.nn.Module]) -> plt.Figure:
    """The field, its posterior, the unknown that is the most skewed, and how much of the posterior each band holds."""
    figure = plt.figure(figsize=(12, 6.8), layout="constrained")
    axes = figure.subplot_mosaic([["truth", "mean", "sd"], ["density", "bands", "bands"]])
    fields = {"truth": planted_field().numpy(), "mean": exact.mean, "sd": exact.sd}
    titles = {"truth": "planted log-conductivity", "mean": "posterior mean", "sd": "posterior standard deviation"}
    middle = np.searchsorted(exact.levels, 0.5)
    skewed = int(np.argmax(np.abs(exact.mean - exact.quantiles[middle]) / exact.sd))
    for name, field in fields.items():
        style = {"cmap": "magma", "vmin": 0.0} if name == "sd" else {"cmap": "RdBu", "vmin": -3.0, "vmax": 3.0}
        image = axes[name].imshow(field.reshape(BLOCKS).T, origin="lower", extent=(0, 1, 0, 1), **style)
        figure.colorbar(image, ax=axes[name], shrink=0.85)
        axes[name].plot(*SENSORS.T, ".", color="0.4", ms=2)
        axes[name].set(title=titles[name], xticks=[0, 1], yticks=[0, 1])
    i, j = np.unravel_index(skewed, BLOCKS)
    axes["mean"].plot((i + 0.5) / BLOCKS[0], (j + 0.5) / BLOCKS[1], "s", mfc="none", mec="k", ms=22, mew=1.5)

    q = exact.quantiles[:, skewed]
    density = np.diff(exact.levels) / np.diff(q)
    axes["density"].stairs(density, q, fill=True, color="0.8", label="long chains")
    torch.manual_seed(4)
    for name, color in (("Laplace", "tab:red"), ("full-rank", "tab:orange"), ("flow", "tab:blue")):
        with torch.no_grad():
            x = posteriors[name]().rsample((4000,))[:, skewed].numpy()
        axes["density"].hist(x, bins=60, density=True, histtype="step", color=color, label=name, lw=1.4)
    axes["density"].set(title="the block in the square", xlabel="x", yticks=[])
    axes["density"].set_xlim(q[0] - 1.5, q[-1] + 1.5)
    axes["density"].legend(frameon=False, fontsize="small")

    judged = [row for row in rows if row.name != "HMC"]  # of itself it says 95 %
    for k, row in enumerate(judged):
        mass = 100 * exact.mass(*np.array(row.band))
        axes["bands"].plot(k + np.linspace(-0.25, 0.25, len(mass)), np.sort(mass), ".", ms=4)
    axes["bands"].axhline(95, color="k", lw=0.8)
    names = [row.name.replace(", ", ",\n") for row in judged]
    axes["bands"].set_xticks(range(len(names)), names, fontsize="small")
    axes["bands"].set(title="how much of the posterior the 95 % bands hold, block by block", ylabel="%")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One posterior by every method of the package, against long chains.")
    parser.add_argument("--full", action="store_true", help="long fits, for a quarter of an hour")
    parser.add_argument("--reference", type=Path, default=HERE / "uncertainty_table")
    parser.add_argument("--out", type=Path, default=Path("runs") / "uncertainty_table")
    main(parser.parse_args())
