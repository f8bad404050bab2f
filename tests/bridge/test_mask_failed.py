"""`Solve(failed=MaskFailed())`: samples that fail are NaN, all others are as if they were alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import ufl
from dolfinx import fem
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.helpers import boundary_dofs, everywhere, interpolated, square

COMM = MPI.COMM_WORLD
FAILING = (1, 3)


def diffusion(kind: str) -> tuple[fem_vi.WeakForm, Any]:
    """-div(m k(u) grad u) = f, with f of a sample's own: singular for m = 0."""
    V = fem.functionspace(square(COMM), ("Lagrange", 1))
    u, m, f, v = fem.Function(V), fem.Function(V, name="m"), fem.Function(V, name="f"), ufl.TestFunction(V)
    k = 1 if kind == "linear" else 1 + u**2
    F = m * k * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - f * v * ufl.dx
    return fem_vi.WeakForm(F, state=u, inputs=[m, f], bcs=[fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)]), V


def samples(V: Any) -> tuple[Tensor, Tensor]:
    """Five coefficients, of which those that fail are zero, and one source for all."""
    m = torch.stack([1.0 + 0.1 * k + interpolated(V, 0.3, float(k)) for k in range(5)])
    m[list(FAILING)] = 0.0
    return m.requires_grad_(), (1.0 + interpolated(V, 0.2, 0.5)).requires_grad_()


@contextmanager
def warned_of(*numbers: int) -> Iterator[None]:
    which = ", ".join(map(str, numbers))
    with pytest.warns(UserWarning, match=rf"Solve: {len(numbers)} of 5 samples failed and are NaN: \[{which}\]"):
        yield


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_the_others_are_as_without_the_failing(kind: str) -> None:
    pde, V = diffusion(kind)
    m, f = samples(V)
    with warned_of(*FAILING):
        u = fem_vi.Solve(pde, failed=fem_vi.MaskFailed())(m, f)
    good = [k for k in range(5) if k not in FAILING]
    assert bool(u[list(FAILING)].isnan().all())
    alone, source = m.detach()[good].requires_grad_(), f.detach().clone().requires_grad_()
    expected = fem_vi.Solve(pde)(alone, source)
    assert torch.allclose(u.detach()[good], expected.detach(), rtol=1e-10, atol=1e-14)
    for got, right in zip(
        torch.autograd.grad(fem_vi.all_sum(u[good].square().sum(), COMM), [m, f]),
        torch.autograd.grad(fem_vi.all_sum(expected.square().sum(), COMM), [alone, source]),
        strict=True,
    ):
        assert torch.allclose(got[good] if got.ndim == 2 else got, right, rtol=1e-9, atol=1e-14)
        assert got.ndim == 1 or not bool(got[list(FAILING)].any()), "zero, and not NaN, where the cotangent is zero"


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_a_cotangent_that_is_not_zero_makes_the_gradient_nan(kind: str) -> None:
    """In all that the failed sample reads, and on all ranks, though one rank only has the cotangent."""
    pde, V = diffusion(kind)
    m, f = samples(V)
    with warned_of(*FAILING):
        u = fem_vi.Solve(pde, failed=fem_vi.MaskFailed())(m, f)
    g = torch.zeros_like(u)
    g[0] = 1.0
    if COMM.rank == COMM.size - 1:
        g[3, 0] = 1.0
    at_m, at_f = torch.autograd.grad(u, [m, f], grad_outputs=g)
    assert bool(at_m[3].isnan().all())
    assert bool(at_f.isnan().all()), "the source is read by all samples"
    assert bool(at_m[[0, 1, 2, 4]].isfinite().all())


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_all_fail_and_then_none(kind: str) -> None:
    pde, V = diffusion(kind)
    m, f = samples(V)
    solve = fem_vi.Solve(pde, failed=fem_vi.MaskFailed())
    with warned_of(*range(5)):
        u = solve(0.0 * m, f)
    assert bool(u.isnan().all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(solve(m[0], f), fem_vi.Solve(pde)(m[0], f), rtol=1e-10, atol=1e-14)


@pytest.mark.mpi
def test_samples_that_share_a_jacobian_fail_together() -> None:
    """They are solved at once: m is the same in all samples, f is not."""
    pde, V = diffusion("linear")
    m, f = samples(V)
    sources = torch.stack([f.detach() * (1.0 + k) for k in range(5)])
    solve = fem_vi.Solve(pde, failed=fem_vi.MaskFailed())
    with warned_of(*range(5)):
        assert bool(solve(0.0 * m[0], sources).isnan().all())


@pytest.mark.mpi
@pytest.mark.parametrize("failed", [None, fem_vi.RaiseFailed()])
def test_raising_is_the_default(failed: Any) -> None:
    pde, V = diffusion("linear")
    with pytest.raises(fem_vi.SolveFailed, match="sample 1 of 5"):
        fem_vi.Solve(pde, failed=failed)(*samples(V))


@pytest.mark.mpi
@pytest.mark.parametrize("failed", [fem_vi.MaskFailed, True, "mask"])
def test_another_choice_is_refused(failed: Any) -> None:
    pde, _ = diffusion("linear")
    with pytest.raises(fem_vi.InvalidInput, match=r"failed is .*; it must be of type RaiseFailed or MaskFailed"):
        fem_vi.Solve(pde, failed=failed)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_tangents_of_failed_samples_are_nan(kind: str) -> None:
    pde, V = diffusion(kind)
    m, f = (x.detach() for x in samples(V))
    solve = fem_vi.Solve(pde, failed=fem_vi.MaskFailed())
    with warned_of(*FAILING):
        _, moved = torch.func.jvp(lambda m: solve(m, f), (m,), (torch.ones_like(m),))
    assert bool(moved[list(FAILING)].isnan().all())
    assert bool(moved[[0, 2, 4]].isfinite().all())


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_second_derivatives_of_the_others(kind: str) -> None:
    """Zero for failed samples whose cotangents are zero; those of the others are as without them."""
    pde, V = diffusion(kind)
    solve = fem_vi.Solve(pde, failed=fem_vi.MaskFailed())
    m, f = samples(V)
    alive = [k for k in range(5) if k not in FAILING]

    def product(m: Tensor, rows: list[int]) -> Tensor:
        m = m.detach().clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = fem_vi.all_sum(solve(m, f)[rows].square().sum(), COMM)
        (g,) = torch.autograd.grad(loss, m, create_graph=True)
        return torch.autograd.grad(fem_vi.all_sum(g[rows].square().sum(), COMM), m)[0]

    among, alone = product(m, alive), product(m[alive], [0, 1, 2])
    assert torch.equal(among[list(FAILING)], torch.zeros_like(among[list(FAILING)]))
    assert torch.allclose(among[alive], alone, rtol=1e-8, atol=1e-12)
