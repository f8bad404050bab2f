"""Meshes read from files: the right area, the right tags, on any number of ranks."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

import dolfinx
import meshio
import numpy as np
import pytest
import ufl
from dolfinx import fem
from dolfinx.io import XDMFFile
from mpi4py import MPI

import fem_vi
from fem_vi.errors import InvalidInput
from fem_vi.pde.mesh import MeshData, read_mesh
from fem_vi.pde.mesh_check import check_content
from fem_vi.pde.mesh_file import read_content
from tests.pde.mesh_files import BEND, CELL, COMM, FACETS, GMSH_FORMATS, on_rank_0, write_gmsh, write_meshio

MESHES = Path(__file__).parents[2] / "meshes"
needs_gmsh = pytest.mark.skipif(importlib.util.find_spec("gmsh") is None, reason="gmsh writes the files")

KINDS = [
    ("interval", 1), ("interval", 2), ("triangle", 1), ("triangle", 2), ("triangle", 3), ("quadrilateral", 1),
    ("quadrilateral", 2), ("tetrahedron", 1), ("tetrahedron", 2), ("hexahedron", 1), ("hexahedron", 2),
]  # fmt: skip
# format, shapes and orders that it holds (as meshio writes it)
MESHIO_KINDS = [
    (".vtu", "triangle", 1), (".vtu", "triangle", 2), (".vtu", "quadrilateral", 2), (".vtu", "tetrahedron", 2),
    (".vtu", "hexahedron", 2), (".vtu", "interval", 2), (".vtk", "triangle", 1), (".vtk", "quadrilateral", 2),
    (".vtk", "tetrahedron", 1), (".vtk", "hexahedron", 2), (".xdmf", "triangle", 1), (".xdmf", "quadrilateral", 1),
    (".xdmf", "tetrahedron", 1), (".xdmf", "hexahedron", 1), (".inp", "triangle", 1), (".inp", "triangle", 2),
    (".inp", "tetrahedron", 1), (".inp", "quadrilateral", 1), (".med", "triangle", 2), (".med", "tetrahedron", 2),
    (".med", "hexahedron", 1), (".mesh", "triangle", 1), (".mesh", "tetrahedron", 1), (".mesh", "hexahedron", 1),
]  # fmt: skip
DIMENSION = {"interval": 1, "triangle": 2, "quadrilateral": 2, "tetrahedron": 3, "hexahedron": 3}


def by_name(data: MeshData) -> MeshData:
    """The same mesh with the tags that FACETS and CELL say, found by name: .inp and .med number their groups themselves."""
    mesh, dim = data.mesh, data.mesh.topology.dim
    groups = [(data.facets(name), tag) for tag, name in FACETS.items() if name in data.names]
    entities = np.concatenate([entities for entities, _ in groups])
    values = np.concatenate([np.full(len(entities), tag, dtype=np.int32) for entities, tag in groups])
    order = np.argsort(entities)
    cells = data.cells(CELL[1])
    return MeshData(
        mesh,
        dolfinx.mesh.meshtags(mesh, dim, cells, np.full(len(cells), CELL[0], dtype=np.int32)),
        dolfinx.mesh.meshtags(mesh, dim - 1, entities[order], values[order]),
        data.names,
    )


def integrals(data: MeshData, order: int) -> dict[str, float]:
    """Volume, a first moment of it, volume of the tagged cells, and the size of each group of facets; one compiled form."""
    mesh, degree = data.mesh, {"quadrature_degree": 2 if order == 1 else 8}
    dx = ufl.Measure("dx", mesh, subdomain_data=data.cell_tags, metadata=degree)
    ds = ufl.Measure("ds", mesh, subdomain_data=data.facet_tags, metadata=degree)
    x = ufl.SpatialCoordinate(mesh)
    flat = x[0] - BEND * x[mesh.geometry.dim - 1] ** order if order > 1 and mesh.geometry.dim > 1 else x[0]
    names = ("volume", "moment", "body", *FACETS.values())
    switch = {name: fem.Constant(mesh, 0.0) for name in names}
    form = switch["volume"] * dx + switch["moment"] * flat * dx + switch["body"] * dx(CELL[0])
    form = fem.form(form + sum(switch[name] * ds(tag) for tag, name in FACETS.items()))
    found = {}
    for name in names:
        switch[name].value = 1.0
        found[name] = mesh.comm.allreduce(fem.assemble_scalar(form))
        switch[name].value = 0.0
    return found


def exact(shape: str, order: int) -> dict[str, float]:
    """Sizes of the groups of the bent unit interval, square or cube."""
    dim = DIMENSION[shape]
    side = 1.0
    if order > 1 and dim > 1:  # low and high are the graph of BEND y^order
        y, weights = np.polynomial.legendre.leggauss(20)
        y, weights = (y + 1) / 2, weights / 2
        side = float(np.sum(weights * np.sqrt(1 + (BEND * order * y ** (order - 1)) ** 2)))
    return {"volume": 1.0, "moment": 0.5, "body": 1.0, "low": side, "high": side, "rest": {1: 0.0, 2: 2.0, 3: 4.0}[dim]}


def check_unit(path: Path, shape: str, order: int, *, named: bool) -> None:
    data = read_mesh(path, COMM)
    assert data.mesh.geometry.dim == data.mesh.topology.dim == DIMENSION[shape]
    if named:
        names = {CELL[1], *FACETS.values()} - ({"rest"} if shape == "interval" else set())
        assert set(data.names) == names
        assert all(data.names[n][0] == DIMENSION[shape] - (n != CELL[1]) for n in names)
        data = by_name(data)
    expected = exact(shape, order)
    assert integrals(data, order) == pytest.approx(expected, rel=1e-8)


@needs_gmsh
@pytest.mark.mpi
@pytest.mark.parametrize("format_", GMSH_FORMATS)
@pytest.mark.parametrize(("shape", "order"), KINDS)
def test_gmsh_files(tmp_path: Path, format_: str, shape: str, order: int) -> None:
    path = tmp_path / "unit.msh"
    on_rank_0(lambda: write_gmsh(path, shape, order, format_))
    check_unit(path, shape, order, named=True)


@needs_gmsh
@pytest.mark.mpi
@pytest.mark.parametrize(("suffix", "shape", "order"), MESHIO_KINDS)
def test_meshio_files(tmp_path: Path, suffix: str, shape: str, order: int) -> None:
    path = tmp_path / f"unit{suffix}"
    on_rank_0(lambda: write_meshio(path, shape, order))
    check_unit(path, shape, order, named=suffix in (".inp", ".med"))


def length_of(data: MeshData, name: str) -> float:
    """The size of a group of facets, from the vertices of owned facets: no form, so that interior facets count once."""
    dim = data.mesh.topology.dim - 1
    facets = data.facets(name)
    facets = facets[facets < data.mesh.topology.index_map(dim).size_local]
    if len(facets) == 0:  # entities_to_geometry of DOLFINx 0.9 crashes on an empty array
        return float(COMM.allreduce(0.0))
    x = data.mesh.geometry.x[dolfinx.mesh.entities_to_geometry(data.mesh, dim, facets)]
    edges = x[:, 1:] - x[:, :1]
    if dim == 1:
        size = np.linalg.norm(edges[:, 0], axis=1).sum()
    else:
        size = 0.5 * np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1).sum()
    return float(COMM.allreduce(size))


def chord(radius: float, num_edges: int) -> float:
    """The length of a regular polygon's outline."""
    return 2 * num_edges * radius * math.sin(math.pi / num_edges)


SIZES = {  # the first decimals of spline lengths come from the files themselves; polygons and boxes are exact
    "aquifer": {"river": 1.230500, "inflow": 1.218548, "no_flow": 2.576471, "well": chord(0.02, 16), "fault": 0.695520},
    "cylinder": {"inflow": 0.41, "outflow": 0.41, "walls": 4.4, "cylinder": chord(0.05, 40)},
    "l_bracket": {"clamped": 0.12, "load": 0.12, "free": 2 * (0.51 + 0.01 * (1 - math.pi / 4)) + 0.4 * (2 + 2 * 0.6)},
    "plate_with_hole": {"left": 2.0, "right": 2.0, "bottom": 2.0, "top": 2.0, "hole": chord(0.3, 100)},
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", SIZES)
def test_meshes_of_this_repository(name: str) -> None:
    data = read_mesh(MESHES / f"{name}.msh", COMM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {n: length_of(data, n) for n in SIZES[name]} == pytest.approx(
            SIZES[name], rel=2e-3 if name == "l_bracket" else 1e-6
        )
    dim = data.mesh.topology.dim
    assert {d for d, _ in data.names.values()} == {dim, dim - 1}
    assert COMM.allreduce(int(np.sum(data.cell_tags.indices < data.mesh.topology.index_map(dim).size_local))) == (
        data.mesh.topology.index_map(dim).size_global
    )


@pytest.mark.mpi
def test_interior_facets_are_integrated_once_on_any_number_of_ranks() -> None:
    data = read_mesh(MESHES / "aquifer.msh", COMM)
    dS = ufl.Measure("dS", data.mesh, subdomain_data=data.facet_tags)
    ds = ufl.Measure("ds", data.mesh, subdomain_data=data.facet_tags)
    one = fem.Constant(data.mesh, 1.0)
    total = [COMM.allreduce(fem.assemble_scalar(fem.form(one * m(data.facet_tag("fault"))))) for m in (dS, ds)]
    assert total == pytest.approx([SIZES["aquifer"]["fault"], 0.0], rel=1e-6)


def readme_rows() -> dict[str, tuple[str, int, int, int, str]]:
    """What meshes/README.md says of each file: cells, their number, vertices, bytes, checksum."""
    rows = re.findall(
        r"\| `(\w+)\.msh` \|.*?\| (\d+) (\w+) \| (\d+) \| (\d+) \| `(\w{64})` \|", (MESHES / "README.md").read_text()
    )
    return {name: (kind, int(cells), int(vertices), int(size), checksum) for name, cells, kind, vertices, size, checksum in rows}


@pytest.mark.parametrize("name", SIZES)
def test_readme_is_right_about(name: str) -> None:
    kind, cells, vertices, size, checksum = readme_rows()[name]
    data = (MESHES / f"{name}.msh").read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (size, checksum)
    mesh = read_mesh(MESHES / f"{name}.msh", MPI.COMM_SELF).mesh
    plural = {"triangle": "triangles", "tetrahedron": "tetrahedra", "quadrilateral": "quadrilaterals"}
    assert plural[mesh.topology.cell_name()] == kind
    assert (mesh.topology.index_map(mesh.topology.dim).size_global, mesh.topology.index_map(0).size_global) == (cells, vertices)


@needs_gmsh
@pytest.mark.parametrize("name", SIZES)
def test_script_writes_the_same_file_again(tmp_path: Path, name: str) -> None:
    version = subprocess.run(
        [sys.executable, "-c", "import gmsh; gmsh.initialize(); print(gmsh.option.getString('General.Version'))"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout.split()[-1]  # fmt: skip
    command = [sys.executable, str(MESHES / f"{name}.py"), "--out", str(tmp_path / "again.msh")]
    subprocess.run(command, timeout=60, check=True, capture_output=True)
    written = f"gmsh {version} on {platform.machine()}"
    if written in (MESHES / "README.md").read_text():
        assert (tmp_path / "again.msh").read_bytes() == (MESHES / f"{name}.msh").read_bytes()
    else:
        content = check_content(read_content(tmp_path / "again.msh"))
        assert set(content.names) == set(check_content(read_content(MESHES / f"{name}.msh")).names)
        pytest.skip(f"the files were not written by {written}")


@needs_gmsh
def test_curved_plate_follows_the_circle(tmp_path: Path) -> None:
    path = tmp_path / "curved.msh"
    command = [sys.executable, str(MESHES / "plate_with_hole.py"), "--order", "2", "--size", "0.2", "--out", str(path)]
    subprocess.run(command, timeout=60, check=True, capture_output=True)
    data = read_mesh(path, MPI.COMM_SELF)
    area = fem.assemble_scalar(fem.form(fem.Constant(data.mesh, 1.0) * ufl.dx))
    assert area == pytest.approx(4 - math.pi * 0.09, abs=2e-6)  # the straight-sided mesh is off by 1e-3


@pytest.mark.mpi
def test_unknown_names_are_listed() -> None:
    data = read_mesh(MESHES / "plate_with_hole.msh", COMM)
    with pytest.raises(InvalidInput, match=r"no facets are called 'well'.*bottom, hole, left, right, top"):
        data.facets("well")
    with pytest.raises(InvalidInput, match=r"no cells are called 'hole'.*plate"):
        data.cells("hole")


def block_mesh(path: Path, cells: list[tuple[str, list[list[int]]]], points: list[list[float]], **data: object) -> None:
    meshio.write(path, meshio.Mesh(np.array(points, dtype=float), [(k, np.array(v)) for k, v in cells], **data))  # type: ignore[arg-type]


SQUARE = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
TRIANGLES = ("triangle", [[0, 1, 2], [0, 2, 3]])


@pytest.mark.mpi
def test_fewer_cells_than_ranks(tmp_path: Path) -> None:
    path = tmp_path / "one.vtu"
    on_rank_0(lambda: block_mesh(path, [("triangle", [[0, 1, 2]])], SQUARE[:3]))
    mesh = read_mesh(path, COMM).mesh
    assert mesh.topology.index_map(2).size_global == 1


@pytest.mark.parametrize(
    ("heights", "gdim"),
    [((0.0, 0.0, 0.0, 0.0), 2), ((5.0, 5.0, 5.0, 5.0), 2), ((0.0, 0.0, 1e-3, 1e-3), 3)],
    ids=["z=0", "z=5", "tilted"],
)
def test_a_third_coordinate_is_dropped_where_it_is_the_same_everywhere(
    tmp_path: Path, heights: tuple[float, ...], gdim: int
) -> None:
    points = [[*p[:2], z] for p, z in zip(SQUARE, heights, strict=True)]
    block_mesh(tmp_path / "square.vtu", [TRIANGLES], points)
    mesh = read_mesh(tmp_path / "square.vtu", MPI.COMM_SELF).mesh
    assert (mesh.topology.dim, mesh.geometry.dim) == (2, gdim)


def test_curve_in_space_and_closed_surface_keep_their_coordinates(tmp_path: Path) -> None:
    block_mesh(tmp_path / "curve.vtu", [("line", [[0, 1], [1, 2]])], [[0, 0, 0], [1, 0, 0], [1, 1, 0]])
    assert read_mesh(tmp_path / "curve.vtu", MPI.COMM_SELF).mesh.geometry.dim == 2
    corners = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    block_mesh(tmp_path / "hull.stl", [("triangle", [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])], corners)
    mesh = read_mesh(tmp_path / "hull.stl", MPI.COMM_SELF).mesh
    assert (mesh.topology.dim, mesh.geometry.dim, mesh.topology.index_map(0).size_global) == (2, 3, 4)


@pytest.mark.parametrize("cells", [[[0, 1, 2], [0, 2, 3]], [[0, 2, 1], [0, 2, 3]], [[0, 2, 1], [3, 2, 0]]])
def test_either_orientation_of_a_simplex_is_fine(tmp_path: Path, cells: list[list[int]]) -> None:
    block_mesh(tmp_path / "turned.vtu", [("triangle", cells)], SQUARE)
    mesh = read_mesh(tmp_path / "turned.vtu", MPI.COMM_SELF).mesh
    assert fem.assemble_scalar(fem.form(fem.Constant(mesh, 1.0) * ufl.dx)) == pytest.approx(1.0)


def test_unused_nodes_are_dropped_with_a_warning(tmp_path: Path) -> None:
    block_mesh(tmp_path / "loose.vtu", [TRIANGLES], [*SQUARE, [9.0, 9.0, 9.0]])
    with pytest.warns(UserWarning, match=r"loose.vtu: 1 of 5 nodes belong to no cell and are dropped \(nodes 4\)"):
        mesh = read_mesh(tmp_path / "loose.vtu", MPI.COMM_SELF).mesh
    assert mesh.geometry.x.shape == (4, 3)
    assert mesh.geometry.dim == 2  # the dropped node does not count


@needs_gmsh
@pytest.mark.parametrize(("format_", "tagged"), list(zip(GMSH_FORMATS, (0, 0, 2, 2), strict=True)))
def test_cells_without_a_group_belong_to_the_mesh(tmp_path: Path, format_: str, tagged: int) -> None:
    write_gmsh(tmp_path / "some.msh", "triangle", 1, format_, save_all=True)  # as MSH 2.2, gmsh then writes no groups at all
    data = read_mesh(tmp_path / "some.msh", MPI.COMM_SELF)
    assert data.mesh.topology.index_map(2).size_local == 8
    assert (len(data.cell_tags.indices), len(data.facet_tags.indices), len(data.facets("low"))) == (0, tagged, tagged)


@needs_gmsh
@pytest.mark.parametrize("binary", [0, 1])
def test_partitioned_gmsh_file(tmp_path: Path, binary: int) -> None:
    import gmsh

    gmsh.initialize(readConfigFiles=False, interruptible=False)
    try:
        gmsh.option.setNumber("General.Terminal", 0)
        gmsh.open(str(MESHES / "plate_with_hole.msh"))
        gmsh.option.setNumber("Mesh.Binary", binary)
        gmsh.model.mesh.partition(3)
        gmsh.write(str(tmp_path / "parts.msh"))
    finally:
        gmsh.finalize()
    data = read_mesh(tmp_path / "parts.msh", MPI.COMM_SELF)
    assert len(data.cells("plate")) == 1100
    assert {n: length_of_serial(data, n) for n in SIZES["plate_with_hole"]} == pytest.approx(SIZES["plate_with_hole"], rel=1e-6)


def length_of_serial(data: MeshData, name: str) -> float:
    x = data.mesh.geometry.x[dolfinx.mesh.entities_to_geometry(data.mesh, 1, data.facets(name))]
    return float(np.linalg.norm(x[:, 1] - x[:, 0], axis=1).sum())


MSH2 = """$MeshFormat
2.2 0 8
$EndMeshFormat
$PhysicalNames
{num_names}
{names}
$EndPhysicalNames
$Nodes
4
10 0 0 0
7 1 0 0
300 1 1 0
2 0 1 0
$EndNodes
$Elements
{num_elements}
{elements}
$EndElements
"""


def write_msh2(path: Path, names: list[str], elements: list[str]) -> None:
    elements = [f"{i + 1} {text}" for i, text in enumerate(elements)]
    path.write_text(
        MSH2.format(num_names=len(names), names="\n".join(names), num_elements=len(elements), elements="\n".join(elements))
    )


def test_node_numbers_may_have_gaps_and_kinds_may_alternate(tmp_path: Path) -> None:
    elements = ["1 2 4 1 10 7", "2 2 9 1 10 7 300", "15 2 5 1 10", "1 2 4 1 7 300", "2 2 9 1 10 300 2"]
    write_msh2(tmp_path / "gaps.msh", ['1 4 "two sides"', '2 9 "sand"'], elements)
    data = read_mesh(tmp_path / "gaps.msh", MPI.COMM_SELF)
    assert (len(data.facets("two sides")), len(data.cells("sand"))) == (2, 2)
    assert length_of_serial(data, "two sides") == pytest.approx(2.0)


def test_cells_and_facets_may_share_a_name(tmp_path: Path) -> None:
    elements = ["1 2 4 1 10 7", "2 2 9 1 10 7 300", "2 2 9 1 10 300 2"]
    write_msh2(tmp_path / "twins.msh", ['1 4 "well"', '2 9 "well"'], elements)
    with pytest.warns(UserWarning, match="cells and facets both have a group 'well'"):
        data = read_mesh(tmp_path / "twins.msh", MPI.COMM_SELF)
    assert (len(data.cells("well")), len(data.facets("well"))) == (2, 1)
    assert dict(data.names) == {"well": (2, 9), "well (dim 1)": (1, 4)}


@pytest.mark.parametrize("encoding", ["HDF5", "ASCII"])
@pytest.mark.parametrize("cell", ["interval", "triangle", "quadrilateral", "tetrahedron", "hexahedron"])
def test_xdmf_of_dolfinx_with_its_tags(tmp_path: Path, cell: str, encoding: str) -> None:
    kind = dolfinx.mesh.CellType[cell]
    if cell == "interval":
        mesh = dolfinx.mesh.create_unit_interval(MPI.COMM_SELF, 4)
    elif cell in ("triangle", "quadrilateral"):
        mesh = dolfinx.mesh.create_unit_square(MPI.COMM_SELF, 3, 3, kind)
    else:
        mesh = dolfinx.mesh.create_unit_cube(MPI.COMM_SELF, 2, 2, 2, kind)
    dim = mesh.topology.dim
    mesh.topology.create_connectivity(dim - 1, dim)
    left = dolfinx.mesh.locate_entities_boundary(mesh, dim - 1, lambda x: np.isclose(x[0], 0.0))
    half = dolfinx.mesh.locate_entities(mesh, dim, lambda x: x[0] < 0.51)
    facet_tags = dolfinx.mesh.meshtags(mesh, dim - 1, np.sort(left), np.full(len(left), 0, dtype=np.int32))
    cell_tags = dolfinx.mesh.meshtags(mesh, dim, np.sort(half), np.full(len(half), 3, dtype=np.int32))
    facet_tags.name, cell_tags.name = "facets", "cells"
    with XDMFFile(MPI.COMM_SELF, str(tmp_path / "mesh.xdmf"), "w", XDMFFile.Encoding[encoding]) as file:
        file.write_mesh(mesh)
        file.write_meshtags(facet_tags, mesh.geometry)
        file.write_meshtags(cell_tags, mesh.geometry)
    data = read_mesh(tmp_path / "mesh.xdmf", MPI.COMM_SELF)
    assert data.mesh.topology.index_map(dim).size_global == mesh.topology.index_map(dim).size_global
    assert (len(data.facet_tags.find(0)), len(data.cell_tags.find(3))) == (len(left), len(half))
    where = dolfinx.mesh.compute_midpoints(data.mesh, dim - 1, data.facet_tags.find(0))
    assert np.allclose(where[:, 0], 0.0)
    assert np.all(dolfinx.mesh.compute_midpoints(data.mesh, dim, data.cell_tags.find(3))[:, 0] < 0.51)


@needs_gmsh
@pytest.mark.mpi
@pytest.mark.parametrize(("shape", "order"), KINDS)
def test_xdmf_of_dolfinx_follows_curves(tmp_path: Path, shape: str, order: int) -> None:
    on_rank_0(lambda: write_gmsh(tmp_path / "unit.msh", shape, order))
    first = read_mesh(tmp_path / "unit.msh", COMM)
    if order > 2:
        pytest.skip("XDMF has no name for such cells")
    with XDMFFile(COMM, str(tmp_path / "unit.xdmf"), "w") as file:
        file.write_mesh(first.mesh)
        first.mesh.topology.create_connectivity(first.mesh.topology.dim - 1, first.mesh.topology.dim)
        for tags in (first.cell_tags, first.facet_tags):
            file.write_meshtags(tags, first.mesh.geometry)
    COMM.barrier()
    check_unit(tmp_path / "unit.xdmf", shape, order, named=False)


@pytest.mark.parametrize("name", ["cell_tags", "anything"])
def test_whole_numbers_on_cells_are_tags_in_formats_without_a_word_for_them(tmp_path: Path, name: str) -> None:
    block_mesh(tmp_path / "data.vtu", [TRIANGLES], SQUARE, cell_data={name: [np.array([4, -2])], "area": [np.array([0.5, 0.5])]})
    assert sorted(read_mesh(tmp_path / "data.vtu", MPI.COMM_SELF).cell_tags.values) == [-2, 4]


def test_two_arrays_of_whole_numbers_are_not_guessed_between(tmp_path: Path) -> None:
    both = {"red": [np.array([4, -2])], "blue": [np.array([1, 1])]}
    block_mesh(tmp_path / "data.vtu", [TRIANGLES], SQUARE, cell_data=both)
    with pytest.warns(UserWarning, match="red, blue.*Name one cell_tags|blue, red.*Name one cell_tags"):
        assert len(read_mesh(tmp_path / "data.vtu", MPI.COMM_SELF).cell_tags.values) == 0


def test_element_sets_that_others_cover_are_left_out(tmp_path: Path) -> None:
    sets = {"all": [np.array([0, 1])], "one": [np.array([0])], "two": [np.array([1])], "again": [np.array([1])]}
    block_mesh(tmp_path / "sets.inp", [TRIANGLES], [p[:3] for p in SQUARE], cell_sets=sets)
    with pytest.warns(UserWarning, match="set '(all|again)' is left out"):
        data = read_mesh(tmp_path / "sets.inp", MPI.COMM_SELF)
    assert dict(data.names) == {"one": (2, 1), "two": (2, 2)}


def test_read_mesh_is_a_public_name() -> None:
    if hasattr(fem_vi, "read_mesh"):
        assert fem_vi.read_mesh is read_mesh
