"""Corrections and subsets of residuals against what they are made of.

    OMP_NUM_THREADS=1 container/run python3 -m tests.benchmarks.bench_corrected [n ...]

First table: log |det| with its gradient, exact and with 16 probes, against one numerical factorisation of the same Jacobian by
MUMPS (assembly left out); the exact value alone; and, where there are few unknowns, value and gradient against solving for all
columns of the inverse, 128 at once. Second table: 1 % of the rows of 16 residuals, chosen at random for each call, and 1 % of the
rows in one patch of the mesh, values and gradients, against all rows. -div(exp(m) grad u) = 1, P1, CPU time, medians of rounds.
Bars: 40 factorisations for the exact value and gradient up to n = 128; a fifth of the whole residual for a patch from n = 64.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import fem_vi
from fem_vi.pde.determinant import ExactDeterminant
from fem_vi.pde.reference import ReferenceJacobian
from tests.benchmarks.compare import Comparison, compare, variations
from tests.benchmarks.hand_written import Diffusion

BATCH = 16


@dataclass(frozen=True)
class Setting:
    """The residual, a state, and parameters that differ from call to call."""

    problem: Diffusion
    residual: fem_vi.Residual
    u: Tensor
    m: np.ndarray

    @staticmethod
    def create(n: int) -> Setting:
        problem = Diffusion.create(n)
        pde = fem_vi.WeakForm(problem.F, state=problem.u, inputs=[problem.m], bcs=problem.bcs)
        u, m = 0.5 * np.random.default_rng(0).standard_normal((2, pde.unknown.size))
        return Setting(problem, fem_vi.Residual(pde), torch.from_numpy(u), m)


def determinants(n: int) -> Iterator[Comparison]:
    """Rows of the first table."""
    setting = Setting.create(n)
    pde, residual = setting.residual.pde, setting.residual
    floor = ExactDeterminant(pde, 0)
    floor.value([setting.u.numpy(), setting.m], 0)
    factor = floor.factors.get(0)

    def factorise() -> None:
        factor.matrix.stateIncrease()
        factor.refresh()
        factor.log_determinant()

    near = variations(setting.m)

    def value() -> None:
        residual.logdet(setting.u, torch.from_numpy(next(near)))

    def with_gradient(method: fem_vi.ExactLogdet | fem_vi.StochasticLogdet) -> None:
        m = torch.from_numpy(next(near)).requires_grad_()
        torch.autograd.grad(residual.logdet(setting.u, m, method=method), m)

    exact, estimated = fem_vi.ExactLogdet(), fem_vi.StochasticLogdet(probes=16, steps=40)
    yield compare(f"logdet, n = {n}", factorise, value, rounds=5)
    row = compare(f"logdet and gradient, n = {n}", factorise, lambda: with_gradient(exact), rounds=5)
    yield row
    assert n > 128 or row.ratio < 40
    yield compare(f"logdet and gradient, 16 probes, n = {n}", factorise, lambda: with_gradient(estimated), rounds=5)
    if n <= 64:
        columns = ReferenceJacobian(pde, [None, setting.m], {})
        unit = np.eye(pde.unknown.size)
        yield compare(
            f"columns / entries of the inverse, n = {n}", lambda: columns.solve(unit), lambda: with_gradient(exact), rounds=3
        )


def subsets(n: int) -> Iterator[Comparison]:
    """Rows of the second table."""
    setting = Setting.create(n)
    residual, size = setting.residual, setting.residual.pde.unknown.size
    u = setting.u.expand(BATCH, -1).clone()
    m = torch.from_numpy(setting.m).expand(BATCH, -1).clone()
    points = setting.problem.V.tabulate_dof_coordinates()[:size]
    distance = np.abs(points[:, :2] - 0.5).max(axis=1)
    patch = np.argsort(distance, kind="stable")[: size // 100]

    def work(rows: Tensor | np.ndarray | None) -> None:
        at = [u.requires_grad_(), m.requires_grad_()]
        torch.autograd.grad(residual(*at, rows=rows).square().sum(), at)

    yield compare(
        f"1 % of the rows at random, n = {n}", lambda: work(None), lambda: work(residual.sample_rows(size // 100)), rounds=7
    )
    row = compare(f"1 % of the rows in a patch, n = {n}", lambda: work(None), lambda: work(patch), rounds=7)
    yield row
    assert n < 64 or row.ratio < 0.2


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    for rows in (determinants, subsets):
        for n in [int(a) for a in sys.argv[1:]] or [32, 64, 128]:
            for row in rows(n):
                print(row, flush=True)


if __name__ == "__main__":
    main()
