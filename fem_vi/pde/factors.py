"""Jacobians that are assembled and factorised (or preconditioned) once and kept while they may be needed again.

The pool owns every PETSc object. Others hold keys only: Python's garbage collector must never destroy a PETSc object,
a collective act, at a time of its own choosing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
import ufl
from petsc4py import PETSc

from fem_vi.errors import InvalidInput, SolveFailed
from fem_vi.parallel import any_rank, any_rank_each, max_over_ranks
from fem_vi.pde import _compat
from fem_vi.pde.boundary import Boundary
from fem_vi.pde.dense_block import DenseBlock
from fem_vi.pde.inputs import Array
from fem_vi.pde.matrix import Assemble, Matrix, MatrixForm, assemble_loaded
from fem_vi.pde.petsc_options import Options

RESIDUAL_BOUND = 1e-6
"""Largest relative residual of a linear solve that is believed."""
WAY_OUT = 'petsc_options={"pc_type": "lu"} takes a factorisation that fits any regular Jacobian'
"""What an error says of other methods."""
BLOCK = 128
"""Right-hand sides that are solved at once."""
MUMPS_INSTANCE = 2.5e5
"""Bytes that MUMPS takes for the smallest matrix; it tells of whole megabytes only."""


def reason_name(kind: type, reason: int) -> str:
    """PETSc's name of a converged reason."""
    names = [name for name in dir(kind) if not name.startswith("_") and getattr(kind, name) == reason]
    return max(names, key=len, default=str(reason))


def petsc_words(error: PETSc.Error) -> str:
    """The code and the cause of an error of PETSc, without its call stack, in one line."""
    lines = [line.split("] ", 1)[-1].strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]}, {lines[-1]}" if len(lines) > 1 else str(error)


def lacks_workspace(ksp: PETSc.KSP) -> bool:
    """Whether MUMPS gave up because more came into the factor than its analysis had foreseen, or into a message.

    That happens to matrices that are not definite: pivots that are too small are put off to later fronts, which grow, and on
    several ranks it differs from run to run.

    References:
        Amestoy, Duff, L'Excellent, Koster (2001), A fully asynchronous multifrontal solver; MUMPS users' guide, INFOG(1).
    """
    preconditioner = ksp.getPC()
    if preconditioner.getType() not in ("lu", "cholesky") or preconditioner.getFactorSolverType() != "mumps":
        return False
    if preconditioner.getFailedReason() == PETSc.PC.FailedReason.NOERROR:
        return False
    factor = preconditioner.getFactorMatrix()
    return bool(factor) and factor.getMumpsInfog(1) in (-8, -9, -11, -14, -17, -20)


class Factor:
    """One Jacobian with its solver and work vectors.

    A method for symmetric matrices (CG, MINRES, Cholesky) supposes that J is symmetric; the check of each solution finds out
    where that is not so.

    Attributes:
        released: Whether the holder of its key has said that it will probably not come back.
    """

    def __init__(self, assembled: Matrix, options: Options, *, is_symmetric: bool) -> None:
        self.released = True
        self.assembled = assembled
        self.matrix = matrix = assembled.petsc
        self.ksp = PETSc.KSP().create(matrix.comm)
        self.ksp.setOptionsPrefix(options.prefix)
        self.ksp.setOperators(matrix)
        try:
            self.ksp.setFromOptions()
        except PETSc.Error as error:
            raise InvalidInput(f"PETSc does not take these petsc_options: {petsc_words(error)}") from error
        method, preconditioner = self.ksp.getType(), self.ksp.getPC().getType()
        self._direct = method == "preonly"
        self._symmetric = method in ("cg", "minres", "symmlq", "pipecg") or preconditioner in ("cholesky", "icc")
        self._transposes = preconditioner == "lu"
        self._suits = preconditioner == "lu" or (preconditioner == "cholesky" and is_symmetric)
        self._x, self._b = matrix.createVecs()
        self._residual = self._b.duplicate()
        self._block: DenseBlock | None = None
        self._options = options
        self._random: Array | None = None
        self._transpose: PETSc.Mat | None = None
        self._transpose_is_old = True
        self._sound = True

    def solve(self, b: Array, *, transposed: bool) -> Array:
        """Solve J x = b, or J^T x = b.

        For an iterative method the right-hand side is scaled to largest entry one first, so that the tolerances are relative.

        Args:
            b: Owned entries, `(n_owned,)`.
            transposed: Which of the two systems.

        Returns:
            Owned entries of x, `(n_owned,)`.

        Raises:
            SolveFailed: On every rank, where the solver did not converge or the matrix is singular.

        MPI: Collective.
        """
        self._b.setArray(b)
        largest = self._b.norm(PETSc.NormType.INFINITY)
        if largest == 0.0:
            return np.zeros_like(b)
        if not np.isfinite(largest):
            raise SolveFailed("the right-hand side is not finite")
        scale = 1.0 if self._direct and 1e-100 < largest < 1e100 else largest
        if scale != 1.0:
            self._b.scale(1.0 / scale)
        if not transposed or self._symmetric:
            ksp = self._run(self.ksp, self.ksp.solve)
        elif self._transposes:
            ksp = self._run(self.ksp, self.ksp.solveTranspose)
        else:
            other = self._transposed_solver()
            ksp = self._run(other, other.solve)
        self._check(ksp, transposed)
        self._sound = True
        return self._x.array_r * scale if scale != 1.0 else self._x.array_r.copy()  # type: ignore[no-any-return]

    def solve_many(self, rows: Array, *, transposed: bool) -> tuple[Array, dict[int, SolveFailed]]:
        """Solve for several right-hand sides: with a direct method all at once, with any other one by one.

        Args:
            rows: Right-hand sides, `(num_systems, n_owned)`, the same number on every rank.
            transposed: Whether with J^T.

        Returns:
            Solutions, `(num_systems, n_owned)`, perhaps a view that is valid until the next call; and what went wrong, by
            system; the rows of those are of no use.

        MPI: Collective.
        """
        at_once = self._symmetric or (self._transposes and not (transposed and not _compat.LU_TRANSPOSES_BLOCKS))
        if len(rows) > 1 and self._direct and at_once:
            if len(rows) <= BLOCK:
                return self._solve_block(rows, 0, transposed)
            out, failures = np.empty_like(rows), dict[int, SolveFailed]()
            for first in range(0, len(rows), BLOCK):
                out[first : first + BLOCK], failed = self._solve_block(rows[first : first + BLOCK], first, transposed)
                failures |= failed
            return out, failures
        out, failures = np.zeros_like(rows), {}
        for number, b in enumerate(rows):
            try:
                out[number] = self.solve(b, transposed=transposed)
            except SolveFailed as error:
                failures[number] = error
        return out, failures

    def _solve_block(self, rows: Array, first: int, transposed: bool) -> tuple[Array, dict[int, SolveFailed]]:
        """One block of right-hand sides at once; systems are numbered from `first`."""
        if self._block is None or self._block.width != len(rows):
            self._block = DenseBlock(self.matrix, len(rows))
        block = self._block
        block.set_right(rows)
        failures = self._not_finite(block, first)
        solve = self.ksp.matSolveTranspose if transposed and not self._symmetric else self.ksp.matSolve
        try:
            solve(block.b, block.x)
        except PETSc.Error as error:
            self._sound = False
            failed = SolveFailed(f"PETSc failed inside KSP: {petsc_words(error)}")
            return block.left, dict.fromkeys(range(first, first + len(rows)), failed)
        return block.left, failures | self._doubts(block, first, transposed)

    def _not_finite(self, block: DenseBlock, first: int) -> dict[int, SolveFailed]:
        """Right-hand sides of a block that are not finite, which zeros take the place of. Collective."""
        wrong = any_rank_each(self.matrix.comm.tompi4py(), np.any(~np.isfinite(block.right), axis=1))
        block.right[wrong] = 0.0
        return {first + int(k): SolveFailed("the right-hand side is not finite") for k in np.flatnonzero(wrong)}

    def _doubts(self, block: DenseBlock, first: int, transposed: bool) -> dict[int, SolveFailed]:
        """Check a random combination of the systems of a block and, where that is wrong, each of them."""
        if self._trusted():
            return {}
        scales = block.scales()
        weights = np.random.default_rng(0).choice([-1.0, 1.0], block.width) * scales
        self._sound = self._relative_residual(weights @ block.left, weights @ block.right, transposed) <= RESIDUAL_BOUND
        if self._sound:
            return {}
        sizes = [
            self._relative_residual(scale * x, scale * b, transposed)
            for scale, x, b in zip(scales, block.left, block.right, strict=True)
        ]
        return {first + k: SolveFailed(_weak(size)) for k, size in enumerate(sizes) if not size <= RESIDUAL_BOUND}

    def _relative_residual(self, x: Array, b: Array, transposed: bool) -> float:
        """|b - J x| for a b of norm one. Collective."""
        self._x.array_w[:], self._b.array_w[:] = x, b
        (self.matrix.multTranspose if transposed else self.matrix.mult)(self._x, self._residual)
        self._residual.axpy(-1.0, self._b)
        return float(self._residual.norm())

    def _trusted(self) -> bool:
        """Factors that have solved one system solve any: those of LU, and those of Cholesky where the matrix is symmetric."""
        return self._direct and self._suits and self._sound

    def rebuild(self, assemble: Assemble = assemble_loaded) -> None:
        """Assemble the matrix and factorise it. Collective."""
        assemble(self.assembled)
        self.refresh()

    def probe(self) -> None:
        """Solve for a random right-hand side, which a singular matrix, unlike one that fits it, does not survive. Collective.

        Where no pressure or no mean value is fixed the right-hand sides of the problem itself may all fit, and the answer is then
        any of many; inputs may bring that about at any call. Solutions after this one are not checked again. Iterative methods
        are not asked: they would take their last iteration to notice.
        """
        if self._direct and self._suits:
            if self._random is None:
                self._random = np.random.default_rng((0, self.matrix.comm.rank)).standard_normal(self._x.getLocalSize())
            self.solve(self._random, transposed=False)

    def refresh(self) -> None:
        """Factorise, or set the preconditioner up, for the matrix as it is now. Collective."""
        if not self._sound:
            self.ksp.reset()  # MUMPS does not factorise again after an error, and PETSc does not say so
        self._sound = False
        self._set_up()
        while lacks_workspace(self.ksp) and self._options.grow_workspace():
            self.ksp.reset()
            self._set_up()
        self._transpose_is_old = True

    def _set_up(self) -> None:
        try:
            self.ksp.setOperators(self.matrix)
            self.ksp.setUp()
        except PETSc.Error as error:
            raise SolveFailed(f"PETSc could not set the solver up: {petsc_words(error)}") from error

    def _run(self, ksp: PETSc.KSP, solve: Callable[[PETSc.Vec, PETSc.Vec], None]) -> PETSc.KSP:
        try:
            solve(self._b, self._x)
        except PETSc.Error as error:
            raise SolveFailed(f"PETSc failed inside KSP: {petsc_words(error)}") from error
        return ksp

    def _transposed_solver(self) -> PETSc.KSP:
        """A solver of its own for J^T: few preconditioners can be applied transposed (BoomerAMG's answer is wrong)."""
        if self._transpose is None:
            self._transpose = PETSc.Mat()
            self._transpose_ksp = PETSc.KSP().create(self.matrix.comm)
            self._transpose_ksp.setOptionsPrefix(self._options.prefix)
            self._transpose_ksp.setFromOptions()
        if self._transpose_is_old:
            self.matrix.transpose(self._transpose)
            self._transpose_ksp.setOperators(self._transpose)
            self._transpose_is_old = False
        return self._transpose_ksp

    def _check(self, ksp: PETSc.KSP, transposed: bool) -> None:
        """Trust the solver's word, and then the true residual: a wrong answer must not pass for a converged one."""
        reason = ksp.getConvergedReason()
        if reason <= 0:
            raise SolveFailed(
                f"KSP stopped with {reason_name(PETSc.KSP.ConvergedReason, reason)} after {ksp.getIterationNumber()} iterations, "
                f"relative residual {ksp.getResidualNorm():.1e}{'' if self._direct else '; ' + WAY_OUT}"
            )
        if self._trusted():
            return
        (self.matrix.multTranspose if transposed else self.matrix.mult)(self._x, self._residual)
        self._residual.axpy(-1.0, self._b)
        size = self._residual.norm() / self._b.norm()
        if not size <= (RESIDUAL_BOUND if self._direct else max(RESIDUAL_BOUND, 1e3 * ksp.getTolerances()[0])):
            raise SolveFailed(_weak(size))

    def log_determinant(self) -> float:
        """log |det J|, replicated, where MUMPS was told to compute it (`mat_mumps_icntl_33`), without a solve.

        MUMPS gives a mantissa and a binary exponent, so that the determinant does not overflow.

        Raises:
            SolveFailed: On every rank, where the matrix is singular or not finite.

        MPI: Collective.
        """
        preconditioner = self.ksp.getPC()
        factor = preconditioner.getFactorMatrix()
        mantissa, exponent = factor.getMumpsRinfog(12), factor.getMumpsInfog(34)
        failed = preconditioner.getFailedReason() != 0 or mantissa == 0.0 or not np.isfinite(mantissa)
        if any_rank(self.matrix.comm.tompi4py(), failed):
            raise SolveFailed("the Jacobian is singular, so that log |det| has no finite value")
        self._sound = True
        return float(np.log(abs(mantissa)) + exponent * np.log(2.0))

    def num_bytes(self) -> int:
        """Memory of the matrix and its factor, the largest over ranks. Collective."""
        local = 2.0**16 + _num_bytes(self.matrix)
        preconditioner = self.ksp.getPC()
        if preconditioner.getType() in ("lu", "cholesky"):
            factor = preconditioner.getFactorMatrix()
            if preconditioner.getFactorSolverType() == "mumps":
                local += max(1e6 * factor.getMumpsInfog(18), MUMPS_INSTANCE)
            else:
                local += _num_bytes(factor)
        else:
            local *= 3
        return int(max_over_ranks(self.matrix.comm.tompi4py(), local))


def _num_bytes(matrix: PETSc.Mat) -> float:
    """Memory of this rank's part of a matrix. PETSc does not count that of its own factors, nor arrays that are not its own."""
    info = matrix.getInfo(PETSc.Mat.InfoType.LOCAL)
    values_and_columns = 12.0 * max(info["nz_allocated"], info["nz_used"])
    return float(max(info["memory"], values_and_columns))


def _weak(size: float) -> str:
    return (
        f"the linear solver left a relative residual of {size:.1e}: the Jacobian is singular or nearly so, or the method does "
        f"not fit it (Cholesky and CG want it symmetric); {WAY_OUT}"
    )


class FactorPool:
    """Factors of one operator's Jacobian at several linearisation points, within a memory budget.

    What is released goes first, then what was used least recently; an evicted one is rebuilt when it is needed. The
    symbolic factorisation stays with the matrix that is reused.

    Args:
        form: The Jacobian dF/du, a 2-form.
        boundary: Its Dirichlet conditions: their rows and columns are those of the identity.
        options: PETSc options.
        budget: Bytes, per rank; one factor is kept whatever its size.
        prepare: What to do with each new matrix.
        is_symmetric: Whether the Jacobian is known to be symmetric wherever it is taken.
        check: What a new factorisation must survive: it raises `SolveFailed` where that is of no use.

    Raises:
        UnsupportedForm: Where nothing determines some unknowns; see `MatrixForm.check_rows`.

    MPI: Collective.
    """

    def __init__(
        self,
        form: ufl.Form,
        boundary: Boundary,
        options: Options,
        budget: int,
        *,
        prepare: Callable[[PETSc.Mat], None] = lambda matrix: None,
        is_symmetric: bool = False,
        check: Callable[[Factor], object] = Factor.probe,
    ) -> None:
        self._prepare, self._check = prepare, check
        self._is_symmetric = is_symmetric
        self._form = MatrixForm(form, boundary.bcs)
        self._form.check_rows()
        self._options = options
        self._budget = budget
        self._factors: OrderedDict[Hashable, Factor] = OrderedDict()
        self._spare: Factor | None = None
        self._capacity = 1
        self.num_factorisations = 0

    def get(self, key: Hashable, assemble: Assemble = assemble_loaded) -> Factor:
        """The factor of a key, built where it is not kept.

        Args:
            key: Names the linearisation point; equal on all ranks. The state and inputs of that point are loaded.
            assemble: What assembles the matrix.

        MPI: Collective.
        """
        factor = self._factors.get(key)
        if factor is None:
            factor = self._build(key, assemble)
        else:
            self._factors.move_to_end(key)
        factor.released = False
        return factor

    def keeps(self, key: Hashable) -> bool:
        """Whether the factor of a key is kept. Not collective."""
        return key in self._factors

    def release(self, key: Hashable) -> None:
        """Say that a key will probably not be asked for again. Not collective."""
        factor = self._factors.get(key)
        if factor is not None:
            factor.released = True
            self._factors.move_to_end(key, last=False)

    def _build(self, key: Hashable, assemble: Assemble) -> Factor:
        factor = self._vacant()
        self._spare = factor
        factor.rebuild(assemble)
        self._check(factor)
        self._factors[key], self._spare = factor, None
        self.num_factorisations += 1
        if self.num_factorisations == 1:
            self._capacity = max(1, self._budget // factor.num_bytes())
        return factor

    def create_matrix(self) -> Matrix:
        """A matrix of the Jacobian. Collective."""
        matrix = self._form.create_matrix()
        self._prepare(matrix.petsc)
        return matrix

    def _vacant(self) -> Factor:
        """The factor that goes first, or a new one where the budget allows it."""
        oldest = next(iter(self._factors.values()), None)
        if self._spare is not None:
            factor, self._spare = self._spare, None
        elif oldest is not None and (oldest.released or len(self._factors) >= self._capacity):
            _, factor = self._factors.popitem(last=False)
        else:
            factor = Factor(self.create_matrix(), self._options, is_symmetric=self._is_symmetric)
        return factor
