"""Forms that TorchKernel is held against AssembledKernel on: cells, degrees, elements, facets, curved meshes, UFL nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import basix.ufl
import numpy as np
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

from fem_vi.pde._compat_mesh import cell_partitioner
from tests.helpers import CASES, Case, boundary_dofs, everywhere, left, make_case, square

Build = Callable[[MPI.Comm], Case]


def line(comm: MPI.Comm) -> mesh.Mesh:
    return mesh.create_interval(comm, 5, [0.0, 1.3])


def quads(comm: MPI.Comm) -> mesh.Mesh:
    """Quadrilaterals whose maps are not affine."""
    msh = square(comm, 3, mesh.CellType.quadrilateral)
    return bent(msh)


def tets(comm: MPI.Comm) -> mesh.Mesh:
    return mesh.create_unit_cube(comm, 2, 2, 1)


def hexes(comm: MPI.Comm) -> mesh.Mesh:
    return bent(mesh.create_unit_cube(comm, 2, 1, 2, mesh.CellType.hexahedron))


def bent(msh: mesh.Mesh) -> mesh.Mesh:
    """The mesh with its nodes moved smoothly."""
    x = msh.geometry.x
    x[:, 0] += 0.1 * np.sin(2.0 * x[:, 1]) + 0.05 * x[:, 0] * x[:, 2]
    x[:, 1] += 0.1 * np.cos(1.5 * x[:, 0]) if msh.geometry.dim > 1 else 0.0
    return msh


def curved(comm: MPI.Comm) -> mesh.Mesh:
    """Triangles of geometric degree two, bent."""
    msh = square(comm, 3)
    tree = basix.ufl.element("Lagrange", "triangle", 2, shape=(2,))
    nodes = fem.functionspace(msh, ("Lagrange", 2))
    cells = np.arange(msh.topology.index_map(2).size_local)
    original = nodes.dofmap.index_map.local_to_global(nodes.dofmap.list[cells].ravel().astype(np.int32)).reshape(len(cells), -1)
    owned = nodes.dofmap.index_map.size_local
    x = nodes.tabulate_dof_coordinates()[:owned, :2].copy()
    x[:, 1] += 0.1 * np.sin(3.0 * x[:, 0])
    order = np.argsort(basix.ufl.element("Lagrange", "triangle", 2).entity_closure_dofs[2][0])
    partitioner = cell_partitioner(mesh.GhostMode.shared_facet)
    return mesh.create_mesh(comm, cells=original[:, order].astype(np.int64), x=x, e=tree, partitioner=partitioner)


MESHES = {
    "interval": line,
    "triangle": square,
    "quadrilateral": quads,
    "tetrahedron": tets,
    "hexahedron": hexes,
    "curved": curved,
}


def diffusion(shape: str, degree: int) -> Build:
    """Nonlinear diffusion with a flux on the boundary, Lagrange elements."""

    def build(comm: MPI.Comm) -> Case:
        msh = MESHES[shape](comm)
        V = fem.functionspace(msh, ("Lagrange", degree))
        u, v = fem.Function(V), ufl.TestFunction(V)
        m, h = fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m"), fem.Function(V, name="h")
        x = ufl.SpatialCoordinate(msh)
        quadrature = {"metadata": {"quadrature_degree": 4}}
        F = (1 + u**2) * ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx(**quadrature)
        F += (ufl.dot(ufl.FacetNormal(msh), ufl.grad(u)) + x[0] * m) * v * ufl.ds(**quadrature) - x[0] ** 2 * v * ufl.dx(
            **quadrature
        )
        return make_case(F, u, [m, h], [fem.dirichletbc(h, boundary_dofs(V, left))], [0.4, 1.0])

    return build


def interior_penalty(shape: str, degree: int) -> Build:
    """Jumps and averages on interior facets, whose points both sides must see in one order."""

    def build(comm: MPI.Comm) -> Case:
        msh = MESHES[shape](comm)
        V = fem.functionspace(msh, ("DG", degree))
        u, v = fem.Function(V), ufl.TestFunction(V)
        m = fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m")
        n = ufl.FacetNormal(msh)
        F = (
            ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx
            + ufl.avg(m) * ufl.inner(ufl.jump(u, n), ufl.jump(v, n)) * ufl.dS
        )
        F += ufl.inner(ufl.avg(ufl.exp(m) * ufl.grad(u)), ufl.jump(v, n)) * ufl.dS + u("+") ** 2 * v("-") * ufl.dS
        return make_case(F, u, [m], [], [0.4])

    return build


def maxwell(shape: str, degree: int) -> Build:
    """Nedelec elements: covariant maps, and basis functions that turn with the cells."""

    def build(comm: MPI.Comm) -> Case:
        msh = MESHES[shape](comm)
        family = "N1curl" if shape in ("triangle", "tetrahedron") else ("RTCE" if msh.geometry.dim == 2 else "NCE")
        V = fem.functionspace(msh, (family, degree))
        u, v = fem.Function(V), ufl.TestFunction(V)
        m = fem.Function(fem.functionspace(msh, ("DG", 1)), name="m")
        F = ufl.exp(m) * ufl.inner(ufl.curl(u), ufl.curl(v)) * ufl.dx + ufl.inner(u, u) * ufl.inner(u, v) * ufl.dx
        F += ufl.inner(ufl.jump(u), ufl.jump(v)) * ufl.dS
        return make_case(F, u, [m], [], [0.3])

    return build


def darcy(shape: str, degree: int) -> Build:
    """Raviart-Thomas and DG: contravariant maps in a mixed space, whose transformations are those of its parts."""

    def build(comm: MPI.Comm) -> Case:
        msh = MESHES[shape](comm)
        cell = msh.basix_cell()
        parts = [basix.ufl.element("RT", cell, degree), basix.ufl.element("DG", cell, degree - 1)]
        W = fem.functionspace(msh, basix.ufl.mixed_element(parts))
        w, (tau, v) = fem.Function(W), ufl.TestFunctions(W)
        sigma, u = ufl.split(w)
        m = fem.Function(fem.functionspace(msh, ("Lagrange", 2)), name="m")
        F = ufl.exp(-m) * ufl.inner(sigma, tau) * ufl.dx(degree=4) + (u * ufl.div(tau) + ufl.div(sigma) * v + u**2 * v) * ufl.dx
        F -= m * ufl.dot(tau, ufl.FacetNormal(msh)) * ufl.ds
        return make_case(F, w, [m], [], [0.5])

    return build


def subdomains(comm: MPI.Comm) -> Case:
    """Tags of cells, exterior and interior facets, some together; integrals over all besides; fixed coefficients."""
    msh = square(comm, 4)
    V = fem.functionspace(msh, ("Lagrange", 2, (2,)))
    u, v = fem.Function(V), ufl.TestFunction(V)
    m, fixed = fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m"), fem.Function(fem.functionspace(msh, ("DG", 0)))
    fixed.interpolate(lambda x: 1.0 + x[0] * x[1])
    rate, given = fem.Constant(msh, np.zeros((2, 2))), fem.Constant(msh, 2.5)
    dx, ds, dS = (ufl.Measure(name, domain=msh, subdomain_data=tags(msh, dim)) for name, dim in (("dx", 2), ("ds", 1), ("dS", 1)))
    F = ufl.inner(rate * u, v) * dx(1) + fixed * ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * dx((2, 3))
    F += given * ufl.inner(u, v) * dx + u[0] * m * v[1] * ds(2) + ufl.inner(u, v) * ds((1, 3)) + ufl.inner(u, u) * v[0] * ds
    F += ufl.inner(ufl.jump(u), ufl.jump(v)) * dS(2) + fixed("+") * u[0]("+") * v[1]("-") * dS
    return make_case(F, u, [m, rate], [], [0.4, [[1.0, 0.3], [-0.2, 0.7]]])


def tags(msh: mesh.Mesh, dim: int) -> Any:
    """Tags 1, 2, 3 by where an entity lies."""
    msh.topology.create_connectivity(dim, msh.topology.dim)
    num = msh.topology.index_map(dim).size_local + msh.topology.index_map(dim).num_ghosts
    entities = np.arange(num, dtype=np.int32)
    middle = mesh.compute_midpoints(msh, dim, entities)
    return mesh.meshtags(msh, dim, entities, (1 + np.floor(2.9 * middle[:, 0])).astype(np.int32))


def every_function(comm: MPI.Comm) -> Case:
    """Functions of UFL that torch has, conditionals, tensor algebra, second derivatives, sizes of cells and facets."""
    msh = square(comm, 3)
    V = fem.functionspace(msh, ("Lagrange", 2))
    u, v = fem.Function(V), ufl.TestFunction(V)
    m, c = fem.Function(fem.functionspace(msh, ("Lagrange", 1, (2, 2))), name="m"), fem.Constant(msh, 0.0)
    A = ufl.Identity(2) * 2 + 0.2 * m
    s = 0.3 * ufl.sin(u) + c
    F = (
        ufl.det(A) * ufl.inner(ufl.inv(A) * ufl.grad(u), ufl.grad(v)) + ufl.tr(ufl.dev(A)) * v + ufl.perp(ufl.grad(u))[0] * v
    ) * ufl.dx
    F += (
        (ufl.tan(s) + ufl.atan(s) + ufl.asin(s) + ufl.acos(s) + ufl.erf(s) + ufl.tanh(s) * ufl.cosh(s) - ufl.sinh(s)) * v * ufl.dx
    )
    F += (ufl.atan2(s, 2 + u) + abs(u) ** 1.5 + ufl.sqrt(1 + u**2) + ufl.ln(2 + s) + (1.5 + s) ** s + 1 / (2 + u)) * v * ufl.dx
    F += ufl.conditional(ufl.And(ufl.gt(u, 0.1), ufl.Not(ufl.ge(s, 2.0))), u**3, -s) * v * ufl.dx
    F += (ufl.max_value(u, 0.2) + ufl.min_value(s, u)) * v * ufl.dx + ufl.div(ufl.grad(u)) * ufl.div(ufl.grad(v)) * ufl.dx
    F += (
        ufl.CellDiameter(msh) * ufl.Circumradius(msh) * ufl.CellVolume(msh) * u * v * ufl.dx + ufl.FacetArea(msh) * u * v * ufl.ds
    )
    return make_case(F, u, [m, c], [fem.dirichletbc(0.3, boundary_dofs(V, everywhere), V)], [0.5, 0.2], u_scale=0.7)


def schemes(comm: MPI.Comm) -> Case:
    """Quadrature at vertices, a quadrature element, Gauss-Lobatto points, a symmetric tensor field."""
    msh = quads(comm)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, v = fem.Function(V), ufl.TestFunction(V)
    source = fem.Function(fem.functionspace(msh, basix.ufl.quadrature_element(msh.basix_cell(), degree=2)), name="source")
    source.x.array[:] = 1.5
    k = fem.Function(fem.functionspace(msh, basix.ufl.element("P", msh.basix_cell(), 1, shape=(2, 2), symmetry=True)), name="k")
    F = u**3 * v * ufl.dx(scheme="vertex", degree=1) + source * v * ufl.dx(degree=2)
    F += ufl.inner((k + 2 * ufl.Identity(2)) * ufl.grad(u), ufl.grad(v)) * ufl.dx(scheme="GLL", degree=3)
    return make_case(F, u, [k], [], [0.3])


TORCH_CASES: dict[str, Build] = {
    **{f"diffusion-{shape}-P{degree}": diffusion(shape, degree) for shape in MESHES for degree in (1, 3)},
    "diffusion-triangle-P4": diffusion("triangle", 4),
    "diffusion-tetrahedron-P2": diffusion("tetrahedron", 2),
    **{f"interior_penalty-{shape}": interior_penalty(shape, 1) for shape in MESHES},
    **{
        f"maxwell-{shape}-{k}": maxwell(shape, k)
        for shape in ("triangle", "tetrahedron", "quadrilateral", "hexahedron")
        for k in (1, 2)
    },
    **{
        f"darcy-{shape}-{k}": darcy(shape, k)
        for shape, k in (("triangle", 1), ("triangle", 2), ("tetrahedron", 1), ("tetrahedron", 2))
    },
    "subdomains": subdomains,
    "every_function": every_function,
    "schemes": schemes,
}
LONG = {
    "diffusion-hexahedron-P3",
    "diffusion-tetrahedron-P3",
    "maxwell-hexahedron-2",
    "maxwell-tetrahedron-2",
    "darcy-tetrahedron-2",
}
"""Those that the form compiler takes seconds for."""
ALL_CASES: dict[str, Build] = {**CASES, **TORCH_CASES}
