"""What every mesh script does alike: a gmsh that is quiet and gives the same file each time, and the same options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gmsh

HERE = Path(__file__).resolve().parent


def options(name: str, description: str, *, size: float, order: int = 1) -> argparse.Namespace:
    """The options that all scripts share, from the command line.

    Args:
        name: Name of the mesh; without options its script writes `meshes/<name>.msh`.
        description: One line for `--help`.
        size: Default edge length of the largest cells, in the units of the geometry.
        order: Default order of the geometry.

    Returns:
        size, order and out. Another size or order than the default needs `--out`: `meshes/<name>.msh` stays what it is.
    """
    own = HERE / f"{name}.msh"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", type=float, default=size, help="edge length of the largest cells (default: %(default)s)")
    parser.add_argument("--order", type=int, default=order, choices=[1, 2, 3], help="geometric order (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {own}, for the default size and order alone)")
    given = parser.parse_args()
    if given.out is None and (given.size, given.order) != (size, order):
        parser.error(f"another size or order needs --out FILE; {own} is the mesh of the default ones")
    given.out = given.out or own
    return given


@contextmanager
def model(name: str) -> Iterator[None]:
    """A gmsh model in which nothing depends on chance, threads or the user's own gmsh settings."""
    gmsh.initialize(readConfigFiles=False, interruptible=False)
    try:
        gmsh.option.setNumber("General.Terminal", 0)
        gmsh.option.setNumber("General.NumThreads", 1)
        gmsh.option.setNumber("Mesh.RandomSeed", 1)
        gmsh.option.setNumber("Mesh.Algorithm", 6)  # Frontal-Delaunay
        gmsh.option.setNumber("Mesh.Algorithm3D", 1)  # Delaunay; HXT depends on the number of threads
        gmsh.option.setNumber("Mesh.MshFileVersion", 4.1)
        gmsh.option.setNumber("Mesh.Binary", 0)  # text, so that a change shows in a diff
        gmsh.model.add(name)
        yield
    finally:
        gmsh.finalize()


def tag(dim: int, name: str, value: int, entities: list[int]) -> None:
    """Name some entities: a physical group with this tag and name."""
    gmsh.model.addPhysicalGroup(dim, entities, value, name)


def circle(centre: tuple[float, float], radius: float) -> list[int]:
    """Four arcs, counterclockwise."""
    x, y = centre
    middle = gmsh.model.geo.addPoint(x, y, 0.0)
    rim = [gmsh.model.geo.addPoint(x + radius * c, y + radius * s, 0.0) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return [gmsh.model.geo.addCircleArc(rim[i], middle, rim[(i + 1) % 4]) for i in range(4)]


def set_sizes(size: float, near: list[tuple[list[int], float, float]]) -> None:
    """Cells of `size` far from everything that is listed, and growing linearly up to there.

    Args:
        size: Edge length of the largest cells.
        near: Groups of curves, each with the edge length at them and the distance where it no longer matters.
    """
    field = gmsh.model.mesh.field
    thresholds = []
    for curves, smallest, far in near:
        distance = field.add("Distance")
        field.setNumbers(distance, "CurvesList", curves)
        field.setNumber(distance, "Sampling", 200)
        threshold = field.add("Threshold")
        for key, value in (("InField", distance), ("SizeMin", smallest), ("SizeMax", size), ("DistMin", 0.0), ("DistMax", far)):
            field.setNumber(threshold, key, value)
        thresholds.append(threshold)
    smallest_of_all = field.add("Min")
    field.setNumbers(smallest_of_all, "FieldsList", thresholds)
    field.setAsBackgroundMesh(smallest_of_all)
    for option in ("MeshSizeExtendFromBoundary", "MeshSizeFromPoints", "MeshSizeFromCurvature"):
        gmsh.option.setNumber(f"Mesh.{option}", 0)


def write(path: Path, *, dim: int, order: int) -> None:
    """Mesh the current model and write it.

    Args:
        path: File to write, .msh.
        dim: Dimension of the mesh.
        order: Order of the geometry; curved boundaries are followed from 2 on.
    """
    gmsh.model.mesh.generate(dim)
    if order > 1:
        gmsh.model.mesh.setOrder(order)
    gmsh.write(str(path))
