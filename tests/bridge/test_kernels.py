"""All kernels of `Residual` give DOLFINx's numbers: values, gradients, tangents, second derivatives, on any number of ranks."""

from __future__ import annotations

import ctypes
import subprocess
import threading
from pathlib import Path
from typing import Any

import dolfinx.jit
import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from fem_vi.pde import c_compiler
from tests.helpers import CASES, owned, square
from tests.kernel_forms import FORMS, Build, apart, numbers, samples

COMM = MPI.COMM_WORLD
AGREE = 1e-12
# What takes long: the derivatives of integrals over facets of solids, high degrees.
LONG = {
    "diffusion_triangle_P4", "diffusion_tetrahedron_P3", "diffusion_hexahedron_P2", "discontinuous_quadrilateral_DG1",
    "discontinuous_tetrahedron_DG1", "discontinuous_hexahedron_DG1", "curl_curl_tetrahedron_2", "curl_curl_hexahedron_1",
    "face_elements_tetrahedron_1", "face_elements_quadrilateral_1", "navier_stokes", "hyperelasticity", "helmholtz",
}  # fmt: skip
# What differs between ranks: ghosts of vectors, dofs that are turned, inner facets between ranks, Constants, tags.
ON_RANKS = [
    "diffusion_triangle_P2",
    "face_elements_triangle_2",
    "curl_curl_tetrahedron_1",
    "discontinuous",
    "subdomains",
    "reaction",
]


def cases(names: Any) -> list[Any]:
    return [pytest.param(FORMS[name], id=name, marks=[pytest.mark.long] if name in LONG else []) for name in names]


def pair(case: Any) -> list[fem_vi.Residual]:
    return [fem_vi.Residual(case.pde, kernel=kernel) for kernel in (fem_vi.CompiledKernel(), fem_vi.AssembledKernel())]


def agree(build: Build, comm: MPI.Comm) -> None:
    case = build(comm)
    at = samples(case, 3)
    compiled, assembled = (numbers(residual, case, at, second=True) for residual in pair(case))
    assert apart(compiled, assembled, comm) < AGREE


@pytest.mark.parametrize("build", cases(FORMS))
def test_compiled_agrees_with_assembled(build: Build) -> None:
    agree(build, MPI.COMM_SELF)


@pytest.mark.mpi
@pytest.mark.skipif(COMM.size == 1, reason="the test above has it on one rank")
@pytest.mark.parametrize("build", cases(ON_RANKS))
def test_compiled_agrees_with_assembled_on_ranks(build: Build) -> None:
    agree(build, COMM)


@pytest.mark.parametrize("batch", [1, 8, 67])
@pytest.mark.parametrize("alone", [(), (0,), (1, 2)], ids=["all varied", "one state", "one of each input"])
def test_batches_and_what_they_share(batch: int, alone: tuple[int, ...]) -> None:
    case = CASES["reaction"](MPI.COMM_SELF)
    at = samples(case, batch, alone=alone)
    compiled, assembled = (numbers(residual, case, at, second=batch < 10) for residual in pair(case))
    assert apart(compiled, assembled, MPI.COMM_SELF) < AGREE


def side_by_side(x: Tensor) -> Tensor:
    """The same numbers, the samples of each entry following each other in memory."""
    return x.T.contiguous().T if x.ndim == 2 else x


@pytest.mark.mpi
@pytest.mark.parametrize("batch", [48, 67], ids=["whole blocks", "a block with a rest"])
@pytest.mark.parametrize("which", [slice(None), slice(1)], ids=["all", "only the state"])
@pytest.mark.parametrize("name", ["diffusion_triangle_P2", "curl_curl_tetrahedron_1", "discontinuous", "reaction"])
def test_samples_that_lie_side_by_side(name: str, which: slice, batch: int) -> None:
    """Lanes are then read and written where they are: ghosts, turned dofs, inner facets, Constants. No number changes."""
    case = FORMS[name](COMM)
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.CompiledKernel(num_threads=2))
    at = samples(case, batch)
    turned = [side_by_side(x) if k in range(len(at))[which] else x for k, x in enumerate(at)]
    rows, columns = (numbers(residual, case, given, second=batch == 48) for given in (at, turned))
    assert apart(columns, rows, COMM) < 1e-14
    own = torch.Size(at[0].shape).numel()
    assert columns.value.T.is_contiguous() or own == 0, "the residual lies as the state does"
    assert columns.gradients[0].T.is_contiguous() or own == 0


def test_batch_axes_of_several_inputs_cross() -> None:
    case = FORMS["diffusion_triangle_P2"](MPI.COMM_SELF)
    u, m = 0.3 * case.weights[-1], case.values[0]
    at = [torch.linspace(0.5, 1.0, 4).double().reshape(4, 1, 1) * u, torch.linspace(0.2, 1.0, 5).double().reshape(5, 1) * m]
    found = []
    for residual in pair(case):
        leaves = [x.clone().requires_grad_() for x in at]
        r = residual(*leaves)
        assert r.shape == (4, 5, u.numel())
        found.append([r.detach(), *torch.autograd.grad(r.square().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) < AGREE * float(b.abs().max())


def test_empty_batch() -> None:
    case = FORMS["diffusion_triangle_P2"](MPI.COMM_SELF)
    u = torch.empty((0, case.weights[-1].numel()), dtype=torch.float64, requires_grad=True)
    r = fem_vi.Residual(case.pde, kernel=fem_vi.CompiledKernel())(u, case.values[0])
    assert r.shape == u.shape
    assert torch.autograd.grad(r.sum(), u)[0].shape == u.shape


def test_empty_batch_beside_inputs_that_have_one_row() -> None:
    case = CASES["reaction"](MPI.COMM_SELF)
    at = [x.reshape(1, *x.shape).clone().requires_grad_() for x in samples(case, 1, alone=tuple(range(9)))]
    r = fem_vi.Residual(case.pde, kernel=fem_vi.CompiledKernel())(at[0][:0], *at[1:])
    assert r.shape == (0, at[0].shape[1])
    assert all(not g.any() for g in torch.autograd.grad(r.sum(), at))


def test_threads_change_no_bit() -> None:
    case = CASES["reaction"](MPI.COMM_SELF)
    at = samples(case, 67, alone=(1,))
    one, three = (
        numbers(fem_vi.Residual(case.pde, kernel=fem_vi.CompiledKernel(num_threads=n)), case, at, second=False) for n in (1, 3)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.all(), three.all(), strict=True))


def test_another_batch_size_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = FORMS["diffusion_triangle_P2"](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.CompiledKernel())
    numbers(residual, case, samples(case, 3), second=True)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was compiled again")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(c_compiler, "load_library", refuse)
    for batch in (1, 9, 20):
        numbers(residual, case, samples(case, batch), second=True)


@pytest.mark.parametrize("fewer", [(), ("-mno-avx512f",), ("-mno-avx",)], ids=["lanes of this processor", "four", "two"])
def test_exponential_on_lanes(fewer: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """exp over its whole range, from DG0: r_i = exp(m_i) times the area of a cell."""
    if fewer and not c_compiler.has_macro("__AVX__"):
        pytest.skip("lanes are pairs on this processor")
    native, macros = c_compiler.target()
    monkeypatch.setattr(c_compiler, "target", lambda: ((*native, *fewer), macros))
    msh = mesh.create_unit_square(MPI.COMM_SELF, 4, 4)
    V = fem.functionspace(msh, ("DG", 0))
    u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    pde = fem_vi.WeakForm((ufl.exp(m) * v + u * v) * ufl.dx, state=u, inputs=[m])
    residual = fem_vi.Residual(pde, kernel=fem_vi.CompiledKernel())
    values = torch.cat([torch.linspace(-707, 709, 4 * 32 - 2), torch.tensor([0.0, -800.0])]).double().reshape(4, 32)
    exact = torch.exp(values) / 32
    r = residual(torch.zeros(32).double(), values)
    assert float(((r - exact).abs() / exact.clamp(min=1e-300)).max()) < 1e-15
    with pytest.raises(fem_vi.NotFinite, match=r"samples \[1\] of 2"):
        residual(torch.zeros(32).double(), torch.stack([values[0], values[0] + 1417]))


def test_values_that_are_not_finite_are_found() -> None:
    V = fem.functionspace(square(MPI.COMM_SELF), ("Lagrange", 1))
    u, v = fem.Function(V), ufl.TestFunction(V)
    pde = fem_vi.WeakForm(ufl.ln(u) * v * ufl.dx, state=u, inputs=[])
    residual = fem_vi.Residual(pde, kernel=fem_vi.CompiledKernel())
    with pytest.raises(fem_vi.NotFinite, match=r"samples \[1\] of 2"):
        residual(torch.stack([owned(u) + 1.0, owned(u) - 1.0]))


LAYOUTS = {
    "rows": lambda x: x,
    "side by side": lambda x: side_by_side(x),
    "one for all": lambda x: x[-1:],
}


@pytest.mark.mpi
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrong", [0, 1, 2, 3], ids=["state", "field", "Constant", "field that the residual does not see"])
def test_inputs_that_are_not_finite_are_named(wrong: int, layout: str) -> None:
    """Also where the residual is finite all the same, as exp(-inf) is; on all ranks, where one has the wrong value."""
    V = fem.functionspace(square(COMM), ("Lagrange", 1))
    u, m, h, v = fem.Function(V), fem.Function(V), fem.Function(V), ufl.TestFunction(V)
    c = fem.Constant(V.mesh, 1.0)
    F = (ufl.exp(-u) + ufl.exp(-m) + ufl.exp(-c)) * v * ufl.dx
    bc = fem.dirichletbc(h, fem.locate_dofs_geometrical(V, lambda x: np.isclose(x[0], 0.0)))
    pde = fem_vi.WeakForm(F, state=u, inputs=[m, c, h], bcs=[bc])
    residual = fem_vi.Residual(pde, kernel=fem_vi.CompiledKernel(num_threads=2))
    at = [torch.ones((16, owned(x).numel()), dtype=torch.float64) for x in (u, m, u, h)]
    at[2] = torch.ones(16, dtype=torch.float64)
    assert torch.isfinite(residual(*at)).all()
    if COMM.rank == COMM.size - 1 or wrong == 2:
        at[wrong][-1, ...].fill_(torch.inf)
    label = "state" if wrong == 0 else rf"inputs\[{wrong - 1}\]"
    with pytest.raises(fem_vi.InvalidInput, match=f"Residual: .*{label}.*not finite"):
        residual(*(LAYOUTS[layout](x) if k == wrong else x for k, x in enumerate(at)))


@pytest.mark.mpi
def test_coordinates_are_refused() -> None:
    case = CASES["moving_mesh"](COMM)
    with pytest.raises(fem_vi.UnsupportedForm, match=r"CompiledKernel.*coordinates.*AssembledKernel"):
        fem_vi.Residual(case.pde, kernel=fem_vi.CompiledKernel())


def test_integrals_over_vertices_are_refused() -> None:
    V = fem.functionspace(square(MPI.COMM_SELF), ("Lagrange", 1))
    u, v = fem.Function(V), ufl.TestFunction(V)
    pde = fem_vi.WeakForm(u * v * ufl.dx + u**2 * v * ufl.dP, state=u, inputs=[])
    with pytest.raises(fem_vi.UnsupportedForm, match=r"CompiledKernel cannot integrate over vertex.*AssembledKernel"):
        fem_vi.Residual(pde, kernel=fem_vi.CompiledKernel())


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "2"])
def test_numbers_of_threads_are_checked(given: Any) -> None:
    with pytest.raises(fem_vi.InvalidInput, match="num_threads is"):
        fem_vi.CompiledKernel(num_threads=given)


@pytest.mark.parametrize("given", ["compiled", fem_vi.CompiledKernel, None])
def test_kernels_are_checked(given: Any) -> None:
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    with pytest.raises(fem_vi.InvalidInput, match=r"kernel is .*AssembledKernel"):
        fem_vi.Residual(case.pde, kernel=given)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cache folder of the test's own, and nothing known of the compiler."""
    monkeypatch.setattr(dolfinx.jit, "get_options", lambda *_: {"cache_dir": tmp_path})
    c_compiler.target.cache_clear()
    yield tmp_path
    c_compiler.target.cache_clear()


def test_a_missing_compiler_is_named(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(fem_vi.CompilerFailed, match=r"/nowhere/cc cannot be run.*environment variable CC.*AssembledKernel"):
        c_compiler.load_library("key", lambda: "int f;", MPI.COMM_SELF)


def test_what_the_compiler_says_is_quoted(empty_cache: Path) -> None:
    with pytest.raises(fem_vi.CompilerFailed, match="this is no C"):
        c_compiler.load_library("key", lambda: "this is no C", MPI.COMM_SELF)
    assert list(empty_cache.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_what_is_no_library_is_made_again(empty_cache: Path, content: bytes) -> None:
    """As a crash of the machine may leave it. A library that this process has loaded is not looked at again."""
    name = Path(c_compiler._cached("key", lambda: "int answer = 42;"))
    name.unlink()
    name.write_bytes(content)
    library = c_compiler.load_library("key", lambda: "int answer = 42;", MPI.COMM_SELF)
    assert ctypes.c_int.in_dll(library, "answer").value == 42


def test_a_cache_that_cannot_be_written_is_named(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_cache / "file").write_text("")
    monkeypatch.setattr(dolfinx.jit, "get_options", lambda *_: {"cache_dir": empty_cache / "file" / "below"})
    with pytest.raises(fem_vi.CompilerFailed, match=r"below cannot be written.*cache_dir"):
        c_compiler.load_library("key", lambda: "int f;", MPI.COMM_SELF)


def test_libraries_appear_complete(empty_cache: Path) -> None:
    """Several threads want the same library at once: each gets a whole one, and nothing else stays behind."""
    text = "#include <stdint.h>\nint64_t answer = 42;\n" + "".join(
        f"double f{k}(double x) {{ return x + {k}; }}\n" for k in range(500)
    )
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(c_compiler._cached("key", lambda: text))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and list(empty_cache.iterdir()) == found[:1]
    assert c_compiler.load_library("key", lambda: "this is no C", MPI.COMM_SELF).f7 is not None


@pytest.mark.parametrize("kernel", [fem_vi.CompiledKernel(), fem_vi.AssembledKernel()], ids=["compiled", "assembled"])
def test_cotangents_stay_the_callers(kernel: Any) -> None:
    """What is prescribed has no test function; the caller's cotangent keeps its values there, and may change afterwards."""
    case = FORMS["diffusion_triangle_P2"](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde, kernel=kernel)
    leaves = [x.clone().requires_grad_() for x in samples(case, 3)]
    found = []
    for scale in (1.0, 0.0):
        g = torch.linspace(-1.0, 1.0, leaves[0].numel()).double().reshape(leaves[0].shape).requires_grad_()
        given = g.detach().clone()
        grads = torch.autograd.grad(residual(*leaves), leaves, g, create_graph=True)
        assert torch.equal(g, given)
        g.data.mul_(scale)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in grads), leaves))
    for a, b in zip(*found, strict=True):
        assert a.any()
        assert torch.equal(a, b)


def test_gradient_that_sums_over_samples_is_the_same_for_any_split() -> None:
    """The gradient of an input that all samples share, as a sum over blocks of lanes that are not full."""
    case = FORMS["diffusion_triangle_P2"](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.CompiledKernel())
    u = torch.from_numpy(0.3 * np.random.default_rng(0).standard_normal((13, case.weights[-1].numel())))
    together = case.values[0].clone().requires_grad_()
    (whole,) = torch.autograd.grad(residual(u, together).square().sum(), together)
    parts = torch.zeros_like(whole)
    for row in u:
        parts += torch.autograd.grad(residual(row, together).square().sum(), together)[0]
    assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-13)
