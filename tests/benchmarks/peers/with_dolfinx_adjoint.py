"""dolfinx-adjoint: the tape is recorded once, at m = 0, and replayed.

Its losses are integrals. The sum over nodes is one too: by the rule whose points are the vertices, with each node's weight
divided out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dolfinx_adjoint
import numpy as np
import pyadjoint
import ufl
from dolfinx import fem

from tests.benchmarks.compare import variations
from tests.benchmarks.hand_written import Diffusion
from tests.benchmarks.peers.case import Case

SOLVERS: dict[str, dict[str, Any]] = {
    name: {"ksp_type": "preonly", "pc_type": name, "pc_factor_mat_solver_type": "mumps"} for name in ("lu", "cholesky")
}


def sum_over_nodes(integrand: Any, V: Any) -> Any:
    """The form that is the sum of the integrand's values at the nodes of a P1 space."""
    dx = ufl.dx(metadata={"quadrature_rule": "vertex", "quadrature_degree": 1})
    weights = fem.assemble_vector(fem.form(ufl.TestFunction(V) * dx)).array
    inverse = fem.Function(V)
    inverse.x.array[:] = 1 / weights
    return inverse * integrand * dx


def create(case: Case, variant: str) -> Callable[[], tuple[float, np.ndarray]]:
    """Value and gradient of (u - d)^2 / 2, summed or integrated.

    Args:
        case: The problem.
        variant: "sum-lu", "sum-cholesky" and "integral-lu" fix the quadrature of state and gradient to the same degree;
            "unpinned-lu" is "integral-lu" with the degrees that UFL estimates, as in dolfinx-adjoint's own demonstrations.
    """
    loss, _, solver = variant.partition("-")
    problem = Diffusion.create(case.n)
    V = problem.V
    assert np.array_equal(V.tabulate_dof_coordinates()[:, :2], case.nodes)
    dx = ufl.dx if loss == "unpinned" else ufl.dx(metadata={"quadrature_degree": 3})
    options = SOLVERS[solver]
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
    misfit = 0.5 * (u - d) ** 2
    value = dolfinx_adjoint.assemble_scalar(sum_over_nodes(misfit, V) if loss == "sum" else misfit * ufl.dx)
    reduced = pyadjoint.ReducedFunctional(value, pyadjoint.Control(m))
    inputs = variations(case.m)
    given = dolfinx_adjoint.Function(V)

    def work() -> tuple[float, np.ndarray]:
        given.x.array[:] = next(inputs)
        value = reduced(given)
        return float(value), reduced.derivative().x.array

    work.pde = pde  # type: ignore[attr-defined]  # the tape holds it weakly, and would compile it again
    return work
