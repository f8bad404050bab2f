"""The quadrature of a form, pinned before it is differentiated.

The form compiler estimates a quadrature degree for each form it sees, and for a derivative it estimates another one: with
exp(m) in it, the assembled derivative is then not the derivative of what was assembled (relative error 1e-5 to 1e-3 on coarse
meshes), and no test of the form alone notices. With the degree of the form written into its integrals, derivatives inherit
it, and are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ufl
from ufl.algorithms import estimate_total_polynomial_degree


def pin_quadrature(form: ufl.Form) -> ufl.Form:
    """The same form with the degrees that the form compiler would choose for it written down.

    The compiler sums all integrands over one subdomain that have the same metadata and takes the largest degree among them.

    Args:
        form: UFL form with derivatives expanded.

    Returns:
        Form whose integrals all state a quadrature degree; degrees that the user chose stay.
    """
    degrees: dict[Any, int] = {}
    for integral in form.integrals():
        degree = int(np.max(estimate_total_polynomial_degree(integral.integrand())))
        for key in _groups(integral):
            degrees[key] = max(degree, degrees.get(key, 0))
    pinned = []
    for integral in form.integrals():
        metadata = dict(integral.metadata())
        if metadata.get("quadrature_degree", -1) < 0:
            metadata["quadrature_degree"] = max(degrees[key] for key in _groups(integral))
        pinned.append(integral.reconstruct(metadata=metadata))
    return ufl.Form(pinned)


def _groups(integral: Any) -> list[Any]:
    ids = integral.subdomain_id()
    metadata = tuple(sorted((key, str(value)) for key, value in integral.metadata().items()))
    each = ids if isinstance(ids, tuple) else (ids,)
    return [(integral.integral_type(), integral.ufl_domain(), metadata, number) for number in each]
