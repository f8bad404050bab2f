"""Random estimates of log det K, for K = dF/du symmetric and positive definite, and of its gradient.

With the diagonal D of K and S = D^(-1/2) K D^(-1/2), log det K = log det D + tr log S, and for a vector z of independent signs
E[z^T log(S) z] = tr log S. Lanczos's iteration, started at z, gives a tridiagonal matrix T whose eigenvalues and first components
of eigenvectors are the nodes and weights of a Gauss quadrature for z^T f(S) z / |z|^2. The gradient is tr(K^-1 dK), the mean of
z^T K^-1 dK z. At prescribed dofs, where K is the identity, z is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import ufl
from dolfinx import fem
from mpi4py import MPI

from fem_vi.errors import NotFinite, SolveFailed, UnsupportedForm
from fem_vi.parallel import any_rank, sum_over_ranks
from fem_vi.pde.adjoint import FormGradient
from fem_vi.pde.dense_block import DenseBlock
from fem_vi.pde.determinant import JacobianSamples
from fem_vi.pde.factors import FactorPool
from fem_vi.pde.generic_jacobian import GenericJacobian
from fem_vi.pde.inputs import Array, Coefficients
from fem_vi.pde.matrix import MatrixForm
from fem_vi.pde.petsc_options import Options
from fem_vi.pde.solver_choice import choose_solver
from fem_vi.pde.weak_form import WeakForm

_NOT_POSITIVE = (
    "StochasticLogdet wants a symmetric, positive definite Jacobian; this one is not {what}. Take fem_vi.ExactLogdet() instead."
)


class StochasticDeterminant:
    """Estimates of log det dF/du and of its gradient.

    Args:
        pde: The weak form.
        probes: Random vectors for each estimate.
        steps: Steps of Lanczos's iteration.

    Attributes:
        positions: Of the state (0) and of the inputs (from 1) that the Jacobian sees.

    Raises:
        UnsupportedForm: Where the Jacobian is not symmetric for all inputs.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm, probes: int, steps: int) -> None:
        jacobian = GenericJacobian(pde)
        jacobian.destroy()
        if not jacobian.is_symmetric:
            raise UnsupportedForm(_NOT_POSITIVE.format(what="symmetric"))
        self._pde, self._probes, self._steps = pde, probes, steps
        self._samples = JacobianSamples(pde)
        self._matrix = MatrixForm(pde.jacobian, pde.boundary.bcs).create_matrix()
        self._block = DenseBlock(self._matrix.petsc, probes)
        choice = choose_solver(pde, {})
        self._factors = FactorPool(
            pde.jacobian, pde.boundary, Options(choice.options, watched=[]), 0, prepare=choice.prepare, is_symmetric=True
        )
        self._left, self._right = fem.Function(pde.space), fem.Function(pde.space)
        form = ufl.replace(pde.jacobian, {pde.test: self._left, pde.trial: self._right})
        given = [pde.unknown, *pde.inputs]
        self.positions = [k for k, one in enumerate(given) if one.occurs_in(pde.jacobian)]
        self._gradient = FormGradient(form, given)

    def value(self, sample: Sequence[Array], seed: tuple[int, int]) -> tuple[float, float]:
        """An estimate of log det K and its standard error, replicated.

        Args:
            sample: Owned values of the state and of each input.
            seed: Names the probes.

        Raises:
            UnsupportedForm: On every rank, where K is seen not to be positive definite.
            NotFinite: On every rank, where it has entries that are not finite.

        MPI: Collective.
        """
        comm = self._pde.comm
        self._samples.load(sample)
        self._matrix.assemble()
        diagonal = self._matrix.petsc.getDiagonal().array_r
        if any_rank(comm, not np.isfinite(diagonal).all()):
            raise NotFinite("Residual.logdet: the Jacobian has entries that are not finite.")
        if any_rank(comm, bool((diagonal <= 0.0).any())):
            raise UnsupportedForm(_NOT_POSITIVE.format(what="positive on its diagonal"))
        root = 1.0 / np.sqrt(diagonal)

        def multiply(x: Array) -> Array:
            self._block.set_left(x * root)
            self._matrix.petsc.matMult(self._block.x, self._block.b)
            return self._block.right * root

        estimates = lanczos_log(multiply, self._draw(seed), self._steps, comm)
        offset = float(sum_over_ranks(comm, np.array([np.log(diagonal).sum()]))[0])
        return offset + float(estimates.mean()), float(estimates.std(ddof=1) / np.sqrt(self._probes))

    def gradient(self, sample: Sequence[Array], seed: tuple[int, int], positions: Sequence[int]) -> list[Array]:
        """Estimates of the gradient for the state (position 0) or for inputs, at the same probes as a value.

        Args:
            sample: See `value`.
            seed: See `value`.
            positions: Which are wanted.

        Returns:
            For each, what `FormGradient.assemble` returns.

        Raises:
            SolveFailed: On every rank, where a solver did not converge.

        MPI: Collective.
        """
        self._samples.load(sample)
        probes = self._draw(seed)
        (key,) = self._samples.groups([sample])
        solved, failures = self._factors.get(key).solve_many(probes, transposed=False)
        if failures:
            raise SolveFailed(f"Residual.logdet: {next(iter(failures.values()))}.")
        left, right = Coefficients(self._left), Coefficients(self._right)
        out: list[Array] = [np.zeros(self._size(k)) for k in positions]
        for z, y in zip(probes, solved, strict=True):
            left.load(y)
            right.load(z)
            for total, k in zip(out, positions, strict=True):
                total += self._gradient.assemble(k) / self._probes
        return out

    def _size(self, position: int) -> int:
        return [self._pde.unknown, *self._pde.inputs][position].size

    def _draw(self, seed: tuple[int, int]) -> Array:
        """Random signs, zero at prescribed dofs, `(probes, n_owned)`; each rank draws its own."""
        random = np.random.default_rng((*seed, self._pde.comm.rank))
        signs = random.choice([-1.0, 1.0], (self._probes, self._pde.unknown.size))
        signs[:, self._pde.boundary.owned] = 0.0
        return signs


def lanczos_log(multiply: Callable[[Array], Array], start: Array, steps: int, comm: MPI.Comm) -> Array:
    """Gauss quadratures of z^T log(S) z for several z at once, S symmetric and positive definite.

    Lost orthogonality makes copies of converged nodes, which share their weight and do no harm.

    Args:
        multiply: S times each row.
        start: The vectors z, owned entries, `(num, n_owned)`.
        steps: Nodes, at most.
        comm: Ranks that share the vectors.

    Returns:
        `(num,)`, replicated.

    Raises:
        UnsupportedForm: On every rank, where S is not positive definite.

    MPI: Collective.

    References:
        Golub, Meurant (2010), Matrices, Moments and Quadrature with Applications, chapter 6.
    """

    def dot(x: Array, y: Array) -> Array:
        return sum_over_ranks(comm, np.einsum("ij,ij->i", x, y))

    length = dot(start, start)
    v, before = start / np.sqrt(np.where(length > 0.0, length, 1.0))[:, None], np.zeros_like(start)
    alpha, beta = np.ones((len(start), steps)), np.zeros((len(start), steps))
    alive = length > 0.0
    for step in range(steps):
        w = multiply(v)
        alpha[alive, step] = dot(w, v)[alive]
        w = w - alpha[:, step, None] * v - (beta[:, step - 1, None] * before if step else 0.0)
        size = np.sqrt(dot(w, w))
        alive = alive & (size > 1e-10)  # the space of z is exhausted: the quadrature is exact
        if step + 1 == steps or not alive.any():
            break
        beta[alive, step] = size[alive]
        before, v = v, np.where(alive[:, None], w / np.where(alive, size, 1.0)[:, None], 0.0)
    tridiagonal = np.zeros((len(start), steps, steps))
    index = np.arange(steps)
    tridiagonal[:, index, index] = alpha
    tridiagonal[:, index[:-1], index[1:]] = tridiagonal[:, index[1:], index[:-1]] = beta[:, :-1]
    nodes, vectors = np.linalg.eigh(tridiagonal)
    weights = vectors[:, 0] ** 2
    if bool((nodes[weights > 1e-14] <= 0.0).any()):
        raise UnsupportedForm(_NOT_POSITIVE.format(what="positive definite"))
    return np.asarray(length * (weights * np.log(np.where(nodes > 0.0, nodes, 1.0))).sum(axis=1))
