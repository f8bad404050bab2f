"""The table of weak forms that every recipe runs over, and what recipes need to look at fields on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, TypeVar

import basix.ufl
import numpy as np
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from fem_vi.pde.coordinates import Coordinates

Row = TypeVar("Row")


def once(build: Callable[[MPI.Comm], Row]) -> Callable[[MPI.Comm], Row]:
    """Build a row of a table once in a process for each communicator, as most of the time of a small test goes into that.

    No test may change what it is given: operators never write to the Functions of their caller, which is itself a test.
    """
    built: dict[bool, Row] = {}

    @wraps(build)
    def kept(comm: MPI.Comm) -> Row:
        if comm not in (MPI.COMM_SELF, MPI.COMM_WORLD):
            return build(comm)
        alone = comm == MPI.COMM_SELF
        if alone not in built:
            built[alone] = build(comm)
        return built[alone]

    return kept


@dataclass(frozen=True)
class Case:
    """A weak form with inputs to try it at.

    Attributes:
        pde: The weak form.
        given: The caller's Functions and Constants, in the order of the inputs.
        values: One tensor for each input.
        weights: For each input and then for the state, a tensor to pair gradients or values with; what is a field is the
            interpolation of one function on any partition.
        state: The caller's state Function.
    """

    pde: fem_vi.WeakForm
    given: list[Any]
    values: list[Tensor]
    weights: list[Tensor]
    state: fem.Function
    extra: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def solve(self) -> fem_vi.Solve:
        """The solver, as it is by default: one for all tests of the row."""
        return fem_vi.Solve(self.pde)

    @cached_property
    def residual(self) -> fem_vi.Residual:
        """The residual, as it is by default: one for all tests of the row."""
        return fem_vi.Residual(self.pde)


def owned(function: fem.Function) -> Tensor:
    """A copy of a Function's owned coefficients."""
    dofmap = function.function_space.dofmap
    return torch.from_numpy(function.x.array[: dofmap.index_map.size_local * dofmap.index_map_bs].copy())


def interpolated(V: Any, scale: float, shift: float) -> Tensor:
    """A smooth field that depends on the position only, in any space (each part of a mixed one)."""
    function = fem.Function(V)
    if V.num_sub_spaces > 0 and V.ufl_element().is_mixed:
        for part in range(V.num_sub_spaces):
            _interpolate(function.sub(part), V.sub(part).collapse()[0], scale, shift + part)
    else:
        _interpolate(function, V, scale, shift)
    function.x.scatter_forward()
    return owned(function)


def _interpolate(target: fem.Function, V: Any, scale: float, shift: float) -> None:
    size = int(np.prod(V.value_shape, dtype=int))

    def smooth(x: np.ndarray) -> np.ndarray:
        rows = [scale * np.sin(3.1 * x[0] + (1 + k) * 2.3 * x[1] - 1.7 * x[2] + shift + k) for k in range(size)]
        return np.stack(rows) if size > 1 else rows[0]

    target.interpolate(smooth)


def make_case(
    F: ufl.Form, u: fem.Function, given: list[Any], bcs: list[Any], values: list[Any], *, u_scale: float = 1.0, **extra: Any
) -> Case:
    """Fill the table's row: `values[k]` is a scale for a Function and a number or array for a Constant.

    `u_scale` keeps the state's weight, where residuals and Jacobians are looked at, among the states that the equation admits.
    """
    tensors, weights = [], []
    for k, (what, value) in enumerate(zip(given, values, strict=True)):
        if isinstance(what, Coordinates):
            tensors.append(owned(what) + interpolated(what.function_space, value, 0.3 + k))
            weights.append(interpolated(what.function_space, 1.0, 1.9 * k))
        elif isinstance(what, fem.Function):
            tensors.append(interpolated(what.function_space, value, 0.3 + k))
            weights.append(interpolated(what.function_space, 1.0, 1.9 * k))
        else:
            tensors.append(torch.as_tensor(np.array(value, dtype=np.float64)))
            weights.append(torch.linspace(0.5, 1.5, max(1, tensors[-1].numel()), dtype=torch.float64).reshape(tensors[-1].shape))
    weights.append(interpolated(u.function_space, u_scale, 0.7))
    return Case(fem_vi.WeakForm(F, state=u, inputs=given, bcs=bcs), given, tensors, weights, u, extra)


def square(comm: MPI.Comm, n: int = 4, cell: mesh.CellType = mesh.CellType.triangle) -> mesh.Mesh:
    """The unit square, n by n - 1 cells (pairs of triangles)."""
    return mesh.create_unit_square(comm, n, n - 1, cell)


def boundary_dofs(V: Any, where: Callable[[np.ndarray], np.ndarray], other: Any = None) -> Any:
    """Dofs of V (or of the pair V, other) on the boundary facets whose points satisfy `where`."""
    msh = V.mesh
    facets = mesh.locate_entities_boundary(msh, msh.topology.dim - 1, where)
    return fem.locate_dofs_topological(V if other is None else (V, other), msh.topology.dim - 1, facets)


def left(x: np.ndarray) -> np.ndarray:
    """The side x = 0."""
    return np.isclose(x[0], 0.0)


def everywhere(x: np.ndarray) -> np.ndarray:
    """The whole boundary."""
    return np.full(x.shape[1], True)


def taylor_hood(msh: mesh.Mesh) -> Any:
    """The space of velocities of degree two and pressures of degree one."""
    cell = msh.basix_cell()
    parts = [basix.ufl.element("Lagrange", cell, 2, shape=(msh.geometry.dim,)), basix.ufl.element("Lagrange", cell, 1)]
    return fem.functionspace(msh, basix.ufl.mixed_element(parts))


def log_diffusion(comm: MPI.Comm) -> Case:
    """-div(exp(m) grad u) = 1, u = 0 on the boundary: the linear case with a fixed source."""
    msh = square(comm)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V, name="m"), ufl.TestFunction(V)
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx
    return make_case(F, u, [m], [fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)], [0.5])


def source_and_data(comm: MPI.Comm) -> Case:
    """P2 on quadrilaterals, DG0 source, Neumann and Dirichlet data: an operator that no input enters."""
    msh = square(comm, cell=mesh.CellType.quadrilateral)
    V, Q = fem.functionspace(msh, ("Lagrange", 2)), fem.functionspace(msh, ("DG", 0))
    u, h, v = fem.Function(V), fem.Function(V, name="h"), ufl.TestFunction(V)
    f, flux = fem.Function(Q, name="f"), fem.Function(V, name="flux")
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - f * v * ufl.dx - flux * v * ufl.ds
    return make_case(F, u, [f, flux, h], [fem.dirichletbc(h, boundary_dofs(V, left))], [1.0, 1.0, 1.0])


def reaction(comm: MPI.Comm) -> Case:
    """A nonlinear reaction and diffusion with scalar and tensor Constants and an inhomogeneous Constant on the boundary."""
    msh = square(comm)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(V, name="m"), ufl.TestFunction(V)
    rate, tensor, level = fem.Constant(msh, 0.0), fem.Constant(msh, np.zeros((2, 2))), fem.Constant(msh, 0.0)
    F = (1 + u**2) * ufl.exp(m) * ufl.inner(ufl.dot(tensor, ufl.grad(u)), ufl.grad(v)) * ufl.dx
    F += rate * u**3 * v * ufl.dx - ufl.cos(rate) * v * ufl.dx
    values = [0.4, 1.5, [[1.2, 0.3], [-0.2, 0.9]], 0.7]
    bcs = [fem.dirichletbc(level, boundary_dofs(V, left), V)]
    return make_case(F, u, [m, rate, tensor, level], bcs, values)


def elasticity(comm: MPI.Comm) -> Case:
    """Linear elasticity in three dimensions: Lame Constants, a traction vector, a Dirichlet Function on one component."""
    msh = mesh.create_unit_cube(comm, 2, 2, 1)
    V = fem.functionspace(msh, ("Lagrange", 1, (3,)))
    u, v = fem.Function(V), ufl.TestFunction(V)
    mu, lam, traction = fem.Constant(msh, 0.0), fem.Constant(msh, 0.0), fem.Constant(msh, np.zeros(3))
    V1, _ = V.sub(1).collapse()
    h = fem.Function(V1, name="h")
    eps = lambda w: ufl.sym(ufl.grad(w))  # noqa: E731
    sigma = 2 * mu * eps(u) + lam * ufl.tr(eps(u)) * ufl.Identity(3)
    F = ufl.inner(sigma, eps(v)) * ufl.dx - ufl.dot(traction, v) * ufl.ds
    bcs = [
        fem.dirichletbc(np.zeros(3), boundary_dofs(V, left), V),
        fem.dirichletbc(h, boundary_dofs(V.sub(1), lambda x: np.isclose(x[0], 1.0), V1), V.sub(1)),
    ]
    return make_case(F, u, [mu, lam, traction, h], bcs, [0.8, 1.1, [0.1, -0.2, 0.3], 0.2])


def stokes(comm: MPI.Comm) -> Case:
    """Taylor-Hood elements: a mixed state, a viscosity field, a body force, Dirichlet data on the velocity subspace."""
    msh = square(comm, 3)
    W = taylor_hood(msh)
    w, (v, q) = fem.Function(W), ufl.TestFunctions(W)
    u, p = ufl.split(w)
    m = fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m")
    force = fem.Constant(msh, np.zeros(2))
    V, _ = W.sub(0).collapse()
    h = fem.Function(V, name="h")
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - p * ufl.div(v) * ufl.dx - q * ufl.div(u) * ufl.dx
    F -= ufl.dot(force, v) * ufl.dx
    bcs = [fem.dirichletbc(h, boundary_dofs(W.sub(0), lambda x: x[0] < 0.99, V), W.sub(0))]
    return make_case(F, w, [m, force, h], bcs, [0.5, [1.0, -0.5], 1.0])


def discontinuous(comm: MPI.Comm) -> Case:
    """Interior penalty: interior facets, a coefficient restricted to both sides, no strong conditions."""
    msh = square(comm)
    V, P = fem.functionspace(msh, ("DG", 1)), fem.functionspace(msh, ("Lagrange", 1))
    u, m, v = fem.Function(V), fem.Function(P, name="m"), ufl.TestFunction(V)
    penalty = fem.Constant(msh, 0.0)
    n, k = ufl.FacetNormal(msh), ufl.exp(m)
    F = k * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx + penalty * u * v * ufl.ds
    F += penalty * ufl.inner(ufl.jump(u, n), ufl.jump(v, n)) * ufl.dS
    F -= ufl.inner(ufl.avg(k * ufl.grad(u)), ufl.jump(v, n)) * ufl.dS
    F -= ufl.inner(ufl.jump(u, n), ufl.avg(k * ufl.grad(v))) * ufl.dS
    return make_case(F, u, [m, penalty], [], [0.4, 40.0])


def mixed_poisson(comm: MPI.Comm) -> Case:
    """Raviart-Thomas and DG0: an indefinite system with a permeability field and pressure data on the boundary."""
    msh = square(comm)
    cell = msh.basix_cell()
    W = fem.functionspace(msh, basix.ufl.mixed_element([basix.ufl.element("RT", cell, 1), basix.ufl.element("DG", cell, 0)]))
    w, (tau, v) = fem.Function(W), ufl.TestFunctions(W)
    sigma, u = ufl.split(w)
    m = fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m")
    data = fem.Function(fem.functionspace(msh, ("Lagrange", 2)), name="data")
    F = ufl.exp(-m) * ufl.inner(sigma, tau) * ufl.dx + u * ufl.div(tau) * ufl.dx + ufl.div(sigma) * v * ufl.dx
    F += v * ufl.dx - data * ufl.dot(tau, ufl.FacetNormal(msh)) * ufl.ds
    return make_case(F, w, [m, data], [], [0.5, 1.0])


def navier_stokes(comm: MPI.Comm) -> Case:
    """Steady flow in Taylor-Hood elements: viscosity, inflow and a force as inputs, no slip at the walls, free outflow."""
    msh = square(comm)
    W = taylor_hood(msh)
    w, (v, q) = fem.Function(W), ufl.TestFunctions(W)
    u, p = ufl.split(w)
    nu, force = fem.Constant(msh, 0.0), fem.Function(fem.functionspace(msh, ("DG", 0, (2,))), name="force")
    V, _ = W.sub(0).collapse()
    inflow, rest = fem.Function(V, name="inflow"), fem.Function(V)
    F = nu * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + ufl.inner(ufl.dot(ufl.grad(u), u) - force, v) * ufl.dx
    F -= (p * ufl.div(v) + q * ufl.div(u)) * ufl.dx
    walls = boundary_dofs(W.sub(0), lambda x: np.isclose(x[1] * (1 - x[1]), 0.0), V)
    bcs = [
        fem.dirichletbc(inflow, boundary_dofs(W.sub(0), left, V), W.sub(0)),
        fem.dirichletbc(rest, walls, W.sub(0)),
    ]
    return make_case(F, w, [nu, inflow, force], bcs, [0.4, 1.0, 1.0])


def neo_hookean(u: Any, mu: Any, lam: Any) -> Any:
    """The energy density of a compressible neo-Hookean solid in plane strain, mu / 2 (tr C - 2) - mu ln J + lam / 2 (ln J)^2.

    C = D^T D, J = det D with the deformation gradient D = I + grad u. Bonet and Wood (2008), Nonlinear continuum mechanics for
    finite element analysis, section 6.4.3.
    """
    deformation = ufl.Identity(2) + ufl.grad(u)
    log_j = ufl.ln(ufl.det(deformation))
    return mu / 2 * (ufl.inner(deformation, deformation) - 2) - mu * log_j + lam / 2 * log_j**2


def hyperelasticity(comm: MPI.Comm) -> Case:
    """A neo-Hookean solid from its energy: a Lame field, a body force, a side that is pulled away."""
    msh = square(comm, 3)
    V = fem.functionspace(msh, ("Lagrange", 2, (2,)))
    u, v = fem.Function(V), ufl.TestFunction(V)
    m = fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m")
    force, pull = fem.Function(V, name="force"), fem.Constant(msh, np.zeros(2))
    dx = ufl.dx(metadata={"quadrature_degree": 4})
    F = ufl.derivative(neo_hookean(u, ufl.exp(m), 2 * ufl.exp(m)) * dx, u, v) - ufl.inner(force, v) * dx
    right = boundary_dofs(V, lambda x: np.isclose(x[0], 1.0))
    bcs = [fem.dirichletbc(np.zeros(2), boundary_dofs(V, left), V), fem.dirichletbc(pull, right, V)]
    return make_case(F, u, [m, force, pull], bcs, [0.4, 0.5, [0.1, -0.05]], u_scale=0.1)


def helmholtz(comm: MPI.Comm) -> Case:
    """Waves in a square with hard walls, driven from one side: symmetric and indefinite, wave number and index of refraction.

    k^2 = 27 lies between the eigenvalues 22.2 and 32.1 of -div grad with u = 0 on that side.
    """
    msh = square(comm, cell=mesh.CellType.quadrilateral)
    V = fem.functionspace(msh, ("Lagrange", 2))
    u, v = fem.Function(V), ufl.TestFunction(V)
    k, m = fem.Constant(msh, 0.0), fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m")
    h = fem.Function(V, name="h")
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - (k * ufl.exp(m)) ** 2 * u * v * ufl.dx
    return make_case(F, u, [k, m, h], [fem.dirichletbc(h, boundary_dofs(V, left))], [27**0.5, 0.02, 1.0])


def moving_mesh(comm: MPI.Comm) -> Case:
    """Mesh coordinates as an input: convection and diffusion, a Robin side, a normal, a Constant, data h(x)."""
    msh = square(comm, 3)
    x, n = fem_vi.coordinates(msh), ufl.FacetNormal(msh)
    V = fem.functionspace(msh, ("Lagrange", 2))
    u, m, v = fem.Function(V), fem.Function(fem.functionspace(msh, ("Lagrange", 1)), name="m"), ufl.TestFunction(V)
    h, rate = fem.Function(V, name="h"), fem.Constant(msh, 0.0)
    F = ufl.exp(rate * m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + rate**2 * u.dx(0) * v * ufl.dx - x[0] ** 2 * v * ufl.dx
    F += (u - ufl.inner(n, ufl.SpatialCoordinate(msh))) * v * ufl.ds
    return make_case(F, u, [x, m, h, rate], [fem.dirichletbc(h, boundary_dofs(V, left))], [0.02, 0.5, 1.0, 0.8])


CASES: dict[str, Callable[[MPI.Comm], Case]] = {
    build.__name__: once(build)
    for build in (
        log_diffusion,
        source_and_data,
        reaction,
        elasticity,
        stokes,
        discontinuous,
        mixed_poisson,
        navier_stokes,
        hyperelasticity,
        helmholtz,
        moving_mesh,
    )
}


def paired(comm: MPI.Comm, tensors: list[Tensor], weights: list[Tensor], are_fields: list[bool]) -> list[float]:
    """The pairing of each tensor with its weight: summed over ranks for fields, as it is for what is replicated.

    Which is which is told and not guessed from the shape: a rank may own three entries of a field, or none.
    """
    out = []
    for x, w, is_field in zip(tensors, weights, are_fields, strict=True):
        local = float((x.detach() * w).sum())
        out.append(comm.allreduce(local, op=MPI.SUM) if is_field else local)
    return out
