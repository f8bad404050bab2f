# # Where should the copper go?
#
# A square plate is heated evenly and may lose its heat at one short piece of its edge only. Copper, a thousand times more
# conductive than the plate, may cover two fifths of it. Where should it go, to keep the plate as cool as possible?
#
# The temperature $T$ obeys $-\nabla \cdot (k \nabla T) = 1$, with $T = 0$ at the sink and no flux through the rest of the edge.
# We minimise the thermal compliance $\int T$, the mean temperature, over densities $\rho$ of copper with $\int \rho = 0.4$.
#
# A density cannot jump from cell to cell: $\rho$ solves $-r^2 \Delta \rho + \rho = s(\theta)$, which smooths over lengths
# of $r$, with $s$ the logistic function; a smooth step then pushes it towards 0 and 1. Mixtures conduct less than their share:
# $k = k_0 + (1 - k_0) \rho^p$ (SIMP). The exponent and the steepness of the step grow in stages. Each stage starts from the
# design of the last one, and at first makes it warmer: mixtures that it still contains count for less.
#
#     python demos/demo_heat_sink.py               # some ten seconds; the picture goes to runs/heat_sink
#     mpirun -n 2 python demos/demo_heat_sink.py   # on two ranks: another of many minima, within 1 %
#
# To torch this is a chain of functions of $\theta$: two solves and two integrals. torch.optim.LBFGS does not know of meshes.

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from rich.table import Table

import fem_vi

CELLS = 40  # squares along an edge, of four triangles each
COPPER = 0.4  # share of the plate that may be copper
POOR = 1e-3  # conductivity of the plate, that of copper is 1
SINK = 0.1  # length of the sink, in the middle of the left edge
RADIUS = 0.025  # of the filter
STAGES = [(1.0, 1.0), (2.0, 2.0), (3.0, 4.0), (3.0, 8.0), (3.0, 16.0)]  # exponent p, steepness of the step


# ## The equations, in weak form


def create_plate(comm: MPI.Comm) -> mesh.Mesh:
    """The unit square."""
    return mesh.create_unit_square(comm, CELLS, CELLS, diagonal=mesh.DiagonalType.crossed)


def step(density: Any, steepness: Any) -> Any:
    """From 0 to 1, the steeper the closer to a jump at 1/2; for UFL and for torch."""
    tanh = torch.tanh if isinstance(density, torch.Tensor) else ufl.tanh
    half = tanh(steepness / 2)
    return (half + tanh(steepness * (density - 0.5))) / (2 * half)


def filter_equation(plate: mesh.Mesh) -> fem_vi.WeakForm:
    """A raw density, one number a cell, to a smooth one."""
    V, cells = fem.functionspace(plate, ("Lagrange", 1)), fem.functionspace(plate, ("DG", 0))
    smooth, raw, v = fem.Function(V), fem.Function(cells, name="raw"), ufl.TestFunction(V)
    F = RADIUS**2 * ufl.inner(ufl.grad(smooth), ufl.grad(v)) * ufl.dx + (smooth - raw) * v * ufl.dx
    return fem_vi.WeakForm(F, state=smooth, inputs=[raw])


class Conduction:
    """Temperature, compliance, share of copper and heat flux, as functions of the smooth density and of the stage."""

    def __init__(self, plate: mesh.Mesh) -> None:
        self.space = V = fem.functionspace(plate, ("Lagrange", 1))
        T, density, v = fem.Function(V), fem.Function(V, name="density"), ufl.TestFunction(V)
        exponent, steepness = fem.Constant(plate, 1.0), fem.Constant(plate, 1.0)
        copper = step(density, steepness)
        k = POOR + (1 - POOR) * copper**exponent

        F = k * ufl.inner(ufl.grad(T), ufl.grad(v)) * ufl.dx(degree=4) - v * ufl.dx
        at_sink = lambda x: np.isclose(x[0], 0) & (abs(x[1] - 0.5) < SINK / 2 + 1e-9)  # noqa: E731
        sink = fem.dirichletbc(0.0, fem.locate_dofs_geometrical(V, at_sink), V)
        inputs = [density, exponent, steepness]

        pde = fem_vi.WeakForm(F, state=T, inputs=inputs, bcs=[sink])
        self.temperature = fem_vi.Solve(pde, petsc_options={"pc_type": "cholesky"})
        self.compliance = fem_vi.Functional(T * ufl.dx, [T])
        self.share = fem_vi.Functional(copper * ufl.dx(degree=4), [density, steepness])
        self.grid = np.stack(np.meshgrid(*2 * [np.linspace(0.03, 0.97, 18)]), axis=-1).reshape(-1, 2)
        self.flux = fem_vi.ExpressionObservation(-k * ufl.grad(T), self.grid, [T, *inputs])


# ## The best uniform plate, to compare with
#
# No isotropic mixture with this share of copper conducts better than the bound of Hashin and Shtrikman (1962) says.


def best_mixture() -> float:
    """The conductivity of the best isotropic mixture."""
    return 1 + (1 - COPPER) / (1 / (POOR - 1) + COPPER / 2)


def uniform_compliance(conduction: Conduction) -> float:
    """The mean temperature of a plate of that mixture: temperatures are inverse to a conductivity that is the same everywhere."""
    exponent, steepness = torch.tensor(STAGES[0], dtype=torch.float64)
    copper = torch.ones_like(fem_vi.to_tensor(fem.Function(conduction.space)))
    return float(conduction.compliance(conduction.temperature(copper, exponent, steepness))) / best_mixture()


# ## Minimise
#
# One number, added to all parameters, sets the share of copper. Newton's method finds it; its last step is taken with gradients,
# and so carries the derivative of the number for the parameters (the implicit function theorem).
#
# The parameters are replicated, one for each cell of the whole mesh, and `distribute` hands each rank its part: the dot
# products inside LBFGS are the global ones.


class Density:
    """The smooth density, with the right share of copper, as a function of one parameter for each cell."""

    def __init__(self, plate: mesh.Mesh, conduction: Conduction) -> None:
        self.cells = fem.functionspace(plate, ("DG", 0))
        self.smooth = fem_vi.Solve(filter_equation(plate), petsc_options={"pc_type": "cholesky"})
        self.share = conduction.share

    def __call__(self, theta: torch.Tensor, steepness: torch.Tensor) -> torch.Tensor:
        """The smooth density for parameters `(num_cells,)`, replicated."""
        shift = torch.zeros((), dtype=torch.float64)
        for _ in range(30):
            excess, slope = self.excess(theta.detach(), shift, steepness)
            shift = shift - (excess / slope).clamp(-1, 1)
            if abs(excess) < 1e-7:
                break
        excess, slope = self.excess(theta, shift, steepness)
        return self.shifted(theta, shift - excess / slope)

    def excess(self, theta: torch.Tensor, shift: torch.Tensor, steepness: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of copper above the allowed one, and its derivative for the shift."""
        shift = shift.clone().requires_grad_()
        excess = self.share(self.shifted(theta, shift), steepness) - COPPER
        (slope,) = torch.autograd.grad(excess, shift, retain_graph=True)
        return excess if theta.requires_grad else excess.detach(), slope

    def shifted(self, theta: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """The smooth density of shifted parameters."""
        return self.smooth(fem_vi.distribute(torch.sigmoid(theta + shift), self.cells))


def optimise(density: Density, conduction: Conduction) -> tuple[torch.Tensor, list[list[float]]]:
    """The smooth density, and the mean temperature at each evaluation of each stage."""
    num_cells = density.cells.dofmap.index_map.size_global
    theta = torch.zeros(num_cells, dtype=torch.float64, requires_grad=True)
    history: list[list[float]] = []

    def mean_temperature(exponent: torch.Tensor, steepness: torch.Tensor) -> torch.Tensor:
        temperature = conduction.temperature(density(theta, steepness), exponent, steepness)
        value = conduction.compliance(temperature)
        history[-1].append(float(value))
        return value

    for exponent, steepness in torch.tensor(STAGES, dtype=torch.float64):
        history.append([])
        descend(theta, partial(mean_temperature, exponent, steepness))
    return density(theta, steepness).detach(), history


def descend(theta: torch.Tensor, objective: Callable[[], torch.Tensor]) -> None:
    """Some iterations of LBFGS."""
    optimiser = torch.optim.LBFGS([theta], max_iter=25, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = objective()
        value.backward()
        return value

    optimiser.step(closure)


def main(arguments: argparse.Namespace) -> None:
    """Optimise, check, draw."""
    started = time.perf_counter()
    comm = MPI.COMM_WORLD
    plate = create_plate(comm)
    conduction = Conduction(plate)
    uniform = uniform_compliance(conduction)
    rho, history = optimise(Density(plate, conduction), conduction)

    exponent, steepness = torch.tensor(STAGES[-1], dtype=torch.float64)
    T = conduction.temperature(rho, exponent, steepness)
    compliance, share = float(conduction.compliance(T)), float(conduction.share(rho, steepness))
    seconds = time.perf_counter() - started

    table = Table("quantity", "value", title=f"Heat sink: {plate.topology.index_map(2).size_global} cells, {comm.size} rank(s)")
    table.add_row("mean temperature, best uniform mixture", f"{uniform:.3f}")
    table.add_row("mean temperature, this design", f"{compliance:.3f}")
    table.add_row("share of copper", f"{share:.6f}")
    table.add_row("evaluations of value and gradient", f"{sum(map(len, history))}")
    table.add_row("wall time", f"{seconds:.0f} s")
    fem_vi.report(comm, table, f"Picture: {arguments.out / 'heat_sink.png'}")
    figure = draw(conduction, step(rho, steepness), T, conduction.flux(T, rho, exponent, steepness), history, uniform)
    fem_vi.save_figure(figure, arguments.out / "heat_sink.png", comm)

    # ## Check
    #
    # All the copper is used and no more, and the plate is less than half as warm as one of the best uniform mixture. There are
    # many good designs, and rounding decides between them: on 1, 2 and 3 ranks the mean temperatures agree to half a per cent.
    assert abs(share - COPPER) < 1e-6, share
    assert compliance < 0.5 * uniform, (compliance, uniform)


# ## Picture


def draw(
    conduction: Conduction, copper: torch.Tensor, T: torch.Tensor, flux: torch.Tensor, history: list[list[float]], uniform: float
) -> plt.Figure:
    """Where the copper is; the temperature and the way of the heat; the mean temperature during the optimisation."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.1), layout="constrained", width_ratios=[1, 1.15, 1.1])
    fem_vi.plot_field(axes[0], conduction.space, copper, cmap="copper", vmin=0, vmax=1)
    axes[0].set_title("copper, and the sink (blue)")
    warm = fem_vi.plot_field(axes[1], conduction.space, T, cmap="inferno")
    figure.colorbar(warm, ax=axes[1], shrink=0.8)
    arrows = (flux / flux.norm(dim=-1, keepdim=True).sqrt()).detach().numpy()
    axes[1].quiver(*conduction.grid.T, *arrows.T, color="white", width=0.004)
    axes[1].set_title("temperature, and the flux of heat")
    for ax in axes[:2]:
        ax.plot([0, 0], [0.5 - SINK / 2, 0.5 + SINK / 2], color="deepskyblue", lw=6, clip_on=False, solid_capstyle="butt")
        ax.axis("off")

    start = 0
    for (exponent, steepness), part in zip(STAGES, history, strict=True):
        label = f"p = {exponent:.0f}, steepness {steepness:.0f}"
        axes[2].plot(range(start, start + len(part)), part, label=label)
        start += len(part)
    axes[2].axhline(uniform, color="black", ls="--", lw=0.8, label="best uniform mixture")
    axes[2].set(xlabel="evaluation", ylabel="mean temperature", ylim=(0, 1.1 * uniform), title="optimisation, in five stages")
    axes[2].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Where to put copper on a heated plate.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "heat_sink")
    main(parser.parse_args())
