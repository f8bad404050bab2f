"""`Residual` with `TorchKernel` against the DOLFINx loop, `AssembledKernel`: residual and VJP to state and field, 64 samples.

    OMP_NUM_THREADS=1 container/run python3 -m tests.benchmarks.bench_torch_kernel [n ...]

P1 on an n x n square of triangles, -div(k grad u) = 1 with k = e^m and k = (1 + u^2) e^m, float64, one thread; CPU time, medians
of rounds in turn. Bar: no slower than the loop at n = 64 and 128. Where there is a CUDA device, a second table has 1024 samples
on it in float64 and float32, wall time, against the loop's time for each sample; bar: 50 times faster.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from torch import Tensor

import fem_vi
from tests.benchmarks.compare import compare

SAMPLES = 64
SAMPLES_ON_GPU = 1024


def weak_forms(n: int) -> dict[str, fem_vi.WeakForm]:
    """The linear and the nonlinear diffusion."""
    msh = mesh.create_unit_square(MPI.COMM_SELF, n, n)
    V = fem.functionspace(msh, ("Lagrange", 1))
    forms = {}
    for name, nonlinear in (("e^m", False), ("(1 + u^2) e^m", True)):
        u, m, v = fem.Function(V), fem.Function(V), ufl.TestFunction(V)
        k = ufl.exp(m) * (1 + u**2) if nonlinear else ufl.exp(m)
        forms[name] = fem_vi.WeakForm(k * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx - v * ufl.dx, state=u, inputs=[m])
    return forms


class Vjp:
    """Residual and gradients at random fields.

    Args:
        pde: The weak form.
        kernel: Who evaluates.
        samples: How many at once.
        like: A tensor of the device and type to use.
    """

    def __init__(self, pde: fem_vi.WeakForm, kernel: Any, samples: int, like: Tensor) -> None:
        self.residual = fem_vi.Residual(pde, kernel=kernel)
        rng = np.random.default_rng(0)
        u, m, g = (
            torch.from_numpy(scale * rng.standard_normal((samples, pde.unknown.size))).to(like) for scale in (1.0, 0.3, 1.0)
        )
        self.inputs, self.g = [u.requires_grad_(), m.requires_grad_()], g

    def __call__(self) -> list[Tensor]:
        """r, and g . dr/du and g . dr/dm."""
        r = self.residual(*self.inputs)
        return [r.detach(), *torch.autograd.grad(r, self.inputs, self.g)]


def error_of(wanted: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry."""
    return max(float((a - b.to(a)).abs().max() / a.abs().max()) for a, b in zip(wanted, got, strict=True))


def on_the_host(n: int) -> None:
    """One row for each form."""
    like = torch.empty(0, dtype=torch.float64)
    for name, pde in weak_forms(n).items():
        loop, kernel = (Vjp(pde, choice, SAMPLES, like) for choice in (fem_vi.AssembledKernel(), fem_vi.TorchKernel()))
        row = compare(f"n = {n:>3}, {name}, {SAMPLES} samples", loop, kernel, rounds=9)
        verdict = "ok" if row.ratio <= 1.0 else "TOO SLOW"
        print(f"{row}   difference {error_of(loop(), kernel()):.1e}   bar 1: {verdict}", flush=True)


def on_cuda(n: int) -> None:
    """One row for each form and type: 1024 samples on the device, the loop for 16 of them on the host."""
    few = 16
    for name, pde in weak_forms(n).items():
        loop = Vjp(pde, fem_vi.AssembledKernel(), few, torch.empty(0, dtype=torch.float64))
        loop()
        began = time.perf_counter()
        loop()
        each = (time.perf_counter() - began) / few
        for dtype in (torch.float64, torch.float32):
            like = torch.empty(0, dtype=dtype, device="cuda")
            work = Vjp(pde, fem_vi.TorchKernel(device="cuda", dtype=dtype), SAMPLES_ON_GPU, like)
            work()
            times = []
            for _ in range(5):
                torch.cuda.synchronize()
                began = time.perf_counter()
                work()
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            speedup = each * SAMPLES_ON_GPU / statistics.median(times)
            verdict = "ok" if speedup >= 50.0 else "TOO SLOW"
            milliseconds = 1e3 * statistics.median(times)
            about = f"n = {n:>3}, {name}, {SAMPLES_ON_GPU} samples, {dtype}"
            print(f"{about}: {milliseconds:.1f} ms, {speedup:.0f} times the loop   {verdict}")


def main(sizes: list[int]) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for n in sizes:
        on_the_host(n)
    if not torch.cuda.is_available():
        print("No CUDA device here: the table of 1024 samples on a GPU is left out.")
        return
    print(torch.cuda.get_device_name())
    on_cuda(128)


if __name__ == "__main__":
    main([int(arg) for arg in sys.argv[1:]] or [64, 128])
