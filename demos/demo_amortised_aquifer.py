# # Wells that fail and move: one network for all campaigns
#
# The aquifer of demo_aquifer.py is measured again and again. Each campaign reads the heads in 15 to 40 wells, never the same
# ones: some fail, others are drilled. A fit takes seconds for each campaign. Instead we train one network, once, that turns
# whatever wells have reported into a posterior.
#
# The field has 16 unknowns, the coefficients $\xi$ of its main modes. From pairs of fields and heads simulated beforehand,
# $(\xi_i, h_i)$, no adjoint needed, the network's $q(\xi | y)$ is fitted to
#
# $$\min_q \; -E_{p(\xi, y)} \log q(\xi | y),$$
#
# with the wells and the noise drawn anew whenever a pair is used. The network starts from what linear prediction tells (kriging,
# the ensemble Kalman filter) and learns the rest.
#
#     python demos/demo_amortised_aquifer.py                # half a minute; the picture goes to runs/amortised_aquifer
#     mpirun -n 2 python demos/demo_amortised_aquifer.py    # two ranks share out the simulations
#     python demos/demo_amortised_aquifer.py --full         # ten times the simulations, a wider network: four minutes
#
# With `--full` (one thread: simulations 50 s, training 153 s) the network tells 14.9 nats of the truth, as committed 13.5; 51 %
# and 89 % of the truths lie in intervals of 50 % and 90 %. A fit to one campaign still has the higher bound, by 7 nats on average
# of five; refining gains 3.5 nats in the first campaign, in 2.7 s.

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from demo_aquifer import HERE, LENGTH, STD, Flow, aquifer_flow, pumping_well
from mpi4py import MPI
from rich.table import Table

import fem_vi

MODES = 16  # unknowns
BOX = [2.0, 1.2]  # the aquifer lies within [km]
PLACES = 200  # where there may be wells
FEWEST, MOST = 15, 40  # wells that report in a campaign
NOISE = 0.1  # standard deviation of a head's error [m]
CAMPAIGNS = 50


def possible_wells(data: fem_vi.MeshData, flow: Flow) -> np.ndarray:
    """Places in the aquifer, at random, away from the well that is pumped [km]."""
    places = np.random.default_rng(2).uniform([0.0, 0.0], BOX, (8 * PLACES, 2))
    inside = fem_vi.PointObservation(flow.heads, places, outside=fem_vi.MaskOutside()).found.numpy()
    far = np.linalg.norm(places - pumping_well(data), axis=1) > 0.06
    return places[inside & far][:PLACES]


# ## Simulate, train, use


def main(arguments: argparse.Namespace) -> None:
    """Simulate, train, look at fifty campaigns, compare with fits."""
    comm = MPI.COMM_WORLD
    data = fem_vi.read_mesh(HERE.parent / "meshes" / "aquifer.msh", MPI.COMM_SELF)  # a whole mesh on each rank
    flow = aquifer_flow(data)
    field = fem_vi.MaternField(flow.coefficients, std=STD, length=LENGTH)
    prior = fem_vi.KarhunenLoeveField(flow.coefficients, field, truncation=fem_vi.Modes(MODES))
    wells = possible_wells(data, flow)
    solve, observe = fem_vi.Solve(flow.pde), fem_vi.PointObservation(flow.heads, wells)
    sensors = fem_vi.RandomSensors(torch.from_numpy(wells), fewest=FEWEST, most=MOST)
    problem = fem_vi.InverseProblem(
        prior, lambda xi: observe(solve(prior.field(xi))), fem_vi.GaussianNoise(NOISE), torch.zeros(PLACES)
    )

    pairs, steps, batch, hidden = (20_000, 4_000, 256, (256, 256, 256)) if arguments.full else (2_000, 800, 64, (128, 128))
    clock = Clock()
    simulations = fem_vi.simulate(problem, pairs, path=arguments.out / f"simulations_{pairs}", share=comm)
    clock.stop("simulations")
    torch.manual_seed(0)
    encoder = fem_vi.KalmanEncoder(problem, simulations, points=sensors.points, hidden=hidden)
    model = fem_vi.models.AmortisedInversion(problem, encoder, head=fem_vi.FullHead, sensors=sensors)
    fem_vi.fit(problem, model, fem_vi.ExpectedForwardKL(fem_vi.Stored(simulations, batch)), steps=steps)
    clock.stop("training")

    # Fifty campaigns that the network has not seen: fields, noise and wells are new
    unseen = fem_vi.simulate(problem, CAMPAIGNS, seed=1)
    torch.manual_seed(1)
    y = sensors.observe(problem.likelihood.sample(unseen.prediction))
    clock.start()
    q = model.posterior(y)
    clock.stop("all posteriors")

    # ## Is it right? Is it sharp?
    #
    # If a posterior is right, the truth is as likely to lie above any share of its draws as that share says.
    draws = q.sample((999,))
    ranks = (draws < unseen.xi).double().mean(0)  # of 16 unknowns in each of 50 campaigns
    told = q.log_ratio(unseen.xi).tolist()
    gaps, more = [], []
    for k in range(arguments.fits):
        own = model.problem_of(y[k])
        clock.start()
        run = fem_vi.fit(own, fem_vi.FullRankNormal(prior), fem_vi.ELBO(samples=8), steps=60)
        clock.stop("a fit")
        bounds = [float(fem_vi.ELBO(samples=256)(own, member).elbo) for member in (run.posterior, model.at(y[k]))]
        gaps.append(bounds[0] - bounds[1])
        more.append(float(run.posterior().log_ratio(unseen.xi[k])) - told[k])
    clock.start()
    refined = model.refine(y[0], steps=40)
    clock.stop("refining")
    closed = [float(fem_vi.ELBO(samples=256)(model.problem_of(y[0]), each).elbo) for each in (model.at(y[0]), refined.posterior)]

    coverage = {p: float(((ranks - 0.5).abs() < 0.5 * p).double().mean()) for p in (0.5, 0.9)}
    one, all_of_them = clock.seconds["a fit"] / arguments.fits, clock.seconds["all posteriors"] / CAMPAIGNS
    table = Table("quantity", "value", title=f"{CAMPAIGNS} campaigns of {FEWEST} to {MOST} wells, {comm.size} rank(s)")
    table.add_row("simulations, training (CPU)", f"{clock.seconds['simulations']:.0f} s, {clock.seconds['training']:.0f} s")
    table.add_row("a posterior from the network (CPU)", f"{1e3 * all_of_them:.2f} ms")
    table.add_row("a posterior by fit (CPU)", f"{one:.1f} s, {one / all_of_them:.0f} times as long")
    table.add_row("log q(truth | y) - log p(truth), mean", f"{np.mean(told):.1f} nats")
    table.add_row(f"  by fit less by the network, mean of {arguments.fits}", f"{np.mean(more):.1f} nats")
    table.add_row(f"ELBO by fit less by the network, mean of {arguments.fits}", f"{np.mean(gaps):.1f} nats")
    table.add_row("  gained by refine, first campaign", f"{closed[1] - closed[0]:.1f} nats in {clock.seconds['refining']:.1f} s")
    table.add_row("truth inside the 50 % interval", f"{100 * coverage[0.5]:.0f} % of {ranks.numel()} unknowns")
    table.add_row("truth inside the 90 % interval", f"{100 * coverage[0.9]:.0f} %")
    fem_vi.report(comm, table, f"Picture: {arguments.out / 'amortised_aquifer.png'}")

    times = {"network": all_of_them, "fit": one}
    figure = draw(flow, prior, (wells, y, unseen.xi, draws), ranks, times)
    fem_vi.save_figure(figure, arguments.out / "amortised_aquifer.png", comm)

    # ## Check
    #
    # Intervals hold the truth as often as they say; the network tells the truth apart nearly as well as a fit for each campaign,
    # and is thousands of times as quick; a short fit that starts from it closes what is left.
    assert abs(coverage[0.5] - 0.5) < 0.07, coverage
    assert abs(coverage[0.9] - 0.9) < 0.05, coverage
    assert np.mean(told) > 12.0, told
    assert one / all_of_them > 100
    assert closed[1] > closed[0], closed


class Clock:
    """CPU seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """From here."""
        self.began = time.process_time()

    def stop(self, name: str) -> None:
        """To here; and from here."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - self.began
        self.start()


# ## Picture


def draw(
    flow: Flow,
    prior: fem_vi.KarhunenLoeveField,
    campaigns: tuple[np.ndarray, fem_vi.SensorData, torch.Tensor, torch.Tensor],
    ranks: torch.Tensor,
    times: dict[str, float],
) -> plt.Figure:
    """Two campaigns; calibration over all of them; what a posterior costs."""
    places, y, truth, draws = campaigns
    figure = plt.figure(figsize=(15, 6.2), layout="constrained")
    rows = [["truth 0", "mean 0", "sd 0", "ranks"], ["truth 1", "mean 1", "sd 1", "time"]]
    axes: dict[str, Any] = figure.subplot_mosaic(rows, width_ratios=[1, 1, 1, 0.8])
    counts = y.present.sum(1)
    for row, k in enumerate((int(counts.argmin()), int(counts.argmax()))):
        field = prior.field(draws[:, k])
        shown = {"truth": prior.field(truth[k]), "mean": field.mean(0), "sd": field.std(0)}
        titles = {
            "truth": "true log-transmissivity",
            "mean": f"mean from {int(counts[k])} wells",
            "sd": "standard deviation",
        }
        for name, values in shown.items():
            ax = axes[f"{name} {row}"]
            cmap, low, high = ("magma", 0.0, 0.5) if name == "sd" else ("viridis", -1.2, 1.2)
            colours = fem_vi.plot_field(ax, flow.coefficients, values, cmap=cmap, vmin=low, vmax=high)
            figure.colorbar(colours, ax=ax, shrink=0.75)
            ax.plot(*places.T, ".", color="0.6", ms=1.5, label="no well, or failed")
            x = y.points[k][y.present[k]]
            ax.plot(x[:, 0], x[:, 1], "o", mfc="white", mec="black", ms=3.5, mew=0.8, label="well that reported")
            ax.set(title=titles[name], xlabel="x [km]", ylabel="y [km]")
            ax.spines[:].set_visible(False)
    figure.legend(*axes["mean 0"].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)

    u = np.sort(ranks.flatten().numpy())
    level = (np.arange(len(u)) + 0.5) / len(u)
    band = 2.0 * np.sqrt(level * (1 - level) / len(u))
    axes["ranks"].fill_between(level, level - band, level + band, color="0.85", label="chance (2 sd)")
    axes["ranks"].plot(u, level, label=f"{len(u)} unknowns")
    axes["ranks"].set(title="calibration", xlabel="share of draws below the truth", ylabel="share of truths")
    axes["ranks"].legend(frameon=False, loc="upper left")
    axes["time"].barh(list(times), list(times.values()), color=["C0", "C1"], height=0.5)
    for at, seconds in enumerate(times.values()):
        axes["time"].text(seconds * 1.3, at, f"{1e3 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.1f} s", va="center")
    axes["time"].set(title="a posterior costs", xlabel="CPU time [s]", xscale="log", ylim=(-0.6, 1.6))
    axes["time"].set_xlim(min(times.values()) / 3, max(times.values()) * 30)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One network for the posteriors of all campaigns in an aquifer.")
    parser.add_argument("--full", action="store_true", help="20,000 simulations and 4,000 steps of 256: four minutes")
    parser.add_argument("--fits", type=int, default=2, help="campaigns that are fitted one by one, for comparison")
    parser.add_argument("--out", type=Path, default=Path("runs") / "amortised_aquifer")
    main(parser.parse_args())
