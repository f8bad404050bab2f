# # How well does water flow through this aquifer?
#
# Sixty wells tell the height of the water table. What they cannot tell directly is the transmissivity of the ground between
# them. We ask for all transmissivity fields that explain the heads, and how probable each is: a posterior.
#
# Steady flow in the plane, with heads $h$ [m] and log-transmissivity $m$,
#
# $$-\nabla \cdot (T_0 e^m \nabla h) = 0,$$
#
# with the river's head in the south-west, an inflow from the north, a pumping well, and impermeable ground around the rest.
# A priori $m$ is a Gaussian field with Matern covariance. Lengths are in km, $T_0$ in m^2/d.
#
#     python demos/demo_aquifer.py                               # the wells of demos/aquifer/heads.csv
#     mpirun -n 2 python demos/demo_aquifer.py                   # the same on two ranks
#     python demos/demo_aquifer.py --mesh my.msh --heads my.csv  # your aquifer: see README
#
# The data come from a mesh three times finer, with quadratic elements and a field that was drawn by another method
# (make_aquifer_data.py).

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import ufl
from dolfinx import fem
from mpi4py import MPI
from rich.table import Table
from scipy.interpolate import NearestNDInterpolator

import fem_vi

HERE = Path(__file__).parent
MESH, HEADS = HERE.parent / "meshes" / "aquifer.msh", HERE / "aquifer" / "heads.csv"
TRUTH = HERE / "aquifer" / "truth.csv"  # the field behind those heads
STD, LENGTH = 0.5, 0.35  # prior of the log-transmissivity [-], its correlation length [km]
TRANSMISSIVITY = 100.0  # its geometric mean T_0 [m^2/d]
INFLOW = 900.0  # over each kilometre of the northern boundary [m^3/d/km]
PUMPING, RADIUS = 600.0, 0.02  # out of the well [m^3/d], whose radius is 20 m [km]
RIVER = 0.0  # head of the river [m]


# ## The equation, in weak form


@dataclass(frozen=True)
class Flow:
    """The weak form, and the spaces of heads and log-transmissivities."""

    pde: fem_vi.WeakForm
    heads: Any
    coefficients: Any


def aquifer_flow(data: fem_vi.MeshData, degree: int = 1) -> Flow:
    """Flow on a mesh with facets called river, inflow and well."""
    V = fem.functionspace(data.mesh, ("Lagrange", degree))
    M = fem.functionspace(data.mesh, ("Lagrange", 1))
    h, m, v = fem.Function(V), fem.Function(M, name="m"), ufl.TestFunction(V)
    ds = ufl.Measure("ds", data.mesh, subdomain_data=data.facet_tags)

    F = TRANSMISSIVITY * ufl.exp(m) * ufl.inner(ufl.grad(h), ufl.grad(v)) * ufl.dx
    F -= INFLOW * v * ds(data.facet_tag("inflow"))
    F += PUMPING / (2 * np.pi * RADIUS) * v * ds(data.facet_tag("well"))

    river = fem.dirichletbc(RIVER, fem.locate_dofs_topological(V, 1, data.facets("river")), V)
    return Flow(fem_vi.WeakForm(F, state=h, inputs=[m], bcs=[river]), V, M)


def pumping_well(data: fem_vi.MeshData) -> list[float]:
    """The middle of the facets called well [km]."""
    x = ufl.SpatialCoordinate(data.mesh)
    rim = ufl.Measure("ds", data.mesh, subdomain_data=data.facet_tags)(data.facet_tag("well"))
    length, *moments = (float(fem_vi.Functional(f * rim, [])()) for f in (1, x[0], x[1]))
    return [moment / length for moment in moments]


def read_columns(path: Path, names: str) -> np.ndarray:
    """The numbers of a CSV file: a line of names, then one number for each of `names` in each line."""
    rows = []
    try:
        lines = list(csv.reader(path.read_text().splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = [float(value) for value in line]
        except ValueError:
            row = []
        is_good = len(row) == len(names.split(",")) and np.isfinite(row).all()
        if line and is_good == (number == 1):
            expected = "a line of names" if number == 1 else f"numbers {names}"
            raise SystemExit(f"{path}, line {number}: expected {expected}; found {','.join(line)}")
        rows += [row] if is_good else []
    if not rows:
        raise SystemExit(f"{path} has no numbers; expected a line of names, then lines of {names}.")
    return np.array(rows)


# ## The posterior


def main(arguments: argparse.Namespace) -> None:
    """Read, fit, check, draw."""
    started = time.perf_counter()
    comm = MPI.COMM_WORLD
    data = fem_vi.read_mesh(arguments.mesh, comm)
    wells = read_columns(arguments.heads, "x_km,y_km,head_m,std_m")  # std_m: standard deviation of the head's noise
    flow = aquifer_flow(data)

    solve = fem_vi.Solve(flow.pde)
    observe = fem_vi.PointObservation(flow.heads, wells[:, :2])
    prior = fem_vi.MaternField(flow.coefficients, std=STD, length=LENGTH)
    likelihood = fem_vi.GaussianNoise(std=torch.from_numpy(wells[:, 3]))
    problem = fem_vi.InverseProblem(prior, lambda m: observe(solve(m)), likelihood, torch.from_numpy(wells[:, 2]))

    posterior = fem_vi.LowRankNormal(prior, rank=60)
    run = fem_vi.fit(problem, posterior, fem_vi.ELBO(samples=8), steps=arguments.steps, path=arguments.out, resume=True)
    diagnosis = fem_vi.diagnose(problem, posterior, samples=500)

    q = posterior()
    mean, sd = q.mean.detach(), q.variance.detach().sqrt()
    with torch.no_grad():
        torch.manual_seed(1)
        predicted = observe(solve(q.rsample((200,))))
    is_shipped = (arguments.mesh, arguments.heads) == (MESH, HEADS)
    truth = read_truth(arguments.truth or (TRUTH if is_shipped else None), flow.coefficients)
    seconds = time.perf_counter() - started

    coverage = {p: float("nan") for p in (0.5, 0.9)}
    if truth is not None:
        for p, z in ((0.5, 0.6745), (0.9, 1.6449)):
            inside = ((truth - mean).abs() < z * sd).to(torch.float64).sum()
            coverage[p] = float(fem_vi.all_sum(inside, comm)) / prior.num_global

    last = run.history[-1]
    table = Table("quantity", "value", title=f"Aquifer: {prior.num_global} unknowns, {len(wells)} wells, {comm.size} rank(s)")
    table.add_row("misfit of the mean, per datum (1 is the noise)", f"{diagnosis.chi2:.2f}")
    table.add_row("KL(posterior, prior)", f"{last.kl:.1f} nats")
    table.add_row("ELBO", f"{diagnosis.elbo:.1f} +- {diagnosis.elbo_error:.1f} nats")
    if truth is not None:
        table.add_row("truth inside the 50 % band", f"{100 * coverage[0.5]:.0f} % of the nodes")
        table.add_row("truth inside the 90 % band", f"{100 * coverage[0.9]:.0f} % of the nodes")
    table.add_row("solves of the fit (forward and adjoint)", f"{run.cost.solves}")
    table.add_row("wall time", f"{seconds:.0f} s")
    fem_vi.report(comm, diagnosis, table, f"Picture: {arguments.out / 'aquifer.png'}; fields for ParaView beside it.")

    fields = {"truth": truth, "mean": mean, "sd": sd}
    bound = Bound([row.elbo for row in run.history], diagnosis.log_evidence)
    figure = draw(flow.coefficients, fields, wells, bound, predicted, pumped_at=pumping_well(data))
    fem_vi.save_figure(figure, arguments.out / "aquifer.png", comm)

    # ## Check
    #
    # The mean explains the heads to within their noise, the bands hold the truth about as often as they say, and the
    # data have taught us something: far from the wells' information the field stays uncertain, near them it does not. Of other
    # data we cannot know that beforehand; the diagnosis above says what to make of their posterior.
    if not is_shipped:
        return
    assert diagnosis.chi2 < 1.5, "the mean does not explain the heads"
    assert last.kl > 10, "the data taught us nothing"
    assert 0.35 < coverage[0.5] < 0.75, coverage
    assert 0.75 < coverage[0.9] <= 1.0, coverage


def read_truth(path: Path | None, M: Any) -> torch.Tensor | None:
    """The field behind the data, where it is known, on the nodes of the mesh."""
    if path is None:
        return None
    table = read_columns(path, "x_km,y_km,log_transmissivity")
    at = NearestNDInterpolator(table[:, :2], table[:, 2])
    truth = fem.Function(M)
    truth.interpolate(lambda x: at(x[0], x[1]))
    return fem_vi.to_tensor(truth)


# ## Picture


@dataclass(frozen=True)
class Bound:
    """The evidence lower bound in each step, and what importance weights make of it in the end [nats]."""

    elbo: list[float]
    log_evidence: float


def draw(
    M: Any,
    fields: dict[str, torch.Tensor | None],
    wells: np.ndarray,
    bound: Bound,
    heads: torch.Tensor,
    *,
    pumped_at: list[float],
) -> plt.Figure:
    """Truth, mean and standard deviation with the wells; the ELBO; predicted against observed heads."""
    figure = plt.figure(figsize=(13, 6.4), layout="constrained")
    axes = figure.subplot_mosaic([["truth", "mean", "sd"], ["elbo", "heads", "heads"]], height_ratios=[1, 0.9])
    titles = {"truth": "true log-transmissivity", "mean": "posterior mean", "sd": "posterior standard deviation"}
    for name, field in fields.items():
        ax = axes[name]
        ax.set(title=titles[name], xlabel="x [km]", ylabel="y [km]")
        ax.spines[:].set_visible(False)
        if field is None:
            ax.text(0.5, 0.5, "unknown", ha="center", transform=ax.transAxes)
            continue
        style = {"cmap": "magma", "vmin": 0.0} if name == "sd" else {"cmap": "viridis", "vmin": -1.5, "vmax": 1.5}
        figure.colorbar(fem_vi.plot_field(ax, M, field, **style), ax=ax, shrink=0.75)
        ax.plot(wells[:, 0], wells[:, 1], "o", mfc="white", mec="black", ms=3.5, mew=0.8, label="observed well")
        ax.plot(*pumped_at, "X", mfc="red", mec="white", ms=7, mew=0.8, label="pumped well")
    figure.legend(*axes["mean"].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)

    elbo = np.array(bound.elbo)
    window = min(50, len(elbo))
    steps = np.arange(1, len(elbo) + 1)
    axes["elbo"].plot(steps, elbo, ".", ms=2, alpha=0.4, label="of the draws of a step")
    axes["elbo"].plot(steps[window - 1 :], np.convolve(elbo, np.ones(window) / window, "valid"), label=f"mean of {window} steps")
    axes["elbo"].axhline(bound.log_evidence, color="k", lw=0.8, ls="--", label="log evidence, by importance weights")
    axes["elbo"].set(xlabel="step, from the linearised posterior", ylabel="nats", title="evidence lower bound")
    axes["elbo"].legend(frameon=False, fontsize=8)
    median, low, high = (torch.quantile(heads, p, dim=0).numpy() for p in (0.5, 0.05, 0.95))
    observed = wells[:, 2]
    axes["heads"].errorbar(observed, median, [median - low, high - median], fmt="o", ms=3, lw=0.8, label="median, 90 % interval")
    ends = [observed.min(), observed.max()]
    axes["heads"].plot(ends, ends, "k-", lw=0.6, label="equal")
    axes["heads"].set(xlabel="observed head [m]", ylabel="predicted head [m]", title="heads at the wells")
    axes["heads"].legend(frameon=False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A posterior of an aquifer's transmissivity from heads at wells.")
    parser.add_argument("--mesh", type=Path, default=MESH)
    parser.add_argument("--heads", type=Path, default=HEADS)
    parser.add_argument("--truth", type=Path, help="the field behind the heads, where it is known")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs") / "aquifer")
    main(parser.parse_args())
