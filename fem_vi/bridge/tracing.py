"""Refuses to be traced: a trace that records torch operations would take the result of a solve for a constant."""

from __future__ import annotations

import sys

from fem_vi.errors import UnsupportedDerivative

_TRACER = "torch.fx.experimental.proxy_tensor"


def check_not_traced(name: str) -> None:
    """Refuse `torch.func.linearize`, `make_fx` and whatever else records operations now. Not collective.

    Raises:
        UnsupportedDerivative: Naming what cannot be traced.
    """
    tracer = sys.modules.get(_TRACER)
    if tracer is not None and tracer.get_proxy_mode() is not None:
        raise UnsupportedDerivative(
            f"{name} cannot be traced (torch.func.linearize, make_fx): the trace would hold its result as a constant. "
            "Use torch.func.jvp or vjp."
        )
