"""Make demos/uncertainty_table/reference.json: the data of demo_uncertainty_table.py, and the posterior by long chains.

The data come from a planted field on a mesh twice as fine with quadratic elements. Hamiltonian Monte Carlo in the coordinates of
a full-rank normal, whose covariance the warm-up learns anew, moves 64 chains as one batch of solves; tempered SMC from the same
normal gives the evidence. No flow is used, so that flows can be judged by what is in the file.

    mpirun -n 4 python demos/make_uncertainty_reference.py hmc   # each writes its part of the file; ranks share the chains out
    mpirun -n 4 python demos/make_uncertainty_reference.py again
    mpirun -n 4 python demos/make_uncertainty_reference.py smc
    python demos/make_uncertainty_reference.py plain             # HMC as it comes
    python demos/make_uncertainty_reference.py nuts              # needs pyro-ppl
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_uncertainty_table import BAND, FULL, HERE, NOISE, fitted, forward_map, inverse_problem, planted_field
from mpi4py import MPI

import fem_vi

FILE = HERE / "uncertainty_table" / "reference.json"
GRID = fem_vi.ProcessGrid.create(MPI.COMM_WORLD, 1)  # a mesh on each rank
LEVELS = [0.001, 0.005, 0.01, 0.025, *np.round(np.arange(0.05, 0.951, 0.05), 3).tolist(), 0.975, 0.99, 0.995, 0.999]


def make_data() -> torch.Tensor:
    """Temperatures of the planted field, with noise."""
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal(169))
    return forward_map(MPI.COMM_SELF, cells=64, degree=2)(planted_field()) + NOISE * noise


def digits(x: torch.Tensor) -> Any:
    """Nested lists with six digits."""
    return json.loads(json.dumps(x.tolist()), parse_float=lambda text: float(f"{float(text):.6g}"))


def of_chains(samples: fem_vi.Samples) -> dict[str, Any]:
    """What chains say, and what they are worth; printed too."""
    report = samples.report()
    fem_vi.report(GRID.comm, report)
    return {
        "step_size": samples.step_size,
        "rhat": report.rhat,
        "ess_bulk": report.ess_bulk,
        "ess_tail": report.ess_tail,
        "solves": samples.cost.solves,
        "seed": samples.seed,
        "mean": digits(samples.mean),
        "sd": digits(samples.variance.sqrt()),
    }


def again(problem: fem_vi.InverseProblem, normal: fem_vi.FullRankNormal) -> dict[str, Any]:
    """Other chains with other steps, which must agree: their moments alone."""
    found = by_hmc(problem, normal, kernel=fem_vi.HMC(step_size=0.19), draws=640, warmup=96)["hmc"]
    return {"again": {name: value for name, value in found.items() if name not in ("levels", "quantiles")}}


def by_hmc(
    problem: fem_vi.InverseProblem,
    normal: fem_vi.FullRankNormal,
    *,
    kernel: fem_vi.HMC = fem_vi.HMC(step_size=0.12),  # noqa: B008 - frozen
    draws: int = 768,
    warmup: int = 128,
) -> dict[str, Any]:
    """Long chains: moments, quantiles, and what they are worth."""
    chains = 64
    samples = fem_vi.sample(
        problem,
        kernel,
        chains=chains,
        draws=draws,
        warmup=warmup,
        reference=normal,
        adaptation=fem_vi.LearnDense(),
        seed=9,
        grid=GRID,
    )
    points = torch.stack([torch.zeros(64, dtype=torch.float64), planted_field(), samples.mean]).requires_grad_()
    log_joint = problem.log_joint(points)
    (gradient,) = torch.autograd.grad(log_joint.sum(), points)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    return {
        "hmc": {
            "kernel": repr(kernel),
            "chains": chains,
            "draws": draws,
            "warmup": warmup,
            **of_chains(samples),
            "levels": LEVELS,
            "quantiles": digits(torch.quantile(samples.m.flatten(0, 1), levels, dim=0)),
        },
        "check": {"points": points.tolist(), "log_joint": log_joint.tolist(), "gradient": digits(gradient)},
    }


def plain(problem: fem_vi.InverseProblem, normal: fem_vi.FullRankNormal) -> dict[str, Any]:
    """The sampler as it comes, without anything fitted before: what a user pays who asks for no more."""
    samples = fem_vi.sample(problem, fem_vi.HMC())
    band = torch.quantile(samples.m.flatten(0, 1), torch.tensor(BAND, dtype=torch.float64), dim=0)
    return {"plain": {"kernel": "HMC()", "chains": 4, "draws": 1000, "warmup": 500, **of_chains(samples), "band": digits(band)}}


def by_smc(problem: fem_vi.InverseProblem, normal: fem_vi.FullRankNormal) -> dict[str, Any]:
    """The evidence, with means that the chains must agree with."""
    kernel = fem_vi.HMC(most_rotations=12)
    tempered = fem_vi.smc(problem, kernel, particles=64, islands=8, moves=2, reference=normal, seed=8, grid=GRID)
    fem_vi.report(GRID.comm, tempered)
    return {
        "smc": {
            "log_evidence": tempered.log_evidence,
            "error": tempered.log_evidence_error,
            "islands": tempered.log_evidences.tolist(),
            "mean": digits(tempered.mean),
            "sd": digits(tempered.variance.sqrt()),
            "band": digits(torch.quantile(tempered.m.flatten(0, 1), torch.tensor(BAND, dtype=torch.float64), dim=0)),
            "mean_error": digits(tempered.mean_error),
            "solves": tempered.cost.solves,
            "seed": tempered.seed,
        }
    }


def by_nuts(problem: fem_vi.InverseProblem, normal: fem_vi.FullRankNormal) -> dict[str, Any]:
    """Pyro's NUTS, which moves one chain at a time: fewer chains, and shorter ones."""
    samples = fem_vi.pyro_nuts(problem, chains=4, draws=750, warmup=400, reference=normal, seed=10)
    return {
        "nuts": {
            "chains": 4,
            "draws": 750,
            "warmup": 400,
            **of_chains(samples),
            "band": digits(torch.quantile(samples.m.flatten(0, 1), torch.tensor(BAND, dtype=torch.float64), dim=0)),
        }
    }


PARTS: dict[str, Callable[[fem_vi.InverseProblem, fem_vi.FullRankNormal], dict[str, Any]]] = {
    "hmc": by_hmc,
    "again": again,
    "plain": plain,
    "smc": by_smc,
    "nuts": by_nuts,
}


def main(part: str) -> None:
    """Write a part of the file."""
    torch.set_num_threads(1)
    began = time.process_time()
    y = make_data()
    problem = inverse_problem(GRID.mesh_comm, y)
    normal = fem_vi.FullRankNormal(problem.prior)
    fitted(problem, normal, FULL.normal, Path("runs") / "uncertainty_table" / f"rank-{GRID.comm.rank}" / "full-rank")
    found = PARTS[part](problem, normal)
    found[part]["cpu_seconds"] = round(GRID.comm.allreduce(time.process_time() - began))
    found[part]["versions"] = {"python": platform.python_version(), "torch": torch.__version__} | {
        name: metadata.version(name) for name in ("fenics-dolfinx", "petsc4py")
    }
    if GRID.comm.rank == 0:
        content = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps(content | {"y": y.tolist()} | found) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Long chains for demo_uncertainty_table.py.")
    parser.add_argument("part", choices=PARTS)
    main(parser.parse_args().part)
