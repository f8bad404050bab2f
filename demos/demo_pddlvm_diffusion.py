# # Groundwater without a solver in the loop
#
# Rain falls evenly on an island aquifer that drains into a river. How high the water stands depends on the transmissivity of the
# ground, $-\nabla \cdot (e^m \nabla u) = 1$ with $u = 0$ at the river and no flux elsewhere; $m$ is a random field, here with the
# 16 dominant modes of a Matern field. A network $q(u \mid z)$ learns the heads at all nodes of an unstructured mesh for any
# coefficients $z$ of these modes. It never sees a solution: each step evaluates the weak form at 32 of its own draws and is
# told that the residual should have been zero, give or take $\epsilon$.
#
# A second network learns the way back, $p(z \mid u)$, from the same draws: which ground belongs to these heads?
#
# The residual is multiplied by the inverse of one Jacobian, that of uniform ground, so that $\epsilon$ is an error in $u$; and
# $\epsilon$ is learnt with the networks, so that the bands of $q$ are about as wide as its errors.
#
#     python demos/demo_pddlvm_diffusion.py               # half a minute; the picture goes to runs/pddlvm_diffusion
#     mpirun -n 2 python demos/demo_pddlvm_diffusion.py   # runs too: each rank does all of it, on a mesh of its own
#     python demos/demo_pddlvm_diffusion.py --full        # 10,000 steps: four minutes
#
# What that buys, in 240 s of CPU time: heads to 0.65 % in place of 2.2 %, eps 0.005 in place of 0.034, and with it 81 % of the
# variance of the ground in place of 57 %. The bands of 95 % hold 93.5 % of the heads and 95.2 % of the coefficients.

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import ufl
from dolfinx import fem
from mpi4py import MPI
from rich.table import Table
from torch import Tensor, nn

import fem_vi
from fem_vi.models import PDDLVM, FieldMoments, Preconditioned, VirtualELBO

WORLD, COMM = MPI.COMM_WORLD, MPI.COMM_SELF  # for so small a mesh messages would cost more than they save
MESH = Path(__file__).parent.parent / "meshes" / "aquifer.msh"
STD, LENGTH = 0.7, 0.5  # of the log-transmissivity
MODES = 16
WIDTH = 128  # of the network
BATCH = 32  # fields in a step
QUERIES = 1000


# ## The equation, in weak form, and the random field


def aquifer() -> tuple[fem.FunctionSpace, fem_vi.WeakForm, fem_vi.KarhunenLoeveField]:
    """The space of heads, the equation for a log-transmissivity, and the law of that."""
    data = fem_vi.read_mesh(MESH, COMM)
    V = fem.functionspace(data.mesh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
    river = fem.locate_dofs_topological(V, 1, data.facets("river"))
    pde = fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(0.0, river, V)])
    prior = fem_vi.KarhunenLoeveField(V, fem_vi.MaternField(V, std=STD, length=LENGTH), truncation=fem_vi.Modes(MODES))
    return V, pde, prior


# ## The networks
#
# The forward one starts from the heads in uniform ground, which one application of the preconditioner gives:
# $A_0^{-1} r(0) = -u_0$. The inverse one sees heads as their difference from these, over the root of their number: a step of Adam
# moves each weight as far, and the sum over 1,800 nodes should not move further than one over the 128 units of another layer.


class Divided(nn.Module):
    """A vector over the root of its length."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x / x.shape[-1] ** 0.5


def layers(*sizes: int) -> nn.Module:
    """Hidden layers of these sizes, the first of them that of the input."""
    return nn.Sequential(*(layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU()))).double()


def create_model(pde: fem_vi.WeakForm, prior: fem_vi.KarhunenLoeveField) -> PDDLVM:
    """Heads at all nodes as a function of the 16 coefficients, and back."""
    torch.manual_seed(0)
    uniform = prior.field_mean
    start = -fem_vi.Residual(pde).precondition(reference=uniform)(torch.zeros_like(uniform), uniform)
    largest = max(fem_vi.parallel.all_values(COMM, float(start.max())))
    state = fem_vi.Nodal(scale=largest / 2, offset=start)
    size = state.create(pde).size
    return PDDLVM(
        pde,
        prior=prior,
        inputs=prior.field,
        forward=nn.Sequential(layers(MODES, WIDTH, WIDTH, WIDTH), fem_vi.DiagonalHead(WIDTH, size, std=0.05)),
        inverse=nn.Sequential(Divided(), layers(size, WIDTH, WIDTH), fem_vi.FullHead(WIDTH, MODES)),
        state=state,
        eps=fem_vi.LearnedEps(first=0.1),
        measure=Preconditioned(uniform),
    )


# ## How good is it?


@dataclass(frozen=True)
class Verdict:
    """Of test fields that the networks have not seen.

    Attributes:
        errors: Relative error of the mean of u in L2, of each.
        covered: Share of nodes and fields where the solution lies in the band of 95 %.
    """

    errors: Tensor
    covered: float


@dataclass(frozen=True)
class WayBack:
    """What the inverse network says of z where it is shown heads.

    Attributes:
        mean: Of p(z | u), `(fields, 16)`.
        std: Likewise.
        errors: Root mean square error of each coefficient; one is what the prior knows.
        explained: Share of the variance of m that the mean of p(z | u) has right.
        covered: Share of coefficients and fields where the truth lies in the band of 95 %.
    """

    mean: Tensor
    std: Tensor
    errors: Tensor
    explained: float
    covered: float


def judge_inverse(model: PDDLVM, prior: fem_vi.KarhunenLoeveField, z: Tensor, u: Tensor) -> WayBack:
    """Against the coefficients that the heads `(fields, n_owned)` belong to."""
    q = model.invert(u)
    off = q.mean - z
    weights = prior.eigenvalues  # of each coefficient in the variance of m, integrated over the mesh
    explained = 1 - float((off.square() @ weights).mean() / (z.square() @ weights).mean())
    inside = (off.abs() < 1.96 * q.stddev).double().mean()
    return WayBack(q.mean, q.stddev, off.square().mean(0).sqrt(), explained, float(inside))


def judge(prior: fem_vi.KarhunenLoeveField, q: FieldMoments, u: Tensor) -> Verdict:
    """Against solutions, `(fields, n_owned)`."""
    off = fem_vi.all_sum((q.mean - u).square() @ prior.mass, COMM)
    errors = (off / fem_vi.all_sum(u.square() @ prior.mass, COMM)).sqrt()
    free = (q.std > 0).double()
    inside = ((q.mean - u).abs() < 1.96 * q.std).double() * free
    return Verdict(errors, float(fem_vi.all_sum(inside.sum(), COMM) / fem_vi.all_sum(free.sum(), COMM)))


def timed(work: Callable[[], Tensor | FieldMoments]) -> tuple[float, Tensor | FieldMoments]:
    """CPU seconds on this rank, and what came of it."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


@torch.no_grad()
def main(arguments: argparse.Namespace) -> None:
    """Learn, judge, draw."""
    V, pde, prior = aquifer()
    model = create_model(pde, prior)
    steps, rate = (10_000, 2e-3) if arguments.full else (900, 4e-3)
    with torch.enable_grad():
        objective = VirtualELBO(samples=BATCH, gradient=fem_vi.TotalDerivative())
        fit = lambda: fem_vi.fit(model.problem, model, objective, steps=steps, optimizer=fem_vi.Adam(rate))  # noqa: E731
        learning, run = timed(fit)
    if WORLD.rank == 0:
        model.save(arguments.out / "model")

    torch.manual_seed(1)
    z = torch.randn(QUERIES, MODES, dtype=torch.float64)
    m, solve = prior.field(z), fem_vi.Solve(pde)
    asking, q = timed(lambda: model.predict(z))
    solving, u = timed(lambda: solve(m))
    verdict = judge(prior, q, u)
    back = judge_inverse(model, prior, z, u)
    of_own = judge_inverse(model, prior, z, model.sample(z, 1)[0])

    table = Table("quantity", "value", title=f"{prior.num_global} modes, {model.state.size} heads")
    table.add_row("residuals evaluated, solves", f"{BATCH * steps}, {run.cost.solves}")
    table.add_row("mean relative error in L2", f"{100 * float(verdict.errors.mean()):.2f} %")
    table.add_row("the same, 95 % of fields below", f"{100 * float(verdict.errors.quantile(0.95)):.2f} %")
    table.add_row("solutions in the bands of 95 %", f"{100 * verdict.covered:.1f} %")
    table.add_row("inverse, from solved heads: error of z_1, z_2, z_3", ", ".join(f"{x:.2f}" for x in back.errors[:3]))
    table.add_row("variance of m that its mean has right", f"{100 * back.explained:.0f} %")
    shares = f"{100 * back.covered:.1f} %, {100 * of_own.covered:.1f} %"
    table.add_row("coefficients in its bands of 95 %, from solved heads, from own draws", shares)
    table.add_row("eps, in units of u", f"{float(model.noise.log_eps().exp()):.4f}")
    table.add_row("CPU time of learning", f"{learning:.1f} s")
    table.add_row(f"CPU time of {QUERIES} queries, of {QUERIES} solves", f"{asking:.2f} s, {solving:.2f} s")
    table.add_row("has paid for itself after", f"{learning / max(solving - asking, 1e-9) * QUERIES:,.0f} queries")
    fem_vi.report(WORLD, table, f"Picture: {arguments.out / 'pddlvm_diffusion.png'}")
    worst = int(verdict.errors.argsort()[int(0.9 * QUERIES)])
    seen = Shown(z[worst], u[worst], FieldMoments(q.mean[worst], q.std[worst]), back.mean[worst], back.std[worst])
    figure = draw(V, prior, seen, verdict)
    fem_vi.save_figure(figure, arguments.out / "pddlvm_diffusion.png", WORLD)

    # ## Check
    #
    # The heads are right to less than 3 %, and the bands of 95 % hold 90 to 99 % of them, as do those of the inverse. Its mean
    # has more than half of the variance of the ground: heads with an error of eps say little of the finer modes.
    assert float(verdict.errors.mean()) < 0.03, verdict.errors.mean()
    assert 0.90 < verdict.covered < 0.99, verdict.covered
    assert 0.90 < back.covered < 0.99, back.covered
    assert 0.90 < of_own.covered < 0.99, of_own.covered
    assert back.explained > 0.5, back.explained
    assert run.cost.solves == 0


# ## Picture


@dataclass(frozen=True)
class Shown:
    """A field that nine of ten are easier than: coefficients, solved heads, and what the networks say of both.

    Attributes:
        z: Coefficients.
        u: Solved heads.
        q: Heads by the forward network.
        mean: Coefficients by the inverse network, from the solved heads.
        std: Their standard deviations.
    """

    z: Tensor
    u: Tensor
    q: FieldMoments
    mean: Tensor
    std: Tensor


def draw(V: fem.FunctionSpace, prior: fem_vi.KarhunenLoeveField, seen: Shown, verdict: Verdict) -> plt.Figure:
    """Above the ground and its heads, below what the networks say of them, each with its errors to the right."""
    figure, axes = plt.subplots(2, 4, figsize=(18, 6.2), layout="constrained")
    u, q, m = seen.u, seen.q, prior.field(torch.stack([seen.z, seen.mean]))
    top = max(fem_vi.parallel.all_values(COMM, float(u.max())))
    largest = max(fem_vi.parallel.all_values(COMM, float(m.abs().max())))
    widest = max(fem_vi.parallel.all_values(COMM, float((1.96 * q.std).max())))
    ground = {"cmap": "viridis", "vmin": -largest, "vmax": largest}
    heads = {"cmap": "Blues_r", "vmin": 0, "vmax": top}
    errors = {"cmap": "magma_r", "vmin": 0, "vmax": widest}
    panels = [
        (axes[0, 0], m[0], "log-transmissivity m", ground),
        (axes[1, 0], m[1], "m from the solved heads, mean of p(z | u)", ground),
        (axes[0, 1], u, "head u, finite elements", heads),
        (axes[1, 1], q.mean, "head u, mean of q(u | z)", heads),
        (axes[0, 2], (q.mean - u).abs(), "error of the mean of u", errors),
        (axes[1, 2], 1.96 * q.std, "half a band of 95 % of u", errors),
    ]
    for ax, field, title, options in panels:
        figure.colorbar(fem_vi.plot_field(ax, V, field, **options), ax=ax, shrink=0.8)
        ax.set_title(title)
        ax.axis("off")
    draw_errors(axes[0, 3], verdict)
    draw_coefficients(axes[1, 3], seen)
    return figure


def draw_errors(ax: plt.Axes, verdict: Verdict) -> None:
    """Errors of all fields."""
    ax.hist(100 * verdict.errors.numpy(), bins=40, color="tab:blue")
    ax.axvline(100 * float(verdict.errors.mean()), color="black", lw=1, label="mean")
    ax.set(xlabel="relative error of u in L2 [%]", ylabel="fields", title=f"{len(verdict.errors)} fields not seen before")
    ax.legend(frameon=False)


def draw_coefficients(ax: plt.Axes, seen: Shown) -> None:
    """Coefficients of the field shown, and what the inverse network says of them."""
    number = range(1, MODES + 1)
    ax.errorbar(number, seen.mean, 1.96 * seen.std, fmt="o", ms=4, lw=1, color="tab:blue", label="p(z | u), 95 %")
    ax.plot(number, seen.z, "x", color="black", ms=5, label="truth")
    ax.set(xlabel="mode k", ylabel="coefficient of m", ylim=(-3.5, 4.5), title="the way back, mode by mode")
    ax.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Heads in an aquifer for any transmissivity, learnt from residuals alone.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "pddlvm_diffusion")
    parser.add_argument("--full", action="store_true", help="10,000 steps: four minutes")
    main(parser.parse_args())
