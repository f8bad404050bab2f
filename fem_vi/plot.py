"""Pictures of fields on plane meshes, of any number of ranks, drawn by matplotlib on rank 0."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fem_vi.bridge.layout import as_numpy
from fem_vi.errors import InvalidInput
from fem_vi.parallel import all_values, raise_on_all
from fem_vi.pde.fields import cell_nodes, check_vertex_space, node_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_field(axes: Axes, V: Any, x: Tensor, **options: Any) -> Any:
    """Draw a field on a mesh of triangles or quadrilaterals in the plane.

    Args:
        axes: Where to draw; other ranks' stay empty.
        V: Scalar continuous Lagrange space of degree 1.
        x: Field tensor, `(n_owned,)`.
        options: Passed to `tripcolor`, such as `cmap`, `vmin`, `vmax`.

    Returns:
        The matplotlib artist, for a colour bar.

    Raises:
        InvalidInput: For other spaces and meshes.

    MPI: Collective.
    """
    check_vertex_space(V)
    with raise_on_all(V.mesh.comm):
        if V.mesh.geometry.dim != 2 or x.shape != node_names(V).shape:
            raise InvalidInput(
                f"plot_field: the mesh has dimension {V.mesh.geometry.dim} and x shape {tuple(x.shape)}; it draws fields "
                f"{node_names(V).shape} on plane meshes. Write others with fem_vi.write_fields."
            )
    points = V.tabulate_dof_coordinates()[: x.shape[0], :2]
    parts = all_values(V.mesh.comm, (node_names(V), points, as_numpy(x), cell_nodes(V)))
    names, where, values, cells = (np.concatenate([part[k] for part in parts]) for k in range(4))
    order = np.argsort(names)
    corners = order[np.searchsorted(names[order], cells)]
    triangles = corners if corners.shape[1] == 3 else np.concatenate([corners[:, [0, 1, 2]], corners[:, [1, 3, 2]]])
    artist = axes.tripcolor(where[:, 0], where[:, 1], triangles, values, **{"shading": "gouraud", "rasterized": True, **options})
    axes.set_aspect("equal")
    return artist


def save_figure(figure: Figure, path: str | Path, comm: Any) -> None:
    """Write a figure, on rank 0 only, to a temporary name and then to its own.

    Args:
        figure: What to write.
        path: With an ending that matplotlib knows.
        comm: Communicator of the mesh.

    MPI: Collective.
    """
    target = Path(path)
    with raise_on_all(comm):
        if comm.rank == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.stem}.partial{target.suffix}")
            figure.savefig(partial)
            os.replace(partial, target)
