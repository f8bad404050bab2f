"""The doctor's judgement, on findings made up for each thing that hurts, and one look at this machine."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from fem_vi.doctor import OPTIONAL, REQUIRED, Findings, Part, blas_name, loaded_libraries, look, problems, report

SOUND = Findings(
    python="3.13.5 (/usr/bin/python3)",
    parts={name: Part(name, "0.9.0") for name in (*REQUIRED, *OPTIONAL)},
    petsc="3.22.5",
    solvers=("MUMPS", "SuperLU_DIST", "UMFPACK", "hypre", "GAMG"),
    mpi="Open MPI v5.0.7",
    mpi_libraries=("/usr/lib/libmpi.so.40",),
    blas_libraries=("/usr/lib/openblas-pthread/libblas.so.3", "/usr/lib/openblas-pthread/libopenblas.so.0"),
    ranks=2,
    ranks_here=2,
    cores=2,
    omp_threads="1",
)


def without(name: str) -> Findings:
    return replace(SOUND, parts=SOUND.parts | {name: Part(name, error=f"ModuleNotFoundError: No module named '{name}'")})


# What is found, what the doctor says about it, the remedy, and whether fem_vi cannot work at all.
TROUBLES = {
    "dolfinx": (without("dolfinx"), "dolfinx cannot be imported", "conda-forge", True),
    "petsc4py": (replace(without("petsc4py"), petsc=None, solvers=()), "petsc4py cannot be imported", "container/run", True),
    "mpi4py": (without("mpi4py"), "mpi4py cannot be imported", "container/run", True),
    "torch": (without("torch"), "torch cannot be imported", "pip install torch", True),
    "gmsh": (without("gmsh"), "make meshes", "pip install gmsh", False),
    "meshio": (without("meshio"), "XDMF meshes can be read", "pip install meshio", False),
    "arviz": (without("arviz_stats"), "k-hat", "pip install arviz-stats", False),
    "old dolfinx": (
        replace(SOUND, parts=SOUND.parts | {"dolfinx": Part("dolfinx", "0.8.0")}),
        "DOLFINx 0.8.0 is not supported",
        "0.9, 0.10, 0.11",
        False,
    ),
    "complex": (replace(SOUND, complex_scalars=True), "complex numbers", "python3-dolfinx-real", True),
    "no MUMPS": (replace(SOUND, solvers=("hypre", "GAMG")), "PETSc has no MUMPS", "petsc_options", False),
    "no hypre": (replace(SOUND, solvers=("MUMPS", "GAMG")), "BoomerAMG", "gamg", False),
    "reference BLAS": (
        replace(SOUND, blas_libraries=("/usr/lib/x86_64-linux-gnu/blas/libblas.so.3.12.1",)),
        "reference BLAS",
        "libopenblas0-pthread",
        False,
    ),
    "threads": (replace(SOUND, omp_threads=None), "OMP_NUM_THREADS is not set", "export OMP_NUM_THREADS=1", False),
    "cores": (replace(SOUND, ranks=3, ranks_here=3), "3 ranks share 2 cores", "mpirun -n 2", False),
    "two MPIs": (
        replace(SOUND, mpi_libraries=("/opt/mpich/libmpi.so.12", "/usr/lib/libmpi.so.40")),
        "Two MPI libraries",
        "--no-binary mpi4py",
        True,
    ),
}


def printed(findings: Findings) -> str:
    console = Console(file=io.StringIO(), width=200)
    report(findings, console)
    return console.file.getvalue()


def test_nothing_to_say_about_a_sound_machine() -> None:
    assert problems(SOUND) == ()
    assert "Nothing here will hurt" in printed(SOUND)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_trouble_has_one_line_with_its_remedy(trouble: str) -> None:
    findings, what, remedy, essential = TROUBLES[trouble]
    (problem,) = problems(findings)
    assert what in problem.what
    assert remedy in problem.remedy
    assert problem.essential is essential
    (line,) = [line for line in printed(findings).splitlines() if line.startswith(("warning:", "missing:"))]
    assert problem.what in line
    assert problem.remedy in line


def test_one_rank_needs_no_word_about_threads() -> None:
    assert problems(replace(SOUND, ranks=1, ranks_here=1, omp_threads=None)) == ()


def test_ranks_on_other_machines_do_not_share_these_cores() -> None:
    assert problems(replace(SOUND, ranks=64, ranks_here=2)) == ()


def test_the_essential_comes_first() -> None:
    found = problems(replace(without("dolfinx"), solvers=(), omp_threads=None))
    assert [problem.essential for problem in found] == sorted((problem.essential for problem in found), reverse=True)


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (["/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3"], "OpenBLAS"),
        (["/opt/conda/lib/libopenblasp-r0.3.29.so", "/opt/conda/lib/libmkl_rt.so.2"], "OpenBLAS, MKL"),
        (["/usr/lib/x86_64-linux-gnu/blas/libblas.so.3.12.0"], "reference BLAS"),
        (["/usr/lib/libopenblas.so.0", "/usr/lib/blas/libblas.so.3"], "reference BLAS"),
        ([], None),
    ],
)
def test_blas_is_named_by_its_files(paths: list[str], name: str | None) -> None:
    assert blas_name(paths) == name


def test_libraries_are_read_from_the_map_of_a_process() -> None:
    maps = (
        "7f00-7f01 r-xp 00000000 fe:00 12 /usr/lib/blas/libblas.so.3.12.1\n"
        "7f01-7f02 r--p 00000000 fe:00 12 /usr/lib/blas/libblas.so.3.12.1\n"
        "7f02-7f03 r-xp 00000000 fe:00 13 /usr/lib/libmpi.so.40.40.7\n"
        "7f03-7f04 r-xp 00000000 fe:00 14 /usr/lib/libmpi_cxx.so.40\n"
        "7f04-7f05 rw-p 00000000 00:00 0 [heap]\n"
    )
    assert loaded_libraries(maps) == (("/usr/lib/blas/libblas.so.3.12.1",), ("/usr/lib/libmpi.so.40.40.7",))


@pytest.mark.mpi
def test_this_machine_has_what_is_essential() -> None:
    findings = look()
    assert not [problem for problem in problems(findings) if problem.essential]
    assert "GAMG" in findings.solvers
    assert 0 <= findings.rank < findings.ranks
    assert findings.mpi
