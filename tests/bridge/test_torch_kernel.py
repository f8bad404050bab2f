"""TorchKernel against AssembledKernel: values, VJPs and JVPs of every form, on any number of ranks; what only torch can do."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor
from torch.func import grad, vmap

import fem_vi
from fem_vi.bridge import torch_residual
from fem_vi.bridge.torch_residual import TorchResidual
from tests.bridge.torch_cases import ALL_FORMS
from tests.helpers import CASES, Case, square
from tests.kernel_forms import FORMS, Build, apart, numbers, samples

COMM = MPI.COMM_WORLD
every_form = pytest.mark.parametrize("build", ALL_FORMS.values(), ids=ALL_FORMS.keys())
FEW = ("reaction", "discontinuous", "mixed_poisson", "moving_mesh")
few_forms = pytest.mark.parametrize("build", [CASES[name] for name in FEW], ids=FEW)


def at_some_state(case: Case, samples: int = 2) -> list[Tensor]:
    """State and inputs for some samples, one row each; Constants the same for all."""
    scales = torch.linspace(0.9, 1.1, samples, dtype=torch.float64)
    fields = [True, *(given.is_field for given in case.pde.inputs)]
    tensors = [0.3 * case.weights[-1], *case.values]
    return [scales[:, None] * x if is_field else x.clone() for x, is_field in zip(tensors, fields, strict=True)]


def directions(tensors: list[Tensor]) -> list[Tensor]:
    """The same on every rank for what is replicated."""
    return [torch.cos(3.0 * x + 0.2) for x in tensors]


def both(case: Case) -> list[fem_vi.Residual]:
    return [case.residual, fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel())]


def assert_same(wanted: Tensor, got: Tensor, scale: float | None = None) -> None:
    """Equal to 1e-12 of the largest entry on any rank."""
    assert got.shape == wanted.shape
    largest = COMM.allreduce(float(wanted.abs().max()) if wanted.numel() else 0.0, op=MPI.MAX)
    error = float((wanted - got).abs().max()) if wanted.numel() else 0.0
    assert error <= 1e-12 * max(largest, scale or 0.0), (error, largest)


@pytest.mark.mpi
@every_form
def test_torch_agrees_with_assembled(build: Build) -> None:
    """Values, VJPs, JVPs and second derivatives."""
    case = build(COMM)
    assembled, torch_made = both(case)
    at = samples(case, 3)
    assert apart(numbers(torch_made, case, at, second=True), numbers(assembled, case, at, second=True), COMM) < 1e-12


@few_forms
def test_derivatives_of_torch_check(build: Build) -> None:
    case = build(MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel())
    inputs = [x.clone().requires_grad_() for x in at_some_state(case)]
    assert torch.autograd.gradcheck(residual, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(residual, inputs, fast_mode=True)


@few_forms
def test_third_derivative_against_finite_differences(build: Build) -> None:
    """d^3/dt^3 of w . r along a line, which AssembledKernel refuses, is the difference of second derivatives."""
    case = build(MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel())
    at = at_some_state(case, 1)
    moved = directions(at)
    w = torch.cos(torch.arange(at[0].shape[-1], dtype=torch.float64))

    def along(t: Tensor) -> Tensor:
        return (w * residual(*(x + t * d for x, d in zip(at, moved, strict=True)))).sum()

    def second(t: float) -> Tensor:
        s = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(along(s), s, create_graph=True)
        return torch.autograd.grad(first, s)[0]

    s = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    value = along(s)
    for _ in range(3):
        (value,) = torch.autograd.grad(value, s, create_graph=True)
    step = 1e-3
    assert float(value.detach()) == pytest.approx(float((second(step) - second(-step)) / (2 * step)), rel=1e-4)
    assert abs(float(value.detach())) > 1e-6
    assert float(grad(grad(grad(along)))(torch.tensor(0.0, dtype=torch.float64))) == pytest.approx(
        float(value.detach()), rel=1e-9
    )


def test_gradient_by_an_input_does_not_run_through_another() -> None:
    """m enters u as well: with create_graph, the partial gradient must not contain the way through u."""
    case = CASES["reaction"](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel())
    m = case.values[0].clone().requires_grad_()

    def slope(create_graph: bool) -> Tensor:
        r = residual(m.square(), m, *case.values[1:])
        return torch.autograd.grad(r.square().sum(), m, create_graph=create_graph)[0].detach()

    assert torch.allclose(slope(True), slope(False), rtol=1e-13)


@few_forms
def test_vmap_is_a_batch(build: Build) -> None:
    case = build(MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel())
    at = at_some_state(case, 3)
    dims = tuple(0 if given.is_field else None for given in (case.pde.unknown, *case.pde.inputs))
    assert torch.allclose(vmap(residual, in_dims=dims)(*at), residual(*at), rtol=1e-13, atol=1e-14)

    def loss(u: Tensor, *inputs: Tensor) -> Tensor:
        return residual(u, *inputs).square().sum()

    u = at[0].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(u, *at[1:]), u)
    assert torch.allclose(vmap(grad(loss), in_dims=dims)(*at), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.mpi
def test_batch_axes_broadcast() -> None:
    case = CASES["reaction"](COMM)
    assembled, torch_made = both(case)
    u, m, *constants = (0.3 * case.weights[-1], *case.values)
    scales = torch.tensor([[0.8], [1.0], [1.2]], dtype=torch.float64)
    rate = torch.tensor([0.5, 1.5], dtype=torch.float64)
    given = [(scales * u)[:, None], m, rate, *constants[1:]]
    inputs = [[x.clone().requires_grad_() for x in given] for _ in range(2)]
    r = [residual(*x) for residual, x in zip((assembled, torch_made), inputs, strict=True)]
    assert r[1].shape == (3, 2, u.numel())
    assert_same(r[0].detach(), r[1].detach())
    for a, b in zip(*(torch.autograd.grad(y, x, torch.cos(y.detach())) for y, x in zip(r, inputs, strict=True)), strict=True):
        assert_same(a, b)
    empty = torch_made(u.new_zeros(0, u.numel()), m, *constants)
    assert empty.shape == (0, u.numel())


def test_parts_of_cells_give_what_all_cells_give(monkeypatch: pytest.MonkeyPatch) -> None:
    case = FORMS["subdomains"](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel())
    results = []
    for values in (2**18, 40):
        monkeypatch.setitem(torch_residual.VALUES_AT_ONCE, "cpu", values)
        inputs = [x.clone().requires_grad_() for x in at_some_state(case)]
        r = residual(*inputs)
        results.append([r.detach(), *torch.autograd.grad(r.sin().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


def test_nothing_is_kept_for_the_backward_but_the_inputs() -> None:
    """The graph of a call holds its columns, not what was computed at quadrature points."""
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel())
    u, m = (x.requires_grad_() for x in at_some_state(case))
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        residual(u, m)
    assert sum(kept) <= 3 * (u.numel() + m.numel())


@pytest.mark.parametrize("name", ["reaction", "mixed_poisson"])
def test_single_precision(name: str) -> None:
    case = CASES[name](MPI.COMM_SELF)
    at = at_some_state(case)
    wanted = fem_vi.Residual(case.pde)(*at)
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel(dtype=torch.float32))
    inputs = [x.clone().requires_grad_() for x in at]
    r = residual(*inputs)
    assert r.dtype is torch.float32
    error = float((r.detach() - wanted).abs().max() / wanted.abs().max())
    assert 1e-9 < error < 3e-6
    assert torch.autograd.grad(r.sum(), inputs)[0].dtype is torch.float64


def test_torch_compile_traces_the_whole() -> None:
    """Dynamo and AOTAutograd see one graph; the default back end compiles it (a long test)."""
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    module = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel()).function.module
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    check_compiled(case, module, compiled)


@pytest.mark.long
def test_torch_compile() -> None:
    try:
        torch.compile(lambda x: x.sin().sum())(torch.ones(2))
    except Exception as error:  # of a class that depends on torch's version
        pytest.skip(f"torch.compile's default back end compiles nothing here: {str(error).splitlines()[0]}")
    case = CASES["reaction"](MPI.COMM_SELF)
    module = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel()).function.module
    check_compiled(case, module, torch.compile(module, fullgraph=True))


def check_compiled(case: Case, module: TorchResidual, compiled: Any) -> None:
    inputs = [[x.clone().requires_grad_() for x in at_some_state(case)] for _ in range(2)]
    r = [f(*x) for f, x in zip((module, compiled), inputs, strict=True)]
    assert_same(r[0].detach(), r[1].detach())
    for a, b in zip(*(torch.autograd.grad(y, x, y.detach()) for y, x in zip(r, inputs, strict=True)), strict=True):
        assert_same(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: TorchKernel(device='cuda') is not run")
@pytest.mark.parametrize("name", FEW)
def test_cuda(name: str) -> None:
    case = CASES[name](MPI.COMM_SELF)
    at = at_some_state(case)
    results = []
    for kernel in (fem_vi.AssembledKernel(), fem_vi.TorchKernel(device="cuda")):
        device = "cuda" if isinstance(kernel, fem_vi.TorchKernel) else "cpu"
        inputs = [x.to(device).requires_grad_() for x in at]
        r = fem_vi.Residual(case.pde, kernel=kernel)(*inputs)
        assert r.device.type == device
        results.append([x.detach().cpu() for x in (r, *torch.autograd.grad(r, inputs, torch.cos(r.detach())))])
    for wanted, got in zip(*results, strict=True):
        assert_same(wanted, got)


def test_meta_device_gives_shapes_without_values() -> None:
    """Any device of torch will do: on "meta" every operation runs without data, so nothing of the path is tied to the host."""
    case = CASES["discontinuous"](MPI.COMM_SELF)
    module = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel()).function.module
    at = at_some_state(case)
    shape = module(*at).shape
    inputs = [x.to("meta").requires_grad_() for x in at]
    r = module.to("meta")(*inputs)
    assert r.shape == shape and r.device.type == "meta"
    assert [g.shape for g in torch.autograd.grad(r.sum(), inputs)] == [x.shape for x in at]


def test_a_residual_without_varying_inputs_in_some_integrals() -> None:
    """What does not vary is integrated once: a source alone in its integral leaves no program."""
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    module = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel()).function.module
    assert len(module.plan.programs) == 1
    source = module.get_buffer(module.plan.offset)
    assert float(source.sum()) == pytest.approx(-1.0, rel=1e-13)


def heat(msh: mesh.Mesh) -> tuple[Any, Any, Any]:
    V = fem.functionspace(msh, ("Lagrange", 1))
    return V, fem.Function(V), ufl.TestFunction(V)


def test_an_unsupported_node_is_named() -> None:
    _, u, v = heat(square(MPI.COMM_SELF, 2))
    pde = fem_vi.WeakForm(ufl.bessel_J(1, u) * v * ufl.dx, state=u, inputs=[])
    with pytest.raises(fem_vi.UnsupportedForm, match=r"BesselJ.*AssembledKernel\(\)"):
        fem_vi.Residual(pde, kernel=fem_vi.TorchKernel())


def test_an_unsupported_integral_is_named() -> None:
    _, u, v = heat(square(MPI.COMM_SELF, 2))
    pde = fem_vi.WeakForm(u * v * ufl.dx + u * v * ufl.dP, state=u, inputs=[])
    with pytest.raises(fem_vi.UnsupportedForm, match=r"vertex.*AssembledKernel\(\)"):
        fem_vi.Residual(pde, kernel=fem_vi.TorchKernel())


def test_an_unsupported_cell_is_named() -> None:
    msh = mesh.create_unit_cube(MPI.COMM_SELF, 1, 1, 1, mesh.CellType.prism)
    _, u, v = heat(msh)
    pde = fem_vi.WeakForm(u * v * ufl.dx, state=u, inputs=[])
    with pytest.raises(fem_vi.UnsupportedForm, match=r"prism.*AssembledKernel\(\)"):
        fem_vi.Residual(pde, kernel=fem_vi.TorchKernel())


def test_geometry_that_ufl_cannot_lower_is_named() -> None:
    V, u, v = heat(square(MPI.COMM_SELF, 2, mesh.CellType.quadrilateral))
    with pytest.warns(UserWarning, match="affine"):
        pde = fem_vi.WeakForm(ufl.CellVolume(V.mesh) * u * v * ufl.dx, state=u, inputs=[])
        with pytest.raises(fem_vi.UnsupportedForm, match=r"CellVolume.*AssembledKernel\(\)"):
            fem_vi.Residual(pde, kernel=fem_vi.TorchKernel())


def test_kernel_refuses_other_types_and_devices() -> None:
    with pytest.raises(fem_vi.InvalidInput, match=r"float16.*float64"):
        fem_vi.TorchKernel(dtype=torch.float16)
    with pytest.raises(fem_vi.InvalidInput, match="device='cpu' always works"):
        fem_vi.TorchKernel(device="no such device")
    if not torch.cuda.is_available():
        with pytest.raises(fem_vi.InvalidInput, match="cuda"):
            fem_vi.TorchKernel(device="cuda")


@pytest.mark.mpi
def test_wrong_tensors_are_refused_on_every_rank() -> None:
    case = CASES["log_diffusion"](COMM)
    residual = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel())
    u, m = case.weights[-1], case.values[0]
    wrong: list[tuple[list[Any], str]] = [
        ([u], "takes 2 tensors"),
        ([u, m[:-1] if COMM.rank == COMM.size - 1 else m], "last axes"),
        ([u, m.numpy()], "torch tensor"),
        ([u, m.to(torch.int64)], "dtype"),
        ([u.expand(2, -1), m.expand(3, -1)], "broadcast"),
        ([u.to("meta"), m], "is on meta"),
    ]
    for given, message in wrong:
        with pytest.raises(fem_vi.InvalidInput, match=message):
            residual(*given)
    if COMM.size > 1:
        with pytest.raises(fem_vi.InvalidInput, match="differ between ranks"):
            residual(u.expand(2 + COMM.rank, -1), m)


def test_what_was_fixed_must_not_change() -> None:
    msh = square(MPI.COMM_SELF, 3)
    V, u, v = heat(msh)
    level = fem.Constant(msh, 1.0)
    residual = fem_vi.Residual(fem_vi.WeakForm(level * u * v * ufl.dx, state=u, inputs=[]), kernel=fem_vi.TorchKernel())
    x = torch.ones(V.dofmap.index_map.size_local, dtype=torch.float64)
    residual(x)
    level.value = 2.0
    with pytest.raises(fem_vi.InvalidInput, match="has changed"):
        residual(x)
    level.value = 1.0
    msh.geometry.x[:] *= 2.0
    with pytest.raises(fem_vi.InvalidInput, match="moved"):
        residual(x)


@pytest.mark.mpi
def test_interior_facets_that_one_rank_sees_from_one_side_are_refused() -> None:
    msh = mesh.create_unit_square(COMM, 4, 4, ghost_mode=mesh.GhostMode.none)
    _, u, v = heat(msh)
    pde = fem_vi.WeakForm(u * v * ufl.dx + ufl.jump(u) * ufl.jump(v) * ufl.dS, state=u, inputs=[])
    if COMM.size == 1:
        fem_vi.Residual(pde, kernel=fem_vi.TorchKernel())
        return
    with pytest.raises(fem_vi.UnsupportedForm, match="shared_facet"):
        fem_vi.Residual(pde, kernel=fem_vi.TorchKernel())


def test_state_dict_is_all() -> None:
    case = CASES["mixed_poisson"](MPI.COMM_SELF)
    at = at_some_state(case)
    module = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel()).function.module
    again = TorchResidual.from_state_dict(module.state_dict())
    assert torch.equal(again(*at), module(*at))
    assert again.plan == module.plan
    state = module.state_dict()
    for name in [module.plan.offset, module.plan.programs[0].gathers[0].dofs, "plan_json"]:
        with pytest.raises(fem_vi.InvalidInput, match="state_dict"):
            TorchResidual.from_state_dict({key: value for key, value in state.items() if key != name})


def test_the_type_of_the_module_is_the_type_of_the_result() -> None:
    """float32 and back: the type of the buffers is the type of the result."""
    case = CASES["log_diffusion"](MPI.COMM_SELF)
    module = fem_vi.Residual(case.pde, kernel=fem_vi.TorchKernel()).function.module
    at = at_some_state(case)
    wanted = module(*at)
    assert module.float()(*at).dtype is torch.float32
    assert np.allclose(module.double()(*at), wanted, rtol=1e-6, atol=1e-7)


def test_orders_of_multiplication_do_not_matter() -> None:
    """The same form, its factors in every order: one and the same plan but for the order of the leaves, and the same numbers."""
    msh = square(MPI.COMM_SELF, 3)
    V, u, v = heat(msh)
    m = fem.Function(V, name="m")
    x = torch.linspace(0.1, 1.0, V.dofmap.index_map.size_local, dtype=torch.float64)
    counts, values = set(), []
    for a, b, c in itertools.permutations([ufl.exp(m), 1 + u**2, ufl.inner(ufl.grad(u), ufl.grad(v))]):
        pde = fem_vi.WeakForm(a * b * c * ufl.dx(degree=4), state=u, inputs=[m])
        residual = fem_vi.Residual(pde, kernel=fem_vi.TorchKernel())
        counts.add(len(residual.function.module.plan.programs[0].steps))
        values.append(residual(x, x.flip(0)))
    assert len(counts) == 1
    assert all(torch.allclose(values[0], other, rtol=1e-13, atol=1e-15) for other in values[1:])
