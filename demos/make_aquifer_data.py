"""Make the data of demo_aquifer.py: heads at 60 wells, from another mesh, other elements and another random field.

The field is drawn on a mesh three times finer than the demo's, by random Fourier features instead of the demo's stochastic
PDE; heads are computed with quadratic elements. The noise is 1 % of the range of the heads.

    python meshes/aquifer.py --size 0.015 --out fine.msh
    python demos/make_aquifer_data.py fine.msh
"""

import csv
import sys

import numpy as np
from demo_aquifer import HERE, LENGTH, STD, aquifer_flow
from dolfinx import fem
from mpi4py import MPI

import fem_vi


def random_field(x: np.ndarray, generator: np.random.Generator, features: int = 2000) -> np.ndarray:
    """A Gaussian field with Matern covariance, smoothness one, at points `(3, n)`, as a sum of random waves."""
    # The spectral density of this covariance in two dimensions is a Student t with two degrees of freedom.
    waves = generator.standard_normal((features, 2)) / np.sqrt(generator.chisquare(2, features) / 2)[:, None]
    waves /= LENGTH
    phases = generator.uniform(0.0, 2 * np.pi, features)
    return STD * np.sqrt(2 / features) * np.cos(waves @ x[:2] + phases[:, None]).sum(0)


def main() -> None:
    """Write heads.csv and truth.csv."""
    generator = np.random.default_rng(11)
    data = fem_vi.read_mesh(sys.argv[1], MPI.COMM_SELF)
    flow = aquifer_flow(data, degree=2)
    m = fem.Function(flow.coefficients)
    m.interpolate(lambda x: random_field(x, np.random.default_rng(7)))
    heads = fem_vi.Solve(flow.pde)(fem_vi.to_tensor(m))

    low, high = data.mesh.geometry.x[:, :2].min(0), data.mesh.geometry.x[:, :2].max(0)
    candidates = np.round(generator.uniform(low, high, (4000, 2)), 3)
    inside = fem_vi.PointObservation(flow.heads, candidates, outside=fem_vi.MaskOutside()).found.numpy()
    candidates = candidates[inside & (np.linalg.norm(candidates - [1.32, 0.58], axis=1) > 0.06)]
    wells = [candidates[0]]
    for point in candidates[1:]:  # no two wells closer than 120 m
        if len(wells) < 60 and np.linalg.norm(np.array(wells) - point, axis=1).min() > 0.12:
            wells.append(point)
    values = fem_vi.PointObservation(flow.heads, wells)(heads).numpy()
    std = 0.01 * float(np.ptp(values))
    values = values + std * generator.standard_normal(len(values))

    folder = HERE / "aquifer"
    folder.mkdir(exist_ok=True)
    with (folder / "heads.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["x_km", "y_km", "head_m", "std_m"])
        rows.writerows([f"{x:.3f}", f"{y:.3f}", f"{h:.4f}", f"{std:.4f}"] for (x, y), h in zip(wells, values, strict=True))

    coarse = fem_vi.read_mesh(HERE.parent / "meshes" / "aquifer.msh", MPI.COMM_SELF)
    points = coarse.mesh.geometry.x[:, :2]
    with (folder / "truth.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["x_km", "y_km", "log_transmissivity"])
        truth = random_field(coarse.mesh.geometry.x.T, np.random.default_rng(7))
        rows.writerows([f"{x:.4f}", f"{y:.4f}", f"{t:.4f}"] for (x, y), t in zip(points, truth, strict=True))
    print(f"{len(wells)} wells, heads {values.min():.2f} to {values.max():.2f} m, noise {std:.3f} m")


if __name__ == "__main__":
    main()
