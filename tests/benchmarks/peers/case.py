"""The problem that all solve, as arrays in a file: any peer can read it with NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Case:
    """-div(exp(m) grad u) = 1, u = 0 on the boundary, P1, with exp(m) integrated by a rule of degree 3.

    Attributes:
        n: The unit square has n x n squares, two triangles each.
        nodes: Coordinates of the nodes, (num_nodes, 2), in the order of DOLFINx's dofs.
        cells: Nodes of the triangles, counterclockwise, (num_cells, 3).
        boundary: Nodes on the boundary.
        rule_points: Barycentric coordinates of the quadrature points, (num_points, 3).
        rule_weights: Their weights, of sum 1, (num_points,).
        m: Parameter at the nodes.
        data: What the state is compared with, at the nodes.
    """

    n: int
    nodes: np.ndarray
    cells: np.ndarray
    boundary: np.ndarray
    rule_points: np.ndarray
    rule_weights: np.ndarray
    m: np.ndarray
    data: np.ndarray

    def write(self, path: Path) -> None:
        """Into an npz file."""
        np.savez(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def read(path: Path) -> Case:
        """From an npz file."""
        with np.load(path) as file:
            arrays = {field.name: file[field.name] for field in fields(Case)}
        return Case(**{**arrays, "n": int(arrays["n"])})
