"""What this machine has, and what will hurt: the findings behind `fem-vi doctor`.

Looking (`look`), judging (`problems`) and printing (`report`) are separate. Nothing here fails where FEniCSx is missing:
each part is imported by name, and one that cannot be imported is a finding.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

SUPPORTED_DOLFINX = ("0.9", "0.10", "0.11")
SOLVERS = {
    "mumps": "MUMPS",
    "superlu_dist": "SuperLU_DIST",
    "umfpack": "UMFPACK",
    "hypre": "hypre",
}
REQUIRED = ("dolfinx", "petsc4py", "mpi4py", "torch", "numpy", "scipy", "h5py", "safetensors")
OPTIONAL = ("gmsh", "meshio", "slepc4py", "matplotlib", "arviz_stats")
DISTRIBUTIONS = {"dolfinx": "fenics-dolfinx", "arviz_stats": "arviz-stats"}


@dataclass(frozen=True)
class Part:
    """One Python package.

    Attributes:
        name: Name that one imports.
        version: Its version, or None where it cannot be imported.
        error: Why it cannot be imported.
    """

    name: str
    version: str | None = None
    error: str = ""


@dataclass(frozen=True)
class Findings:
    """What was found on this machine.

    Attributes:
        python: Python's version and place.
        parts: The packages of `REQUIRED` and `OPTIONAL`, by name.
        petsc: PETSc's version and scalar type, or None.
        solvers: PETSc's solver packages, of the values of `SOLVERS`.
        complex_scalars: Whether PETSc computes with complex numbers.
        mpi: The MPI library that mpi4py uses, or None.
        mpi_libraries: Paths of the MPI libraries loaded in this process.
        blas_libraries: Paths of the BLAS libraries loaded in this process.
        torch_blas: What torch says it was built with.
        cuda: The CUDA device, or None.
        rank: This rank.
        ranks: MPI ranks of this run.
        ranks_here: Those of them on this machine.
        cores: Cores that this process may use.
        omp_threads: The variable OMP_NUM_THREADS, or None.
    """

    python: str
    parts: dict[str, Part]
    petsc: str | None = None
    solvers: tuple[str, ...] = ()
    complex_scalars: bool = False
    mpi: str | None = None
    mpi_libraries: tuple[str, ...] = ()
    blas_libraries: tuple[str, ...] = ()
    torch_blas: str | None = None
    cuda: str | None = None
    rank: int = 0
    ranks: int = 1
    ranks_here: int = 1
    cores: int = 1
    omp_threads: str | None = None


@dataclass(frozen=True)
class Problem:
    """Something that will hurt.

    Attributes:
        what: What was found, and what it does to the user.
        remedy: What to do about it.
        essential: Whether fem_vi cannot work at all.
    """

    what: str
    remedy: str
    essential: bool = False


def _version(name: str, module: ModuleType) -> str:
    try:
        return metadata.version(DISTRIBUTIONS.get(name, name))
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown version"))


def _import_part(name: str) -> tuple[Part, ModuleType | None]:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken library raises anything
        return Part(name, error=f"{type(error).__name__}: {error}".splitlines()[0]), None
    return Part(name, _version(name, module)), module


def _submodule(name: str) -> Any:
    """A module, or None where it is missing or broken."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def loaded_libraries(maps: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The BLAS and the MPI libraries in a process.

    Args:
        maps: The text of `/proc/<pid>/maps`.

    Returns:
        Paths of BLAS libraries, and paths of MPI libraries.
    """
    paths = sorted(set(re.findall(r"(/\S+\.so[.\d]*)$", maps, re.MULTILINE)))
    names = {path: path.rsplit("/", 1)[1] for path in paths}
    blas = tuple(
        path for path in paths if re.match(r"lib(open|c|flexi)?blas|libmkl_(rt|core)|libblis|libatlas|libnvpl", names[path])
    )
    mpi = tuple(path for path in paths if re.match(r"libmpi\.so|libmpich\.so|libmpi_abi\.so", names[path]))
    return blas, mpi


def blas_name(paths: Iterable[str]) -> str | None:
    """The BLAS that a process computes with.

    Args:
        paths: Paths of the BLAS libraries loaded in it.

    Returns:
        Its name, "reference BLAS" where any of them is that, or None where nothing is known.
    """
    kinds = {"openblas": "OpenBLAS", "mkl": "MKL", "blis": "BLIS", "atlas": "ATLAS", "flexiblas": "FlexiBLAS", "nvpl": "NVPL"}
    found = [next((kinds[key] for key in kinds if key in path.lower()), "reference BLAS") for path in paths]
    if "reference BLAS" in found:
        return "reference BLAS"
    return ", ".join(dict.fromkeys(found)) or None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _look_at_petsc(petsc: Any) -> dict[str, Any]:
    is_complex = "complex" in str(petsc.ScalarType)
    return {
        "petsc": ".".join(map(str, petsc.Sys.getVersion())),
        "complex_scalars": is_complex,
        "solvers": (*(title for name, title in SOLVERS.items() if petsc.Sys.hasExternalPackage(name)), "GAMG"),
    }


def _look_at_mpi(mpi: Any) -> dict[str, Any]:
    world = mpi.COMM_WORLD
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    ranks_here = node.size
    node.Free()
    library = mpi.Get_library_version().rstrip("\0").split(",")[0].splitlines()[0].strip()
    return {"mpi": library, "rank": world.rank, "ranks": world.size, "ranks_here": ranks_here}


def _look_at_torch(torch: Any) -> dict[str, Any]:
    built = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch_blas": built[1] if built else None, "cuda": cuda}


def look() -> Findings:
    """Look at this machine: imports each part, and asks it.

    Returns:
        What was found.

    MPI: Collective over COMM_WORLD, where mpi4py is there.
    """
    parts: dict[str, Part] = {}
    found: dict[str, Any] = {}
    modules = {}
    for name in (*REQUIRED, *OPTIONAL):
        parts[name], modules[name] = _import_part(name)
    if petsc := _submodule("petsc4py.PETSc"):
        found |= _look_at_petsc(petsc)
    if mpi := _submodule("mpi4py.MPI"):
        found |= _look_at_mpi(mpi)
    if modules["torch"]:
        found |= _look_at_torch(modules["torch"])
    _submodule("scipy.linalg")  # loads SciPy's BLAS
    maps = Path("/proc/self/maps")
    if maps.exists():
        found["blas_libraries"], found["mpi_libraries"] = loaded_libraries(maps.read_text())
    return Findings(
        python=f"{platform.python_version()} ({sys.executable})",
        parts=parts,
        cores=_cores(),
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
        **found,
    )


def _missing(findings: Findings) -> Iterable[Problem]:
    fenicsx = "Run it with container/run, or get FEniCSx from conda-forge (environment.yml), Debian, Ubuntu, Docker or Spack."
    uses = {
        "gmsh": "scripts that make meshes do not run",
        "meshio": "only gmsh's .msh and XDMF meshes can be read",
        "matplotlib": "demos draw no pictures",
        "arviz_stats": "posteriors are diagnosed without k-hat",
    }
    for part in findings.parts.values():
        if part.version is not None:
            continue
        if part.name in REQUIRED:
            remedy = fenicsx if part.name in ("dolfinx", "petsc4py", "mpi4py") else f"pip install {part.name}"
            yield Problem(
                f"{part.name} cannot be imported ({part.error}): fem_vi does not work without it.", remedy, essential=True
            )
        elif part.name in uses:
            name = DISTRIBUTIONS.get(part.name, part.name)
            yield Problem(f"{part.name} cannot be imported ({part.error}): {uses[part.name]}.", f"pip install {name}")


def _about_solvers(findings: Findings) -> Iterable[Problem]:
    dolfinx = findings.parts.get("dolfinx", Part("dolfinx"))
    if dolfinx.version is not None and ".".join(dolfinx.version.split(".")[:2]) not in SUPPORTED_DOLFINX:
        yield Problem(
            f"DOLFINx {dolfinx.version} is not supported: its names may differ from those that fem_vi uses.",
            f"Install one of {', '.join(SUPPORTED_DOLFINX)}.",
        )
    if findings.petsc is None:
        return
    if findings.complex_scalars:
        yield Problem(
            "PETSc computes with complex numbers; fem_vi computes with real ones.",
            "Use a build with real scalars (Debian: python3-dolfinx-real; conda-forge: petsc=*=real*).",
            essential=True,
        )
    if "MUMPS" not in findings.solvers:
        yield Problem(
            "PETSc has no MUMPS: direct solves work on one rank only, and Cholesky is slower.",
            "Use a PETSc built with MUMPS (conda-forge's and Debian's are), or pass iterative petsc_options.",
        )
    if "hypre" not in findings.solvers:
        yield Problem("PETSc has no hypre: BoomerAMG is not available.", "Use GAMG (pc_type gamg), or a PETSc built with hypre.")


def _about_speed(findings: Findings) -> Iterable[Problem]:
    if blas_name(findings.blas_libraries) == "reference BLAS":
        yield Problem(
            "NumPy, torch or PETSc computes with the reference BLAS: dense products are about 15 times slower.",
            "Debian, Ubuntu: apt-get install libopenblas0-pthread; conda: conda install 'libblas=*=*openblas'.",
        )
    if findings.ranks > 1 and findings.omp_threads is None:
        yield Problem(
            f"OMP_NUM_THREADS is not set, and there are {findings.ranks} ranks: each starts a thread on every core.",
            "export OMP_NUM_THREADS=1",
        )
    if findings.ranks_here > findings.cores:
        yield Problem(
            f"{findings.ranks_here} ranks share {findings.cores} cores of this machine: they wait for each other.",
            f"mpirun -n {findings.cores}, or more machines.",
        )


def _about_mpi(findings: Findings) -> Iterable[Problem]:
    files = {os.path.realpath(path) for path in findings.mpi_libraries}
    if len(files) > 1:
        yield Problem(
            f"Two MPI libraries are loaded ({', '.join(sorted(files))}): petsc4py and mpi4py do not use the same one, "
            "and communicators passed between them crash.",
            "Install both from one place (conda-forge, or Debian), or rebuild mpi4py with PETSc's: "
            "pip install --no-binary mpi4py --force-reinstall mpi4py.",
            essential=True,
        )


def problems(findings: Findings) -> tuple[Problem, ...]:
    """What will hurt, the essential first.

    Args:
        findings: What `look` found.

    Returns:
        One problem for each thing that will hurt.

    MPI: Not collective.
    """
    found = [problem for judge in (_missing, _about_mpi, _about_solvers, _about_speed) for problem in judge(findings)]
    return tuple(sorted(found, key=lambda problem: not problem.essential))


def _rows(findings: Findings) -> Iterable[tuple[str, str]]:
    def version(name: str) -> str:
        part = findings.parts.get(name, Part(name))
        return part.version if part.version is not None else "missing"

    petsc = "missing"
    if findings.petsc is not None:
        petsc = f"{findings.petsc}, {'complex' if findings.complex_scalars else 'real'}, with {', '.join(findings.solvers)}"
    yield "Python", findings.python
    yield "DOLFINx", version("dolfinx")
    yield "PETSc", petsc
    yield "SLEPc", version("slepc4py")
    yield "MPI", f"{findings.mpi or 'missing'}, mpi4py {version('mpi4py')}"
    yield "torch", f"{version('torch')}, {'CUDA: ' + findings.cuda if findings.cuda else 'no CUDA'}"
    yield "BLAS", ", ".join(filter(None, [blas_name(findings.blas_libraries) or "unknown", *findings.blas_libraries[:1]]))
    yield "gmsh, meshio", f"{version('gmsh')}, {version('meshio')}"
    yield "NumPy, SciPy", f"{version('numpy')}, {version('scipy')}"
    yield "cores, ranks", f"{findings.cores}, {findings.ranks}"
    yield "threads", f"OMP_NUM_THREADS is {findings.omp_threads or 'not set'}"


def report(findings: Findings, console: Console) -> None:
    """Print the findings, and one line for each problem with its remedy.

    Args:
        findings: What `look` found.
        console: Where to print.

    MPI: Not collective.
    """
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(findings):
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)
    console.print()
    found = problems(findings)
    for problem in found:
        style, word = ("bold red", "missing") if problem.essential else ("yellow", "warning")
        console.print(Text.assemble((f"{word}: ", style), problem.what, " ", (problem.remedy, "bold")), soft_wrap=True)
    if not found:
        console.print(Text("Nothing here will hurt.", style="green"))
