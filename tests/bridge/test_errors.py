"""Every way a call can go wrong: one error class, a message that names the culprit, raised on all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import basix.ufl
import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.helpers import boundary_dofs, everywhere, square

COMM = MPI.COMM_WORLD
InvalidInput, UnsupportedForm = fem_vi.InvalidInput, fem_vi.UnsupportedForm


@dataclass(frozen=True)
class Setting:
    """A PDE with a field m, a scalar Constant c and a vector Constant b as inputs, and something of every kind besides."""

    V: Any
    W: Any
    P2: Any
    u: fem.Function
    m: fem.Function
    c: fem.Constant
    b: fem.Constant
    fixed: fem.Function
    factor: fem.Constant
    data: fem.Function
    F: ufl.Form
    pde: fem_vi.WeakForm
    solve: fem_vi.Solve
    residual: fem_vi.Residual
    functional: fem_vi.Functional
    observe: fem_vi.PointObservation
    prior: fem_vi.MaternField

    @property
    def n(self) -> int:
        return int(self.V.dofmap.index_map.size_local)

    def field(self, *batch: int) -> Tensor:
        return torch.full((*batch, self.n), 0.1, dtype=torch.float64)


def number(value: Any = 0.5) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


VECTOR = number([1.0, 2.0])


def create(comm: MPI.Comm) -> Setting:
    msh = square(comm)
    V = fem.functionspace(msh, ("Lagrange", 1))
    cell = msh.basix_cell()
    W = fem.functionspace(msh, basix.ufl.mixed_element([basix.ufl.element("Lagrange", cell, k) for k in (2, 1)]))
    u, m, fixed, data = (fem.Function(V, name=name) for name in ("u", "m", "permeability", "data"))
    c, b, factor = fem.Constant(msh, 0.0), fem.Constant(msh, np.zeros(2)), fem.Constant(msh, 1.0)
    v = ufl.TestFunction(V)
    F = (
        ufl.exp(m + fixed) * factor * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx
        - c * v * ufl.dx
        - ufl.dot(b, ufl.grad(v)) * ufl.dx
    )
    pde = fem_vi.WeakForm(F, state=u, inputs=[m, c, b], bcs=[fem.dirichletbc(data, boundary_dofs(V, everywhere))])
    return Setting(
        V, W, fem.functionspace(msh, ("Lagrange", 2)), u, m, c, b, fixed, factor, data, F, pde,
        fem_vi.Solve(pde), fem_vi.Residual(pde), fem_vi.Functional(ufl.exp(m) * c * ufl.dx, [m, c]),
        fem_vi.PointObservation(V, [[0.3, 0.3]]), fem_vi.MaternField(V, std=1.0, length=0.3),
    )  # fmt: skip


@cache
def setting() -> Setting:
    return create(COMM)


def weak_form(s: Setting, F: Any = None, **changes: Any) -> fem_vi.WeakForm:
    return fem_vi.WeakForm(s.F if F is None else F, **{"state": s.u, "inputs": [s.m, s.c, s.b], **changes})


def other_test(s: Setting) -> ufl.Form:
    return ufl.inner(ufl.grad(s.u), ufl.grad(ufl.TestFunction(s.P2))) * ufl.dx


def bilinear(s: Setting) -> ufl.Form:
    return ufl.TrialFunction(s.V) * ufl.TestFunction(s.V) * ufl.dx


def single_precision(s: Setting) -> fem_vi.WeakForm:
    V = fem.functionspace(mesh.create_unit_square(COMM, 3, 3, dtype=np.float32), ("Lagrange", 1))
    u = fem.Function(V, dtype=np.float32)
    return fem_vi.WeakForm(u * ufl.TestFunction(V) * ufl.dx, state=u, inputs=[])


def problem(s: Setting) -> fem_vi.InverseProblem:
    return fem_vi.InverseProblem(s.prior, s.observe, fem_vi.GaussianNoise(1.0), number([0.0]))


def outside(s: Setting) -> fem_vi.PointObservation:
    return fem_vi.PointObservation(s.V, [[0.5, 0.5], [1.25, 0.5], [0.5, -3.0]])


Call = Callable[[Setting], object]
v = lambda s: ufl.TestFunction(s.V)  # noqa: E731

WAYS: dict[str, tuple[Call, str] | tuple[Call, str, type[Exception]]] = {
    # tensors
    "too few tensors": (lambda s: s.solve(s.field()), r"Solve takes 3 tensors .*inputs\[0\] \(m\).*; 1 were given"),
    "too many tensors": (lambda s: s.functional(*[s.field()] * 3), "Functional takes 2 tensors .*; 3 were given"),
    "residual without its state": (lambda s: s.residual(s.field(), number(), VECTOR), "Residual takes 4 .*the state"),
    "array": (lambda s: s.solve(s.field().numpy(), number(), VECTOR), r"inputs\[0\] \(m\) is a ndarray.*torch tensor"),
    "float": (lambda s: s.solve(s.field(), 0.5, VECTOR), r"inputs\[1\].* is a float.*torch tensor"),
    "integers": (lambda s: s.solve(s.field().long(), number(), VECTOR), r"inputs\[0\].*int64.*float64"),
    "booleans": (lambda s: s.solve(s.field(), number(), VECTOR > 0), r"inputs\[2\].*bool"),
    "complex": (lambda s: s.solve(s.field() * 1j, number(), VECTOR), r"inputs\[0\].*complex128"),
    "field too long": (lambda s: s.solve(torch.zeros(s.n + 1).double(), number(), VECTOR), r"inputs\[0\].*distribute"),
    "field without axes": (lambda s: s.solve(number(), number(), VECTOR), r"inputs\[0\] \(m\) has shape \(\)"),
    "state too short": (
        lambda s: s.residual(s.field()[1:], s.field(), number(), VECTOR),
        "the state has shape.*this rank owns",
    ),
    "vector of wrong length": (lambda s: s.solve(s.field(), number(), torch.ones(3).double()), r"inputs\[2\].*\(3,\).*\(2,\)"),
    "vector without axes": (lambda s: s.solve(s.field(), number(), number()), r"inputs\[2\].*\(\).*\(2,\)"),
    "not a number": (lambda s: s.solve(s.field() * torch.nan, number(), VECTOR), r"inputs\[0\] \(m\).*not finite"),
    "infinity in a Constant": (lambda s: s.functional(s.field(), number(np.inf)), r"inputs\[1\].*not finite"),
    "opposite infinities": (lambda s: s.solve(s.field(), number(), number([np.inf, -np.inf])), r"inputs\[2\].*not finite"),
    "batches that do not broadcast": (
        lambda s: s.solve(s.field(2), torch.ones(3).double(), VECTOR),
        r"broadcast.*inputs\[0\].*\(2,\).*inputs\[1\].*\(3,\)",
    ),
    # weak forms
    "not a form": (lambda s: weak_form(s, F=s.u), "F is a Function.*UFL form", UnsupportedForm),
    "bilinear form": (lambda s: weak_form(s, F=bilinear(s)), "2 arguments.*TrialFunction", UnsupportedForm),
    "no test function": (lambda s: weak_form(s, F=s.u * ufl.dx), "0 arguments", UnsupportedForm),
    "test function of another space": (lambda s: weak_form(s, F=other_test(s), inputs=[]), "another space", UnsupportedForm),
    "form without the state": (lambda s: weak_form(s, F=s.m * v(s) * ufl.dx, inputs=[s.m]), "state does not occur"),
    "state that is no Function": (lambda s: weak_form(s, state=s.c), "state is a Constant"),
    "state among the inputs": (lambda s: weak_form(s, inputs=[s.m, s.u]), "state is listed among the inputs"),
    "input twice": (lambda s: weak_form(s, inputs=[s.m, s.c, s.m]), r"inputs\[2\].* twice"),
    "input that occurs nowhere": (
        lambda s: weak_form(s, inputs=[s.m, fem.Function(s.V, name="q")]),
        r"inputs\[1\] \(q\).*neither",
    ),
    "input of a wrong kind": (lambda s: weak_form(s, inputs=[s.m, 3.0]), r"inputs\[1\] is a float"),
    "input that is an expression": (lambda s: weak_form(s, inputs=[s.m + 1]), r"inputs\[0\] is a Sum"),
    "condition on another space": (
        lambda s: weak_form(s, bcs=[fem.dirichletbc(0.0, boundary_dofs(s.P2, everywhere), s.P2)]),
        r"bcs\[0\].*another function space",
    ),
    "condition of a wrong kind": (lambda s: weak_form(s, bcs=[s.m]), r"bcs\[0\] is a Function.*dirichletbc"),
    "conditions that are no list": (
        lambda s: weak_form(s, bcs=fem.dirichletbc(0.0, boundary_dofs(s.V, everywhere), s.V)),
        "bcs.*list",
    ),
    "inputs that are no list": (lambda s: weak_form(s, inputs=s.m), "inputs.*list"),
    "single precision": (single_precision, "the state has dtype float32.*float64"),
    "complex Function": (
        lambda s: weak_form(s, inputs=[fem.Function(s.V, dtype=np.complex128, name="q")]),
        r"inputs\[0\] \(q\).*complex128.*float64",
    ),
    "complex Constant": (
        lambda s: weak_form(s, F=s.u * v(s) * ufl.dx + fem.Constant(s.V.mesh, 1j) * v(s) * ufl.dx, inputs=[]),
        "complex",
    ),
    # functionals
    "functional of no form": (lambda s: fem_vi.Functional(s.m, [s.m]), "form is a Function", UnsupportedForm),
    "functional with a test function": (lambda s: fem_vi.Functional(s.m * v(s) * ufl.dx, [s.m]), "1 argument", UnsupportedForm),
    "functional without the input": (lambda s: fem_vi.Functional(s.m * ufl.dx(s.V.mesh), [s.m, s.u]), r"inputs\[1\].*not occur"),
    # observations
    "points of another dimension": (lambda s: fem_vi.PointObservation(s.V, [[0.1] * 4]), r"\(1, 4\).*\(num_points, 2\)"),
    "points of one axis too many": (lambda s: fem_vi.PointObservation(s.V, np.zeros((2, 2, 2))), r"\(2, 2, 2\)"),
    "no points": (lambda s: fem_vi.PointObservation(s.V, np.zeros((0, 2))), "at least one point"),
    "points that are no numbers": (lambda s: fem_vi.PointObservation(s.V, [["a", "b"]]), "points"),
    "points that are not finite": (lambda s: fem_vi.PointObservation(s.V, [[0.1, 0.1], [np.nan, 0.1]]), r"points \[1\].*finite"),
    "points outside": (outside, r"2 of 3 points.*\(1\.25, 0\.5\); \(0\.5, -3\.0\).*MaskOutside", fem_vi.PointsOutsideMesh),
    "mixed space": (lambda s: fem_vi.PointObservation(s.W, [[0.5, 0.5]]), r"mixed.*V\.sub\(i\)"),
    "observed field too short": (lambda s: s.observe(s.field()[1:]), "PointObservation: u has shape.*distribute"),
    "observed array": (lambda s: s.observe(s.field().numpy()), "PointObservation: u is a ndarray"),
    # priors
    "prior on another degree": (lambda s: fem_vi.MaternField(s.P2, std=1.0, length=1.0), "degree 1"),
    "prior on a mixed space": (lambda s: fem_vi.MaternField(s.W, std=1.0, length=1.0), "degree 1"),
    "prior on a discontinuous space": (
        lambda s: fem_vi.MaternField(fem.functionspace(s.V.mesh, ("DG", 1)), std=1.0, length=1.0),
        "continuous Lagrange",
    ),
    "prior on a vector space": (
        lambda s: fem_vi.MaternField(fem.functionspace(s.V.mesh, ("Lagrange", 1, (2,))), std=1.0, length=1.0),
        "scalar",
    ),
    "negative deviation": (lambda s: fem_vi.MaternField(s.V, std=-1.0, length=1.0), r"std is -1\.0"),
    "length that is no number": (lambda s: fem_vi.MaternField(s.V, std=1.0, length=np.nan), "length is nan"),
    "mean of a wrong length": (
        lambda s: fem_vi.MaternField(s.V, std=1.0, length=1.0, mean=torch.zeros(s.n + 1)),
        "mean has shape",
    ),
    "draw too short": (lambda s: s.prior.log_prob(s.field()[1:]), "m has shape"),
    "noise too short": (lambda s: s.prior.unwhiten(s.field()[1:]), "xi has shape"),
    # crossings
    "distribute too short": (lambda s: fem_vi.distribute(torch.zeros(3), s.V), r"x has shape \(3,\).*20 entries"),
    "distribute a number": (lambda s: fem_vi.distribute(number(), s.V), r"x has shape \(\)"),
    "gather too long": (lambda s: fem_vi.gather(torch.zeros(s.n + 1), s.V), "gather: x has shape"),
    # objects of other kinds
    "solver of a form": (lambda s: fem_vi.Solve(s.F), r"Solve: pde is a Form; .* WeakForm.*fem_vi\.WeakForm\(F, state=u"),
    "solver of the class": (lambda s: fem_vi.Solve(fem_vi.WeakForm), "pde is the class WeakForm"),
    "residual of a form": (lambda s: fem_vi.Residual(s.F), "Residual: pde is a Form"),
    "time steps of a form": (lambda s: fem_vi.Evolve(s.F, previous=s.m, num_steps=2), "Evolve: pde is a Form"),
    "solver with a list of options": (
        lambda s: fem_vi.Solve(s.pde, petsc_options=["lu"]),
        r"petsc_options is \['lu'\].*ksp_type",
    ),
    "residual with a name of options": (lambda s: fem_vi.Residual(s.pde, petsc_options="lu"), "petsc_options is 'lu'"),
    "budget in words": (lambda s: fem_vi.Solve(s.pde, factor_budget="1 GB"), "factor_budget is '1 GB'"),
    "input None": (lambda s: weak_form(s, inputs=[None]), r"inputs\[0\] is a NoneType"),
    "functional of None": (lambda s: fem_vi.Functional(s.m * ufl.dx, [None]), r"inputs\[0\] does not occur"),
    "functional, arguments swapped": (lambda s: fem_vi.Functional([s.m], s.m * ufl.dx), "form is a list", UnsupportedForm),
    "functional of no integral": (lambda s: fem_vi.Functional(ufl.Form([]), []), "no integrals", UnsupportedForm),
    "points of a mesh": (
        lambda s: fem_vi.PointObservation(s.V.mesh, [[0.5, 0.5]]),
        "V is a Mesh; .*FunctionSpace.*functionspace",
    ),
    "points of a Function": (lambda s: fem_vi.PointObservation(s.u, [[0.5, 0.5]]), "V is a Function;"),
    "complex points": (lambda s: fem_vi.PointObservation(s.V, np.array([[0.5j, 0.5]])), "points are complex"),
    "observed complex field": (lambda s: s.observe(s.field() * 1j), "u is torch.complex128.*real"),
    "expression None": (lambda s: fem_vi.ExpressionObservation(None, [[0.5, 0.5]], [s.u]), "expr is a NoneType", UnsupportedForm),
    "parts of a mesh": (lambda s: fem_vi.Split(s.V.mesh), "Split: W is a Mesh"),
    "tensor of a space": (lambda s: fem_vi.to_tensor(s.V), "function is a FunctionSpace; .*Function"),
    "Function of an array": (lambda s: fem_vi.to_function(s.field().numpy(), s.V), "x is a ndarray"),
    "Function, arguments swapped": (lambda s: fem_vi.to_function(s.V, s.field()), "V is a Tensor"),
    "Function of complex numbers": (lambda s: fem_vi.to_function(s.field() * 1j, s.V), "x is torch.complex128"),
    "prior on a mesh": (lambda s: fem_vi.MaternField(s.V.mesh, std=1.0, length=1.0), "V is a Mesh"),
    "deviation in words": (lambda s: fem_vi.MaternField(s.V, std="1", length=1.0), "std is '1'"),
    "complex mean": (lambda s: fem_vi.MaternField(s.V, std=1.0, length=1.0, mean=s.field() * 1j), "mean is torch.complex128"),
    "metric in words": (lambda s: fem_vi.MaternField(s.V, std=1.0, length=1.0, metric="a"), "metric is 'a'.*2 x 2"),
    "one of two lengths": (lambda s: fem_vi.MaternField(s.V, std=1.0, length=1.0, lengths=3.0), r"lengths is 3\.0"),
    "density of complex numbers": (lambda s: s.prior.log_prob(s.field() * 1j), "m is torch.complex128"),
    "density of a Function": (lambda s: s.prior.log_prob(s.m), "m is a Function; it must be a torch tensor"),
    "noise None": (lambda s: s.prior.unwhiten(None), "xi is None"),
    "modes on a mesh": (lambda s: fem_vi.KarhunenLoeveField(s.V.mesh, s.prior), "V is a Mesh"),
    "noise in words": (lambda s: fem_vi.GaussianNoise("0.1"), "std is '0.1'"),
    "problem, arguments swapped": (
        lambda s: fem_vi.InverseProblem(s.observe, s.prior, fem_vi.GaussianNoise(1.0), number([0.0])),
        "prior is a PointObservation.*MaternField",
    ),
    "problem with the prior's class": (
        lambda s: fem_vi.InverseProblem(fem_vi.MaternField, s.observe, fem_vi.GaussianNoise(1.0), number([0.0])),
        "prior is the class MaternField",
    ),
    "problem with the noise's class": (
        lambda s: fem_vi.InverseProblem(s.prior, s.observe, fem_vi.GaussianNoise, number([0.0])),
        "likelihood is the class GaussianNoise",
    ),
    "family on a space": (lambda s: fem_vi.LowRankNormal(s.V, rank=2), "prior is a FunctionSpace"),
    "prediction of nothing": (lambda s: problem(s).predict(None), "m is None"),
    "fit of a distribution": (
        lambda s: fem_vi.fit(problem(s), fem_vi.MeanFieldNormal(s.prior)(), fem_vi.ELBO(samples=2), steps=1),
        "posterior is a .*Module",
    ),
    "fit, arguments swapped": (
        lambda s: fem_vi.fit(fem_vi.MeanFieldNormal(s.prior), problem(s), fem_vi.ELBO(samples=2), steps=1),
        "problem is a MeanFieldNormal; .*InverseProblem",
    ),
    "sum without ranks": (lambda s: fem_vi.all_sum(s.field(), s.V.mesh), "all_sum: comm is a Mesh; .*mesh.comm"),
    "sum of a number": (lambda s: fem_vi.all_sum(1.0, COMM), r"all_sum: x is 1\.0"),
    "distribute over a mesh": (lambda s: fem_vi.distribute(torch.zeros(20), s.V.mesh), "distribute: V is a Mesh"),
    "distribute an array": (lambda s: fem_vi.distribute(np.zeros(20), s.V), "distribute: x is a ndarray"),
    "gather, arguments swapped": (lambda s: fem_vi.gather(s.V, s.field()), "gather: V is a Tensor"),
    "coordinates of a space": (lambda s: fem_vi.coordinates(s.V), r"mesh is a FunctionSpace; .*V\.mesh"),
    "mesh without ranks": (lambda s: fem_vi.read_mesh("a.msh", None), "read_mesh: comm is None"),
    "mesh of a mesh": (lambda s: fem_vi.read_mesh(s.V.mesh, COMM), "read_mesh: path is a Mesh"),
    "grid in words": (lambda s: fem_vi.ProcessGrid.create(COMM, "2"), "mesh_ranks is '2'"),
    "residual of no file": (lambda s: fem_vi.load_residual(None), "load_residual: path is None"),
    "written fields without names": (lambda s: fem_vi.write_fields("fields.xdmf", s.V, [s.field()]), "fields is .*Name them"),
    "written complex field": (lambda s: fem_vi.write_fields("fields.xdmf", s.V, {"m": s.field() * 1j}), "m is torch.complex128"),
    # files
    "file of another kind": (lambda s: fem_vi.write_fields("fields.vtu", s.V, {"m": s.field()}), r"\.xdmf"),
    "written field too short": (lambda s: fem_vi.write_fields("fields.xdmf", s.V, {"m": s.field()[1:]}), "m has shape"),
    "written field of another degree": (
        lambda s: fem_vi.write_fields("fields.xdmf", s.P2, {"m": torch.zeros(fem_vi.bridge.layout.num_owned(s.P2))}),
        "degree",
    ),
}


def check(name: str) -> None:
    call, words, *kind = WAYS[name]
    with pytest.raises(*kind or [InvalidInput], match=words) as caught:
        call(setting())
    assert isinstance(caught.value, fem_vi.FemViError)


@pytest.mark.parametrize("name", WAYS)
def test_way_to_fail(name: str) -> None:
    check(name)


@pytest.mark.mpi
def test_every_way_to_fail_leaves_the_ranks_in_step() -> None:
    for name in WAYS:
        check(name)
        assert set(COMM.allgather(name)) == {name}


@pytest.mark.mpi
def test_all_is_well_after_every_failure() -> None:
    """Guards the table: without a mistake the same calls succeed."""
    s = setting()
    assert s.solve(s.field(2), number([[0.5], [1.0], [2.0]]), VECTOR).shape == (3, 2, s.n)
    assert s.residual(s.field(), s.field(), number(), VECTOR).shape == (s.n,)
    assert s.functional(s.field(), number()).shape == ()
    assert s.observe(s.field()).shape == (1,)


LAST = COMM.rank == COMM.size - 1
ON_ONE_RANK: dict[str, tuple[Call, str]] = {
    "field": (lambda s: s.solve(s.field()[1 if LAST else 0 :], number(), VECTOR), r"inputs\[0\] \(m\) has shape"),
    "value": (
        lambda s: s.solve(s.field() * (torch.nan if LAST else 1.0), number(), VECTOR),
        r"inputs\[0\].*not finite",
    ),
    "type": (lambda s: s.solve(s.field(), 1 if LAST else number(), VECTOR), r"inputs\[1\].* is a int"),
    "number of tensors": (lambda s: s.functional(*[s.field(), number()][: 1 if LAST else 2]), "takes 2 tensors"),
    "observed field": (lambda s: s.observe(s.field()[1 if LAST else 0 :]), "u has shape"),
    "points": (lambda s: fem_vi.PointObservation(s.V, [[0.5] * (4 if LAST else 2)]), r"\(1, 4\)"),
    "draw": (lambda s: s.prior.log_prob(s.field()[1 if LAST else 0 :]), "m has shape"),
    "deviation": (lambda s: fem_vi.MaternField(s.V, std=-1.0 if LAST else 1.0, length=1.0), "std is"),
    "distribute": (lambda s: fem_vi.distribute(torch.zeros(3 if LAST else 20), s.V), "x has shape"),
    "gather": (lambda s: fem_vi.gather(s.field()[1 if LAST else 0 :], s.V), "x has shape"),
    "form": (lambda s: fem_vi.Solve(s.F if LAST else s.pde), "pde is a Form"),
    "options": (lambda s: fem_vi.Residual(s.pde, petsc_options=["lu"] if LAST else None), "petsc_options is"),
    "input": (lambda s: weak_form(s, inputs=[None if LAST else s.m]), r"inputs\[0\] is a NoneType"),
    "state": (lambda s: weak_form(s, state=None if LAST else s.u), "state is a NoneType"),
    "input that occurs nowhere": (lambda s: weak_form(s, inputs=[s.data if LAST else s.m]), "occurs neither"),
    "list": (lambda s: fem_vi.Functional(s.m * ufl.dx, s.m if LAST else [s.m]), "inputs.*list"),
    "input of a functional": (lambda s: fem_vi.Functional(s.m * ufl.dx, [s.u if LAST else s.m]), "does not occur"),
    "input of an expression": (
        lambda s: fem_vi.ExpressionObservation(s.u * s.m, [[0.5, 0.5]], [None if LAST else s.u]),
        r"inputs\[0\] does not occur",
    ),
    "previous": (lambda s: fem_vi.Evolve(s.pde, previous=s.m, num_steps="2" if LAST else 2), "num_steps is '2'"),
    "complex": (lambda s: s.observe(s.field() * (1j if LAST else 1.0)), "u is torch.complex128"),
    "noise": (lambda s: s.prior.unwhiten(None if LAST else s.field()), "xi is None"),
}


@pytest.mark.mpi(every_row=True)
@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_a_mistake_on_one_rank_is_raised_on_all(name: str) -> None:
    call, words = ON_ONE_RANK[name]
    with pytest.raises(InvalidInput, match=words) as caught:
        call(setting())
    assert LAST or f"on rank {COMM.size - 1}" in str(caught.value)


BETWEEN_RANKS: dict[str, tuple[Call, str]] = {
    "batch axes": (lambda s: s.solve(s.field(1 + COMM.rank), number(), VECTOR), "Solve: the batch axes differ between ranks"),
    "Constants": (
        lambda s: s.solve(s.field(), number(1.0 * COMM.rank), VECTOR),
        "Solve: the values of a Constant differ between ranks",
    ),
    "points": (lambda s: fem_vi.PointObservation(s.V, [[0.5, 0.1 * COMM.rank]]), "points differ between ranks"),
    "number of points": (lambda s: fem_vi.PointObservation(s.V, [[0.5, 0.1]] * (1 + COMM.rank)), "points differ between ranks"),
    "batches of draws": (lambda s: s.prior.log_prob(s.field(1 + COMM.rank)), "batch axes of m differ between ranks"),
    "batches of fields": (
        lambda s: s.observe(s.field(1 + COMM.rank)),
        "PointObservation: the batch axes of u differ between ranks",
    ),
}


@pytest.mark.mpi(every_row=True)
@pytest.mark.skipif(COMM.size == 1, reason="one rank cannot differ from another")
@pytest.mark.parametrize("name", BETWEEN_RANKS)
def test_what_must_be_replicated_differs_between_ranks(name: str) -> None:
    call, words = BETWEEN_RANKS[name]
    with pytest.raises(InvalidInput, match=words):
        call(setting())


@pytest.mark.mpi
@pytest.mark.parametrize("what", ["fixed", "factor", "data"])
def test_what_is_fixed_must_not_change(what: str) -> None:
    """On the last rank alone, where it is a field: refused on all; allowed again when it is put back."""
    s = create(COMM)
    words = {"fixed": "permeability", "factor": "Constant", "data": "Dirichlet"}[what]
    target = s.factor.value if what == "factor" else getattr(s, what).x.array
    changes = what == "factor" or LAST
    before = target.copy()
    if changes:
        target[...] = before + 1.0
    arguments = (s.field(), number(), VECTOR)
    for call in (lambda: s.solve(*arguments), lambda: s.residual(s.field(), *arguments)):
        with pytest.raises(InvalidInput, match=f"{words}.*changed since|{words}.* has changed") as caught:
            call()
        assert "inputs=[...]" in str(caught.value)
    if changes:
        target[...] = before
    s.solve(*arguments)


@pytest.mark.mpi
def test_what_a_functional_holds_fixed_must_not_change() -> None:
    s = create(COMM)
    functional = fem_vi.Functional(s.m * s.fixed * ufl.dx, [s.m])
    functional(s.field())
    s.fixed.x.array[:] = 1.0
    with pytest.raises(InvalidInput, match=r"permeability.*changed"):
        functional(s.field())


@pytest.mark.mpi
def test_inputs_and_state_may_change_freely() -> None:
    s = create(COMM)
    before = s.solve(s.field(), number(), VECTOR)
    s.m.x.array[:], s.u.x.array[:], s.c.value, s.b.value[:] = 5.0, 7.0, 9.0, 11.0
    assert torch.allclose(s.solve(s.field(), number(), VECTOR), before, rtol=1e-14)


@pytest.mark.mpi
@pytest.mark.parametrize(("length", "metric", "warns"), [(0.3, None, 0), (0.2, None, 1), (0.3, np.diag([1.0, 0.25]), 1)])
def test_a_length_below_the_distance_of_nodes_is_remarked(length: float, metric: Any, warns: int) -> None:
    """20 nodes on the unit square are 0.22 apart."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fem_vi.MaternField(setting().V, std=1.0, length=length, metric=metric)
    said = [str(each.message) for each in caught if "Neighbouring nodes are all but independent" in str(each.message)]
    assert len(said) == (warns if COMM.rank == 0 else 0)


def test_a_long_list_of_points_outside_is_cut() -> None:
    points = [[2.0 + k, 0.5] for k in range(14)]
    with pytest.raises(fem_vi.PointsOutsideMesh, match=r"14 of 14 .*\(11\.0, 0\.5\) and 4 more") as caught:
        fem_vi.PointObservation(fem.functionspace(mesh.create_unit_square(MPI.COMM_SELF, 1, 1), ("Lagrange", 1)), points)
    assert "12.0" not in str(caught.value)
