"""What is of the wrong type is named, before anything is computed with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fem_vi.errors import InvalidInput
from fem_vi.vi.discrepancy import MMD, SlicedWasserstein
from fem_vi.vi.divergence import ForwardKL, GivenSamples
from fem_vi.vi.field_transform import LevelSet
from fem_vi.vi.fit import fit
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.mcmc.chains import sample
from fem_vi.vi.mcmc.hmc import HMC
from fem_vi.vi.mcmc.smc import smc
from fem_vi.vi.minibatch import MinibatchProblem
from fem_vi.vi.objective import ELBO
from fem_vi.vi.optimizer import Cosine
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem

PRIOR, NOISE = GaussianVector(torch.zeros(2)), GaussianNoise(0.1)
PROBLEM = InverseProblem(PRIOR, lambda m: m, NOISE, torch.ones(2))
THREE = GivenSamples(torch.zeros(5, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: InverseProblem(PRIOR, lambda m: m, GaussianNoise, torch.ones(2)), "likelihood is the class GaussianNoise"),
        (lambda: PROBLEM.predict(None), "m is None"),
        (lambda: PROBLEM.log_joint(np.zeros(2)), "m is a ndarray"),
        (lambda: PROBLEM.predict(torch.zeros(2, dtype=torch.int64)), "m is torch.int64"),
        (lambda: MinibatchProblem(PRIOR, lambda m, index: m, NOISE, None, size=1), "y is None"),
        (lambda: fit(PROBLEM, MeanFieldNormal(PRIOR), ELBO(), steps=1, resume="no"), "resume is 'no'"),
        (lambda: fit(PROBLEM, MeanFieldNormal(PRIOR), ELBO(), steps=1, schedule=Cosine), "schedule is the class Cosine"),
        (lambda: Cosine("a"), "final is 'a'"),
        (lambda: ForwardKL(THREE)(PROBLEM, MeanFieldNormal(PRIOR)), r"m has shape \(5, 3\); the prior has 2 unknowns"),
        (lambda: MMD(THREE)(PROBLEM, MeanFieldNormal(PRIOR)), r"m has shape \(5, 3\)"),
        (lambda: SlicedWasserstein(THREE)(PROBLEM, MeanFieldNormal(PRIOR)), r"m has shape \(5, 3\)"),
        (lambda: sample(PROBLEM, HMC(), grid=3), "grid is 3"),
        (lambda: smc(PROBLEM, grid=3), "grid is 3"),
        (lambda: LevelSet(1.0, 2.0), "values is 1.0"),
    ],
)
def test_is_refused(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()
