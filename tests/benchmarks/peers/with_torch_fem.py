"""torch-fem: planar heat conduction with one conductivity for each triangle, the mean of exp(m) by the case's rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torchfem.materials import IsotropicConductivity2D
from torchfem.planar import PlanarHeat

from tests.benchmarks.compare import variations
from tests.benchmarks.peers.case import Case


def create(case: Case, variant: str) -> Callable[[], tuple[float, np.ndarray]]:
    """Value and gradient of the sum of (u - d)^2 / 2 over the nodes.

    Args:
        case: The problem.
        variant: Linear solver, "direct" or "cg" (with its algebraic multigrid).
    """
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    cells = torch.from_numpy(case.cells.astype(np.int64))
    points, weights = torch.from_numpy(case.rule_points), torch.from_numpy(case.rule_weights)
    data = torch.from_numpy(case.data)
    inputs = variations(case.m)
    model = PlanarHeat(torch.from_numpy(case.nodes), cells, IsotropicConductivity2D(torch.ones(len(cells))))
    constraints = torch.zeros(len(case.nodes), 1, dtype=torch.bool)
    constraints[torch.from_numpy(case.boundary)] = True
    model.constraints = constraints
    model.heat_flux = model.integrate_body_load(1.0)

    def work() -> tuple[float, np.ndarray]:
        m = torch.from_numpy(next(inputs)).requires_grad_()
        conductivity = torch.exp(m[cells] @ points.T) @ weights
        model.material = IsotropicConductivity2D(conductivity)
        u = model.solve(method=variant, differentiable_parameters=conductivity)[0]
        loss = 0.5 * (u[:, 0] - data).square().sum()
        (gradient,) = torch.autograd.grad(loss, m)
        return float(loss.detach()), gradient.numpy()

    return work
