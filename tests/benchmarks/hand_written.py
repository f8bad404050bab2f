"""The floor: value and gradient of a misfit, written by hand in DOLFINx and petsc4py, as an expert would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ufl
from dolfinx import fem, mesh
from dolfinx.fem import petsc as fem_petsc
from mpi4py import MPI
from petsc4py import PETSc


@dataclass(frozen=True)
class Diffusion:
    """-div(exp(m) grad u) = 1 on the unit square, u = 0 on its boundary, P1."""

    V: Any
    u: Any
    m: Any
    F: Any
    bcs: list[Any]

    @staticmethod
    def create(n: int, comm: MPI.Comm = MPI.COMM_WORLD) -> Diffusion:
        msh = mesh.create_unit_square(comm, n, n)
        V = fem.functionspace(msh, ("Lagrange", 1))
        u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
        msh.topology.create_connectivity(1, 2)
        dofs = fem.locate_dofs_topological(V, 1, mesh.exterior_facet_indices(msh.topology))
        bcs = [fem.dirichletbc(PETSc.ScalarType(0), dofs, V)]
        return Diffusion(V, u, m, ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx, bcs)


class HandWritten:
    """J(m) = |u(m) - d|^2 / 2 and its gradient; one factorisation for state and adjoint, nothing built twice."""

    def __init__(self, problem: Diffusion, data: np.ndarray, options: dict[str, Any]) -> None:
        V, self.u, self.m = problem.V, problem.u, problem.m
        self.data, self.bcs = data, problem.bcs
        self.lam = fem.Function(V)
        w, v = ufl.TrialFunction(V), ufl.TestFunction(V)
        dx = ufl.dx(metadata={"quadrature_degree": 3})  # the same for both, or the gradient is not that of the discrete J
        self.a = fem.form(ufl.exp(self.m) * ufl.inner(ufl.grad(w), ufl.grad(v)) * dx)
        self.gradient = fem.form(-ufl.exp(self.m) * v * ufl.inner(ufl.grad(self.u), ufl.grad(self.lam)) * dx)
        self.A = fem_petsc.create_matrix(self.a)
        self.b = fem.assemble_vector(fem.form(v * ufl.dx))
        self.fixed = problem.bcs[0].dof_indices()[0]
        self.b.array[self.fixed] = 0.0
        self.g = fem.Function(V)
        self.out = fem.Function(V)
        prefix = f"floor_{id(self)}_"
        for name, value in options.items():
            PETSc.Options().setValue(prefix + name, value)
        self.ksp = PETSc.KSP().create(V.mesh.comm)
        self.ksp.setOptionsPrefix(prefix)
        self.ksp.setOperators(self.A)
        self.ksp.setFromOptions()
        self.transposed = options["pc_type"] == "lu"
        self.rhs = fem.Function(V)
        self.rhs.x.array[:] = self.b.array

    def __call__(self, m: np.ndarray) -> tuple[float, np.ndarray]:
        self.m.x.array[:] = m
        self.A.zeroEntries()
        fem_petsc.assemble_matrix(self.A, self.a, bcs=self.bcs)
        self.A.assemble()
        self.ksp.setOperators(self.A)
        self.ksp.solve(self.rhs.x.petsc_vec, self.u.x.petsc_vec)
        misfit = self.u.x.array - self.data
        self.g.x.array[:] = misfit
        self.g.x.array[self.fixed] = 0.0
        (self.ksp.solveTranspose if self.transposed else self.ksp.solve)(self.g.x.petsc_vec, self.lam.x.petsc_vec)
        self.out.x.array[:] = 0.0
        fem.assemble_vector(self.out.x.array, self.gradient)
        return 0.5 * float(misfit @ misfit), self.out.x.array
