"""What runs in a peer's own interpreter: `python -m tests.benchmarks.peers.serve PEER CASE RESULT`.

It solves the case once and writes value and gradient to RESULT; then each line on standard input, a number of calls, is
answered by the CPU seconds of one call. Nothing else is written there, whatever the peer prints.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

from tests.benchmarks.compare import seconds
from tests.benchmarks.peers.case import Case


def main(peer: str, case: str, result: str) -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, variant = peer.partition(":")
    work = import_module(f"tests.benchmarks.peers.{module}").create(Case.read(Path(case)), variant)
    value, gradient = work()
    np.savez(result, value=value, gradient=gradient)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(seconds(work, int(line)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
