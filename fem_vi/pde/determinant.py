"""log |det dr/du| of a residual at many inputs and states, from factorisations.

With unknowns I and prescribed dofs B, dr/du = [[J_II, J_IB], [0, 1]] for J = dF/du, so that det dr/du = det J_II: the
determinant of the matrix that solvers factorise, whose rows and columns B are those of the identity.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property

from fem_vi.errors import UnsupportedForm
from fem_vi.parallel import fingerprint
from fem_vi.pde.factors import Factor, FactorPool
from fem_vi.pde.generic_jacobian import GenericJacobian
from fem_vi.pde.inputs import Array
from fem_vi.pde.jacobian_trace import Blocks, JacobianBlocks, TraceGradient
from fem_vi.pde.petsc_options import Options
from fem_vi.pde.selected_inverse import can_select
from fem_vi.pde.weak_form import WeakForm


class JacobianSamples:
    """Which samples share their Jacobian, and how they are loaded.

    Args:
        pde: The weak form.
    """

    def __init__(self, pde: WeakForm) -> None:
        self._given = [pde.unknown, *pde.inputs]
        self._seen = [k for k, given in enumerate(self._given) if given.occurs_in(pde.jacobian)]
        self._comm = pde.comm

    def groups(self, samples: Sequence[Sequence[Array]]) -> dict[Hashable, list[int]]:
        """The samples of each Jacobian, in the order of their first ones, by a fingerprint of all that it sees. Collective."""
        out: dict[Hashable, list[int]] = {}
        for number, key in enumerate(fingerprint(self._comm, [[sample[k] for k in self._seen] for sample in samples])):
            out.setdefault(key, []).append(number)
        return out

    def load(self, sample: Sequence[Array]) -> None:
        """Set the state and the inputs of a sample. Collective."""
        for given, values in zip(self._given, sample, strict=True):
            given.load(values)


class ExactDeterminant:
    """log |det dr/du| and its gradient by MUMPS, L D L^T where the Jacobian is symmetric for any inputs, else LU.

    Args:
        pde: The weak form.
        factor_budget: Bytes per rank for factorisations that are kept from value to gradient.

    Raises:
        UnsupportedForm: Where PETSc has no MUMPS.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm, factor_budget: int) -> None:
        if not can_select():
            raise UnsupportedForm(
                "ExactLogdet takes determinants and entries of inverses from MUMPS, which this PETSc does not have. Take "
                "fem_vi.StochasticLogdet(), or install a PETSc with MUMPS."
            )
        jacobian = GenericJacobian(pde)
        jacobian.destroy()
        method = "cholesky" if jacobian.is_symmetric else "lu"
        options = Options({"pc_type": method, "mat_mumps_icntl_33": 1}, watched=[])
        self.samples = JacobianSamples(pde)
        self._pde = pde
        self.factors = FactorPool(
            pde.jacobian,
            pde.boundary,
            options,
            factor_budget,
            is_symmetric=jacobian.is_symmetric,
            check=Factor.log_determinant,  # PETSc cannot solve any more where MUMPS has given entries of the inverse
        )

    @cached_property
    def _blocks(self) -> JacobianBlocks:
        return JacobianBlocks(self._pde)

    @cached_property
    def gradient(self) -> TraceGradient:
        """sum_e H_e : dA."""
        return TraceGradient(self._pde)

    def value(self, sample: Sequence[Array], key: Hashable) -> float:
        """log |det dr/du| of a sample, replicated.

        Args:
            sample: Owned values of the state and of each input; they stay loaded.
            key: Names the Jacobian.

        Raises:
            SolveFailed: On every rank, where the Jacobian is singular.

        MPI: Collective.
        """
        self.samples.load(sample)
        return self.factors.get(key).log_determinant()

    def blocks(self, sample: Sequence[Array], key: Hashable) -> Blocks:
        """The entries of the inverse that `gradient` wants; arguments and errors as for `value`. Collective."""
        self.samples.load(sample)
        factor = self.factors.get(key)
        factor.log_determinant()  # which refuses a singular one
        return self._blocks.compute(factor.ksp.getPC().getFactorMatrix())
