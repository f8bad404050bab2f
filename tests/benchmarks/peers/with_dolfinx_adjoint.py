"""dolfinx-adjoint: the tape is recorded once, at m = 0, and replayed; the loss is an integral, as it takes no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dolfinx_adjoint
import numpy as np
import pyadjoint
import ufl
from dolfinx import fem

from tests.benchmarks.hand_written import Diffusion
from tests.benchmarks.peers.case import Case

SOLVERS: dict[str, dict[str, Any]] = {
    name: {"ksp_type": "preonly", "pc_type": name, "pc_factor_mat_solver_type": "mumps"} for name in ("lu", "cholesky")
}


def create(case: Case, variant: str) -> Callable[[], tuple[float, np.ndarray]]:
    """Value and gradient of the integral of (u - d)^2 / 2.

    Args:
        case: The problem.
        variant: "lu" or "cholesky", with the quadrature of state and gradient fixed to the same degree; "unpinned" is "lu"
            with the degrees that UFL estimates, as in dolfinx-adjoint's own demonstrations.
    """
    problem = Diffusion.create(case.n)
    V = problem.V
    assert np.array_equal(V.tabulate_dof_coordinates()[:, :2], case.nodes)
    dx = ufl.dx if variant == "unpinned" else ufl.dx(metadata={"quadrature_degree": 3})
    options = SOLVERS["lu" if variant == "unpinned" else variant]
    m, u, d = dolfinx_adjoint.Function(V), dolfinx_adjoint.Function(V), fem.Function(V)
    d.x.array[:] = case.data
    w, v = ufl.TrialFunction(V), ufl.TestFunction(V)
    pde = dolfinx_adjoint.LinearProblem(
        ufl.exp(m) * ufl.inner(ufl.grad(w), ufl.grad(v)) * dx,
        v * ufl.dx,
        u=u,
        bcs=problem.bcs,
        petsc_options=options,
        adjoint_petsc_options=options,
    )
    pde.solve()
    loss = dolfinx_adjoint.assemble_scalar(0.5 * (u - d) ** 2 * ufl.dx)
    reduced = pyadjoint.ReducedFunctional(loss, pyadjoint.Control(m))
    given = dolfinx_adjoint.Function(V)

    def work() -> tuple[float, np.ndarray]:
        given.x.array[:] = case.m
        value = reduced(given)
        return float(value), reduced.derivative().x.array

    work.pde = pde  # type: ignore[attr-defined]  # the tape holds it weakly, and would compile it again
    return work
