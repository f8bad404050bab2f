"""Forms on which TorchKernel is held against AssembledKernel besides those of every kernel."""

from __future__ import annotations

import basix.ufl
import numpy as np
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

from tests.helpers import CASES, Case, boundary_dofs, everywhere, make_case, square
from tests.kernel_forms import FORMS, Build, curved


def curved_facets(comm: MPI.Comm) -> Case:
    """Curved sides of triangles, whose normals and lengths differ from point to point; jumps over them."""
    msh = curved(comm)
    V = fem.functionspace(msh, ("DG", 2))
    u, v = fem.Function(V), ufl.TestFunction(V)
    m = fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m")
    n, degree = ufl.FacetNormal(msh), {"degree": 3}
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx(**degree) + m * ufl.dot(n, ufl.grad(u)) * v * ufl.ds(**degree)
    if comm.size == 1:  # the mesh has no ghosts
        F += (ufl.avg(m) * ufl.inner(ufl.jump(u, n), ufl.jump(v, n)) + u("+") ** 2 * v("-")) * ufl.dS(**degree)
    return make_case(F, u, [m], [], [0.4])


def algebra(comm: MPI.Comm) -> Case:
    """Tensor algebra, second derivatives, sizes of cells and facets."""
    msh = square(comm, 3)
    V = fem.functionspace(msh, ("Lagrange", 2))
    u, v = fem.Function(V), ufl.TestFunction(V)
    m, c = fem.Function(fem.functionspace(msh, ("Lagrange", 1, (2, 2))), name="m"), fem.Constant(msh, 0.0)
    A, s = 2 * ufl.Identity(2) + 0.2 * m, 0.3 * ufl.sin(u) + c
    F = (
        ufl.det(A) * ufl.inner(ufl.inv(A) * ufl.grad(u), ufl.grad(v)) + ufl.tr(ufl.dev(A)) * v + ufl.perp(ufl.grad(u))[0] * v
    ) * ufl.dx
    F += (ufl.sqrt(1 + s**2) + abs(u) ** 1.5 + ufl.sign(u) * s) * v * ufl.dx + ufl.div(ufl.grad(u)) * ufl.div(
        ufl.grad(v)
    ) * ufl.dx
    F += (
        ufl.CellDiameter(msh) * ufl.Circumradius(msh) * ufl.CellVolume(msh) * u * v * ufl.dx + ufl.FacetArea(msh) * u * v * ufl.ds
    )
    return make_case(F, u, [m, c], [fem.dirichletbc(0.3, boundary_dofs(V, everywhere), V)], [0.5, 0.2], u_scale=0.7)


def choices(comm: MPI.Comm) -> Case:
    """Conditionals whose other branch has no finite value or slope where it is not taken, nested, in the test function, too."""
    msh = square(comm, 3)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V, name="m"), ufl.TestFunction(V)
    x = ufl.SpatialCoordinate(msh)
    root = ufl.conditional(ufl.gt(u, 0.05), ufl.sqrt(u - 0.05) + (u - 0.05) ** 0.7, u * m)
    wave = ufl.conditional(
        ufl.le(m, 0.0), ufl.exp(-1 / m**2) * u, ufl.conditional(ufl.lt(m, 0.2), m**2, m * ufl.ln(m - 0.1) + u / m)
    )
    place = ufl.conditional(ufl.lt(x[0], 0.5), u * ufl.ln(0.5 - x[0]), u * ufl.sqrt(x[0] - 0.5) * ufl.acos(m / 2))
    F = (root + wave + place) * v * ufl.dx(degree=3)
    F += ufl.conditional(ufl.gt(u, 0.0), u ** (m + 1) * v, ufl.inner(ufl.grad(u), ufl.grad(v))) * ufl.dx(degree=3)
    return make_case(F, u, [m], [], [0.6])


def schemes(comm: MPI.Comm) -> Case:
    """Quadrature at vertices, a fixed field at quadrature points, Gauss-Lobatto points, a symmetric tensor field."""
    msh = square(comm, 3, mesh.CellType.quadrilateral)
    msh.geometry.x[:, 0] += 0.1 * np.sin(2.0 * msh.geometry.x[:, 1])
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, v = fem.Function(V), ufl.TestFunction(V)
    source = fem.Function(fem.functionspace(msh, basix.ufl.quadrature_element(msh.basix_cell(), degree=2)), name="source")
    source.x.array[:] = 1.5
    k = fem.Function(fem.functionspace(msh, basix.ufl.element("P", msh.basix_cell(), 1, shape=(2, 2), symmetry=True)), name="k")
    F = u**3 * v * ufl.dx(scheme="vertex", degree=1) + source * v * ufl.dx(degree=2)
    F += ufl.inner((k + 2 * ufl.Identity(2)) * ufl.grad(u), ufl.grad(v)) * ufl.dx(scheme="GLL", degree=3)
    return make_case(F, u, [k], [], [0.3])


TORCH_CASES: dict[str, Build] = {
    "curved_facets": curved_facets,
    "algebra": algebra,
    "choices": choices,
    "schemes": schemes,
    "moving_mesh": CASES["moving_mesh"],
}
ALL_FORMS: dict[str, Build] = {**FORMS, **TORCH_CASES}
