"""One training step of a PDDLVM: `CompiledKernel` against `AssembledKernel`, networks included.

    OMP_NUM_THREADS=1 container/run python3 -m tests.benchmarks.bench_pddlvm

-div(exp(m) grad u) = 1 on 64 x 64 squares of two triangles, P1, m with 16 modes, 64 samples a step: draws of z and of u,
residuals, their gradients, the networks' backward pass, Adam. The floor is the same step with `AssembledKernel()`.
The bar is 8, for a network over a reduced basis. One over all nodes cannot reach it: the products of its last layer and of the
inverse network's first cost about 10 ms, and the residuals with their gradients 7, of a floor of 120. Nor can
`Preconditioned`, for the solves with its reference Jacobian. Fields of modes, and coordinates of a `DiagonalHead`, lie with their
samples side by side, as lanes want them. CPU time, medians of rounds in turn.
"""

from __future__ import annotations

import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor, nn

import fem_vi
from fem_vi.models import PDDLVM, Plain, Preconditioned, VirtualELBO
from fem_vi.pde.kernels import Kernel
from tests.benchmarks.compare import compare
from tests.helpers import boundary_dofs, everywhere

N, SAMPLES, MODES, WIDTH = 64, 64, 16, 64
OBJECTIVE = VirtualELBO(samples=SAMPLES, gradient=fem_vi.TotalDerivative())


class Problem:
    """The weak form and the field, built once."""

    def __init__(self) -> None:
        V = fem.functionspace(mesh.create_unit_square(MPI.COMM_SELF, N, N), ("Lagrange", 1))
        u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
        F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
        self.pde = fem_vi.WeakForm(F, state=u, inputs=[m], bcs=[fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)])
        matern = fem_vi.MaternField(V, std=0.5, length=0.3, variance=fem_vi.PlainVariance())
        self.prior = fem_vi.KarhunenLoeveField(V, matern, truncation=fem_vi.Modes(MODES))
        x = torch.from_numpy(V.tabulate_dof_coordinates()[:, :2].T.copy())
        self.basis = torch.stack([torch.sin(torch.pi * j * x[0]) * torch.sin(torch.pi * k * x[1]) for j, k in _pairs(6)])

    def model(self, kernel: Kernel, state: fem_vi.Nodal | fem_vi.ReducedBasis, *, preconditioned: bool) -> PDDLVM:
        """A model of this problem."""
        torch.manual_seed(0)
        size = state.create(self.pde).size
        forward = nn.Sequential(nn.Linear(MODES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()).double()
        inverse = nn.Sequential(nn.Linear(size, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()).double()
        return PDDLVM(
            self.pde,
            prior=self.prior,
            inputs=self.prior.field,
            forward=nn.Sequential(forward, fem_vi.DiagonalHead(WIDTH, size, std=0.01)),
            inverse=nn.Sequential(inverse, fem_vi.DiagonalHead(WIDTH, MODES)),
            state=state,
            kernel=kernel,
            measure=Preconditioned(self.prior.field_mean) if preconditioned else Plain(),
        )


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(j, k) for j in range(1, count + 1) for k in range(1, count + 1)]


class Step:
    """One step of Adam."""

    def __init__(self, model: PDDLVM) -> None:
        self.model = model
        self.optimizer = fem_vi.Adam(1e-6)(model.parameters())  # both kernels stay where they are

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = OBJECTIVE(self.model.problem, self.model).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    problem = Problem()
    states = {"36 modes of u": fem_vi.ReducedBasis(problem.basis), "all nodes": fem_vi.Nodal()}
    for name, state in states.items():
        for preconditioned in (False, True):
            kernels = (fem_vi.AssembledKernel(), fem_vi.CompiledKernel(num_threads=1))
            floor, candidate = (Step(problem.model(kernel, state, preconditioned=preconditioned)) for kernel in kernels)
            losses = []
            for step in (floor, candidate):
                torch.manual_seed(1)
                losses.append(float(step()))
            assert abs(losses[0] - losses[1]) < 1e-9 * abs(losses[0]), losses
            row = compare(f"{name}{', preconditioned' if preconditioned else ''}", floor, candidate, rounds=9)
            print(f"{row}   faster {1 / row.ratio:5.1f}", flush=True)


if __name__ == "__main__":
    main()
