"""The directions in which data tell most, by random probes: a block solver over field tensors on any number of ranks.

Wanted are the dominant eigenpairs of H = J'J. Each block of random vectors takes two passes: Y = J'(J Omega), whose orthonormal
basis Q spans the dominant directions; then J Q, whose singular values and vectors give those of J on the span. The second pass
needs no adjoint, and singular values of J Q keep twice the digits of eigenvalues of Q'HQ.

A block costs three products for each of its vectors. Of few unknowns, J times each unit vector costs no more than two blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fem_vi.parallel import all_values
from fem_vi.vi.prior import FieldPrior
from fem_vi.vi.products import GaussNewtonProducts
from fem_vi.vi.randomness import private_generator

BLOCK = 16
OVERSAMPLING = 8
FEW = 6 * BLOCK  # unknowns that cost no more products than two blocks


def dominant_directions(
    prior: FieldPrior, at: GaussNewtonProducts, *, threshold: float, rank: int | None = None, seed: int = 0
) -> tuple[Tensor, float]:
    """Right singular vectors of J times singular values, largest first: sqrt(lambda_i) v_i with J'J v_i = lambda_i v_i.

    Blocks of probes, each solved as one batch, are added until the smallest but 8 of the values found is below the threshold, or
    the span holds all that J can have; in that case the answer is exact to rounding. It is for up to 96 unknowns: no random
    vectors are taken then.

    Args:
        prior: Knows how the unknowns are spread over ranks.
        at: The linearised problem.
        threshold: Smallest lambda wanted.
        rank: Most directions, or None for all above the threshold.
        seed: Of the probes; the state of torch's generator is left as it was found.

    Returns:
        The directions, `(r, n_owned)`, r at least 1, and the largest lambda that was found and left out (0 for none).

    MPI: Collective.

    References:
        Halko, Martinsson, Tropp (2011), Finding structure with randomness.
    """
    most = min(at.num_data, prior.num_global)
    goal = most if rank is None else min(rank + OVERSAMPLING, most)
    basis, images = torch.zeros(0, *prior.event_shape, dtype=torch.float64), torch.zeros(0, at.num_data, dtype=torch.float64)
    if prior.num_global <= min(FEW, at.num_data, 3 * goal):
        basis = prior.scatter(torch.eye(prior.num_global, dtype=torch.float64))
        images = at.forward(basis)
    with private_generator(seed):
        while len(basis) < goal:
            block = min(max(BLOCK, len(basis)), goal - len(basis))
            rows = at.adjoint(at.forward(prior.white_noise(torch.Size([block]))))
            for _ in range(2):  # twice: what the first pass leaves of the old basis is large beside small directions
                rows = rows - prior.localise(prior.all_sum(basis @ rows.T)).T @ basis
                rows = orthonormal(prior, rows)
            basis, images = torch.cat([basis, rows]), torch.cat([images, at.forward(rows)])
            values = torch.linalg.svdvals(images).square()
            if len(values) > OVERSAMPLING and float(values[-1 - OVERSAMPLING]) < threshold:
                break
    left, singular, _ = torch.linalg.svd(images, full_matrices=False)
    kept = int((singular.square() >= threshold).sum())
    kept = max(1, kept if rank is None else min(rank, kept))
    neglected = float(singular[kept].square()) if kept < len(singular) else 0.0
    return prior.localise(left[:, :kept] * singular[:kept]).T @ basis, neglected


def orthonormal(prior: FieldPrior, rows: Tensor) -> Tensor:
    """Orthonormal rows of the same span, by QR on each rank and once more on the stacked factors (TSQR).

    Args:
        prior: Whose ranks share the unknowns.
        rows: `(k, n_owned)`, k at most the number of unknowns on all ranks.

    Returns:
        `(k, n_owned)`.

    MPI: Collective.

    References:
        Demmel, Grigori, Hoemmen, Langou (2012), Communication-optimal parallel and sequential QR and LU factorizations.
    """
    if all(size == prior.num_global for size in all_values(prior.comm, prior.event_shape[0])):  # replicated
        return torch.linalg.qr(rows.T).Q.T
    local = torch.linalg.qr(rows.T)
    factors = all_values(prior.comm, local.R.numpy())
    joint = torch.linalg.qr(torch.from_numpy(np.concatenate(factors))).Q
    first = sum(len(factor) for factor in factors[: prior.comm.rank])
    return (local.Q @ joint[first : first + len(local.R)]).T
