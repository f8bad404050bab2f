"""The parts of mixed and vector fields, in spaces of their own."""

from __future__ import annotations

from typing import Any

import basix.ufl
import numpy as np
import pytest
import torch
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from tests.helpers import interpolated, owned, square, stokes

COMM = MPI.COMM_WORLD


def element(msh: mesh.Mesh, family: str, degree: int, **options: Any) -> Any:
    return basix.ufl.element(family, msh.basix_cell(), degree, **options)


def spaces(comm: MPI.Comm) -> dict[str, Any]:
    msh = square(comm, 4)
    taylor_hood = [element(msh, "Lagrange", 2, shape=(2,)), element(msh, "Lagrange", 1)]
    return {
        "Taylor-Hood": fem.functionspace(msh, basix.ufl.mixed_element(taylor_hood)),
        "three parts": fem.functionspace(
            msh, basix.ufl.mixed_element([element(msh, "DG", 0), element(msh, "RT", 2), element(msh, "Lagrange", 1)])
        ),
        "vector": fem.functionspace(msh, ("Lagrange", 2, (2,))),
        "symmetric tensor": fem.functionspace(msh, element(msh, "Lagrange", 1, shape=(2, 2), symmetry=True)),
    }


@pytest.mark.mpi
@pytest.mark.parametrize("name", spaces(MPI.COMM_SELF))
def test_parts_are_those_that_dolfinx_collapses(name: str) -> None:
    """Ranks and coefficients alike; observed in its own space, a part has the values that it has in the whole."""
    W = spaces(COMM)[name]
    w = fem.Function(W)
    tensor = interpolated(W, 1.0, 0.4)
    w.x.array[: tensor.numel()] = tensor.numpy()
    w.x.scatter_forward()
    split = fem_vi.Split(W)
    parts = split(owned(w))
    points = np.random.default_rng(0).uniform(0.05, 0.95, (15, 2))
    assert len(parts) == W.num_sub_spaces
    for k, (space, part) in enumerate(zip(split.spaces, parts, strict=True)):
        assert torch.equal(part, owned(w.sub(k).collapse()))
        whole = fem_vi.PointObservation(W.sub(k), points)(owned(w))
        assert torch.allclose(fem_vi.PointObservation(space, points)(part), whole, rtol=1e-13, atol=1e-14)
    assert sum(part.numel() for part in parts) == owned(w).numel()


@pytest.mark.mpi
def test_a_solution_splits_with_batches_and_gradients() -> None:
    case = stokes(COMM)
    solve = fem_vi.Solve(case.pde)
    m, *others = case.values
    m = torch.stack([m, 0.5 * m]).requires_grad_()
    u = solve(m, *others)
    velocity, pressure = solve.split(u)
    assert solve.split.spaces[1].ufl_element() == case.state.function_space.sub(1).ufl_element()
    assert velocity.shape[0] == pressure.shape[0] == 2
    loss = fem_vi.all_sum(velocity.square().sum() + pressure.square().sum(), COMM)
    whole = fem_vi.all_sum(u.square().sum(), COMM)
    assert torch.allclose(loss, whole, rtol=1e-13)
    (gradient,) = torch.autograd.grad(loss, m, retain_graph=True)
    (expected,) = torch.autograd.grad(whole, m)
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12)


def test_gradcheck_to_second_order() -> None:
    split = fem_vi.Split(spaces(MPI.COMM_SELF)["Taylor-Hood"])
    u = interpolated(spaces(MPI.COMM_SELF)["Taylor-Hood"], 1.0, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(split, u, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: tuple(part.sin() for part in split(x)), u, fast_mode=True)


@pytest.mark.mpi
def test_parts_have_names_on_request() -> None:
    W = spaces(COMM)["Taylor-Hood"]
    u = interpolated(W, 1.0, 0.0)
    split = fem_vi.Split(W)
    flow = split(u, names=["velocity", "pressure"])
    assert torch.equal(flow.velocity, split(u)[0])
    assert torch.equal(flow.pressure, split(u)[1])
    assert tuple(flow)[1] is flow.pressure


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda W, u: fem_vi.Split(fem.functionspace(W.mesh, ("Lagrange", 1))), "no parts"),
        (lambda W, u: fem_vi.Split(W)(u[1:]), "u has shape"),
        (lambda W, u: fem_vi.Split(W)(u.numpy()), "ndarray"),
        (lambda W, u: fem_vi.Split(W)(u[1:] if COMM.rank == COMM.size - 1 else u), "u has shape"),
        (lambda W, u: fem_vi.Split(W)(u, names=["velocity"]), "2 names"),
        (lambda W, u: fem_vi.Split(W)(u, names="vp"), "2 names"),
        (lambda W, u: fem_vi.Split(W)(u, names=["v", "class"]), "keyword"),
    ],
)
def test_mistakes_are_named_on_every_rank(call: Any, words: str) -> None:
    W = spaces(COMM)["Taylor-Hood"]
    with pytest.raises(fem_vi.InvalidInput, match=words):
        call(W, interpolated(W, 1.0, 0.0))
