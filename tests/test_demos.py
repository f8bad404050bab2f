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
@pytest.mark.parametrize(
    ("demo", "ranks"),
    [
        pytest.param(demo, ranks, id=f"{demo.stem}-{ranks}", marks=[pytest.mark.long] * (ranks > 1 and demo.stem not in QUICK))
        for demo in DEMOS
        for ranks in (1, 2)
    ],
)
def test_demo(demo: Path, ranks: int, tmp_path: Path) -> None:
    path = os.pathsep.join([str(demo.parent), *filter(None, [os.environ.get("PYTHONPATH")])])  # demos may share parts
    launch = ["mpirun", "-n", str(ranks)] if ranks > 1 else []
    # This process has initialised MPI, which leaves variables that mpirun would take for its own: os.environ has none of them.
    done = subprocess.run(
        [*launch, sys.executable, "-P", str(demo)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": path},
        timeout=600,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
