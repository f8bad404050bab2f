# # A network that solves a PDE and has never seen a solution
#
# How does heat spread through a plate whose conductivity is uncertain? For each conductivity one solve gives the answer. A
# study that asks a hundred thousand times wants a surrogate, a network from the conductivity to the temperature. It is
# usually trained on solves. Here it is trained on the equation alone: 500 new random plates in each step, none of them solved.
#
# On the unit square, with $u = 0$ on the boundary and a Gaussian field $m$ in 49 Karhunen-Loeve modes,
#
# $$-\nabla \cdot (e^m \nabla u) = 1.$$
#
# Which loss? With the residual vector $r = A(m) u - f$, the plain $|r|^2$ weighs errors by the eigenvalues of $A^T A$, whose
# ratio grows with the fourth power of the cells along an edge: a network would learn ripples and miss the mean. But a residual
# is a functional, and its size is the dual norm $|r|_*^2 = r^T A_0^{-1} r$, with $A_0$ the matrix of a plain plate, $m = 0$. If
# $e$ is the error of $u$, then on any mesh
#
# $$\min e^m \; e^T A(m) \, e \;\le\; |r|_*^2 \;\le\; \max e^m \; e^T A(m) \, e:$$
#
# this loss is the squared error in energy, up to the contrast of the plate. And so it stays after training: each answer of the
# network comes with bounds of its error, without a solve.
#
# The network returns coefficients of $K$ functions $b_k$ that are orthonormal, $b_j^T A_0 b_k = \delta_{jk}$. Then
# $\sum_k (b_k \cdot r)^2$ is the part of $|r|_*^2$ that these functions see, and costs one product: no solver is in the loop. The
# $b_k$ are what the plain plate does under $K$ smooth sources of heat. They vanish where $u$ does, know nothing of any
# random plate, and take one factorisation.
#
# Rojas, Maczuga, Munoz-Matute, Pardo, Paszynski (2024), Robust variational physics-informed neural networks; Qiu, Dahmen,
# Chen (2025), Variationally correct operator learning.
#
#     python demos/demo_residual_surrogate.py               # about half a minute; the picture goes to runs/residual_surrogate
#     mpirun -n 2 python demos/demo_residual_surrogate.py   # the plate on two ranks, the network on each

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from rich.table import Table
from torch import Tensor, nn

import fem_vi

CELLS = 32  # along an edge, each of two triangles
STD, LENGTH = 0.5, 0.3  # of the log-conductivity m [-], and its correlation length
BASIS, SOURCE_LENGTH = 100, 0.1  # functions b_k; correlation length of the sources behind them
WIDTH, STEPS, PLATES, RATE = 256, 400, 500, 5e-3  # of the network, of the training, plates in each step, learning rate
QUERIES = 500


# ## The equation, in weak form


class Conduction:
    """The temperature of a plate, its residual, and the plain plate, as functions of field tensors."""

    def __init__(self, comm: MPI.Comm) -> None:
        plate = mesh.create_unit_square(comm, CELLS, CELLS)
        plate.topology.create_connectivity(1, 2)
        self.space = V = fem.functionspace(plate, ("Lagrange", 1))
        u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
        rim = fem.locate_dofs_topological(V, 1, mesh.exterior_facet_indices(plate.topology))
        cold = fem.dirichletbc(0.0, rim, V)

        F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
        pde = fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[cold])
        self.solve = fem_vi.Solve(pde)  # for the check, after training
        self.residual = fem_vi.Residual(pde, kernel=fem_vi.CompiledKernel())
        self.zero = fem_vi.to_tensor(fem.Function(V))
        self.force = -self.residual(self.zero, self.zero)  # f
        self.preconditioned = self.residual.precondition(reference=self.zero)  # A_0^-1 r

        source = fem.Function(V)
        F_plain = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - source * v * ufl.dx
        self.respond = fem_vi.Solve(fem_vi.WeakForm(F_plain, state=u, inputs=[source], bcs=[cold]))

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Sums over the nodes of all ranks of a b, `(*batch,)`."""
        return fem_vi.all_sum((a * b).sum(-1), self.space.mesh.comm)

    def products(self, a: Tensor, basis: Tensor) -> Tensor:
        """The same for each function of a basis, `(*batch, K)`."""
        return fem_vi.all_sum(a @ basis.T, self.space.mesh.comm)


def orthonormal_basis(conduction: Conduction) -> Tensor:
    """The b_k, `(K, n_owned)`: responses of the plain plate to smooth sources, orthonormal in its energy by Gram and Schmidt."""
    V = conduction.space
    smooth = fem_vi.MaternField(V, std=1.0, length=SOURCE_LENGTH)
    responses = conduction.respond(fem_vi.KarhunenLoeveField(V, smooth, truncation=fem_vi.Modes(BASIS)).modes)
    forces = conduction.residual(responses, conduction.zero) + conduction.force  # A_0 b
    gram = conduction.products(forces, responses)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram), responses, upper=False)


# ## The network


class Surrogate(nn.Module):
    """u(xi) = sum over k of c_k(xi) b_k, with c a network; it starts at the plain plate, c_k = b_k . f."""

    def __init__(self, conduction: Conduction, num_modes: int) -> None:
        super().__init__()
        self.comm = conduction.space.mesh.comm
        self.basis = orthonormal_basis(conduction)
        self.plain = conduction.products(conduction.force, self.basis)
        layers = [nn.Linear(num_modes, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()]
        self.network = nn.Sequential(*layers, nn.Linear(WIDTH, BASIS))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def forward(self, xi: Tensor) -> Tensor:
        """Temperatures, `(*batch, n_owned)`, of coefficients xi of the log-conductivity, `(*batch, num_modes)`, replicated."""
        change = self.network(xi.float()).double()
        return fem_vi.localise(self.plain + self.plain.norm() * change, self.comm) @ self.basis


def train(surrogate: Surrogate, conduction: Conduction, prior: fem_vi.KarhunenLoeveField) -> list[float]:
    """Minimise the mean of |r|_*^2, as far as the basis sees it, over random plates; its root in each step, relative to f."""
    optimiser = torch.optim.Adam(surrogate.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=RATE, total_steps=STEPS, pct_start=0.1)
    history = []
    for _ in range(STEPS):
        xi = prior.rsample((PLATES,))
        r = conduction.residual(surrogate(xi), prior.field(xi))
        loss = conduction.products(r, surrogate.basis).square().sum(-1).mean() / surrogate.plain.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        history.append(float(loss.detach().sqrt()))
    return history


# ## Is it right?


@dataclass(frozen=True)
class Check:
    """New plates, what the network says of them, and what solves say; relative errors are those of each plate, `(QUERIES,)`.

    Attributes:
        m: Log-conductivities, `(QUERIES, n_owned)`.
        solved: Temperatures by `Solve`.
        learnt: Temperatures by the network.
        error: Relative error in L2.
        plain: The same of the temperature of the plain plate, what one would say without a network.
        energy: Relative error in the energy norm.
        bound: What the residual knew of that without a solve: never less.
        low: A number below it that the residual knew too.
        seconds: CPU time of the network, and of the solves.
    """

    m: Tensor
    solved: Tensor
    learnt: Tensor
    error: Tensor
    plain: Tensor
    energy: Tensor
    bound: Tensor
    low: Tensor
    seconds: tuple[float, float]


@torch.no_grad()
def check(surrogate: Surrogate, conduction: Conduction, prior: fem_vi.KarhunenLoeveField) -> Check:
    """Compare with solves of plates that are new to the network."""
    xi = prior.rsample((QUERIES,))
    clock = [time.process_time()]
    learnt = surrogate(xi)
    clock.append(time.process_time())
    m = prior.field(xi)
    solved = conduction.solve(m)
    clock.append(time.process_time())

    dot, residual = conduction.dot, conduction.residual
    size = dot(prior.mass * solved, solved).sqrt()
    off, off_plain = learnt - solved, conduction.solve(conduction.zero) - solved
    r = residual(learnt, m)
    dual = dot(r, conduction.preconditioned.apply(r)).sqrt()
    energy = dot(conduction.force, solved).sqrt()
    contrast = fem_vi.gather(m, conduction.space).exp()
    return Check(
        m=m,
        solved=solved,
        learnt=learnt,
        error=dot(prior.mass * off, off).sqrt() / size,
        plain=dot(prior.mass * off_plain, off_plain).sqrt() / size,
        energy=dot(off, r).sqrt() / energy,
        bound=dual / contrast.amin(-1).sqrt() / energy,
        low=dual / contrast.amax(-1).sqrt() / energy,
        seconds=(clock[1] - clock[0], clock[2] - clock[1]),
    )


def main(arguments: argparse.Namespace) -> None:
    """Train, check, draw."""
    comm = MPI.COMM_WORLD
    torch.manual_seed(0)
    started = time.process_time()
    conduction = Conduction(comm)
    V = conduction.space
    prior = fem_vi.KarhunenLoeveField(V, fem_vi.MaternField(V, std=STD, length=LENGTH), truncation=fem_vi.Energy(0.95))
    surrogate = Surrogate(conduction, prior.num_global)
    history = train(surrogate, conduction, prior)
    training = time.process_time() - started
    found = check(surrogate, conduction, prior)

    queries, solves = found.seconds
    table = Table(
        "quantity",
        "value",
        title=f"Surrogate: {prior.num_global} inputs, {V.dofmap.index_map.size_global} temperatures, {comm.size} rank(s)",
    )
    table.add_row("relative error in L2: median, 99 %, worst", summary(found.error))
    table.add_row("the same of the plain plate", summary(found.plain))
    table.add_row("relative error in energy", summary(found.energy))
    table.add_row("its bound from the residual", summary(found.bound))
    table.add_row(f"{QUERIES} queries of the network", f"{1000 * queries:.0f} ms")
    table.add_row(f"{QUERIES} solves, in one batch", f"{1000 * solves:.0f} ms")
    table.add_row("training, basis included", f"{training:.0f} s")
    table.add_row("it has paid after", f"{QUERIES * training / (solves - queries):.0f} queries")
    fem_vi.report(comm, table, f"Picture: {arguments.out / 'residual_surrogate.png'}")
    figure = draw(conduction, found, history)
    fem_vi.save_figure(figure, arguments.out / "residual_surrogate.png", comm)

    # ## Check
    #
    # The network is right to about a per cent on plates that it has not seen, and the theorem above holds for each of them.
    assert found.error.median() < 0.015, found.error.median()
    assert found.error.quantile(0.99) < 0.05, found.error.quantile(0.99)
    assert (found.low <= found.energy * (1 + 1e-6)).all()
    assert (found.energy <= found.bound * (1 + 1e-6)).all()
    assert solves > 10 * queries, (solves, queries)


def summary(errors: Tensor) -> str:
    """Median, the error that one in a hundred exceeds, and the worst, in per cent."""
    return ", ".join(f"{100 * float(errors.quantile(share)):.1f}" for share in (0.5, 0.99, 1.0)) + " %"


# ## Picture


def draw(conduction: Conduction, found: Check, history: list[float]) -> plt.Figure:
    """A plate of median error and the worst of all; the training; the bounds against the errors."""
    figure = plt.figure(figsize=(15, 5.2), layout="constrained")
    axes = figure.subplot_mosaic(
        [["m0", "s0", "l0", "e0", "training"], ["m1", "s1", "l1", "e1", "bounds"]], width_ratios=[1, 1, 1, 1, 1.25]
    )
    order = found.error.argsort()
    for row, (name, k) in enumerate([("median", order[len(order) // 2]), ("worst", order[-1])]):
        solved, learnt = found.solved[k], found.learnt[k]
        high = float(fem_vi.gather(solved, conduction.space).max())
        off = 100 * (learnt - solved) / high
        reach, field = (float(fem_vi.gather(x, conduction.space).abs().max()) for x in (off, found.m[k]))
        panels = {
            "m": (found.m[k], "log-conductivity", {"cmap": "RdBu_r", "vmin": -field, "vmax": field}),
            "s": (solved, "solve", {"cmap": "inferno", "vmin": 0, "vmax": high}),
            "l": (learnt, "network", {"cmap": "inferno", "vmin": 0, "vmax": high}),
            "e": (off, "difference [% of the maximum]", {"cmap": "PuOr", "vmin": -reach, "vmax": reach}),
        }
        for key, (values, title, style) in panels.items():
            ax = axes[f"{key}{row}"]
            figure.colorbar(fem_vi.plot_field(ax, conduction.space, values, **style), ax=ax, shrink=0.75)
            ax.set(title=title if row == 0 else "", xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        axes[f"m{row}"].set_ylabel(f"{name} of {QUERIES} plates\nL2 error {100 * float(found.error[k]):.1f} %")

    training, bounds = axes["training"], axes["bounds"]
    training.plot([100 * x for x in history], lw=0.8)
    training.set(xlabel=f"step, each with {PLATES} new plates", ylabel="relative residual [%]", title="training", yscale="log")
    training.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    training.minorticks_off()
    bounds.plot(100 * found.energy, 100 * found.bound, ".", ms=2, label="upper bound")
    bounds.plot(100 * found.energy, 100 * found.low, ".", ms=2, label="lower bound")
    most = 100 * float(found.energy.max())
    bounds.plot([0, most], [0, most], "k-", lw=0.8, label="equal")
    bounds.set(xlabel="error in energy [%]", ylabel="known without a solve [%]", title="bounds, from the residual")
    bounds.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A network trained on the residuals of a PDE, checked against solves.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "residual_surrogate")
    main(parser.parse_args())
