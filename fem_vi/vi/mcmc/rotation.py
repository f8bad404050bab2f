"""Kicks and rotations: the integrator that the kernels share.

Hamilton's equations of exp(h(x)) N(x; 0, I) with velocity v ~ N(0, I) are x' = v, v' = -x + grad h(x). They are split into

    kick       v <- v + (t / 2) grad h(x)
    rotation   (x, v) <- (x cos t + v sin t, v cos t - x sin t)
    kick       v <- v + (t / 2) grad h(x)

The rotation conserves |x|^2 + |v|^2 exactly, so that a mesh may be refined without the acceptance falling. Without kicks and with
one rotation this is pCN; with kicks and one rotation a Langevin step; with many rotations Hamiltonian Monte Carlo. The energy
|v|^2 / 2 changes in a kick k by <v, k> + |k|^2 / 2, which is summed up as it happens: no difference of large numbers is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fem_vi.vi.mcmc.kernel import Info, accept_or_stay
from fem_vi.vi.mcmc.target import State, Target

QUARTER = 0.5 * math.pi


def rotate_once(target: Target, state: State, angle: float, *, temperature: float) -> tuple[State, Info]:
    """A step without kicks, accepted with probability min(1, exp(temperature (h(x') - h(x)))). Collective."""
    x = math.cos(angle) * state.x + math.sin(angle) * target.crowd.noise()
    proposal = target.attempt(x)
    return accept_or_stay(target, state, proposal, temperature * (proposal.excess - state.excess))


def trajectory(target: Target, state: State, angle: float, *, rotations: int, temperature: float) -> tuple[State, Info]:
    """Kicks and rotations from a fresh velocity, accepted by the change of energy. Collective."""
    v = target.crowd.noise()
    cosine, sine, half = math.cos(angle), math.sin(angle), 0.5 * angle * temperature
    work = torch.zeros(len(v), dtype=v.dtype)  # rank-local part of the change of |x|^2 / 2 + |v|^2 / 2
    alive = torch.ones(len(v), dtype=torch.bool)
    at = state
    for _ in range(rotations):
        v, work = _kick(v, half * at.slope, work)
        x, v = cosine * at.x + sine * v, cosine * v - sine * at.x
        at = target.attempt(x)
        alive &= torch.isfinite(at.excess)
        v, work = _kick(v, half * at.slope, work)
        if not bool(alive.any()):
            break
    change = temperature * (at.excess - state.excess) - target.problem.prior.all_sum(work)
    return accept_or_stay(target, state, at, torch.where(alive, change, torch.full_like(change, -torch.inf)))


def _kick(v: Tensor, kick: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
    return v + kick, work + (v * kick).sum(-1) + 0.5 * kick.square().sum(-1)
