"""Each demo, as it is committed, on one rank and on two. A demo ends in assertions of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
DEMOS = sorted((REPOSITORY / "demos").glob("demo_*.py"))
QUICK = {"demo_aquifer", "demo_heat_sink", "demo_linear_gaussian"}
"""Those whose meshes are spread over ranks and that take seconds; networks, which ranks only repeat, take two ranks longer."""


@pytest.mark.timeout(650)
@pytest.mark.parametrize("demo", DEMOS, ids=[demo.stem for demo in DEMOS])
def test_demo(demo: Path, tmp_path: Path) -> None:
    run(demo, [], tmp_path)


@pytest.mark.timeout(650)
@pytest.mark.parametrize(
    "demo", [pytest.param(demo, id=demo.stem, marks=[pytest.mark.long] * (demo.stem not in QUICK)) for demo in DEMOS]
)
def test_demo_on_two_ranks(demo: Path, tmp_path: Path) -> None:
    run(demo, ["mpirun", "-n", "2"], tmp_path)


def run(demo: Path, launch: list[str], folder: Path) -> None:
    """Run a demo in a folder, by itself or by a launcher."""
    path = os.pathsep.join([str(demo.parent), *filter(None, [os.environ.get("PYTHONPATH")])])  # demos may share parts
    # This process has initialised MPI, which leaves variables that mpirun would take for its own: os.environ has none of them.
    done = subprocess.run(
        [*launch, sys.executable, "-P", str(demo)],
        cwd=folder,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": path},
        timeout=600,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
