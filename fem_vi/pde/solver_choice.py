"""The linear solver of a weak form where the user does not name one: chosen once for each operator, from its Jacobian.

| Jacobian | unknowns | solver |
|---|---|---|
| symmetric | up to a limit | L D L^T by MUMPS |
| not symmetric | up to a limit | LU by MUMPS |
| symmetric, Lagrange space with a component for each dimension | more | CG with GAMG, told the rigid body modes |
| symmetric, any other Lagrange space | more | CG with BoomerAMG (GAMG where PETSc has no hypre) |
| not symmetric, Lagrange space | more | GMRES with BoomerAMG |
| with diagonal entries that are not positive; any other space; or where CG or GMRES fails on a trial | any | as up to the limit |

The limit is `DIRECT_LIMIT`, times `LATER` for a Jacobian that is not symmetric, and for one that no input and no state enters.
MUMPS pivots, so that indefinite matrices (Stokes, Helmholtz) are no exception. Whether a Jacobian is positive definite cannot be
read from a form; large ones are tried instead, by solving one system with the Jacobian at random inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from petsc4py import PETSc

from fem_vi.pde.generic_jacobian import SEED, GenericJacobian
from fem_vi.pde.inputs import Array
from fem_vi.pde.petsc_options import Option, Options, complete_options
from fem_vi.pde.rigid_modes import rigid_modes
from fem_vi.pde.weak_form import WeakForm

DIRECT_LIMIT: Mapping[int, float] = {1: math.inf, 2: 4e5, 3: 3e4}
"""Unknowns, over all ranks, up to which a factorisation is taken to be the better choice, by dimension of the cells.

On one core, for a factorisation and two solves: in the plane MUMPS takes half the time of multigrid at 4e5 unknowns, and 0.35 GB;
in space it takes between one (elasticity) and three times (Poisson) that of multigrid at 4e4.
"""
LATER = 3
"""How many times further that goes where GMRES would be the alternative to it, or where it serves every call."""
TRIAL_ITERATIONS = 100
_METHODS = ("ksp_type", "pc_type", "pc_factor_mat_solver_type")


@dataclass(frozen=True)
class SolverChoice:
    """PETSc options, and what the preconditioner must know of the problem.

    Attributes:
        options: Complete options, without prefix.
        near_nullspace: Orthonormal vectors that algebraic multigrid is told of, owned, `(num_vectors, n_owned)`; None for none.
        is_symmetric: Whether the Jacobian is known to be symmetric, whatever the inputs and the state.
    """

    options: Mapping[str, Option]
    near_nullspace: Array | None = None
    is_symmetric: bool = False

    def prepare(self, matrix: PETSc.Mat) -> None:
        """Attach the near-nullspace to a matrix of the operator. Collective."""
        if self.near_nullspace is None:
            return
        vectors = []
        for values in self.near_nullspace:
            vector = matrix.createVecRight()
            vector.array_w[:] = values
            vectors.append(vector)
        matrix.setNearNullSpace(PETSc.NullSpace().create(vectors=vectors, comm=matrix.comm))


def choose_solver(pde: WeakForm, given: Mapping[str, Option]) -> SolverChoice:
    """The user's options, over a solver that fits the Jacobian.

    Args:
        pde: The weak form. Its private Functions and Constants keep their values.
        given: The user's options. They always win; where they name a method (`ksp_type`, `pc_type` or
            `pc_factor_mat_solver_type`) nothing is chosen.

    Returns:
        The same on all ranks, up to what each rank owns.

    MPI: Collective.
    """
    if any(name in given for name in _METHODS):
        choice = _with_modes(pde, complete_options(given))
        return replace(choice, is_symmetric=given.get("pc_type") == "cholesky" and _is_symmetric(pde))
    jacobian = GenericJacobian(pde)
    try:
        return replace(_choose(pde, given, jacobian), is_symmetric=jacobian.is_symmetric)
    finally:
        jacobian.destroy()


def _is_symmetric(pde: WeakForm) -> bool:
    jacobian = GenericJacobian(pde)
    jacobian.destroy()
    return jacobian.is_symmetric


def _choose(pde: WeakForm, given: Mapping[str, Option], jacobian: GenericJacobian) -> SolverChoice:
    positive = jacobian.is_finite and jacobian.matrix.getDiagonal().min()[1] > 0.0
    if positive and jacobian.matrix.getSize()[0] > _limit(pde, jacobian.is_symmetric) and _is_lagrange(pde):
        choice = _multigrid(pde, given, jacobian.is_symmetric)
        if choice is not None and _solves(choice, jacobian):
            return choice
    pivots = _has("mumps")
    if jacobian.is_symmetric and (pivots or positive):  # PETSc's own Cholesky does not pivot
        return SolverChoice(complete_options({"pc_type": "cholesky", **given}))
    return SolverChoice(complete_options(given))


def _limit(pde: WeakForm, symmetric: bool) -> float:
    limit = DIRECT_LIMIT[pde.space.mesh.topology.dim]
    serves_all = pde.is_linear and not pde.occurs_in(pde.jacobian)
    return LATER * limit if serves_all or not symmetric else limit


def _multigrid(pde: WeakForm, given: Mapping[str, Option], symmetric: bool) -> SolverChoice | None:
    if symmetric:
        preconditioner = "gamg" if _is_displacement(pde) or not _has("hypre") else "hypre"
        return _with_modes(pde, complete_options({"ksp_type": "cg", "pc_type": preconditioner, **given}))
    return SolverChoice(complete_options({"ksp_type": "gmres", "pc_type": "hypre", **given})) if _has("hypre") else None


def _has(package: str) -> bool:
    return bool(PETSc.Sys.hasExternalPackage(package))


def _with_modes(pde: WeakForm, options: Mapping[str, Option]) -> SolverChoice:
    tell = options["pc_type"] == "gamg" and _is_lagrange(pde) and _is_displacement(pde)
    return SolverChoice(options, rigid_modes(pde.space) if tell else None)


def _is_lagrange(pde: WeakForm) -> bool:
    """Whether the space is continuous Lagrange, scalar or blocked: one on which algebraic multigrid can be expected to work."""
    element = pde.space.ufl_element()
    family = getattr(element, "element_family", None)
    return getattr(family, "name", "") == "P" and not element.discontinuous


def _is_displacement(pde: WeakForm) -> bool:
    """Whether the state has a component for each dimension, two or more."""
    dim = pde.space.mesh.geometry.dim
    return dim > 1 and bool(pde.space.dofmap.index_map_bs == dim)


def _solves(choice: SolverChoice, jacobian: GenericJacobian) -> bool:
    """Whether the solver copes with J, and with J^T where that is another matrix, in few iterations. Collective."""
    choice.prepare(jacobian.matrix)
    if choice.options["ksp_type"] == "cg" and not _is_positive_on_constants(jacobian.matrix):
        return False
    if not _solves_one(choice, jacobian.matrix):
        return False
    if jacobian.is_symmetric:
        return True
    transpose = jacobian.matrix.transpose(PETSc.Mat())
    solved = _solves_one(choice, transpose)
    transpose.destroy()
    return solved


def _is_positive_on_constants(matrix: PETSc.Mat) -> bool:
    """Whether 1'J1 > 0, which shows the indefinite matrices of waves for what they are. Collective.

    On a small mesh a multigrid cycle is nearly a factorisation, negative directions included, and CG gets through with it; on
    others it does not. Which, depends on the partition too, that differs from run to run.
    """
    one, product = matrix.createVecs()
    one.set(1.0)
    matrix.mult(one, product)
    return bool(one.dot(product) > 0.0)


def _solves_one(choice: SolverChoice, matrix: PETSc.Mat) -> bool:
    options = Options({"ksp_max_it": TRIAL_ITERATIONS, **choice.options})
    ksp = PETSc.KSP().create(matrix.comm)
    ksp.setOptionsPrefix(options.prefix)
    ksp.setOperators(matrix)
    x, b = matrix.createVecs()
    b.array_w[:] = np.random.default_rng((SEED, matrix.comm.rank)).standard_normal(b.getLocalSize())
    try:
        ksp.setFromOptions()
        ksp.solve(b, x)
        return bool(ksp.getConvergedReason() > 0)
    except PETSc.Error:
        return False
    finally:
        ksp.destroy()
