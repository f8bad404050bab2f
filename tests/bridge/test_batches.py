"""Samples that share a Jacobian: one factorisation, all right-hand sides at once, and the same numbers as one by one."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem
from mpi4py import MPI
from torch import Tensor

import fem_vi
from fem_vi import parallel
from fem_vi.pde import factors
from tests.helpers import boundary_dofs, interpolated, left, square

COMM = MPI.COMM_WORLD
OPTIONS = [{}, {"pc_type": "lu"}, {"pc_type": "cholesky"}, {"ksp_type": "cg", "pc_type": "jacobi"}]


def sources(comm: MPI.Comm, **settings: Any) -> tuple[fem_vi.Solve, list[Tensor], Any]:
    """Two sources, one of them in another space and one nonlinear, with zero or given values on one side."""
    msh = square(comm)
    V, Q = fem.functionspace(msh, ("Lagrange", 1)), fem.functionspace(msh, ("DG", 0))
    u, v, f, q, h = fem.Function(V), ufl.TestFunction(V), fem.Function(V), fem.Function(Q), fem.Function(V)
    lifted = settings.pop("lifted", False)
    F = ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + u * v * ufl.dx - f * v * ufl.dx - q * v.dx(0) * ufl.dx
    given, spaces = [f, q], [V, Q]
    if settings.pop("nonlinear_source", False):
        F -= f**2 * v * ufl.ds
    if lifted:
        given, spaces = [*given, h], [*spaces, V]
    bcs = [fem.dirichletbc(h, boundary_dofs(V, left))]
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=given, bcs=bcs), **settings)
    return solve, [interpolated(space, 1.0, 0.3 + k) for k, space in enumerate(spaces)], V


@pytest.mark.mpi
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
@pytest.mark.parametrize("kind", ["matrices", "lifted", "nonlinear_source"])
def test_a_batch_is_its_samples(kind: str, options: dict[str, Any]) -> None:
    solve, values, V = sources(COMM, petsc_options=options, **({kind: True} if kind != "matrices" else {}))
    first, *rest = values
    scales = torch.tensor([1.0, -0.5, 2.0, 0.0], dtype=torch.float64)[:, None]
    weight = interpolated(V, 1.0, 2.0)
    batched = [(scales * first).requires_grad_(), *(x.clone().requires_grad_() for x in rest)]
    u = solve(*batched)
    assert solve.num_factorisations == 1
    gradients = torch.autograd.grad(fem_vi.all_sum((u.square() * weight).sum(), COMM), batched)
    sums = [torch.zeros_like(x) for x in rest]
    for k, scale in enumerate(scales):
        one = [(scale * first).requires_grad_(), *(x.clone().requires_grad_() for x in rest)]
        alone = solve(*one)
        assert torch.allclose(alone, u[k], rtol=1e-9, atol=1e-11)
        own = torch.autograd.grad(fem_vi.all_sum((alone.square() * weight).sum(), COMM), one)
        assert torch.allclose(own[0], gradients[0][k], rtol=1e-8, atol=1e-10)
        for total, part in zip(sums, own[1:], strict=True):
            total += part
    for total, gradient in zip(sums, gradients[1:], strict=True):
        assert torch.allclose(total, gradient, rtol=1e-8, atol=1e-10)
    assert solve.num_factorisations == 1


@pytest.mark.mpi
def test_more_samples_than_a_block_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    solve, (f, q), _ = sources(COMM)
    batch = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None] * f
    expected = solve(batch, q)
    monkeypatch.setattr(factors, "BLOCK", 3)
    assert torch.allclose(solve(batch, q), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.mpi
def test_equal_values_share_a_factor_wherever_they_come_from() -> None:
    """Samples of one batch, calls, and the tensors of another graph: what the Jacobian sees decides."""
    msh = square(COMM)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, v, m = fem.Function(V), ufl.TestFunction(V), fem.Function(V)
    F = ufl.exp(m) * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx + u * v * ufl.dx - v * ufl.dx
    solve = fem_vi.Solve(fem_vi.WeakForm(F, state=u, inputs=[m]))
    x, y = interpolated(V, 1.0, 0.3), interpolated(V, 0.5, 1.3)
    batch = solve(torch.stack([x, y, x]))
    assert solve.num_factorisations == 2
    assert torch.equal(batch[0], batch[2])
    z = y.clone().requires_grad_()
    solve(z).sum().backward()
    assert solve.num_factorisations == 2
    assert not torch.equal(solve(1.0000001 * y), batch[1])
    assert solve.num_factorisations == 3


def test_a_wrong_sample_of_a_block_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a random combination notices one wrong solution among many, and says which."""
    solve, (f, q), _ = sources(MPI.COMM_SELF)
    plain = factors.DenseBlock.scales

    def spoil(self: factors.DenseBlock) -> np.ndarray:
        self.left[2] *= 1 + 1e-4
        return plain(self)

    monkeypatch.setattr(factors.DenseBlock, "scales", spoil)
    monkeypatch.setattr(factors.Factor, "_trusted", lambda self: False)
    with pytest.raises(fem_vi.SolveFailed, match=r"sample 2 of 4.*relative residual"):
        solve(torch.linspace(1, 2, 4, dtype=torch.float64)[:, None] * f, q)


@pytest.mark.mpi
def test_names_of_jacobians_tell_ranks_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A here and B there is not B here and A there, also where all ranks hash alike (PYTHONHASHSEED)."""
    monkeypatch.setattr(parallel, "hash", lambda parts: zlib.crc32(repr(parts).encode()), raising=False)
    a, b = np.zeros(2), np.ones(2)
    first, second = (a, b) if COMM.rank == 0 else (b, a)
    names = parallel.fingerprint(COMM, [[first], [second], [first]])
    assert names[0] == names[2] != names[1]


@pytest.mark.mpi
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_right_hand_sides_of_any_size(scale: float) -> None:
    solve, (f, q), _ = sources(COMM)
    assert torch.allclose(solve(scale * f, scale * q) / scale, solve(f, q), rtol=1e-10, atol=1e-14)
