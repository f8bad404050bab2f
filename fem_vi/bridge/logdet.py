"""log |det dr/du| of a residual as a differentiable function of state and inputs.

Where a posterior is built from residuals, p(r = 0 | u, m) = N(r(u, m); 0, eps^2) with a flat p(u), the integral over u leaves
1 / |det dr/du(m)| behind: a prior that nobody asked for, worse on finer meshes. Adding this term to the log density removes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fem_vi.arguments import whole
from fem_vi.bridge.call import Call
from fem_vi.bridge.operator import BatchedOperator
from fem_vi.errors import SolveFailed
from fem_vi.parallel import shared_seed
from fem_vi.pde.determinant import ExactDeterminant
from fem_vi.pde.inputs import Array
from fem_vi.pde.stochastic_determinant import StochasticDeterminant
from fem_vi.pde.weak_form import WeakForm


@dataclass(frozen=True)
class ExactLogdet:
    """From a factorisation by MUMPS; the gradient from the entries of the inverse on the pattern of the Jacobian.

    The value costs one factorisation, the gradient 10 to 30 of them for P1 elements with up to 4e4 unknowns, in the plane as in
    space, and more beyond.

    Attributes:
        factor_budget: Bytes per rank for factorisations that are kept from value to gradient.
    """

    factor_budget: int = 2**30

    def __post_init__(self) -> None:
        """Check."""
        whole("factor_budget", self.factor_budget, least=0)


@dataclass(frozen=True)
class StochasticLogdet:
    """A random estimate for large problems whose Jacobian is symmetric and positive definite.

    Value: stochastic Lanczos quadrature, the mean over probes z of z^T log(S) z, S the Jacobian K scaled to a diagonal of ones.
    Gradient: Hutchinson's estimate, the mean of z^T K^-1 dK z over the same probes, which takes as many solves. It is an
    unbiased estimate of the gradient, not the gradient of the estimated value. Probes are drawn anew in each call from torch's
    generator (that of rank 0), for each sample of a batch its own.

    Attributes:
        probes: Random vectors of signs; the standard error falls with the root of their number.
        steps: Steps of Lanczos's iteration for each, about the root of the condition number of the scaled Jacobian or more. What
            fewer leave out is no part of the standard error.

    References:
        Ubaru, Chen, Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature.
        Hutchinson (1989), A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines.
    """

    probes: int = 32
    steps: int = 40

    def __post_init__(self) -> None:
        """Check."""
        whole("probes", self.probes, least=2)
        whole("steps", self.steps, least=1)


class LogdetEstimate(NamedTuple):
    """An estimate of log |det dr/du| and how far it may be off.

    Attributes:
        value: `(*batch,)`, replicated, differentiable once.
        standard_error: The standard deviation over probes over the root of their number, `(*batch,)`, replicated; zero for an
            exact value.
    """

    value: Tensor
    standard_error: Tensor


LogdetMethod = ExactLogdet | StochasticLogdet


def create_logdet(pde: WeakForm, method: LogdetMethod) -> _Logdet:
    """The operator of a method. Collective."""
    return _ExactLogdet(pde, method) if isinstance(method, ExactLogdet) else _StochasticLogdet(pde, method)


class _Logdet(BatchedOperator):
    """(log |det dr/du|, its standard error), shape (2,); the second is not differentiated."""

    def __init__(self, pde: WeakForm) -> None:
        super().__init__(pde.space.mesh, [pde.unknown, *pde.inputs], (2,))
        self.pde = pde

    @property
    def _name(self) -> str:
        return "Residual.logdet"

    def _check_state(self) -> None:
        self.pde.check_fixed()

    def estimate(self, u: Tensor, *inputs: Tensor) -> LogdetEstimate:
        """Value and standard error. Collective."""
        out = self(u, *inputs)
        return LogdetEstimate(out[..., 0], out[..., 1].detach())


class _ExactLogdet(_Logdet):
    """d log |det A| = tr(A^-1 dA); see `fem_vi.pde.jacobian_trace`."""

    def __init__(self, pde: WeakForm, method: ExactLogdet) -> None:
        super().__init__(pde)
        self._determinant = ExactDeterminant(pde, method.factor_budget)

    @property
    def num_factorisations(self) -> int:
        """Factorisations so far."""
        return self._determinant.factors.num_factorisations

    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        out = np.zeros((call.num_samples, 2))
        samples = [call.values(flat, sample) for sample in range(call.num_samples)]
        for key, members in self._determinant.samples.groups(samples).items():
            try:
                out[members, 0] = self._determinant.value(samples[members[0]], key)
            except SolveFailed as error:
                raise SolveFailed(f"Residual.logdet: sample {members[0]}: {error}.") from error
            if not call.keep:
                self._determinant.factors.release(key)
        return out

    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> Array:
        samples = [call.values(flat, sample) for sample in range(call.num_samples)]
        gradient = self._determinant.gradient
        wanted = [k for k in gradient.positions if grads[k] is not None]
        groups = self._determinant.samples.groups(samples) if wanted else {}
        for key, members in reversed(groups.items()):  # the factor used last is the one surely kept
            blocks = self._determinant.blocks(samples[members[0]], key)
            for k in wanted:
                slope = gradient.assemble(k, blocks)
                for sample in members:
                    grads[k][call.rows[k][sample]] += g[sample, 0] * slope  # type: ignore[index]
            self._determinant.factors.release(key)
        return g


class _StochasticLogdet(_Logdet):
    """Lanczos quadrature, and Hutchinson's estimate of the gradient; see `fem_vi.pde.stochastic_determinant`."""

    def __init__(self, pde: WeakForm, method: StochasticLogdet) -> None:
        super().__init__(pde)
        self._determinant = StochasticDeterminant(pde, method.probes, method.steps)

    def _seed(self, call: Call) -> int:
        if "seed" not in call.saved:
            call.saved["seed"] = shared_seed(self.comm, int(torch.randint(2**62, ()).item()))
        return int(call.saved["seed"])

    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        out = np.empty((call.num_samples, 2))
        for sample in range(call.num_samples):
            out[sample] = self._determinant.value(call.values(flat, sample), (self._seed(call), sample))
        return out

    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> Array:
        wanted = [k for k in self._determinant.positions if grads[k] is not None]
        for sample in range(call.num_samples if wanted else 0):
            slopes = self._determinant.gradient(call.values(flat, sample), (self._seed(call), sample), wanted)
            for k, slope in zip(wanted, slopes, strict=True):
                grads[k][call.rows[k][sample]] += g[sample, 0] * slope  # type: ignore[index]
        return g
