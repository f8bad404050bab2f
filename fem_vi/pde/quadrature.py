"""The quadrature of a form, pinned before it is differentiated.

The form compiler estimates a quadrature degree for each form it sees, and for a derivative it estimates another one: with
exp(m) in it, the assembled derivative is then not the derivative of what was assembled (2.5e-5 apart, relatively, on a
4 x 3 mesh), and no test of the form alone notices. With the degree of the form written into its integrals, derivatives inherit
it, and are exact.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import ufl
from ufl.algorithms import estimate_total_polynomial_degree
from ufl.algorithms.apply_integral_scaling import compute_integrand_scaling_factor

from fem_vi.pde.measures import share_subdomain_data


def pin_quadrature(form: ufl.Form) -> ufl.Form:
    """The same form with the degrees that the form compiler would choose for it written down.

    The compiler sums all integrands over one subdomain that have the same metadata and takes the largest degree among
    them, plus that of the map's Jacobian determinant (zero on straight simplices).

    Args:
        form: UFL form with derivatives expanded.

    Returns:
        Form whose integrals all state a quadrature degree; degrees that the user chose stay. Integrals of one kind have the
        same subdomain data, see `share_subdomain_data`.

    Raises:
        UnsupportedForm: Where the subdomain data of the form contradict each other, or a tag has none.
    """
    form = share_subdomain_data(form)
    degrees: dict[Hashable, int] = {}
    for integral in form.integrals():
        key = _group(integral)
        degrees[key] = max(_degree(integral), degrees.get(key, 0))
    return ufl.Form([_with_degree(integral, degrees[_group(integral)]) for integral in form.integrals()])


def _degree(integral: Any) -> int:
    _, of_the_map = compute_integrand_scaling_factor(integral)
    return int(np.max(estimate_total_polynomial_degree(integral.integrand()))) + int(np.max(of_the_map))


def _group(integral: Any) -> Hashable:
    metadata = tuple(sorted((key, str(value)) for key, value in integral.metadata().items()))
    return integral.integral_type(), integral.ufl_domain(), integral.subdomain_id(), metadata


def _with_degree(integral: Any, degree: int) -> Any:
    metadata = dict(integral.metadata())
    if metadata.get("quadrature_degree", -1) < 0:
        metadata["quadrature_degree"] = degree
    return integral.reconstruct(metadata=metadata)
