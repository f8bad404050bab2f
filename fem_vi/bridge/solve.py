"""`Solve`: the state of a PDE as a differentiable function of its inputs.

For F(u, m; v) = 0 and a loss with cotangent g = dL/du, differentiate F(u(m), m) = 0:

    dF/du du + dF/dm dm = 0      so      dL = g^T du = -g^T (dF/du)^-1 dF/dm dm = -lam^T dF/dm dm,
    (dF/du)^T lam = g, lam = 0 on the Dirichlet boundary.

The prescribed values h are part of the state, u = (u_I, h): dL = g_I^T du_I + g_B^T dh with J_II du_I = -J_IB dh, so
dL/dh = g_B - J_IB^T lam_I, which is g - (dF/du)^T lam on the boundary dofs.

Forward mode solves J du = -dF/dm dm. For second derivatives, with T(lam) = (dF/du du + dF/dm dm) . lam, the gradient for u and m
of g^T du, at a fixed direction dm, is that of -T(lam): assembly only (see `fem_vi.bridge.operator`).
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fem_vi.arguments import instance, whole
from fem_vi.bridge.call import Call
from fem_vi.bridge.operator import BatchedOperator, Bend
from fem_vi.bridge.split import Split
from fem_vi.errors import SolveFailed
from fem_vi.parallel import any_rank_each
from fem_vi.pde.adjoint import ResidualVjp
from fem_vi.pde.agree import agreed
from fem_vi.pde.inputs import Array
from fem_vi.pde.kernels import Samples
from fem_vi.pde.matrix import Assemble
from fem_vi.pde.petsc_options import Option, check_options
from fem_vi.pde.sample_kernels import Jacobians, LoadedJacobians, SampleKernels
from fem_vi.pde.state import StateEquation
from fem_vi.pde.tangent import ResidualTangent
from fem_vi.pde.weak_form import WeakForm, check_weak_form

_LOADED = LoadedJacobians()


@dataclass(frozen=True)
class RaiseFailed:
    """Raise `SolveFailed` where the solve of a sample fails."""


@dataclass(frozen=True)
class MaskFailed:
    """Return NaN for samples whose solve fails, with a warning that says how many and which."""


class Solve(BatchedOperator):
    """u = solve(m, ...): the state with F(u, m; v) = 0 for all v, differentiable twice for every input.

    A form that is affine in the state is solved by one factorisation, which adjoint and tangent solves use again. Samples
    that share the inputs of the Jacobian share the factorisation, and with a direct method are solved all at once. Other forms
    go through PETSc's SNES, from the values that the state Function had when the `WeakForm` was built.

    What a batch of more than four samples needs of its form is evaluated for all of them at once, by C that is compiled for it
    when the first such batch comes (see `CompiledKernel`): gradients and right-hand sides, and on one rank the Jacobians of
    samples that have their own. Forms that have no such code, and Jacobians with inner facets, are assembled sample by sample.

    Second derivatives are those of reverse mode over either mode and of forward over reverse mode: `torch.autograd.grad` with
    `create_graph=True`, `torch.func.hessian`. Third ones are refused.

    Args:
        pde: The weak form.
        petsc_options: SNES, KSP and PC options without prefix, such as `{"ksp_type": "cg", "pc_type": "hypre"}`; set under a
            prefix that no other object has. They go before the defaults below.
        factor_budget: Bytes per rank for factorisations kept between forward and backward; the least recently used
            goes first and is rebuilt when it is needed.
        failed: What to do where the solve of a sample fails: `RaiseFailed()` or `MaskFailed()`. A masked sample has NaN for
            its gradient too, unless its cotangent is zero.

    Defaults:
        `ksp_rtol` 1e-10, `snes_rtol` 1e-10. Where one of `ksp_type`, `pc_type` and `pc_factor_mat_solver_type` is given, the
        others are preonly, lu and mumps. Where none is, the method is chosen when the operator is built, from the Jacobian at
        random inputs: MUMPS, as L D L^T (with pivots, also for indefinite matrices) where it is symmetric, else as LU. Continuous
        Lagrange spaces beyond 4e5 unknowns in the plane, 3e4 in space (three times as many where the Jacobian is not symmetric,
        or sees neither inputs nor state) get CG with BoomerAMG where it is symmetric, with GAMG and the rigid body modes where
        the state has also a component for each dimension, else GMRES with BoomerAMG; provided that the diagonal is positive and
        that this solves a trial system in 100 iterations. A GAMG that you ask for is told the rigid body modes too.

    Call:
        `solve(*inputs)`, in the order of `WeakForm(inputs=[...])`: `(*batch, n_owned)` for a Function, replicated
        `(*batch, *shape)` for a Constant; returns the state, a field tensor `(*batch, n_owned)`.

    Raises:
        InvalidInput: See `BatchedOperator.__call__`.
        UnsupportedForm: Where no integral reaches an unknown, and no condition prescribes it.
        SolveFailed: On every rank, where a solver did not converge: PETSc's reason, iterations, residual, which sample.

    MPI: Collective, forward and backward.

    References:
        Hinze, Pinnau, Ulbrich, Ulbrich (2009), Optimization with PDE Constraints, section 1.6.

    Example:
        >>> solve = fem_vi.Solve(pde)
        >>> loss = (observe(solve(m)) - y).square().sum()
        >>> loss.backward()
    """

    def __init__(
        self,
        pde: WeakForm,
        *,
        petsc_options: Mapping[str, Option] | None = None,
        factor_budget: int = 2**30,
        failed: RaiseFailed | MaskFailed | None = None,
    ) -> None:
        with agreed(pde):
            check_weak_form("Solve: pde", pde)
            check_options(petsc_options)
            instance("failed", failed, RaiseFailed, MaskFailed, type(None))
            whole("Solve: factor_budget", factor_budget, least=0)
        super().__init__(pde.space.mesh, pde.inputs, pde.unknown.shape)
        self.pde = pde
        self._equation = StateEquation(pde, petsc_options or {}, factor_budget)
        self._vjp = ResidualVjp(pde, self._equation.matrices)
        self._kernels = SampleKernels(pde)
        self._masks = isinstance(failed, MaskFailed)

    @property
    def num_factorisations(self) -> int:
        """Factorisations (or preconditioner set-ups) of the Jacobian so far, without those inside SNES."""
        return self._equation.factors.num_factorisations

    @property
    def petsc_options(self) -> dict[str, Option]:
        """The options that the solver works with: those given, and those chosen."""
        return dict(self._equation.options)

    def __repr__(self) -> str:
        kind = "linear" if self.pde.is_linear else "nonlinear"
        return f"Solve({kind}, {len(self.pde.inputs)} inputs, petsc_options={self.petsc_options})"

    @cached_property
    def split(self) -> Split:
        """The parts of a mixed state: `velocity, pressure = solve.split(u)`; see `Split`. Collective when first used."""
        return Split(self.pde.space)

    @cached_property
    def _tangent(self) -> ResidualTangent:
        return ResidualTangent(self.pde)

    def _check_state(self) -> None:
        self.pde.check_fixed()

    def _forward(self, call: Call, flat: Sequence[Array]) -> Array:
        out = np.empty((call.num_samples, self.pde.unknown.size))
        failures: dict[int, SolveFailed] = {}
        groups = self._groups(call, flat)
        jacobians = self._jacobians(call, flat, groups)
        systems = self._kernels.systems(call.num_samples, flat, call.rows) if self._equation.assembles_systems else None
        for number, group in enumerate(groups):
            out[group.where], failed = self._equation.solve_many(
                group.values,
                group.key,
                systems=None if systems is None else systems.of(group.where),
                assemble=jacobians.assembler(number),
            )
            if failed:
                failures |= {group.samples[k]: error for k, error in failed.items()}
            if not call.keep and group.key is not None:
                self._equation.factors.release(group.key)
            if failures and not self._masks:
                break
        if failures:
            self._report(call, failures)
            out[list(failures)] = np.nan
        return out

    def _report(self, call: Call, failures: Mapping[int, SolveFailed]) -> None:
        """Raise the first failure, or warn of all."""
        sample, error = min(failures.items())
        if not self._masks:
            raise SolveFailed(f"Solve: {_which(call, sample)}: {error}.") from error
        warnings.warn(
            f"Solve: {len(failures)} of {call.num_samples} samples failed and are NaN: {sorted(failures)}; the first: {error}.",
            stacklevel=2,
        )

    def _groups(self, call: Call, flat: Sequence[Array], states: Array | None = None) -> list[_Group]:
        """Samples that share a Jacobian together, in the order of their first ones; worked out once in a call.

        Args:
            call: The call.
            flat: Its inputs.
            states: For a form that is not linear, the states; without them each sample is alone and has no key.
        """
        if not self.pde.is_linear and states is None:
            return [_Group(None, [sample], [call.values(flat, sample)]) for sample in range(call.num_samples)]
        if call.num_samples == 1:
            return [self._single(call, flat, states)]
        if "groups" not in call.saved:
            call.saved["groups"] = self._samples_of_keys(call, flat, states)
        groups: dict[Hashable, list[int]] = call.saved["groups"]
        return [_Group(key, samples, [call.values(flat, sample) for sample in samples]) for key, samples in groups.items()]

    def _jacobians(self, call: Call, flat: Sequence[Array], groups: Sequence[_Group], states: Array | None = None) -> Jacobians:
        """The Jacobians of some groups, each that of its first sample; arguments as for `_groups`."""
        if not self._kernels.take(len(groups)) or (not self.pde.is_linear and states is None):
            return _LOADED
        first = np.array([group.samples[0] for group in groups], dtype=np.intp)
        own = None if self.pde.is_linear or states is None else states[first]
        return self._kernels.jacobians(len(groups), flat, [rows[first] for rows in call.rows], own)

    def _single(self, call: Call, flat: Sequence[Array], states: Array | None) -> _Group:
        """The group of a call with one sample."""
        values = [call.values(flat, 0)]
        if "key" not in call.saved:
            (call.saved["key"],) = self._equation.keys(values, states)
        return _Group(call.saved["key"], [0], values)

    def _samples_of_keys(self, call: Call, flat: Sequence[Array], states: Array | None) -> dict[Hashable, list[int]]:
        """The samples of each Jacobian; no values, which stay with the tensors that torch has saved."""
        values = [call.values(flat, sample) for sample in range(call.num_samples)]
        groups: dict[Hashable, list[int]] = {}
        for sample, key in enumerate(self._equation.keys(values, states)):
            groups.setdefault(key, []).append(sample)
        return groups

    def _backward(self, call: Call, flat: Sequence[Array], out: Array, g: Array, grads: Sequence[Array | None]) -> Array:
        lam = np.empty(g.shape)
        if self._masks:
            lam.fill(0.0)
            self._mask_gradients(call, out, g, grads)
        at = _Adjoint(flat, out, g, lam)
        groups = self._alive(call, flat, out)
        jacobians = self._jacobians(call, flat, groups, out)
        for number in reversed(range(len(groups))):  # the factor used last is the one surely kept
            group = groups[number]
            lam[group.where] = self._solve_adjoints(call, group, at, jacobians.assembler(number))
            if group.key is not None:
                self._equation.factors.release(group.key)
        self._add_gradients(call, groups, at, grads)
        return lam

    def _add_gradients(self, call: Call, groups: Sequence[_Group], at: _Adjoint, grads: Sequence[Array | None]) -> None:
        """Add the gradients of the samples of some groups."""
        if call.num_samples > 1:
            samples = sorted(sample for group in groups for sample in group.samples)
            grads = self._add_gradients_at_once(call, samples, at, grads)
        if all(grad is None for grad in grads):
            return
        for group in groups:
            for sample, values in zip(group.samples, group.values, strict=True):
                self._equation.load(values, at.out[sample])
                self._vjp.load(at.lam[sample])
                rows = [None if grad is None else grad[call.rows[k][sample]] for k, grad in enumerate(grads)]
                self._vjp.add_implicit(at.g[sample], rows)

    def _add_gradients_at_once(
        self, call: Call, samples: Sequence[int], at: _Adjoint, grads: Sequence[Array | None]
    ) -> Sequence[Array | None]:
        """Add the gradients that are known for all samples together, and return those that are left."""
        chosen = np.array(samples, dtype=np.intp)
        rows = [own[chosen] for own in call.rows]
        lam = at.lam if len(samples) == len(at.lam) else at.lam[chosen]
        left = self._vjp.add_products(lam, rows, grads)
        if all(grad is None for grad in left):
            return left
        added = self._kernels.add_implicit(Samples([at.out, *at.flat], [chosen, *rows]), at.g, lam, left)
        return [None] * len(left) if added else left

    def _dead(self, out: Array) -> NDArray[np.bool_]:
        """Which samples failed. Collective where failures are masked."""
        return any_rank_each(self.comm, np.any(np.isnan(out), axis=1)) if self._masks else np.zeros(len(out), dtype=bool)

    def _alive(self, call: Call, flat: Sequence[Array], out: Array) -> list[_Group]:
        """Groups without the samples that failed."""
        groups = self._groups(call, flat, out)
        if not self._masks:
            return groups
        dead = self._dead(out)
        return [group for group in (group.without(dead) for group in groups) if group.samples]

    def _mask_gradients(self, call: Call, out: Array, g: Array, grads: Sequence[Array | None]) -> None:
        """NaN for what failed samples read, unless their cotangent is zero."""
        for sample in np.flatnonzero(self._dead(out) & any_rank_each(self.comm, np.any(g != 0.0, axis=1))):
            for k, grad in enumerate(grads):
                if grad is not None:
                    grad[call.rows[k][sample]] = np.nan

    def _solve_adjoints(self, call: Call, group: _Group, at: _Adjoint, assemble: Assemble) -> Array:
        """lam of samples that share a Jacobian."""
        lam, failed = self._equation.solve_adjoints(
            group.values[0], at.out[group.samples[0]], at.g[group.where], group.key, assemble=assemble
        )
        if failed:
            k, error = min(failed.items())
            raise SolveFailed(f"Solve: {_which(call, group.samples[k])}: adjoint: {error}.") from error
        return lam

    def _pushforward(self, call: Call, flat: Sequence[Array], out: Array, tangents: Sequence[Array]) -> Array:
        moved = np.full_like(out, np.nan)
        for group in self._alive(call, flat, out):
            right, lifting = [], []
            for sample, values in zip(group.samples, group.values, strict=True):
                self._equation.load(values, out[sample])
                directions = call.values(tangents, sample)
                lifting.append(self._prescribed_tangent(directions))
                self._tangent.load(lifting[-1], directions)
                right.append(-self._tangent.vector())
            b = np.stack(right)
            b[:, self.pde.boundary.owned] = 0.0
            du, failed = self._equation.factors.get(group.key).solve_many(b, transposed=False)
            if failed:
                k, error = min(failed.items())
                raise SolveFailed(f"Solve: {_which(call, group.samples[k])}: tangent: {error}.") from error
            moved[group.where] = du + np.stack(lifting)
        return moved

    def _prescribed_tangent(self, directions: Sequence[Array]) -> Array:
        """dh on the prescribed dofs, zero elsewhere: owned coefficients of the state."""
        du = np.zeros(self.pde.unknown.size)
        for source in self.pde.boundary.sources:
            source.push(directions[source.position], du)
        return du

    def _curvature(self, call: Call, flat: Sequence[Array], bend: Bend, at_out: Array, grads: Sequence[Array]) -> None:
        dead = self._dead(bend.out)
        touched = any_rank_each(self.comm, np.any(bend.lam != 0.0, axis=1))
        for sample in range(call.num_samples):
            if dead[sample]:
                if touched[sample]:
                    for part in (at_out[sample], *(grad[call.rows[k][sample]] for k, grad in enumerate(grads))):
                        part[...] = np.nan
                continue
            self._equation.load(call.values(flat, sample), bend.out[sample])
            self._tangent.load(bend.out_dot[sample], call.values(bend.tangents, sample))
            self._tangent.load_test(bend.lam[sample])
            at_out[sample] -= self._tangent.gradient(0)
            for k, grad in enumerate(grads):
                grad[call.rows[k][sample]] -= self._tangent.gradient(1 + k)


class _Adjoint(NamedTuple):
    """What the gradients of a call are made of: the values of its inputs; and states, cotangents and lam of all samples."""

    flat: Sequence[Array]
    out: Array
    g: Array
    lam: Array


class _Group(NamedTuple):
    """Samples that share a Jacobian: its key, their numbers, and the values of their inputs."""

    key: Hashable
    samples: list[int]
    values: list[list[Array]]

    @property
    def where(self) -> slice | list[int]:
        """Index of the samples: a slice, which makes no copies, where they follow one another."""
        first, last = self.samples[0], self.samples[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.samples) else self.samples

    def without(self, dead: NDArray[np.bool_]) -> _Group:
        """The samples that are not marked."""
        alive = [k for k, sample in enumerate(self.samples) if not dead[sample]]
        return _Group(self.key, [self.samples[k] for k in alive], [self.values[k] for k in alive])


def _which(call: Call, sample: int) -> str:
    return f"sample {sample} of {call.num_samples}" if call.batch else "the solve"
