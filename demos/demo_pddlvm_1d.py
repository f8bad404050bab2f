# # A differential equation and its inverse, learnt from residuals
#
# A rod, $-(\kappa u')' = f$ on $(-1, 1)$. Which $u$ belongs to which conductivity? And which conductivity to which $u$? Two
# networks learn both at once, $q(u \mid z)$ and $p(z \mid u)$, and see neither a solution nor a datum: only the residual of the
# weak form, which is told to be zero, give or take $\epsilon$ (Vadeboncoeur, Akyildiz, Kazlauskaite, Girolami, Cirak, 2023,
# Fully probabilistic deep models for forward and inverse problems in parametric PDEs).
#
# Two set-ups of that paper:
#
# - linear: $\kappa = \log(1 + e^a)$, $a \sim N(0, 1)$, $f = 1$, $u(-1) = 0$, $u(1) = 1/2$, 20 elements;
# - nonlinear: the conductivity grows with the slope, $(\sigma(|u'|) + 5 \kappa) / 10$ with $\sigma$ the logistic function; $f$
#   and $u(1)$ are unknown too, uniform on $(1, 2)$ and $(1/2, 1)$; 60 elements. There $u$ alone does not determine $a$: a larger
#   source through a better conductor gives much the same.
#
# As in the paper we look at the squared error of the mean of $u$, over the square of $u$, in bins of $a$. In place of the plain
# residual we take $A_0^{-1} r$, with the Jacobian $A_0$ at one reference: $\epsilon$ is then an error of $u$, and learning quick.
#
#     python demos/demo_pddlvm_1d.py               # half a minute; the picture goes to runs/pddlvm_1d
#     mpirun -n 2 python demos/demo_pddlvm_1d.py   # the ten models shared out between two ranks: the same numbers
#     python demos/demo_pddlvm_1d.py --full        # eight times as many steps: five minutes
#
# What that buys, in 264 s of CPU time, for eps of 0.01 and less: squared errors of u of 1e-5 in place of 2e-4 and more on the
# linear rod, and of 1.3e-5 in place of 4e-4 on the other; in the worst bin 1e-4 at most. The a of the linear rod is found to
# 0.006, for eps = 0.01 in place of 0.033; that of the other is not, since u does not determine it.

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from rich.table import Table
from torch import Tensor, nn

import fem_vi
from fem_vi.models import PDDLVM, Preconditioned, VirtualELBO

COMM = MPI.COMM_WORLD
NOISES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # eps
EDGES = torch.linspace(-2, 2, 9, dtype=torch.float64)  # of the bins of a
SHOWN = (-1.5, 0.0, 1.5)  # a of the curves in the picture
BATCH = 64  # residuals in a step


# ## The equations, in weak form


@dataclass(frozen=True)
class Rod:
    """A weak form, its inputs as functions of z ~ N(0, I), of which the first entry is a, and where A0 is taken."""

    space: fem.FunctionSpace
    pde: fem_vi.WeakForm
    num_z: int
    inputs: Callable[[Tensor], tuple[Tensor, ...]]
    reference: Preconditioned


def conduction(num_elements: int, conductivity: Callable[[Any, Any], Any]) -> tuple[fem_vi.WeakForm, Any]:
    """-(k(kappa, u') u')' = f with u(-1) = 0 and u(1) = h, for inputs kappa, f, h; and the space."""
    V = fem.functionspace(mesh.create_interval(MPI.COMM_SELF, num_elements, [-1.0, 1.0]), ("Lagrange", 1))
    u, v = fem.Function(V), ufl.TestFunction(V)
    kappa, f, h = (fem.Constant(V.mesh, 0.0) for _ in range(3))
    left = fem.locate_dofs_geometrical(V, lambda x: np.isclose(x[0], -1.0))
    right = fem.locate_dofs_geometrical(V, lambda x: np.isclose(x[0], 1.0))
    F = conductivity(kappa, u.dx(0)) * u.dx(0) * v.dx(0) * ufl.dx - f * v * ufl.dx
    bcs = [fem.dirichletbc(0.0, left, V), fem.dirichletbc(h, right, V)]
    return fem_vi.WeakForm(F, state=u, inputs=[kappa, f, h], bcs=bcs), V


def linear() -> Rod:
    """Only the conductivity is unknown."""
    pde, V = conduction(20, lambda kappa, slope: kappa)

    def inputs(z: Tensor) -> tuple[Tensor, ...]:
        return nn.functional.softplus(z[..., 0]), torch.ones(()), torch.tensor(0.5)

    return Rod(V, pde, 1, inputs, Preconditioned(inputs(torch.zeros(1))))


def nonlinear() -> Rod:
    """Conductivity, source and boundary value are unknown."""
    pde, V = conduction(60, lambda kappa, slope: (1 / (1 + ufl.exp(-abs(slope))) + 5 * kappa) / 10)

    def inputs(z: Tensor) -> tuple[Tensor, ...]:
        uniform = torch.special.ndtr(z[..., 1:])
        return nn.functional.softplus(z[..., 0]), 1 + uniform[..., 0], 0.5 + 0.5 * uniform[..., 1]

    ramp = fem.Function(V)
    ramp.interpolate(lambda x: 0.375 * (x[0] + 1))
    return Rod(V, pde, 3, inputs, Preconditioned(inputs(torch.zeros(3)), state=fem_vi.to_tensor(ramp)))


# ## The networks


def layers(size_in: int, width: int = 64) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(size_in, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()).double()


def learn(rod: Rod, eps: float, steps: int, rate: float) -> PDDLVM:
    """Both networks, for one size of the noise."""
    torch.manual_seed(0)
    prior = fem_vi.GaussianVector(torch.zeros(rod.num_z, dtype=torch.float64))
    size = fem_vi.Nodal().create(rod.pde).size
    model = PDDLVM(
        rod.pde,
        prior=prior,
        inputs=rod.inputs,
        forward=nn.Sequential(layers(rod.num_z), fem_vi.DiagonalHead(64, size, std=eps)),
        inverse=nn.Sequential(layers(size), fem_vi.FullHead(64, rod.num_z)),
        eps=fem_vi.FixedEps(eps),
        measure=rod.reference,
    )
    fem_vi.fit(model.problem, model, VirtualELBO(samples=BATCH), steps=steps, optimizer=fem_vi.Adam(rate))
    return model


# ## How good are they?
#
# The test problems are solved, to have something to compare with. The inverse $p(z \mid u)$ belongs to draws of `q`, fields with
# noise of size $\epsilon$ and with the small errors of the forward network. Of those it covers 95 %. A solution proper has
# neither, and is unlike what the inverse has seen: where $\epsilon$ is large, and again where it is smaller than those errors.


@dataclass(frozen=True)
class Verdict:
    """What a model says of test problems that it has not seen.

    Attributes:
        error: Normalised squared error of the mean of u, of each problem.
        bins: The same, averaged in bins of a.
        a: Truth, and mean and standard deviation of p(z | u) where u is the solution, `(3, problems)`.
        covered: Share of a in the band of 95 %, where u is the model's own draw, and where it is the solution.
        curves: Mean and standard deviation of u, and the solution, for three a, `(3, 3, nodes)`.
        seconds: CPU time of learning.
    """

    eps: float
    error: Tensor
    bins: list[float]
    a: Tensor
    covered: tuple[float, float]
    curves: Tensor
    seconds: float

    @property
    def inverse(self) -> float:
        """Root mean square error of a."""
        return float((self.a[0] - self.a[1]).square().mean().sqrt())


@torch.no_grad()
def judge(model: PDDLVM, rod: Rod, eps: float, seconds: float) -> Verdict:
    """Errors of both networks at 400 test problems with a in the bins."""
    torch.manual_seed(1)
    z = torch.randn(400, rod.num_z, dtype=torch.float64)
    z[:, 0] = torch.linspace(-2, 2, 402, dtype=torch.float64)[1:-1]
    u = fem_vi.Solve(rod.pde)(*rod.inputs(z))
    error = square(model.predict(z).mean - u) / square(u)
    which = torch.bucketize(z[:, 0].contiguous(), EDGES) - 1
    bins = [float(error[which == k].mean()) for k in range(len(EDGES) - 1)]
    q = model.invert(u)
    a = torch.stack([z[:, 0], q.mean[:, 0], q.stddev[:, 0]])
    own = torch.randn(2000, rod.num_z)
    shares = covered(model, own, model.sample(own, 1)[0]), covered(model, z, u)
    return Verdict(eps, error, bins, a, shares, curves(model, rod), seconds)


def curves(model: PDDLVM, rod: Rod) -> Tensor:
    """Of u for three a, the other unknowns at their medians."""
    z = torch.zeros(3, rod.num_z)
    z[:, 0] = torch.tensor(SHOWN)
    moments = model.predict(z)
    return torch.stack([moments.mean, moments.std, fem_vi.Solve(rod.pde)(*rod.inputs(z))])


def covered(model: PDDLVM, z: Tensor, u: Tensor) -> float:
    """Share of the a that lie in the bands of 95 % of p(z | u)."""
    q = model.invert(u)
    return float(((q.mean - z).abs() < 1.96 * q.stddev)[:, 0].double().mean())


def square(u: Tensor) -> Tensor:
    """Sum of squares over the nodes."""
    return u.square().sum(-1)


def study(rod: Rod, steps: int, rate: float) -> list[Verdict]:
    """A verdict for each size of the noise. Each rank learns some of the models."""
    mine = []
    for eps in NOISES[COMM.rank :: COMM.size]:
        started = time.process_time()
        model = learn(rod, eps, steps, rate)
        mine.append(judge(model, rod, eps, time.process_time() - started))
    everyone = [verdict for some in fem_vi.parallel.all_values(COMM, mine) for verdict in some]
    return sorted(everyone, key=lambda verdict: -verdict.eps)


def main(arguments: argparse.Namespace) -> None:
    """Learn, judge, draw."""
    torch.set_default_dtype(torch.float64)
    steps, rate = (5000, 3e-3) if arguments.full else (600, 1e-2)
    rods = {"linear": linear(), "nonlinear": nonlinear()}
    verdicts = {name: study(rod, steps, rate) for name, rod in rods.items()}
    for name, found in verdicts.items():
        table = Table(
            "eps", "error of u", "worst bin", "error of a", "covers of own u", "of solved u", "CPU", title=f"{name} rod"
        )
        for verdict in found:
            row = [f"{x:.1e}" for x in (verdict.error.mean(), max(verdict.bins))]
            shares = [f"{100 * share:.0f} %" for share in verdict.covered]
            table.add_row(f"{verdict.eps:g}", *row, f"{verdict.inverse:.3f}", *shares, f"{verdict.seconds:.1f} s")
        fem_vi.report(COMM, table)
    fem_vi.report(COMM, f"{len(NOISES) * 2 * steps * BATCH} residuals, no solves. Picture: {arguments.out / 'pddlvm_1d.png'}")
    fem_vi.save_figure(draw(rods, verdicts), arguments.out / "pddlvm_1d.png", COMM)

    # ## Check
    #
    # The mean of u is right to a few parts in a thousand (of its square) in all bins, and to a few in a hundred where the noise
    # is larger than u itself. The inverse covers what it should on its own draws, and is better where there is less noise, down
    # to eps = 0.01. With less, the errors that so short a training leaves in u are larger than eps: solutions are unlike
    # anything that the inverse has seen, and what it makes of them is luck.
    for name, found in verdicts.items():
        for verdict in found:
            assert max(verdict.bins) < (0.1 if verdict.eps == 1.0 else 5e-3), (name, verdict.eps, verdict.bins)
            assert 0.9 < verdict.covered[0] <= 1.0, (name, verdict.eps, verdict.covered)
        assert found[2].inverse < 0.8 * found[0].inverse, (name, found[2].inverse, found[0].inverse)
    assert all(verdict.inverse < 0.1 for verdict in verdicts["linear"][1:3])


# ## Picture


def draw(rods: dict[str, Rod], verdicts: dict[str, list[Verdict]]) -> plt.Figure:
    """For each rod: some solutions with their bands, errors in bins of a, and what the inverse says of a."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.4), layout="constrained", width_ratios=[1.1, 1.1, 1])
    for row, (name, rod) in zip(axes, rods.items(), strict=True):
        draw_solutions(row[0], rod, verdicts[name][2])
        row[0].set_title(f"{name}: u for three a; bands of 95 %, eps = 0.01")
        for verdict in verdicts[name]:
            row[1].semilogy((EDGES[1:] + EDGES[:-1]) / 2, verdict.bins, "o-", ms=4, label=f"eps = {verdict.eps:g}")
        row[1].set(xlabel="a", ylabel="squared error of u / u squared", title="error of the mean of u, in bins of a")
        row[1].set_ylim(1e-6, 1e-1)
        row[1].legend(frameon=False, fontsize=8, ncols=2)
        truth, mean, std = verdicts[name][2].a[:, ::8]
        row[2].errorbar(truth, mean, 1.96 * std, fmt="o", ms=3, lw=0.8, color="tab:blue")
        row[2].plot([-2, 2], [-2, 2], color="black", lw=0.8)
        row[2].set(xlabel="a", ylabel="a from u, with 95 %", title="the inverse at solved u, eps = 0.01")
    return figure


def draw_solutions(axes: plt.Axes, rod: Rod, verdict: Verdict) -> None:
    """Mean and band of u for three a, and the solutions as dots."""
    x = torch.from_numpy(rod.space.tabulate_dof_coordinates()[:, 0].copy())
    order = torch.argsort(x)
    dots = order[:: len(order) // 20]
    for a, color, mean, std, exact in zip(SHOWN, ("tab:red", "tab:orange", "tab:green"), *verdict.curves, strict=True):
        low, high = mean - 1.96 * std, mean + 1.96 * std
        axes.fill_between(x[order], low[order], high[order], color=color, alpha=0.25, lw=0)
        axes.plot(x[order], mean[order], color=color, lw=1.2, label=f"a = {a:g}")
        axes.plot(x[dots], exact[dots], ".", color="black", ms=4)
    axes.plot([], [], ".", color="black", label="finite elements")
    axes.set(xlabel="x", ylabel="u")
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Forward and inverse networks of a rod, from residuals alone.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "pddlvm_1d")
    parser.add_argument("--full", action="store_true", help="eight times as many steps: five minutes")
    main(parser.parse_args())
