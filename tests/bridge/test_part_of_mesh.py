"""Forms on a part of the mesh: conditions where no integral reaches, and unknowns that nothing determines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from tests.helpers import square

COMM = MPI.COMM_WORLD
SHAPES = {"scalar": (), "vector": (2,)}


def left_half(shape: tuple[int, ...], prescribed: Callable[[np.ndarray], np.ndarray]) -> tuple[fem_vi.WeakForm, Any]:
    """-div(exp(m) grad u) = 1 for x < 1/2 only, each component by itself."""
    msh = square(COMM, 4, mesh.CellType.quadrilateral)  # on which linear elements are exact at the nodes
    V = fem.functionspace(msh, ("Lagrange", 1, shape)) if shape else fem.functionspace(msh, ("Lagrange", 1))
    u, v, m = fem.Function(V), ufl.TestFunction(V), fem.Constant(msh, 0.0)
    cells = np.sort(mesh.locate_entities(msh, 2, lambda x: x[0] < 0.5 + 1e-9))
    tags = mesh.meshtags(msh, 2, cells, np.ones(len(cells), dtype=np.int32))
    dx = ufl.Measure("dx", msh, subdomain_data=tags)
    one = ufl.as_vector([1.0] * shape[0]) if shape else 1.0
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * dx(1) - ufl.inner(ufl.as_ufl(one), v) * dx(1)
    zero, seven = fem.Function(V), fem.Function(V)
    seven.x.array[:] = 7.0
    bcs = [
        fem.dirichletbc(zero, fem.locate_dofs_geometrical(V, lambda x: x[0] < 1e-9)),
        fem.dirichletbc(seven, fem.locate_dofs_geometrical(V, prescribed)),
    ]
    return fem_vi.WeakForm(F, state=u, inputs=[m], bcs=bcs), V


@pytest.mark.mpi
@pytest.mark.parametrize("samples", [1, 6])  # more than four are assembled at once, on one rank
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_conditions_where_no_integral_reaches(shape: tuple[int, ...], samples: int) -> None:
    pde, V = left_half(shape, lambda x: x[0] > 0.5 + 1e-9)
    m = torch.linspace(-0.3, 0.4, samples, dtype=torch.float64).requires_grad_()
    u = fem_vi.Solve(pde)(m)
    owned = V.dofmap.index_map.size_local
    x = torch.from_numpy(V.tabulate_dof_coordinates()[:owned, 0].copy()).repeat_interleave(V.dofmap.bs)
    inside = x < 0.5 + 1e-9
    exact = torch.where(inside, 0.5 * x * (1.0 - x) * (-m.detach())[:, None].exp(), 7.0)  # u' = 0 at x = 1/2
    torch.testing.assert_close(u.detach(), exact, rtol=1e-12, atol=1e-12)
    fem_vi.all_sum(u[:, inside].sum(), COMM).backward()
    torch.testing.assert_close(m.grad, -fem_vi.all_sum(exact[:, inside].sum(1), COMM), rtol=1e-11, atol=1e-12)


@pytest.mark.mpi
def test_what_nothing_determines_is_refused() -> None:
    pde, _ = left_half((), lambda x: (x[0] > 0.5 + 1e-9) & (x[1] < 0.5))
    for options in ({}, {"ksp_type": "preonly", "pc_type": "lu"}):
        with pytest.raises(fem_vi.UnsupportedForm, match="reaches 4 of 20 nodes of the state, and no Dirichlet condition"):
            fem_vi.Solve(pde, petsc_options=options)
