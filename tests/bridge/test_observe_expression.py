"""UFL expressions at points: exact where the spaces hold the fields, differentiable to second order, one cell a point."""

from __future__ import annotations

from typing import Any

import basix.ufl
import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from fem_vi.bridge.ufl_torch import TorchExpression, lower, terminals
from tests.bridge.test_observe import (
    HEXAHEDRON,
    QUADRILATERAL,
    TETRAHEDRON,
    TRIANGLE,
    domain,
    every_cell,
    linear,
    points_of,
    ring,
)
from tests.helpers import interpolated, owned, square

COMM = MPI.COMM_WORLD


def function(V: Any, values: Any, name: str = "f") -> fem.Function:
    f = fem.Function(V, name=name)
    f.interpolate(values)
    f.x.scatter_forward()
    return f


def observed(expr: Any, points: np.ndarray, *inputs: fem.Function) -> torch.Tensor:
    return fem_vi.ExpressionObservation(expr, points, list(inputs))(*[owned(f) for f in inputs])


def cubic(x: Any) -> Any:
    """A polynomial of degree three, for NumPy and for UFL."""
    return x[0] ** 3 - 2 * x[0] * x[1] ** 2 + x[1] - 0.5 * x[0] * x[1] + 0.3


@pytest.mark.mpi
@every_cell
def test_derivatives_of_polynomials_are_exact(cell: mesh.CellType) -> None:
    """Against UFL's derivatives of the polynomial itself, to third order; on affine cells the space holds it."""
    msh = domain(COMM, cell)
    V, points = fem.functionspace(msh, ("Lagrange", 3)), points_of(msh)
    u = function(V, cubic)
    x = ufl.SpatialCoordinate(msh)
    for order in range(4):
        expr, exact = u, cubic(x)
        for _ in range(order):
            expr, exact = ufl.grad(expr), ufl.grad(exact)
        y = observed(expr, points, u)
        expected = TorchExpression(lower(exact), [x])(torch.from_numpy(points))
        assert y.shape == (len(points), *[msh.geometry.dim] * order)
        assert torch.allclose(y, expected, rtol=1e-9, atol=1e-9), order


@pytest.mark.mpi
@pytest.mark.parametrize("cell", [QUADRILATERAL, HEXAHEDRON], ids=lambda c: c.name)
def test_derivatives_on_distorted_cells_are_those_of_functions_of_x(cell: mesh.CellType) -> None:
    """The space of the map holds x itself, whose gradient is one and whose second derivatives are zero; of x^2, in Q2, 2."""
    msh = domain(COMM, cell, distorted=True)
    d, points = msh.geometry.dim, points_of(msh)
    u = function(fem.functionspace(msh, ("Lagrange", 2, (d,))), lambda x: x[:d])
    eye = torch.eye(d, dtype=torch.float64).expand(len(points), d, d)
    assert torch.allclose(observed(ufl.grad(u), points, u), eye, atol=1e-11)
    assert torch.allclose(observed(ufl.grad(ufl.grad(u)), points, u), torch.zeros((), dtype=torch.float64), atol=1e-9)
    square_ = function(fem.functionspace(msh, ("Lagrange", 2 * d)), lambda x: x[0] ** 2)
    assert torch.allclose(observed(square_.dx(0).dx(0), points, square_), torch.tensor(2.0).double(), atol=1e-7)
    assert torch.allclose(observed(square_.dx(0).dx(1), points, square_), torch.tensor(0.0).double(), atol=1e-7)


@pytest.mark.mpi
def test_derivatives_on_curved_cells() -> None:
    msh = ring(COMM)
    r, t = (a.ravel() for a in np.meshgrid(np.linspace(1.02, 1.98, 5), np.linspace(0.01, np.pi / 2 - 0.01, 5)))
    points = np.stack([r * np.cos(t), r * np.sin(t)], axis=1)
    u = function(fem.functionspace(msh, ("Lagrange", 2)), lambda x: 3 * x[0] - x[1])
    expected = torch.tensor([3.0, -1.0]).double().expand(25, 2)
    assert torch.allclose(observed(ufl.grad(u), points, u), expected, atol=1e-11)
    u = function(fem.functionspace(msh, ("Lagrange", 4)), lambda x: x[0] * x[1])
    hessian = observed(ufl.grad(ufl.grad(u)), points, u)
    assert torch.allclose(hessian, torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double().expand(25, 2, 2), atol=1e-8)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("cell", "family", "degree"),
    [(TRIANGLE, "RT", 2), (TRIANGLE, "N1curl", 2), (QUADRILATERAL, "RTCF", 2), (TETRAHEDRON, "N1curl", 2), (TRIANGLE, "Regge", 1),
     (TRIANGLE, "HHJ", 1)],
    ids=str,
)  # fmt: skip
def test_gradients_of_piola_mapped_elements(cell: mesh.CellType, family: str, degree: int) -> None:
    msh = domain(COMM, cell)
    d, points = msh.geometry.dim, points_of(msh)
    V = fem.functionspace(msh, (family, degree))
    if V.value_shape == (d,):
        factor = np.array([[0.3, 1.0, -2.0, 0.5], [0.7, 0.4, 1.5, -1.0], [-0.2, 0.8, 0.6, 1.2]])[:d]
        u = function(V, linear(factor))
        slope = torch.from_numpy(factor[:, 1 : d + 1].copy()).expand(len(points), d, d)
    else:
        u = function(V, lambda x: np.stack([x[0], x[1], x[1], 1 + x[0] - 2 * x[1]]))
        one = [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, -2.0]]]
        slope = torch.tensor(one).double().expand(len(points), d, d, d)
        x = torch.from_numpy(points)
        exact = torch.stack([x[:, 0], x[:, 1], x[:, 1], 1 + x[:, 0] - 2 * x[:, 1]], dim=-1).reshape(-1, 2, 2)
        assert torch.allclose(fem_vi.PointObservation(V, points)(owned(u)), exact, atol=1e-10)
    assert torch.allclose(observed(ufl.grad(u), points, u), slope, atol=1e-9)


def fields(comm: MPI.Comm) -> dict[str, Any]:
    """Functions of several kinds that are polynomials of no particular degree."""
    msh = domain(comm, QUADRILATERAL, distorted=True)
    cell = msh.basix_cell()
    parts = [basix.ufl.element("Lagrange", cell, 2, shape=(2,)), basix.ufl.element("DG", cell, 1)]
    W = fem.functionspace(msh, basix.ufl.mixed_element(parts))
    V = fem.functionspace(msh, ("Lagrange", 2))
    S = fem.functionspace(msh, basix.ufl.element("Lagrange", cell, 2, shape=(2, 2), symmetry=True))
    w, u, s = fem.Function(W), fem.Function(V), fem.Function(S)
    for f, tensor in ((w, interpolated(W, 1.0, 0.2)), (u, interpolated(V, 0.8, 0.5))):
        f.x.array[: tensor.numel()] = tensor.numpy()
        f.x.scatter_forward()
    s.interpolate(lambda x: np.stack([np.sin(x[0]), x[0] * x[1], x[0] * x[1], np.cos(x[1])]))
    s.x.scatter_forward()
    return {"msh": msh, "w": w, "u": u, "s": s, "c": fem.Constant(msh, 1.3), "b": fem.Constant(msh, np.array([0.4, -1.1]))}


def by_variable(u: Any, build: Any) -> Any:
    """The derivative of build(u) for u, taken by UFL."""
    variable = ufl.variable(u)
    return ufl.diff(build(variable), variable)


EXPRESSIONS: dict[str, Any] = {
    "flux": lambda f: -ufl.exp(f["u"]) * ufl.grad(f["u"]),
    "derivative": lambda f: f["u"].dx(0),
    "strain": lambda f: ufl.sym(ufl.grad(ufl.split(f["w"])[0])),
    "stress on a direction": lambda f: ufl.dot(
        2 * f["c"] * ufl.sym(ufl.grad(ufl.split(f["w"])[0])) - ufl.split(f["w"])[1] * ufl.Identity(2), f["b"]
    ),
    "von Mises": lambda f: ufl.sqrt(1.5 * ufl.inner(ufl.dev(f["s"]), ufl.dev(f["s"])) + 0.01),
    "divergence": lambda f: ufl.div(f["s"]) + ufl.div(ufl.split(f["w"])[0]) * f["b"],
    "vorticity": lambda f: ufl.rot(ufl.split(f["w"])[0]),
    "divergence of the flux": lambda f: ufl.div(ufl.exp(f["u"] * f["c"]) * ufl.grad(f["u"])),
    "determinant and inverse": lambda f: ufl.det(ufl.Identity(2) + f["s"]) * ufl.inv(3 * ufl.Identity(2) + f["s"]),
    "coordinates": lambda f: ufl.SpatialCoordinate(f["msh"])[0] * f["u"] * ufl.SpatialCoordinate(f["msh"]),
    "mixed": lambda f: f["w"],
    "gradient of the mixed": lambda f: ufl.grad(f["w"]),
    "outer": lambda f: ufl.outer(f["b"], ufl.grad(f["u"])),
    "trace": lambda f: ufl.tr(f["s"]) * ufl.transpose(f["s"]),
    "index notation": lambda f: ufl.as_tensor(f["s"][ufl.i, ufl.j] * f["b"][ufl.j] * f["b"][ufl.k], (ufl.k, ufl.i)),
    "diagonal": lambda f: ufl.as_vector(ufl.outer(f["b"], f["b"])[ufl.i, ufl.i] * ufl.grad(f["u"])[ufl.j], ufl.j),
    "elementwise": lambda f: ufl.elem_mult(f["s"], f["s"]) + ufl.perp(f["b"])[0] * f["s"],
    "conditional": lambda f: ufl.conditional(ufl.And(ufl.gt(f["u"], 0), ufl.lt(f["u"], 0.5)), f["b"], f["u"] * f["b"]),
    "minimum": lambda f: ufl.min_value(f["u"], 0.1) - ufl.max_value(f["c"], f["u"]) + abs(f["u"]) * ufl.sign(f["u"]),
    "functions": lambda f: (
        ufl.ln(2 + f["u"] ** 2) + ufl.tanh(f["u"]) / ufl.cosh(f["u"]) + ufl.sinh(f["u"]) ** 3 + ufl.erf(f["u"])
    ),
    "trigonometry": lambda f: ufl.sin(f["u"]) + ufl.tan(f["u"]) + ufl.acos(f["u"] / 9) + ufl.atan(f["u"]) + ufl.asin(f["u"] / 9),
    "two arguments": lambda f: ufl.atan2(f["u"], 2 + ufl.cos(f["u"])) + (2 + f["u"] ** 2) ** f["c"],
    "derivative of a variable": lambda f: by_variable(f["u"], lambda v: ufl.exp(v) * f["c"] * v**3),
}
every_expression = pytest.mark.parametrize("build", EXPRESSIONS.values(), ids=EXPRESSIONS.keys())
INPUTS = ("w", "u", "s", "c", "b")


def inputs_of(expr: Any, f: dict[str, Any]) -> list[Any]:
    present = [*ufl.algorithms.extract_coefficients(expr), *ufl.algorithms.analysis.extract_constants(expr)]
    return [f[name] for name in INPUTS if any(f[name] is p for p in present)]


def tensor_of(given: Any) -> torch.Tensor:
    return owned(given) if isinstance(given, fem.Function) else torch.tensor(given.value, dtype=torch.float64)


@pytest.fixture(scope="module")
def compiled() -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]:
    """Fields, one inner point of each cell, and all expressions there as DOLFINx's compiled code evaluates them."""
    f = fields(MPI.COMM_SELF)
    msh, exprs = f["msh"], {name: build(f) for name, build in EXPRESSIONS.items()}
    flat = [expr[k] if expr.ufl_shape else expr for expr in exprs.values() for k in np.ndindex(expr.ufl_shape)]
    everything = ufl.as_vector([*flat, *ufl.SpatialCoordinate(msh)])
    cells = np.arange(msh.topology.index_map(2).size_local, dtype=np.int32)
    table = fem.Expression(everything, np.array([[0.3, 0.6]])).eval(msh, cells).reshape(len(cells), -1)
    sizes = [int(np.prod(expr.ufl_shape, dtype=int)) for expr in exprs.values()]
    columns = np.split(table[:, :-2], np.cumsum(sizes)[:-1], axis=1)
    values = {n: c.reshape(-1, *e.ufl_shape) for (n, e), c in zip(exprs.items(), columns, strict=True)}
    return f, table[:, -2:], values


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_values_are_those_of_the_form_compiler(name: str, compiled: Any) -> None:
    f, points, expected = compiled
    expr = EXPRESSIONS[name](f)
    inputs = inputs_of(expr, f)
    y = fem_vi.ExpressionObservation(expr, points, inputs)(*[tensor_of(x) for x in inputs])
    assert y.shape == (len(points), *expr.ufl_shape)
    assert np.allclose(y.numpy(), expected[name], rtol=1e-10, atol=1e-11)


@every_expression
def test_gradcheck_to_second_order(build: Any) -> None:
    f = fields(MPI.COMM_SELF)
    expr = build(f)
    inputs = inputs_of(expr, f)
    observe = fem_vi.ExpressionObservation(expr, [[0.31, 0.42], [0.71, 0.18]], inputs)
    tensors = [tensor_of(x).requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(observe, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *x: observe(*x).sin(), tensors, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.mpi
def test_torch_transforms_on_any_number_of_ranks() -> None:
    """vmap is a loop; <g, dy(v)> = <dy^T g, v>."""
    f = fields(COMM)
    u, c = f["u"], f["c"]
    observe = fem_vi.ExpressionObservation(c * ufl.exp(u) * ufl.grad(u), POINTS, [u, c])
    us, cs = torch.stack([k * owned(u) for k in (1.0, 0.5, -0.3)]), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    assert torch.allclose(torch.func.vmap(observe)(us, cs), observe(us, cs), rtol=1e-13)
    v = interpolated(u.function_space, 1.0, 1.1)
    y, forward = torch.func.jvp(observe, (us[0], cs[0]), (v, cs[1]))
    _, pull = torch.func.vjp(observe, us[0], cs[0])
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    at_u, at_c = pull(g)
    backward = fem_vi.all_sum((at_u * v).sum(), COMM) + at_c * cs[1]
    assert torch.allclose((g * forward).sum(), backward, rtol=1e-12)


def pairing(f: dict[str, Any], inputs: list[Any], gradients: Any, comm: MPI.Comm) -> list[float]:
    """The gradients against one function on any partition, or as they are where they are replicated."""
    out = []
    for given, g in zip(inputs, gradients, strict=True):
        if isinstance(given, fem.Constant):
            out.extend(g.flatten().tolist())
        elif given is not f["s"]:
            out.append(float(fem_vi.all_sum((g * interpolated(given.function_space, 1.0, 1.7)).sum(), comm)))
    return out


@pytest.mark.mpi
@every_expression
def test_any_number_of_ranks_gives_the_same(build: Any) -> None:
    """At inner points, on edges and corners, where derivatives jump: values and gradients."""
    results = []
    for comm in (COMM, MPI.COMM_SELF):
        f = fields(comm)
        expr = build(f)
        inputs = inputs_of(expr, f)
        tensors = [tensor_of(x).requires_grad_() for x in inputs]
        points = points_of(square(MPI.COMM_SELF, 3, QUADRILATERAL))
        y = fem_vi.ExpressionObservation(expr, points, inputs)(*tensors)
        gradients = torch.autograd.grad(y.square().sum(), tensors)
        results.append((y.detach(), pairing(f, inputs, gradients, comm)))
    (y, paired), (y_alone, paired_alone) = results
    assert torch.allclose(y, y_alone, rtol=1e-11, atol=1e-11)
    assert np.allclose(paired, paired_alone, rtol=1e-9, atol=1e-9)


POINTS = [[0.31, 0.42], [0.5, 0.5], [1.0, 1.0]]


def test_batches_broadcast() -> None:
    f = fields(MPI.COMM_SELF)
    u, c, b = f["u"], f["c"], f["b"]
    observe = fem_vi.ExpressionObservation(c * ufl.exp(u) * ufl.grad(u) + b, POINTS, [u, c, b])
    us = torch.stack([(1 + k) * owned(u) for k in range(6)]).reshape(2, 3, -1)
    cs, bs = torch.tensor([0.5, 1.0, 2.0]).double(), torch.tensor([[[0.1, 0.2]], [[0.3, 0.4]]]).double()
    y = observe(us, cs, bs)
    assert y.shape == (2, 3, 3, 2)
    assert torch.allclose(y[1, 2], observe(us[1, 2], cs[2], bs[1, 0]), rtol=1e-14)
    assert observe(us[0, 0], cs, bs).shape == (2, 3, 3, 2)
    assert observe(us[:0], cs, bs[:1]).shape == (0, 3, 3, 2)


@pytest.mark.mpi
def test_what_does_not_depend_on_an_input_still_has_its_batch_axes() -> None:
    msh = square(COMM)
    u, c = function(fem.functionspace(msh, ("Lagrange", 1)), lambda x: x[1]), fem.Constant(msh, 0.0)
    y = fem_vi.ExpressionObservation(ufl.grad(u + c), POINTS, [u, c])(owned(u), torch.ones(4).double())
    assert torch.allclose(y, torch.tensor([0.0, 1.0]).double().expand(4, 3, 2), atol=1e-14)


@pytest.mark.mpi
def test_points_outside_are_masked_and_poison_no_gradient() -> None:
    """1 / u and c: at points outside u would be 0, and the gradient of c NaN."""
    msh = square(COMM)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, c = function(V, lambda x: 1 + x[0]), fem.Constant(msh, 2.0)
    expr, points = ufl.as_vector([c / u, ufl.sqrt(c * u)]), [[1.2, 0.5], [0.5, 0.5], [0.5, -1e-3], [1.0, 0.25]]
    with pytest.raises(fem_vi.PointsOutsideMesh, match=r"2 of 4 points.*\(1\.2, 0\.5\); \(0\.5, -0\.001\)"):
        fem_vi.ExpressionObservation(expr, points, [u, c])
    observe = fem_vi.ExpressionObservation(expr, points, [u, c], outside=fem_vi.MaskOutside())
    inside = fem_vi.ExpressionObservation(expr, [points[1], points[3]], [u, c])
    assert observe.found.tolist() == [False, True, False, True]
    tensors = [tensor_of(x).requires_grad_() for x in (u, c)]
    y = observe(*[x.expand(2, *x.shape) for x in tensors])
    assert torch.isnan(y[:, ~observe.found]).all()
    assert torch.allclose(y[1, observe.found], inside(*tensors), rtol=1e-14)
    masked = torch.autograd.grad(torch.nansum(observe(*tensors)), tensors)
    expected = torch.autograd.grad(inside(*tensors).sum(), tensors)
    for a, b in zip(masked, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-13)
    nowhere = fem_vi.ExpressionObservation(expr, points[:1], [u, c], outside=fem_vi.MaskOutside())
    assert torch.isnan(nowhere(*tensors)).all()


@pytest.mark.mpi
def test_derivatives_that_jump_are_those_of_one_cell() -> None:
    """A hat function on the line: its slope at the node is that of the cell that came first, on any number of ranks."""
    msh = mesh.create_interval(COMM, 6, (0.0, 6.0))
    u = function(fem.functionspace(msh, ("Lagrange", 1)), lambda x: np.abs(x[0] - 3.0))
    slopes = observed(u.dx(0), np.array([[2.5], [3.0], [3.5]]), u)
    alone = mesh.create_interval(MPI.COMM_SELF, 6, (0.0, 6.0))
    first = np.argsort(alone.topology.original_cell_index)
    middles = mesh.compute_midpoints(alone, 1, first.astype(np.int32))[:, 0]
    of_node = -1.0 if np.flatnonzero(middles == 2.5) < np.flatnonzero(middles == 3.5) else 1.0
    assert torch.allclose(slopes, torch.tensor([-1.0, of_node, 1.0]).double(), atol=1e-13)


@pytest.mark.mpi
def test_a_surface_in_space() -> None:
    """A plane x_2 = 2 x_0 of triangles: the gradient is the tangential one."""
    nodes = np.array([[0, 0, 0], [1, 0, 2], [0, 1, 0], [1, 1, 2]], dtype=np.float64)
    cells = np.array([[0, 1, 2], [1, 3, 2]])[slice(None) if COMM.rank == 0 else slice(0)]
    element = basix.ufl.element("Lagrange", "triangle", 1, shape=(3,))
    msh = mesh.create_mesh(COMM, **{"cells": cells, "x": nodes if COMM.rank == 0 else nodes[:0], "e": element})
    u = function(fem.functionspace(msh, ("Lagrange", 2)), lambda x: x[2] ** 2 + x[1])
    points = np.array([[0.3, 0.2, 0.6], [0.7, 0.6, 1.4]])
    z = torch.from_numpy(points[:, 2])
    expected = torch.stack([0.8 * z, torch.ones(2).double(), 1.6 * z], dim=-1)  # d/ds of z^2 along (1, 0, 2) / sqrt(5)
    assert torch.allclose(observed(ufl.grad(u), points, u), expected, atol=1e-12)


@pytest.mark.mpi
def test_symmetric_tensors_have_all_their_components() -> None:
    msh = square(COMM)
    S = fem.functionspace(msh, basix.ufl.element("Lagrange", msh.basix_cell(), 1, shape=(2, 2), symmetry=True))
    s = function(S, lambda x: np.stack([x[0], 1 + x[1], 1 + x[1], x[0] - x[1]]))
    y = fem_vi.PointObservation(S, POINTS)(owned(s))
    expected = [[[x, 1 + z], [1 + z, x - z]] for x, z in POINTS]
    assert torch.allclose(y, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-15)
    T = fem.functionspace(msh, ("Lagrange", 1, (2, 2)))
    t = function(T, lambda x: np.stack([x[0], 1 + x[1], 2 * x[1], x[0] - x[1]]))
    assert fem_vi.PointObservation(T, POINTS)(owned(t))[0, 1, 0] == pytest.approx(2 * POINTS[0][1])


@pytest.mark.mpi
def test_single_precision_is_cast_and_gets_its_gradient_back() -> None:
    u = function(fem.functionspace(square(COMM), ("Lagrange", 1)), lambda x: x[0])
    x = owned(u).float().requires_grad_()
    y = fem_vi.ExpressionObservation(u**2, POINTS, [u])(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == torch.float64
    assert gradient.dtype == torch.float32


@pytest.mark.mpi
def test_what_is_fixed_must_not_change() -> None:
    msh = square(COMM)
    V = fem.functionspace(msh, ("Lagrange", 1))
    u, k = function(V, lambda x: x[0]), function(V, lambda x: 1 + x[1], name="conductivity")
    c = fem.Constant(msh, 2.0)
    observe = fem_vi.ExpressionObservation(-c * k * u.dx(0), POINTS, [u])
    expected = torch.tensor([-2.0 * (1 + y) for _, y in POINTS], dtype=torch.float64)
    assert torch.allclose(observe(owned(u)), expected, rtol=1e-13)
    u.x.array[:] = 5.0
    c.value = 3.0
    with pytest.raises(fem_vi.InvalidInput, match=r"Constant.*changed since"):
        observe(owned(u))
    c.value = 2.0
    before = k.x.array.copy()
    if COMM.rank == COMM.size - 1:
        k.x.array[:] += 1.0
    with pytest.raises(fem_vi.InvalidInput, match=r"conductivity.*changed since"):
        observe(owned(u))
    k.x.array[:] = before
    msh.geometry.x[:, 0] *= 2
    with pytest.raises(fem_vi.InvalidInput, match="mesh has been moved"):
        observe(owned(u))


Q = fem.functionspace(square(COMM), basix.ufl.quadrature_element("triangle", degree=2))
OTHER = fem.Function(fem.functionspace(square(COMM), ("Lagrange", 1)), name="other")
UnsupportedForm, InvalidInput = fem_vi.UnsupportedForm, fem_vi.InvalidInput


def build(expr: Any, *inputs: Any, points: Any = POINTS) -> fem_vi.ExpressionObservation:
    return fem_vi.ExpressionObservation(expr, points, list(inputs))


WAYS: dict[str, tuple[Any, str, type[Exception]]] = {
    "form": (lambda f: build(f["u"] * ufl.dx, f["u"]), "form.*Functional", UnsupportedForm),
    "number": (lambda f: build(3.0), "expr is a float", UnsupportedForm),
    "list": (lambda f: build([f["u"]]), "expr is a list", UnsupportedForm),
    "test function": (lambda f: build(f["u"] * ufl.TestFunction(f["u"].function_space)), "test or trial", UnsupportedForm),
    "free index": (lambda f: build(ufl.grad(f["u"])[ufl.i], f["u"]), "free indices", UnsupportedForm),
    "facet normal": (lambda f: build(f["u"] * ufl.FacetNormal(f["msh"]), f["u"]), "FacetNormal", UnsupportedForm),
    "side": (lambda f: build(f["u"]("+"), f["u"]), "PositiveRestricted", UnsupportedForm),
    "cell size": (lambda f: build(f["u"] * ufl.CellVolume(f["msh"]), f["u"]), "CellVolume", UnsupportedForm),
    "Bessel function": (lambda f: build(ufl.bessel_J(1, f["u"]), f["u"]), "BesselJ", UnsupportedForm),
    "quadrature element": (lambda f: build(q := fem.Function(Q), q), "own points only", UnsupportedForm),
    "no Function": (lambda f: build(ufl.as_ufl(1.0)), "no dolfinx.fem.Function", InvalidInput),
    "two meshes": (lambda f: build(f["u"] + OTHER, f["u"]), "several meshes", InvalidInput),
    "part of a Function": (lambda f: build(p := f["w"].sub(1), p), r"ufl\.split", InvalidInput),
    "input that does not occur": (lambda f: build(f["u"], f["u"], f["c"]), r"inputs\[1\] does not occur", InvalidInput),
    "inputs that are no list": (lambda f: fem_vi.ExpressionObservation(f["u"], POINTS, f["u"]), "list", InvalidInput),
    "input twice": (lambda f: build(f["u"], f["u"], f["u"]), "twice", InvalidInput),
    "points": (lambda f: build(f["u"], f["u"], points=[[0.1] * 4]), r"\(1, 4\)", InvalidInput),
    "policy": (lambda f: fem_vi.PointObservation(f["u"].function_space, POINTS, outside="nan"), "outside is 'nan'", InvalidInput),
    "too few tensors": (lambda f: build(f["u"] * f["c"], f["u"], f["c"])(owned(f["u"])), "takes 2 tensors.*1 were", InvalidInput),
    "array": (lambda f: build(f["u"], f["u"])(owned(f["u"]).numpy()), "ndarray", InvalidInput),
    "integers": (lambda f: build(f["u"], f["u"])(owned(f["u"]).long()), "int64", InvalidInput),
    "too long": (lambda f: build(f["u"], f["u"])(torch.zeros(owned(f["u"]).numel() + 1).double()), "distribute", InvalidInput),
    "batches": (
        lambda f: build(f["u"] * f["c"], f["u"], f["c"])(owned(f["u"]).expand(2, -1), torch.ones(3).double()),
        r"broadcast.*\(2,\).*\(3,\)",
        InvalidInput,
    ),
}  # fmt: skip


@pytest.mark.mpi
def test_every_way_to_fail_leaves_the_ranks_in_step() -> None:
    f = fields(COMM)
    for name, (call, words, kind) in WAYS.items():
        with pytest.raises(kind, match=words):
            call(f)
        assert set(COMM.allgather(name)) == {name}


@pytest.mark.mpi
@pytest.mark.skipif(COMM.size == 1, reason="one rank cannot differ from another")
def test_what_must_be_replicated_differs_between_ranks() -> None:
    f = fields(COMM)
    observe = build(f["u"] * f["c"], f["u"], f["c"])
    with pytest.raises(InvalidInput, match="batch axes differ between ranks"):
        observe(owned(f["u"]).expand(1 + COMM.rank, -1), torch.tensor(1.0).double())
    with pytest.raises(InvalidInput, match="values of a Constant differ"):
        observe(owned(f["u"]), torch.tensor(1.0 * COMM.rank).double())
    with pytest.raises(InvalidInput, match="is a int"):
        observe(owned(f["u"]), 1 if COMM.rank == COMM.size - 1 else torch.tensor(1.0).double())


@every_expression
def test_torch_transforms_reach_through_the_expression(build: Any) -> None:
    """vmap is a loop, and forward mode the transpose of backward mode."""
    f = fields(MPI.COMM_SELF)
    lowered = lower(build(f))
    nodes = terminals(lowered)
    evaluate = TorchExpression(lowered, nodes)
    draw = torch.Generator().manual_seed(0)
    batch, shift = ([0.3 + torch.rand(4, 3, *n.ufl_shape, generator=draw).double() for n in nodes] for _ in range(2))
    one, tangents = [x[0] for x in batch], [x[0] for x in shift]
    vmapped = torch.func.vmap(evaluate)(*batch)
    assert torch.allclose(vmapped, torch.stack([evaluate(*[x[k] for x in batch]) for k in range(4)]), rtol=1e-13)
    y, forward = torch.func.jvp(evaluate, tuple(one), tuple(tangents))
    _, pull = torch.func.vjp(evaluate, *one)
    g = torch.rand(y.shape, generator=draw).double()
    backward = sum((t * b).sum() for t, b in zip(tangents, pull(g), strict=True))
    assert torch.allclose((g * forward).sum(), backward, rtol=1e-12)
