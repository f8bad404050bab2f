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
# - the full-rank normal again, and a normalizing flow over it, whose layers may stretch the tail of one unknown where others say
#   so, both fitted to a reduced model that is made of a thousand solves; and Hamiltonian steps in the flow's coordinates, on a
#   smaller reduced model, which the full one accepts or rejects: they correct what is left;
# - Hamiltonian Monte Carlo, Pyro's NUTS and tempered sequential Monte Carlo, whose numbers are in the file.
#
# After Aristoff, Bangerth (2023), A benchmark for the Bayesian inversion of coefficients in partial differential equations.
#
#     python demos/demo_uncertainty_table.py              # a minute: short fits
#     mpirun -n 2 python demos/demo_uncertainty_table.py  # the same; chains are shared out over two ranks
#     python demos/demo_uncertainty_table.py --full       # long fits, for half an hour; they go on after an interruption

import argparse
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Plate:
    """Log-conductivities of the blocks `(*batch, 64)` to temperatures at the sensors `(*batch, 169)`."""

    blocks: fem_vi.PiecewiseConstant
    solve: fem_vi.Solve
    residual: fem_vi.Residual
    observe: fem_vi.PointObservation

    def __call__(self, theta: torch.Tensor) -> torch.Tensor:
        """Solve, and measure."""
        return self.observe(self.solve(self.blocks(theta)))


def forward_map(comm: MPI.Comm, cells: int = CELLS, degree: int = 1) -> Plate:
    """The plate, on a mesh of so many squares along an edge."""
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
    return Plate(blocks, solve, fem_vi.Residual(pde), observe)


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

    `solves` are those that HMC needs for what 1,000 independent draws are worth, in the slowest unknown: as it comes, and in the
    coordinates of a fitted normal.
    """

    y: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    levels: np.ndarray
    quantiles: np.ndarray
    log_evidence: float
    solves: tuple[float, float]
    rows: list[Row]

    @staticmethod
    def read(path: Path) -> "Reference":
        """From the file that make_uncertainty_reference.py writes."""
        content = json.loads(path.read_text())
        hmc = content["hmc"]
        arrays = (np.array(value) for value in (content["y"], hmc["mean"], hmc["sd"], hmc["levels"], hmc["quantiles"]))
        hmc["band"] = [hmc["quantiles"][hmc["levels"].index(level)] for level in BAND]
        parts = {"SMC": content["smc"], "NUTS": content["nuts"], "HMC, as it comes": content["plain"], "HMC": hmc}
        rows = [
            Row(name, part["solves"], part["cpu_seconds"], None, None, part["mean"], part["sd"], part["band"])
            for name, part in parts.items()
        ]
        solves = tuple(1000 * part["solves"] / part["ess_bulk"] for part in (content["plain"], hmc))
        return Reference(*arrays, content["smc"]["log_evidence"], solves, rows)

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


NEWTON = fem_vi.NewtonCG(gain=0.5, iterations=20)
ELBO, ADAM = fem_vi.ELBO(samples=32), fem_vi.Adam(lr=1e-2)


@dataclass(frozen=True)
class Stage:
    """A fit to a reduced model: solves at draws of the last fit before, 0 for the model as it is; most modes; steps."""

    draws: int
    rank: int
    steps: int
    objective: fem_vi.ELBO | fem_vi.Renyi = ELBO
    optimizer: fem_vi.Adam = ADAM


@dataclass(frozen=True)
class Budget:
    """Steps of 32 samples for fits to the full model; stages on reduced ones; chains that correct the flow, and their steps."""

    normal: int
    full_rank: tuple[Stage, ...]
    flow: tuple[Stage, ...]
    chains: int
    corrective: int
    rank: int  # modes of the model that these chains move on
    subchain: int  # steps on it before the full one is asked


FLOW = {"optimizer": fem_vi.Adam(lr=2e-3)}
WIDER = {"objective": fem_vi.Renyi(alpha=0.5, samples=64), "optimizer": fem_vi.Adam(lr=1e-3)}  # for tails
WIDEST = {"objective": fem_vi.Renyi(alpha=0.45, samples=128), "optimizer": fem_vi.Adam(lr=1e-3)}  # at last
SHORT = Budget(
    normal=70,
    full_rank=(Stage(150, 100, 150), Stage(150, 120, 150)),
    flow=(Stage(0, 0, 30, **FLOW), Stage(100, 140, 90, **FLOW), Stage(0, 0, 15, **WIDER)),
    chains=64,
    corrective=6,
    rank=140,
    subchain=2,
)
FULL = Budget(
    normal=400,
    full_rank=(Stage(150, 120, 150), Stage(150, 180, 150), Stage(300, 220, 1500)),
    flow=(
        Stage(0, 0, 300, **FLOW),
        Stage(400, 250, 4000, **FLOW),
        Stage(0, 0, 800, **WIDER),
        Stage(400, 280, 1500, **WIDER),
        Stage(0, 0, 600, **WIDEST),
    ),
    chains=256,
    corrective=24,
    rank=200,
    subchain=4,
)


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


def fitted(
    problem: fem_vi.InverseProblem,
    q: torch.nn.Module,
    steps: int,
    path: Path | None = None,
    *,
    objective: fem_vi.ELBO | fem_vi.Renyi = ELBO,
    optimizer: fem_vi.Adam = ADAM,
    start: fem_vi.NewtonCG | fem_vi.PresentParameters = NEWTON,
) -> tuple[int, float | None]:
    """Fit a posterior; the solves and seconds that it took.

    With a path an interrupted fit goes on; its seconds are then not known.
    """
    began, before = time.process_time(), problem.cost.solves
    run = fem_vi.fit(problem, q, objective, steps=steps, optimizer=optimizer, start=start, path=path, resume=path is not None)
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


# ### With a reduced-order model (ROM)
#
# Some hundred temperature fields span nearly all that this plate can do. Galerkin's solution in their span takes small dense
# matrices only, of which the equation has one for each block, times $e^{x_k}$. A fit may ask it for as many samples as it likes.
# Which fields? Those of draws from the last fit: Laplace's, then the full-rank normal's, then the flow's. Whether the reduced
# model was good enough, the diagnosis tells, which solves the full one. (On a mesh as small as this one, it saves solves and
# not seconds: 250 dense unknowns for 961 sparse ones. Those 250 do not grow with the mesh.)


@dataclass
class Reduction:
    """A reduced model of `problem` that grows: solves at the parameters `theta` so far, and the seconds of all that was done."""

    problem: fem_vi.InverseProblem
    theta: list[torch.Tensor] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    seconds: float | None = 0.0

    def grow(self, q: torch.nn.Module, stage: Stage) -> None:
        """Solve at draws of q, and make `reduced`, the problem with a reduced model, of these solves and all before."""
        began, plate = time.process_time(), self.problem.forward
        torch.manual_seed(len(self.theta))
        with torch.no_grad():
            self.theta.append(q().rsample((stage.draws,)))
            self.states.append(plate.solve(plate.blocks(self.theta[-1])))
        self.reduced = self.of_rank(stage.rank)
        self.seconds = added((0, self.seconds), (0, time.process_time() - began))[1]

    def of_rank(self, rank: int) -> fem_vi.InverseProblem:
        """The problem with a reduced model of so many modes, of all solves so far."""
        plate, theta, states = self.problem.forward, torch.cat(self.theta), torch.cat(self.states)
        solve = fem_vi.ReducedSolve(plate.residual, plate.blocks, states, theta, features=torch.exp, rank=rank)
        y, likelihood = self.problem.y, self.problem.likelihood
        return fem_vi.InverseProblem(self.problem.prior, lambda x: plate.observe(solve(x)), likelihood, y)

    def fit(self, q: torch.nn.Module, stage: Stage, start: Any, path: Path | None) -> None:
        """Fit to the reduced model."""
        choices = {"objective": stage.objective, "optimizer": stage.optimizer, "start": start}
        self.seconds = added((0, self.seconds), fitted(self.reduced, q, stage.steps, path, **choices))[1]

    @property
    def cost(self) -> tuple[int, float | None]:
        """Solves of the full model, and seconds."""
        return sum(len(theta) for theta in self.theta), self.seconds


def create_flow(normal: torch.nn.Module) -> fem_vi.Flow:
    """Four autoregressive layers over a fitted normal, each a spline, a shift and a scale."""
    torch.manual_seed(0)
    return fem_vi.Flow(normal.prior, fem_vi.AffineSpline(transforms=4, bins=8, hidden=(192,)), affine=normal)


def reduced_full_rank(known: Reduction, q: torch.nn.Module, stages: tuple[Stage, ...], out: Path | None) -> torch.nn.Module:
    """A full-rank normal by stages, the first of them with solves at draws of q."""
    normal = fem_vi.FullRankNormal(q.prior)
    for k, stage in enumerate(stages):
        known.grow(normal if k else q, stage)
        start = fem_vi.PresentParameters() if k else NEWTON
        known.fit(normal, stage, start, None if out is None else out / f"reduced-full-rank-{k}")
    return normal


def reduced_flow(known: Reduction, normal: torch.nn.Module, stages: tuple[Stage, ...], out: Path | None) -> fem_vi.Flow:
    """A flow over a fitted normal, by stages."""
    flow = create_flow(normal)
    for k, stage in enumerate(stages):
        if stage.draws:
            known.grow(flow, stage)
        known.fit(flow, stage, fem_vi.PresentParameters(), None if out is None else out / f"reduced-flow-{k}")
    return flow


def added(*costs: tuple[int, float | None]) -> tuple[int, float | None]:
    """Solves and seconds together."""
    solves, seconds = zip(*costs, strict=True)
    return sum(solves), None if None in seconds else sum(seconds)


# ### Corrected
#
# A few hundred chains begin at draws of the flow. They move in its coordinates, on a reduced model of fewer modes, and ask
# the full one every few steps whether it agrees. It has the last word: neither the flow's errors nor the small model's stay.


def corrected(known: Reduction, flow: fem_vi.Flow, budget: Budget, grid: fem_vi.ProcessGrid) -> fem_vi.Samples:
    """Many short chains in the coordinates of a flow, from draws of the flow."""
    kernel = fem_vi.DelayedAcceptance(known.of_rank(budget.rank), fem_vi.HMC(step_size=0.15), subchain=budget.subchain)
    chains, steps = budget.chains, budget.corrective
    return fem_vi.sample(known.problem, kernel, chains=chains, draws=steps, warmup=steps // 6, reference=flow, grid=grid, seed=5)


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
    known, first = Reduction(problem), (rows[0].solves, rows[0].seconds)
    normal = posteriors["full-rank by ROM"] = reduced_full_rank(known, posteriors["Laplace"], budget.full_rank, out)
    rows.append(row_of_family("full-rank by ROM", problem, normal, cost=added(first, known.cost)))
    flow = posteriors["flow by ROM"] = reduced_flow(known, normal, budget.flow, out)
    cost = added(first, known.cost)
    rows.append(row_of_family("flow by ROM", problem, flow, cost=cost))
    began = time.process_time()
    samples = corrected(known, flow, budget, grid)
    cost = added(cost, (samples.cost.solves, time.process_time() - began))
    rows.append(row_of_draws("flow, corrected", samples.m, cost=cost))
    rows += exact.rows

    fem_vi.report(
        grid.comm,
        as_table(rows, exact, "64 unknowns, 169 data"),
        f"Whether to trust a fit, its k-hat says alone: below {LIMIT:.2f}. HMC needs {exact.solves[0]:,.0f} solves for what "
        f"1,000 independent draws are worth, and {exact.solves[1]:,.0f} in the coordinates of a normal fitted before.",
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
    for name in (*normals, "full-rank by ROM"):
        assert rows[name].khat > LIMIT, f"{name} is not flagged"
        assert gaps[name] > gaps["flow by ROM"] > 0.0, gaps
    assert 0.6 * min(gaps[name] for name in normals) > gaps["flow by ROM"], gaps
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
    for name, values in fields.items():
        style = {"cmap": "magma", "vmin": 0.0} if name == "sd" else {"cmap": "RdBu", "vmin": -3.0, "vmax": 3.0}
        image = axes[name].imshow(values.reshape(BLOCKS).T, origin="lower", extent=(0, 1, 0, 1), **style)
        figure.colorbar(image, ax=axes[name], shrink=0.85)
        axes[name].plot(*SENSORS.T, ".", color="0.4", ms=2)
        axes[name].set(title=titles[name], xticks=[0, 1], yticks=[0, 1])
    i, j = np.unravel_index(skewed, BLOCKS)
    axes["mean"].plot((i + 0.5) / BLOCKS[0], (j + 0.5) / BLOCKS[1], "s", mfc="none", mec="k", ms=22, mew=1.5)

    q = exact.quantiles[:, skewed]
    density = np.diff(exact.levels) / np.diff(q)
    axes["density"].stairs(density, q, fill=True, color="0.8", label="long chains")
    torch.manual_seed(4)
    for name, color in (("Laplace", "tab:red"), ("full-rank", "tab:orange"), ("flow by ROM", "tab:blue")):
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
    names = [row.name.replace(", ", ",\n").replace(" by ", "\nby ") for row in judged]
    axes["bands"].set_xticks(range(len(names)), names, fontsize="small")
    axes["bands"].set(title="how much of the posterior the 95 % bands hold, block by block", ylabel="%")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One posterior by every method of the package, against long chains.")
    parser.add_argument("--full", action="store_true", help="long fits, for half an hour")
    parser.add_argument("--reference", type=Path, default=HERE / "uncertainty_table")
    parser.add_argument("--out", type=Path, default=Path("runs") / "uncertainty_table")
    main(parser.parse_args())
