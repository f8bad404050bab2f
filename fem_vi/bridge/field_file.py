"""Fields on disk: XDMF with HDF5, which ParaView opens; written aside and renamed when complete."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import basix
from dolfinx import fem
from dolfinx.io import XDMFFile
from torch import Tensor

from fem_vi.arguments import instance
from fem_vi.bridge.layout import OWNED, as_numpy, check_last_axis
from fem_vi.errors import InvalidInput
from fem_vi.parallel import raise_on_all
from fem_vi.pde.agree import agreed, check_space
from fem_vi.pde.inputs import load_owned, local_size
from fem_vi.pde.locate import coordinate_element


def write_fields(path: str | Path, V: Any, fields: Mapping[str, Tensor]) -> None:
    """Write fields on one mesh to `path` (.xdmf) and a .h5 file beside it.

    Args:
        path: Name that ends in .xdmf; existing files are replaced, in one step each, when the new ones are complete.
        V: Continuous Lagrange space of the mesh's own degree (degree 1 on straight cells).
        fields: Names and field tensors `(n_owned,)`.

    Raises:
        InvalidInput: Where a type, the name or a shape is wrong.

    MPI: Collective.
    """
    with agreed(V):
        instance("write_fields: path", path, str, os.PathLike)
        check_space("write_fields: V", V)
        instance("write_fields: fields", fields, Mapping, way_out='Name them: {"m": m}.')
    target, comm = Path(path), V.mesh.comm
    with raise_on_all(comm):
        if target.suffix != ".xdmf":
            raise InvalidInput(f"write_fields: {target} must end in .xdmf.")
        element, map_degree = V.ufl_element(), coordinate_element(V.mesh).degree
        if element.basix_element.family != basix.ElementFamily.P or element.discontinuous or element.degree != map_degree:
            raise InvalidInput(
                f"write_fields: XDMF holds continuous Lagrange fields of the mesh's own degree, {map_degree}; V is {element}. "
                "Interpolate the field to such a space first."
            )
        for name, values in fields.items():
            check_last_axis(f"write_fields: {name}", values, local_size(V)[0], OWNED)
            if tuple(values.shape) != (local_size(V)[0],):
                raise InvalidInput(
                    f"write_fields: {name} has shape {tuple(values.shape)}; expected {(local_size(V)[0],)} on this rank."
                )
    with raise_on_all(comm):
        folder = target.parent / f".{target.stem}.partial"
        if comm.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
    with XDMFFile(comm, str(folder / target.name), "w") as file:
        file.write_mesh(V.mesh)
        for name, values in fields.items():
            function = fem.Function(V, name=name)
            load_owned(function, as_numpy(values))
            file.write_function(function)
    with raise_on_all(comm):
        if comm.rank == 0:
            _join_fields(folder / target.name)
            for suffix in (".h5", ".xdmf"):
                os.replace((folder / target.name).with_suffix(suffix), target.with_suffix(suffix))
            folder.rmdir()


def _join_fields(path: Path) -> None:
    """Put all fields on the one mesh of an XDMF file; DOLFINx writes each as a time series of its own."""
    tree = ElementTree.parse(path)
    domain = tree.getroot()[0]
    grid, *series = domain
    for collection in series:
        grid.extend(collection.iter("Attribute"))
        domain.remove(collection)
    tree.write(path, encoding="utf-8", xml_declaration=True)
