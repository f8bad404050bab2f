"""What users of models get wrong: each is told what is wrong, in the words of their arguments."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import nn

import fem_vi
from fem_vi.models import PDDLVM, AmortisedInversion, DataStage, Preconditioned, RecordedELBO, VirtualELBO
from tests.helpers import boundary_dofs, everywhere

F64 = torch.float64


def network(size_in: int, size_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size_in, 4, dtype=F64), fem_vi.DiagonalHead(4, size_out))


@pytest.fixture(scope="module")
def setting() -> SimpleNamespace:
    """Diffusion on 18 triangles with one coefficient for all, its two models, and data at three points."""
    V = fem.functionspace(mesh.create_unit_square(MPI.COMM_SELF, 3, 3), ("Lagrange", 1))
    u, k, v = fem.Function(V), fem.Constant(V.mesh, (0.0, 0.0)), ufl.TestFunction(V)
    F = (ufl.exp(k[0]) * ufl.inner(ufl.grad(u), ufl.grad(v)) - ufl.exp(k[1]) * v) * ufl.dx
    pde = fem_vi.WeakForm(F, state=u, inputs=[k], bcs=[fem.dirichletbc(0.0, boundary_dofs(V, everywhere), V)])
    prior = fem_vi.GaussianVector(torch.zeros(2))
    solve, observe = fem_vi.Solve(pde), fem_vi.PointObservation(V, [[0.4, 0.4], [0.5, 0.6], [0.6, 0.3]])
    noise = fem_vi.GaussianNoise(0.01)
    problem = fem_vi.InverseProblem(prior, lambda z: observe(solve(z)), noise, torch.zeros(3))

    def create(**changed) -> PDDLVM:
        return PDDLVM(pde, **{"prior": prior, "forward": network(2, 4), "inverse": network(4, 2)} | changed)

    def stage(**changed) -> DataStage:
        given = {"model": model, "y": torch.zeros(5, 3), "encoder": network(3, 2), "observe": observe, "likelihood": noise}
        return DataStage(**given | changed)

    model, amortised = create(), AmortisedInversion(problem, fem_vi.DenseEncoder(3, hidden=(4,)))
    pairs = fem_vi.simulate(problem, 8)
    return SimpleNamespace(**locals())


def fit(module, objective, problem=None):
    return fem_vi.fit(module.problem if problem is None else problem, module, objective, steps=1)


def pairs_of(simulations: fem_vi.Simulations) -> fem_vi.ExpectedForwardKL:
    return fem_vi.ExpectedForwardKL(fem_vi.Stored(simulations, 4))


WAYS = {
    "weak form None": (lambda s: PDDLVM(None, prior=s.prior, forward=network(2, 4)), "pde is None"),
    "float32 network": (lambda s: s.create(forward=network(2, 4).float()), r"forward has parameters in float32.*double\(\)"),
    "a tensor from a network": (lambda s: s.create(forward=nn.Linear(2, 4, dtype=F64)), "returned Tensor; .* a head"),
    "a network of too many parameters": (lambda s: s.create(forward=network(3, 4)), r"forward does not take .*2, 2"),
    "a network of all coefficients": (lambda s: s.create(inverse=network(16, 2)), r"inverse does not take .*2, 4"),
    "reference of another length": (lambda s: s.create(measure=Preconditioned(torch.zeros(3))), r"inputs\[0\] has shape \(3,\)"),
    "an objective of posteriors": (lambda s: fit(s.model, fem_vi.ELBO(samples=2)), "PDDLVM, whose forward takes arguments"),
    "an objective of one data set": (lambda s: fit(s.amortised, fem_vi.ELBO(samples=2)), r"model\.at\(y\)"),
    "all data sets diagnosed": (lambda s: fem_vi.diagnose(s.problem, s.amortised), r"model\.at\(y\)"),
    "no posterior": (lambda s: fem_vi.ELBO(samples=2)(s.problem, nn.Linear(3, 3)), "posterior is a Linear, whose forward takes"),
    "no distribution": (lambda s: fem_vi.diagnose(s.problem, Returns(3.0)), "returned a float; it must return a distribution"),
    "another model's problem": (lambda s: fit(s.model, VirtualELBO(samples=2), s.create().problem), "a model's own virtual data"),
    "virtual data of a stage": (lambda s: fit(s.stage(), VirtualELBO(samples=2)), "model's own virtual data"),
    "recorded data of a model": (lambda s: fit(s.model, RecordedELBO(samples=2)), "a stage's own data"),
    "too few parameters": (lambda s: s.model.predict(torch.zeros(3)), r"z has shape \(3,\); its last axis must have 2"),
    "parameters from NumPy": (lambda s: s.model.predict(np.zeros(2)), "z is a ndarray"),
    "a parameter that is no number": (lambda s: s.model.predict(torch.tensor([0.0, torch.nan])), "z contains values"),
    "a mean of too many parameters": (lambda s: s.model.coordinates_given(torch.zeros(3)), r"z has shape \(3,\)"),
    "half a draw": (lambda s: s.model.sample(torch.zeros(2), 0.5), "samples is 0.5; it must be a whole number, at least 1"),
    "a field that is no number": (lambda s: s.model.invert(torch.full((16,), torch.inf)), "u contains values that are not"),
    "inputs of another size": (lambda s: s.create(inputs=lambda z: z[..., :1]), r"inputs\[0\].* for z .*Give PDDLVM inputs="),
    "inputs that are none": (lambda s: s.create(inputs=3), "inputs is 3"),
    "inputs that return none": (lambda s: s.create(inputs=lambda z: None).predict(torch.zeros(2)), "inputs returned None"),
    "one input too many": (lambda s: s.create(inputs=lambda z: (z, z)).predict(torch.zeros(2)), "returned 2 tensors"),
    "modes in a list": (lambda s: s.create(state=fem_vi.ReducedBasis([[1.0] * 16])), "modes is "),
    "no modes": (lambda s: s.create(state=fem_vi.ReducedBasis(torch.zeros(0, 16))), r"modes have shape \(0, 16\)"),
    "modes that are no numbers": (
        lambda s: s.create(state=fem_vi.ReducedBasis(torch.full((4, 16), torch.nan))),
        "modes contain values that are not finite",
    ),
    "an offset in a list": (lambda s: s.create(state=fem_vi.Nodal(offset=[0.0] * 16)), "offset is "),
    "an offset that is no number": (
        lambda s: s.create(state=fem_vi.Nodal(offset=torch.full((16,), torch.nan))),
        "offset contains values that are not finite",
    ),
    "a frozen model": (lambda s: fit(s.create().requires_grad_(False), VirtualELBO(samples=2)), "PDDLVM has no parameter that"),
    "half a field": (lambda s: s.model.invert(torch.zeros(8)), r"u has shape \(8,\); its last axis must have 16"),
    "no model": (lambda s: s.stage(model=None), "model is None"),
    "other data for a stage": (lambda s: s.stage().posterior(torch.zeros(4)), r"y has shape \(4,\)"),
    "missing data as NaN": (lambda s: s.amortised.posterior(torch.full((3,), torch.nan)), "y contains values that are not"),
    "a family for a head": (
        lambda s: AmortisedInversion(s.problem, fem_vi.DenseEncoder(3), head=fem_vi.MeanFieldNormal),
        "head is the class MeanFieldNormal; it must be a head, or make one",
    ),
    "one width": (lambda s: fem_vi.DenseEncoder(3, hidden=8), "hidden is 8; it must be of type Sequence"),
    "simulations of another problem": (
        lambda s: fit(s.amortised, pairs_of(fem_vi.Simulations(torch.zeros(8, 5), torch.zeros(8, 3)))),
        "the simulations have 5 unknowns; the problem has 2",
    ),
    "a pickle of a model": (lambda s: pickle.dumps(s.model), "a PDDLVM cannot be pickled"),
}  # fmt: skip


class Returns(nn.Module):
    """Returns what it was made with."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> object:
        return self.value


@pytest.mark.parametrize("name", WAYS)
def test_says_what_is_wrong(setting, name):
    act, words = WAYS[name]
    with pytest.raises(fem_vi.InvalidInput, match=words):
        act(setting)


@pytest.mark.parametrize("name", ["model", "amortised", "stage"])
def test_a_copy_has_parameters_of_its_own_and_shares_the_rest(setting, name):
    original = setting.stage() if name == "stage" else getattr(setting, name)
    copied = copy.deepcopy(original)
    assert copied.problem is original.problem
    before = [value.clone() for value in original.parameters()]
    with torch.no_grad():
        for value in copied.parameters():
            value += 0.01
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), before, strict=True))
    fit(copied, {"model": VirtualELBO(samples=2), "amortised": pairs_of(setting.pairs), "stage": RecordedELBO(samples=2)}[name])
