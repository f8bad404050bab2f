"""The state equation: given inputs, the u with F(u, m; v) = 0 for all v."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from petsc4py import PETSc

from fem_vi.errors import SolveFailed
from fem_vi.parallel import any_rank, fingerprint
from fem_vi.pde.assemble import VectorForm, create_vector_form
from fem_vi.pde.boundary import Boundary
from fem_vi.pde.coordinates import CoordinateInput
from fem_vi.pde.coupling import InputMatrix, constant_matrices, without
from fem_vi.pde.factors import WAY_OUT, Factor, FactorPool, lacks_workspace, petsc_words, reason_name
from fem_vi.pde.inputs import Array, FunctionInput, Input
from fem_vi.pde.matrix import Assemble, Matrix, assemble_loaded
from fem_vi.pde.petsc_options import Option, Options
from fem_vi.pde.solver_choice import choose_solver
from fem_vi.pde.weak_form import WeakForm

Failures = dict[int, SolveFailed]


class Systems(NamedTuple):
    """J w = b for some samples of a linear form, with states u = u_D + w.

    Attributes:
        lifting: u_D, `(num_samples, n_owned)`; None where no value but zero is prescribed.
        right: b, likewise, zero where values are prescribed.
    """

    lifting: Array | None
    right: Array

    def of(self, samples: slice | list[int]) -> Systems:
        """Those of some of the samples."""
        return Systems(None if self.lifting is None else self.lifting[samples], self.right[samples])


class StateEquation:
    """Solves a weak form for its state and keeps the linearisations that the adjoint will need.

    A linear form, one whose Jacobian does not contain the state, is solved by one linear solve; the factorisation
    serves the adjoint as well, and serves every sample that shares the inputs of the Jacobian. Any other form goes
    through PETSc's SNES.

    Args:
        pde: The weak form.
        petsc_options: SNES, KSP and PC options, without prefix; see `choose_solver` for what is not given.
        factor_budget: Bytes per rank for kept factorisations.

    Attributes:
        options: PETSc options, those given and those chosen.
        factors: The kept factorisations.
        jacobian_inputs: Positions of the inputs that the Jacobian sees.
        matrices: dF/dm of the inputs that enter the form by a constant matrix, by position.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm, petsc_options: Mapping[str, Option], factor_budget: int) -> None:
        self.pde = pde
        choice = choose_solver(pde, petsc_options)
        self.options = choice.options
        self._options = Options(choice.options, watched=petsc_options)
        self.jacobian_inputs = pde.occurs_in(pde.jacobian) if pde.is_linear else tuple(range(len(pde.inputs)))
        self.factors = FactorPool(
            pde.jacobian,
            pde.boundary,
            self._options,
            factor_budget,
            prepare=choice.prepare,
            is_symmetric=choice.is_symmetric,
            check=_FactorCheck(pde, self.jacobian_inputs),
        )
        self.matrices = constant_matrices(pde)
        self._solver = (
            _LinearSolve(pde, self.factors, self.matrices) if pde.is_linear else _NonlinearSolve(pde, self.factors, self._options)
        )

    def keys(self, values: Sequence[Sequence[Array]], states: Array | None = None) -> list[int]:
        """Names of the Jacobians of some samples, which are fingerprints of all that the Jacobian sees.

        Args:
            values: For each sample, the owned values of each input.
            states: The owned coefficients of their states, `(num_samples, n_owned)`; needed for a form that is not linear.

        Returns:
            One name for each sample: equal for equal contents, and by chance in 2^64 for others.

        MPI: Collective.
        """
        seen = [[sample[k] for k in self.jacobian_inputs] for sample in values]
        if not self.pde.is_linear:
            assert states is not None
            seen = [[*sample, state] for sample, state in zip(seen, states, strict=True)]
        return fingerprint(self.pde.comm, seen)

    def load(self, values: Sequence[Array], state: Array | None = None) -> None:
        """Write one sample's inputs, and its state, into the form's Functions. Collective.

        Args:
            values: Owned values of each input.
            state: Owned coefficients of the state.
        """
        for given, value in zip(self.pde.inputs, values, strict=True):
            given.load(value)
        if state is not None:
            self.pde.unknown.load(state)

    def solve(
        self, values: Sequence[Array], key: Hashable, start: Array | None = None, *, assemble: Assemble = assemble_loaded
    ) -> Array:
        """Solve for the state.

        Args:
            values: Owned values of each input.
            key: Names the values of the inputs `jacobian_inputs`; equal on all ranks.
            start: Owned coefficients that SNES starts from, where not from the weak form's initial guess.
            assemble: For a linear form: what assembles the Jacobian.

        Returns:
            Owned coefficients of the state, `(n_owned,)`.

        Raises:
            SolveFailed: On every rank, where a solver did not converge.

        MPI: Collective.
        """
        self.load(values)
        u = self._solver.solve(key, start, assemble)
        self._options.warn_unused()
        return u

    def solve_many(
        self,
        values: Sequence[Sequence[Array]],
        key: Hashable,
        *,
        systems: Systems | None = None,
        assemble: Assemble = assemble_loaded,
    ) -> tuple[Array, Failures]:
        """Solve for the states of samples: those of a linear form share the Jacobian and are solved at once.

        Args:
            values: For each sample, the owned values of each input.
            key: As in `solve`.
            systems: For a linear form: what is to be solved, where that is known.
            assemble: For a linear form: what assembles the Jacobian.

        Returns:
            States, `(num_samples, n_owned)`, and what went wrong, by sample; the rows of those are of no use.

        MPI: Collective.
        """
        if not self.pde.is_linear or (len(values) == 1 and systems is None):
            return self._one_by_one(values, key, assemble)
        if systems is None:
            systems = self._systems(values)
        else:
            self.load(values[-1])
        try:
            u, failures = self.factors.get(key, assemble).solve_many(systems.right, transposed=False)
        except SolveFailed as error:
            return np.zeros_like(systems.right), dict.fromkeys(range(len(values)), error)
        self._options.warn_unused()
        return (u if systems.lifting is None else u + systems.lifting), failures

    def _one_by_one(self, values: Sequence[Sequence[Array]], key: Hashable, assemble: Assemble) -> tuple[Array, Failures]:
        out, failures = np.empty((len(values), self.pde.unknown.size)), {}
        for number, sample in enumerate(values):
            try:
                out[number] = self.solve(sample, key, assemble=assemble)
            except SolveFailed as error:
                failures[number] = error
        return out, failures

    @property
    def assembles_systems(self) -> bool:
        """Whether the form is linear, and what `solve` solves needs a 1-form for each sample."""
        return isinstance(self._solver, _LinearSolve) and self._solver.assembles

    def _systems(self, values: Sequence[Sequence[Array]]) -> Systems:
        """What is to be solved for some samples, the last one being loaded."""
        assert isinstance(self._solver, _LinearSolve)
        self.load(values[-1])
        if self._solver.enters_by_matrices:
            return Systems(None, self._solver.right_hand_sides(values))
        pairs = []
        for sample in values:
            self.load(sample)
            pairs.append(self._solver.system())
        b = np.stack([b for _, b in pairs])
        return Systems(None if pairs[0][0] is None else np.stack([u for u, _ in pairs if u is not None]), b)

    def solve_linear(self, b: Array, key: Hashable) -> Array:
        """Solve J u = b at inputs, and a state, that are loaded; b is zero where values are prescribed.

        Args:
            b: Owned entries, `(n_owned,)`.
            key: As in `solve`.

        Returns:
            Owned coefficients of u, `(n_owned,)`.

        Raises:
            SolveFailed: On every rank, where the solver did not converge.

        MPI: Collective.
        """
        u = self.factors.get(key).solve(b, transposed=False)
        self._options.warn_unused()
        return u

    def solve_adjoint(self, values: Sequence[Array], u: Array, g: Array, key: Hashable) -> Array:
        """Solve (dF/du)^T lam = g with homogeneous boundary conditions, at a state that `solve` returned.

        Args:
            values: Owned values of each input.
            u: Owned coefficients of the state.
            g: Owned cotangent dL/du.
            key: As in `solve`; a Jacobian that is no longer kept is rebuilt.

        Returns:
            Owned coefficients of lam, `(n_owned,)`. The inputs and the state stay loaded.

        Raises:
            SolveFailed: On every rank, where the solver did not converge.

        MPI: Collective.
        """
        self.load(values, u)
        return self.solve_transposed(g, key)

    def solve_transposed(self, g: Array, key: Hashable) -> Array:
        """`solve_adjoint` where inputs and state are loaded, or the Jacobian is kept (see `FactorPool.keeps`). Collective."""
        right = g.copy()
        right[self.pde.boundary.owned] = 0.0
        return self.factors.get(key).solve(right, transposed=True)

    def solve_adjoints(
        self, values: Sequence[Array], u: Array, g: Array, key: Hashable, *, assemble: Assemble = assemble_loaded
    ) -> tuple[Array, Failures]:
        """`solve_adjoint` for several cotangents, `(num_samples, n_owned)`, of samples that share their Jacobian.

        Args:
            values: Owned values of each input, of one of the samples.
            u: Owned coefficients of its state.
            g: Owned cotangents dL/du.
            key: As in `solve`.
            assemble: What assembles a Jacobian that is no longer kept.

        Returns:
            lam, `(num_samples, n_owned)`, and what went wrong, by sample.

        MPI: Collective.
        """
        try:
            if not self.factors.keeps(key):
                self.load(values, u)
            factor = self.factors.get(key, assemble)
            right = g.copy()
            right[:, self.pde.boundary.owned] = 0.0
            if len(g) == 1:
                return factor.solve(right[0], transposed=True)[None], {}
            return factor.solve_many(right, transposed=True)
        except SolveFailed as error:
            return g, dict.fromkeys(range(len(g)), error)


class _FactorCheck:
    """Probe the first factorisation, and those at inputs that may make a Jacobian singular which is regular elsewhere.

    What does so is a Constant, or a field that is the same everywhere, such as a reaction that vanishes; a field that varies
    meets a singular matrix by chance only, and a probe costs a solve. Collective. Holds no reference to the factors.
    """

    def __init__(self, pde: WeakForm, positions: Sequence[int]) -> None:
        self._comm = pde.comm
        self._seen = [pde.inputs[k] for k in positions]
        self._is_first = True

    def __call__(self, factor: Factor) -> None:
        if self._is_first or any_rank(self._comm, any(_is_uniform(given) for given in self._seen)):
            factor.probe()
        self._is_first = False


def _is_uniform(given: Input) -> bool:
    """Whether all entries of what is loaded are equal; coordinates never are. Not collective."""
    if isinstance(given, CoordinateInput) or given.size == 0:
        return False
    if not given.is_field:
        return True
    values: Array = given.coefficients.owned  # type: ignore[union-attr]
    return bool(values[0] == values[-1] and np.ptp(values) == 0.0)  # the first comparison is a hundred times as quick


class _LinearSolve:
    """J(m) u = b(m): with u = u_D + w, where u_D holds the prescribed values, J w = -F(u_D).

    Where no value but zero is prescribed, inputs that enter by a constant matrix C leave b = -(C m + c).
    """

    def __init__(self, pde: WeakForm, factors: FactorPool, matrices: Mapping[int, InputMatrix]) -> None:
        self._pde = pde
        self._factors = factors
        self._owned = pde.boundary.owned
        self._lifted = not pde.boundary.homogeneous
        known = {} if self._lifted else matrices
        fields = [(k, given) for k, given in enumerate(pde.inputs) if isinstance(given, FunctionInput)]
        self._matrices = [(k, given, known[k]) for k, given in fields if k in known]
        rest = without(pde.form, [pde.state, *(given.symbol for _, given, _ in self._matrices)])
        self._form = VectorForm(pde.form) if self._lifted else create_vector_form(rest, pde.unknown.size)
        self._rest_is_fixed = not self._lifted and not pde.occurs_in(rest)
        self.enters_by_matrices = self._rest_is_fixed and bool(self._matrices)
        self.assembles = self._lifted or not self._rest_is_fixed
        self._fixed_rest: Array | None = None

    def solve(self, key: Hashable, start: Array | None, assemble: Assemble) -> Array:
        del start
        factor = self._factors.get(key, assemble)
        lifting, b = self.system()
        u = factor.solve(b, transposed=False)
        return u if lifting is None else u + lifting

    def system(self) -> tuple[Array | None, Array]:
        """u_D, where values other than zero are prescribed, and b: owned entries, at what is loaded. Collective."""
        lifting = self._pde.unknown.coefficients.array
        lifting.fill(0.0)
        if self._lifted:
            self._pde.boundary.apply(lifting)
            b = -self._form.assemble()
            b[self._owned] = 0.0
            return lifting[: b.size].copy(), b
        b = self._rest()
        for _, given, matrix in self._matrices:
            b = np.subtract(b, matrix.multiply(given.coefficients.owned))
        if self._matrices:
            b[self._owned] = 0.0
        return None, b

    def right_hand_sides(self, values: Sequence[Sequence[Array]]) -> Array:
        """b of some samples, `(num_samples, n_owned)`, where all that varies enters by a matrix. Collective."""
        b = self._rest()
        for k, _, matrix in self._matrices:
            b = b - matrix.multiply_rows([sample[k] for sample in values])
        b[:, self._owned] = 0.0
        return b

    def _rest(self) -> Array:
        """-c, an array of its own or one that nobody writes to."""
        if self._fixed_rest is not None:
            return self._fixed_rest
        b = -self._form.assemble()
        b[self._owned] = 0.0
        if self._rest_is_fixed:
            self._fixed_rest = b
        return b


class _NonlinearSolve:
    """F(u, m) = 0 by SNES, from the initial guess with the prescribed values written into it."""

    def __init__(self, pde: WeakForm, factors: FactorPool, options: Options) -> None:
        self._pde = pde
        self._options = options
        residual = _Residual(VectorForm(pde.form), pde.unknown, pde.boundary)
        matrix = factors.create_matrix()
        self._x, vector = matrix.petsc.createVecs()
        self._snes = PETSc.SNES().create(matrix.petsc.comm)
        self._snes.setOptionsPrefix(options.prefix)
        self._snes.setTolerances(rtol=1e-10, atol=1e-50, stol=1e-12, max_it=50)
        self._snes.setFunction(residual.evaluate, vector)
        self._snes.setJacobian(_Jacobian(matrix, pde.unknown).evaluate, matrix.petsc)
        self._snes.setFromOptions()

    def solve(self, key: Hashable, start: Array | None, assemble: Assemble) -> Array:
        del key, assemble
        guess = self._pde.initial_guess.copy()
        owned = guess[: self._x.getLocalSize()]
        if start is not None:
            owned[:] = start
        self._pde.boundary.apply(guess)
        ksp = self._snes.getKSP()
        self._run(owned)
        while self._snes.getConvergedReason() <= 0 and lacks_workspace(ksp) and self._options.grow_workspace():
            ksp.reset()
            self._run(owned)
        if self._snes.getConvergedReason() <= 0:
            failure = self._failure()
            ksp.reset()  # MUMPS does not factorise again after an error
            raise failure
        return self._x.array_r.copy()  # type: ignore[no-any-return]

    def _run(self, guess: Array) -> None:
        self._x.array_w[:] = guess
        try:
            self._snes.solve(None, self._x)
        except PETSc.Error as error:
            self._snes.getKSP().reset()
            raise SolveFailed(f"PETSc failed inside SNES: {petsc_words(error)}") from error

    def _failure(self) -> SolveFailed:
        """What SNES, and the linear solver inside it, say of a solve that did not converge."""
        ksp = self._snes.getKSP()
        linear = ksp.getConvergedReason()
        hint = f" (KSP: {reason_name(PETSc.KSP.ConvergedReason, linear)})" if linear < 0 else ""
        way_out = f"; {WAY_OUT}" if ksp.getPC().getType() != "lu" else ""
        return SolveFailed(
            f"SNES stopped with {reason_name(PETSc.SNES.ConvergedReason, self._snes.getConvergedReason())}{hint} after "
            f"{self._snes.getIterationNumber()} iterations, residual norm {self._snes.getFunctionNorm():.1e}{way_out}"
        )


class _Residual:
    """SNES's residual: F(u), and u - h on the prescribed dofs. Holds no reference to the SNES that calls it."""

    def __init__(self, form: VectorForm, state: FunctionInput, boundary: Boundary) -> None:
        self._form, self._state, self._boundary = form, state, boundary

    def evaluate(self, snes: PETSc.SNES, x: PETSc.Vec, out: PETSc.Vec) -> None:
        values = x.array_r
        self._state.load(values)
        r = out.array_w
        r[:] = self._form.assemble()
        owned = self._boundary.owned
        r[owned] = values[owned] - self._boundary.values()


class _Jacobian:
    """SNES's Jacobian, at the u that SNES passes."""

    def __init__(self, matrix: Matrix, state: FunctionInput) -> None:
        self._matrix, self._state = matrix, state

    def evaluate(self, snes: PETSc.SNES, x: PETSc.Vec, operator: PETSc.Mat, preconditioner: PETSc.Mat) -> None:
        self._state.load(x.array_r)
        self._matrix.assemble()
        if operator != preconditioner:
            operator.assemble()
