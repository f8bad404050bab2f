"""The Jacobian of a weak form at generic inputs and states: what holds there holds for all but special ones.

Whether a Jacobian is symmetric is a property of the form. At one call's values it may look symmetric by chance (a velocity
that is zero, a state that is constant); at random values it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from petsc4py import PETSc

from fem_vi.parallel import max_over_ranks
from fem_vi.pde.coordinates import CoordinateInput
from fem_vi.pde.inputs import Array, FunctionInput, Input
from fem_vi.pde.matrix import MatrixForm
from fem_vi.pde.weak_form import WeakForm

SYMMETRY_BOUND = 1e-12
"""Largest relative size of J - J^T that counts as rounding."""
SEED = 20259


class GenericJacobian:
    """dF/du with Dirichlet rows and columns of the identity, assembled at random points.

    Args:
        pde: The weak form. Its private Functions and Constants keep their values.

    Attributes:
        matrix: The Jacobian at the last point.
        is_symmetric: Whether J is finite at one point at least, and symmetric wherever it is finite.
        is_finite: Whether it is finite at the last point.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm) -> None:
        self._assembled = MatrixForm(pde.jacobian, pde.boundary.bcs).create_matrix()
        self.matrix = self._assembled.petsc
        self.is_finite = False
        verdicts = []
        with _values_kept(pde):
            for point in _points(pde):
                _load(pde, point)
                self._assembled.assemble()
                asymmetry = relative_asymmetry(self.matrix)
                self.is_finite = bool(np.isfinite(asymmetry))
                if self.is_finite:
                    verdicts.append(asymmetry <= SYMMETRY_BOUND)
        self.is_symmetric = bool(verdicts) and all(verdicts)

    def destroy(self) -> None:
        """Free the matrix. Collective."""
        self.matrix.destroy()


def relative_asymmetry(matrix: PETSc.Mat) -> float:
    """An estimate of |S (J - J^T) S| / |S J S| in the Frobenius norm, where the diagonal S makes all rows of S J S of size one.

    For normal random x and y, x^T (J - J^T) y has mean zero and variance |J - J^T|^2. Without S a coupling between
    quantities of different units, such as displacements and pressures, would not be seen beside the stiffest entries.

    Args:
        matrix: J, square.

    Returns:
        Replicated; NaN or infinite where an entry is not finite.

    MPI: Collective.

    References:
        Ruiz (2001), A scaling algorithm to equilibrate both rows and columns norms in matrices.
    """
    if not np.isfinite(matrix.norm(PETSc.NormType.FROBENIUS)):
        return float("nan")
    scaled = matrix.copy()
    for _ in range(3):
        largest = _row_maxima(scaled)
        scale = scaled.createVecLeft()
        scale.array_w[:] = 1.0 / np.sqrt(np.where(largest > 0.0, largest, 1.0))
        scaled.diagonalScale(scale, scale)
    x, y = scaled.createVecs()
    product = x.duplicate()
    random = np.random.default_rng((SEED, matrix.comm.rank))
    estimates = []
    for _ in range(4):
        x.array_w[:] = random.standard_normal(x.getLocalSize())
        y.array_w[:] = random.standard_normal(y.getLocalSize())
        scaled.mult(y, product)
        forth = x.dot(product)
        scaled.mult(x, product)
        estimates.append(abs(forth - y.dot(product)))
    size = scaled.norm(PETSc.NormType.FROBENIUS)
    scaled.destroy()
    return max(estimates) / size if size > 0.0 else 0.0


def _row_maxima(matrix: PETSc.Mat) -> Array:
    """The largest absolute value of each owned row, `(n_owned,)`."""
    starts, _, values = matrix.getValuesCSR()
    filled = np.flatnonzero(np.diff(starts))
    largest = np.zeros(len(starts) - 1)
    if filled.size:
        largest[filled] = np.maximum.reduceat(np.abs(values), starts[filled])
    return largest


@contextmanager
def _values_kept(pde: WeakForm) -> Iterator[None]:
    kept = [(given, _current(given).copy()) for given in (pde.unknown, *pde.inputs)]
    try:
        yield
    finally:
        for given, values in kept:
            _current(given)[...] = values
            if isinstance(given, CoordinateInput):
                given.restore()


def _current(given: Input) -> Array:
    return given.coefficients.array if isinstance(given, FunctionInput) else given.symbol.value  # type: ignore[no-any-return]


def _points(pde: WeakForm) -> list[list[Array]]:
    """Owned values of the state and of each input, at each point.

    The values that the caller has set may lie on the other side of a condition than any that are drawn. Values of both signs
    take both branches of a conditional; positive ones suit square roots and logarithms; a state near the initial guess suits
    forms that are defined for moderate gradients only, such as those of hyperelasticity.
    """
    alike, own = np.random.default_rng(SEED), np.random.default_rng((SEED, pde.comm.rank))

    def draw(low: float, high: float) -> list[Array]:
        return [
            given.at_first()  # the mesh as it is
            if isinstance(given, CoordinateInput)
            else (own if given.is_field else alike).uniform(low, high, given.size)
            for given in (pde.unknown, *pde.inputs)
        ]

    now = [_current(given).reshape(-1)[: given.size].copy() for given in (pde.unknown, *pde.inputs)]
    points = [now, draw(-1.0, 1.0), draw(0.7, 1.3)]
    if not pde.is_linear:
        noise, *values = draw(0.7, 1.3)
        guess = pde.initial_guess[: pde.unknown.size]
        points.append([guess + 0.05 * _cell_size(pde) * (noise - 1.0), *values])
    return points


def _cell_size(pde: WeakForm) -> float:
    """The size of the smallest cell."""
    mesh = pde.space.mesh
    dim = mesh.topology.dim
    owned = np.arange(mesh.topology.index_map(dim).size_local, dtype=np.int32)
    return -max_over_ranks(pde.comm, -float(mesh.h(dim, owned).min(initial=np.inf)))


def _load(pde: WeakForm, point: list[Array]) -> None:
    for given, values in zip((pde.unknown, *pde.inputs), point, strict=True):
        given.load(values)
