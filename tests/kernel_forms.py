"""The table of forms, cells and degrees that every kernel of `Residual` must agree on, and how agreement is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import basix.ufl
import dolfinx
import numpy as np
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.helpers import CASES, Case, boundary_dofs, left, make_case

Build = Callable[[MPI.Comm], Case]


def cells(comm: MPI.Comm, cell: str) -> mesh.Mesh:
    """A small mesh of one cell type, moved so that no two cells are alike and no map of a quadrilateral is affine."""
    if cell == "interval":
        msh = mesh.create_unit_interval(comm, 5)
    elif cell in ("triangle", "quadrilateral"):
        msh = mesh.create_unit_square(comm, 3, 2, mesh.CellType[cell])
    else:
        msh = mesh.create_unit_cube(comm, 2, 2, 1, mesh.CellType[cell])
    x = msh.geometry.x
    inner = np.all((x[:, : msh.geometry.dim] > 1e-8) & (x[:, : msh.geometry.dim] < 1 - 1e-8), axis=1)
    moved = 0.06 * np.sin(5 * x + np.roll(3 * x, 1, axis=1))
    x[inner, : msh.geometry.dim] += moved[inner, : msh.geometry.dim]
    if msh.topology.dim == 3:  # a mesh of two layers has no inner nodes: tilt it
        x[:, 0] += 0.1 * x[:, 1] * x[:, 2]
    return msh


def curved(comm: MPI.Comm, n: int = 2) -> mesh.Mesh:
    """Triangles with curved sides: nodes of degree two on a lattice that is bent."""
    count = 2 * n + 1
    s, t = np.meshgrid(np.linspace(0, 1, count), np.linspace(0, 1, count), indexing="ij")
    points = np.stack([s + 0.08 * np.sin(3 * t), t + 0.06 * np.sin(4 * s)], axis=-1).reshape(-1, 2)
    number = lambda i, j: i * count + j  # noqa: E731
    triangles = []
    for i in range(0, count - 1, 2):
        for j in range(0, count - 1, 2):
            a, b, c, d = (i, j), (i + 2, j), (i, j + 2), (i + 2, j + 2)
            for corners in ((a, b, d), (a, c, d)):
                sides = [(corners[1], corners[2]), (corners[0], corners[2]), (corners[0], corners[1])]
                middles = [((p[0] + q[0]) // 2, (p[1] + q[1]) // 2) for p, q in sides]
                triangles.append([number(*p) for p in (*corners, *middles)])
    mine = comm.rank == 0
    element = basix.ufl.element("Lagrange", "triangle", 2, shape=(2,))
    cell_nodes = np.array(triangles if mine else np.empty((0, 6)), dtype=np.int64)
    return _create_mesh(comm, cell_nodes, element, points if mine else np.empty((0, 2)))


def _create_mesh(comm: MPI.Comm, cell_nodes: np.ndarray, element: Any, points: np.ndarray) -> mesh.Mesh:
    if tuple(map(int, dolfinx.__version__.split(".")[:2])) < (0, 10):
        return mesh.create_mesh(comm, cell_nodes, points, ufl.Mesh(element))
    return mesh.create_mesh(comm, cell_nodes, element, points)


def diffusion(comm: MPI.Comm, cell: str, degree: int) -> Case:
    """-div((1 + u^2) exp(m) grad u) = 1 with a coefficient of degree one and a side with given values."""
    msh = curved(comm) if cell == "curved" else cells(comm, cell)
    V, P = fem.functionspace(msh, ("Lagrange", degree)), fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(P, name="m"), ufl.TestFunction(V)
    dx = ufl.dx(metadata={"quadrature_degree": 3})
    F = (1 + u**2) * ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * dx - v * dx
    return make_case(F, u, [m], [fem.dirichletbc(0.5, boundary_dofs(V, left), V)], [0.4])


def discontinuous(comm: MPI.Comm, cell: str, degree: int) -> Case:
    """Interior penalty with a nonlinear flux: both sides of facets, normals, sizes of facets, a Constant that varies."""
    msh = cells(comm, cell)
    V, P = fem.functionspace(msh, ("DG", degree)), fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(P, name="m"), ufl.TestFunction(V)
    penalty = fem.Constant(msh, 0.0)
    n, k = ufl.FacetNormal(msh), ufl.exp(m) * (1 + u**2)
    metadata = {"quadrature_degree": 3}
    dx, ds, dS = ufl.dx(metadata=metadata), ufl.ds(metadata=metadata), ufl.dS(metadata=metadata)
    F = k * ufl.inner(ufl.grad(u), ufl.grad(v)) * dx - v * dx + penalty * (u - m) * v * ds
    F += penalty * ufl.avg(k) * ufl.inner(ufl.jump(u, n), ufl.jump(v, n)) * dS
    F -= ufl.inner(ufl.avg(k * ufl.grad(u)), ufl.jump(v, n)) * dS
    return make_case(F, u, [m, penalty], [], [0.4, 4.0])


def curl_curl(comm: MPI.Comm, cell: str, degree: int) -> Case:
    """Edge elements in a nonlinear medium: dofs that change sign and mix between neighbours; a tangential trace."""
    msh = cells(comm, cell)
    family = "N1curl" if cell in ("triangle", "tetrahedron") else ("RTCE" if cell == "quadrilateral" else "NCE")
    V, P = fem.functionspace(msh, (family, degree)), fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(P, name="m"), ufl.TestFunction(V)
    metadata = {"quadrature_degree": 3}
    dx, ds = ufl.dx(metadata=metadata), ufl.ds(metadata=metadata)
    F = ufl.exp(m) * ufl.inner(ufl.curl(u), ufl.curl(v)) * dx + (1 + ufl.inner(u, u)) * ufl.inner(u, v) * dx
    F += m * ufl.inner(u, v) * ds
    return make_case(F, u, [m], [fem.dirichletbc(fem.Function(V), boundary_dofs(V, left))], [0.3])


def face_elements(comm: MPI.Comm, cell: str, degree: int) -> Case:
    """Raviart-Thomas and discontinuous elements together, with an integral over inner facets."""
    msh = cells(comm, cell)
    name = msh.basix_cell()
    parts = [basix.ufl.element("RT", name, degree), basix.ufl.element("DG", name, degree - 1)]
    W = fem.functionspace(msh, basix.ufl.mixed_element(parts))
    w, (tau, v) = fem.Function(W), ufl.TestFunctions(W)
    sigma, u = ufl.split(w)
    m = fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m")
    metadata = {"quadrature_degree": 2}
    dx, dS = ufl.dx(metadata=metadata), ufl.dS(metadata=metadata)
    F = ufl.exp(-m) * (1 + u**2) * ufl.inner(sigma, tau) * dx + u * ufl.div(tau) * dx + ufl.div(sigma) * v * dx
    F += ufl.avg(m) * ufl.inner(ufl.avg(sigma), ufl.avg(tau)) * dS
    return make_case(F, w, [m], [], [0.5])


def solid(comm: MPI.Comm, cell: str, degree: int) -> Case:
    """A compressible neo-Hookean solid in three dimensions with a Lame field and a traction."""
    msh = cells(comm, cell)
    V = fem.functionspace(msh, ("Lagrange", degree, (3,)))
    u, v = fem.Function(V), ufl.TestFunction(V)
    m, traction = fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m"), fem.Constant(msh, np.zeros(3))
    dx = ufl.dx(metadata={"quadrature_degree": 2})
    D = ufl.Identity(3) + ufl.grad(u)
    log_j = ufl.ln(ufl.det(D))
    energy = ufl.exp(m) / 2 * (ufl.inner(D, D) - 3) - ufl.exp(m) * log_j + ufl.exp(m) * log_j**2
    F = ufl.derivative(energy * dx, u, v) - ufl.dot(traction, v) * ufl.ds
    bcs = [fem.dirichletbc(np.zeros(3), boundary_dofs(V, left), V)]
    return make_case(F, u, [m, traction], bcs, [0.3, [0.1, -0.1, 0.2]], u_scale=0.1)


def subdomains(comm: MPI.Comm) -> Case:
    """Tags of cells, boundary facets and inner facets, and integrals over everything besides."""
    msh = cells(comm, "triangle")
    V = fem.functionspace(msh, ("Lagrange", 2))
    u, m, v = fem.Function(V), fem.Function(fem.functionspace(msh, ("DG", 0)), name="m"), ufl.TestFunction(V)
    rate = fem.Constant(msh, np.zeros(2))

    def tags(dim: int) -> mesh.MeshTags:
        msh.topology.create_entities(dim)
        msh.topology.create_connectivity(dim, 2)
        index_map = msh.topology.index_map(dim)
        entities = np.arange(index_map.size_local + index_map.num_ghosts, dtype=np.int32)
        middle = mesh.compute_midpoints(msh, dim, entities)
        return mesh.meshtags(msh, dim, entities, (1 + (middle[:, 0] > 0.4) + (middle[:, 1] > 0.6)).astype(np.int32))

    dx = ufl.Measure("dx", domain=msh, subdomain_data=tags(2))
    ds = ufl.Measure("ds", domain=msh, subdomain_data=tags(1))
    dS = ufl.Measure("dS", domain=msh, subdomain_data=tags(1))
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * dx(1) + u**3 * v * dx((2, 3)) - rate[0] * v * dx
    F += u**2 * v * ds(1) + rate[1] ** 2 * u * v * ds((2, 3)) + m * v * ds
    F += ufl.avg(u) ** 2 * ufl.avg(v) * dS(2) + ufl.jump(ufl.grad(u), ufl.FacetNormal(msh)) * ufl.avg(v) * ufl.avg(m) * dS
    return make_case(F, u, [m, rate], [], [0.3, [1.5, 0.7]])


def functions(comm: MPI.Comm) -> Case:
    """Every function that UFL has and FFCx takes, of fields, and choices between them."""
    msh = cells(comm, "triangle")
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V, name="m"), ufl.TestFunction(V)
    c = fem.Constant(msh, 0.0)
    positive = 1.5 + u**2
    smooth = ufl.sqrt(positive) + ufl.sin(u) + ufl.cos(m) + ufl.tan(0.3 * u) + ufl.tanh(u) + ufl.sinh(m) + ufl.cosh(u)
    smooth += ufl.asin(0.3 * u) + ufl.acos(0.3 * m) + ufl.atan(u) + ufl.atan2(m, positive) + ufl.erf(u) + ufl.ln(positive)
    smooth += positive**m + positive**1.7 + positive**-2 + positive**3 + positive**-0.5 + 2.0**u + ufl.exp(c * u) / (2 + c)
    pieces = ufl.conditional(ufl.And(ufl.lt(u, m), ufl.Not(ufl.ge(m, 0.2))), u**2, 3 * m * c)
    pieces += ufl.conditional(ufl.Or(ufl.gt(u, 0.1), ufl.le(c, 0.0)), u * m, m**2) + ufl.conditional(ufl.lt(c, 0.0), u, m) * u
    pieces += ufl.max_value(u, m) * u + ufl.min_value(u, 0.1 * c) * m + abs(u - m) * u
    x = ufl.SpatialCoordinate(msh)
    pieces += ufl.conditional(ufl.lt(x[0], 0.5), ufl.sin(x[1]) * u, ufl.exp(x[0]) * m)
    F = (smooth + pieces) * v * ufl.dx(metadata={"quadrature_degree": 3})
    return make_case(F, u, [m, c], [], [0.6, 0.8])


def sizes(comm: MPI.Comm) -> Case:
    """Lengths, areas and volumes of cells and facets, which FFCx writes as numbers of several types."""
    msh = cells(comm, "triangle")
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V, name="m"), ufl.TestFunction(V)
    h, edges = ufl.CellDiameter(msh) * ufl.Circumradius(msh), ufl.MinCellEdgeLength(msh) / ufl.MaxCellEdgeLength(msh)
    F = h * ufl.CellVolume(msh) * u**2 * v * ufl.dx + edges * m * u * v * ufl.dx
    F += ufl.CellVolume(msh) / ufl.FacetArea(msh) * u**2 * m * v * ufl.ds
    return make_case(F, u, [m], [], [0.5])


def tensors(comm: MPI.Comm) -> Case:
    """Coefficients of many kinds: symmetric tensors, vectors, values at quadrature points, a fixed field and a fixed Constant."""
    msh = cells(comm, "quadrilateral")
    V = fem.functionspace(msh, ("Lagrange", 1, (2,)))
    u, v = fem.Function(V), ufl.TestFunction(V)
    stress = fem.Function(fem.functionspace(msh, ("DG", 1, (2, 2), True)), name="stress")
    points = fem.functionspace(msh, basix.ufl.quadrature_element(msh.basix_cell(), degree=3))
    q, fixed, factor = fem.Function(points, name="q"), fem.Function(V), fem.Constant(msh, 1.3)
    fixed.interpolate(lambda x: np.stack([np.sin(x[0]), x[1]]))
    matrix = fem.Constant(msh, np.zeros((2, 2)))
    dx = ufl.dx(metadata={"quadrature_degree": 3, "quadrature_rule": "default"})
    F = ufl.inner(stress, ufl.grad(v)) * dx + factor * (1 + q**2) * ufl.inner(ufl.dot(matrix, u), v) * dx
    F += ufl.inner(u, fixed) * ufl.inner(fixed, v) * dx
    case = make_case(F, u, [stress, matrix], [fem.dirichletbc(fixed, boundary_dofs(V, left))], [0.5, [[1.0, 0.2], [-0.3, 0.8]]])
    return case


# fmt: off
FORMS: dict[str, Build] = {
    **{f"diffusion_{cell}_P{degree}": partial(diffusion, cell=cell, degree=degree) for cell, degree in (
        ("interval", 1), ("interval", 3), ("triangle", 1), ("triangle", 2), ("triangle", 3), ("triangle", 4),
        ("quadrilateral", 1), ("quadrilateral", 2), ("tetrahedron", 1), ("tetrahedron", 3), ("hexahedron", 1), ("hexahedron", 2),
        ("curved", 2),
    )},
    **{f"discontinuous_{cell}_DG{degree}": partial(discontinuous, cell=cell, degree=degree) for cell, degree in (
        ("interval", 1), ("triangle", 2), ("quadrilateral", 1), ("tetrahedron", 1), ("hexahedron", 1),
    )},
    **{f"curl_curl_{cell}_{degree}": partial(curl_curl, cell=cell, degree=degree) for cell, degree in (
        ("triangle", 1), ("tetrahedron", 1), ("tetrahedron", 2), ("hexahedron", 1),
    )},
    **{f"face_elements_{cell}_{degree}": partial(face_elements, cell=cell, degree=degree) for cell, degree in (
        ("triangle", 2), ("tetrahedron", 1), ("quadrilateral", 1),
    )},
    "solid_tetrahedron_P1": partial(solid, cell="tetrahedron", degree=1),
    "subdomains": subdomains,
    "functions": functions,
    "sizes": sizes,
    "tensors": tensors,
    **{name: build for name, build in CASES.items() if name != "moving_mesh"},
}
# fmt: on
"""Rows of the table. A kernel may refuse one, with an `UnsupportedForm` that names a kernel that takes it."""


@dataclass(frozen=True)
class Numbers:
    """What a residual gives at some samples.

    Attributes:
        value: r.
        gradients: w . dr/dx for the state and each input.
        tangent: dr/dx . dx.
        second: d/dx of w . dr/dx . dx, for the state and each input; empty where it was not asked for.
    """

    value: Tensor
    gradients: list[Tensor]
    tangent: Tensor
    second: list[Tensor]

    def all(self) -> list[Tensor]:
        """All of them."""
        return [self.value, *self.gradients, self.tangent, *self.second]


def samples(case: Case, batch: int, *, alone: tuple[int, ...] = ()) -> list[Tensor]:
    """Values of the state and each input, different in each sample; those at the positions `alone` without a batch axis."""
    state = 0.3 * case.weights[-1]
    varied = []
    for position, x in enumerate([state, *case.values]):
        scale = torch.linspace(0.7, 1.1, batch, dtype=torch.float64) if batch > 1 else torch.ones(1, dtype=torch.float64)
        varied.append(x if position in alone else scale.reshape(-1, *[1] * x.ndim) * x)
    return varied


def numbers(residual: fem_vi.Residual, case: Case, at: list[Tensor], *, second: bool) -> Numbers:
    """What a residual gives at some samples."""
    leaves = [x.clone().requires_grad_() for x in at]
    along = [torch.zeros_like(x) + w for x, w in zip(at, [case.weights[-1], *case.weights[:-1]], strict=True)]
    value = residual(*leaves)
    scale = torch.linspace(1.0, 0.5, value.shape[0] if value.ndim > 1 else 1, dtype=torch.float64)
    w = scale.reshape(-1, *[1] * (value.ndim - 1)) * case.weights[-1] if value.ndim > 1 else case.weights[-1]
    gradients = torch.autograd.grad(value, leaves, w, create_graph=second)
    _, tangent = torch.func.jvp(residual, tuple(at), tuple(along))
    curved_ = []
    if second:
        slope = sum((g * d).sum() for g, d in zip(gradients, along, strict=True))
        curved_ = [torch.zeros_like(x) for x in leaves]
        if slope.requires_grad:  # torch knows of a linear residual that its slope is the same everywhere
            curved_ = list(torch.autograd.grad(slope, leaves, materialize_grads=True))
    return Numbers(value.detach(), [g.detach() for g in gradients], tangent, curved_)


def apart(a: Numbers, b: Numbers, comm: MPI.Comm) -> float:
    """The largest difference between two, relative to the largest number of its kind on any rank."""
    worst = 0.0
    for x, y in zip(a.all(), b.all(), strict=True):
        mine = float((x - y).abs().nan_to_num(nan=float("inf")).max()) if x.numel() else 0.0  # NaN would pass any comparison
        difference = comm.allreduce(mine, op=MPI.MAX)
        size = comm.allreduce(float(y.abs().max()) if y.numel() else 0.0, op=MPI.MAX)
        worst = max(worst, difference / size if size > 0 else difference)
    return worst
