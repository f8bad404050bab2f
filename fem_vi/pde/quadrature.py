"""The quadrature of a form, pinned before it is differentiated.

The form compiler estimates a quadrature degree for each form it sees, and for a derivative it estimates another one: with
exp(m) in it, the assembled derivative is then not the derivative of what was assembled (2.5e-5 apart, relatively, on a
4 x 3 mesh), and no test of the form alone notices. With the degree of the form written into its integrals, derivatives inherit
it, and are exact.

Rules of a single point, such as those of selective reduced integration, must not meet others. What has one value at all points of
a rule, FFCx computes once, before its loops, and takes for that value in the loops of the other rules over the same subdomain
too: with one point, everything. grad u . grad v, with its second term integrated at midpoints, was half as large as it should
be. Such rules get a second point, of weight zero.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import basix
import numpy as np
import ufl
from dolfinx import fem
from ufl.algorithms import estimate_total_polynomial_degree
from ufl.algorithms.apply_integral_scaling import compute_integrand_scaling_factor

from fem_vi.errors import UnsupportedForm
from fem_vi.pde import _compat
from fem_vi.pde.inputs import Array
from fem_vi.pde.integrals import CELLS, KINDS, quadrature
from fem_vi.pde.measures import share_subdomain_data

_TOWARDS_THE_ORIGIN = (0.89, 0.87, 0.83)
"""Factors that take a point of a reference cell to another one inside, along no symmetry of the cell."""


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
        UnsupportedForm: Where the subdomain data of the form contradict each other, a tag has none, or rules on facets meet that
            FFCx or DOLFINx takes for each other.
    """
    form = share_subdomain_data(form)
    degrees: dict[Hashable, int] = {}
    for integral in form.integrals():
        key = _group(integral)
        degrees[key] = max(_degree(integral), degrees.get(key, 0))
    pinned = ufl.Form([_with_degree(integral, degrees[_group(integral)]) for integral in form.integrals()])
    return _without_single_points(pinned, [_is_chosen(integral) for integral in form.integrals()])


def _is_chosen(integral: Any) -> bool:
    return integral.metadata().get("quadrature_degree", -1) >= 0 or "quadrature_rule" in integral.metadata()


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


def _without_single_points(form: ufl.Form, chosen: Sequence[bool]) -> ufl.Form:
    """The same form, in which no rule of one point shares a subdomain with others.

    Args:
        form: Form with pinned degrees.
        chosen: For each integral, whether the user chose its rule.
    """
    rules = [_rule(integral) for integral in form.integrals()]
    found: dict[Hashable, set[bytes]] = {}
    for integral, rule in zip(form.integrals(), rules, strict=True):
        if rule is not None:
            for place in _places(integral):
                found.setdefault(place, set()).add(rule[0].tobytes() + rule[1].tobytes())
    integrals = []
    for integral, rule, own in zip(form.integrals(), rules, chosen, strict=True):
        if rule is None or all(len(found[place]) == 1 for place in _places(integral)):
            integrals.append(integral)
        else:
            integrals.append(_beside_others(integral, *rule, own))
    return ufl.Form(integrals)


def _beside_others(integral: Any, points: Array, weights: Array, chosen: bool) -> Any:
    """An integral as FFCx takes it beside others with other rules."""
    on_cells, metadata = integral.integral_type() == "cell", integral.metadata()
    if not on_cells and metadata.get("quadrature_rule") == "custom" and _compat.DOLFINX_VERSION >= (0, 10):
        raise UnsupportedForm(
            "the form has a custom quadrature rule on facets beside others over one subdomain, which DOLFINx counts twice. "
            "Give all of them the same rule."
        )
    if len(weights) > 1:
        return integral
    if on_cells:
        return _with_second_point(integral, points, weights)
    if not chosen:
        return integral.reconstruct(metadata={**metadata, "quadrature_degree": 2})
    raise UnsupportedForm(
        f"the form has facet integrals with quadrature of one point, {metadata}, beside others over one subdomain, which FFCx "
        "takes for each other. Give all of them the same degree, or each at least 2."
    )


def _rule(integral: Any) -> tuple[Array, Array] | None:
    """Points and weights of an integral; None where there is no choice of them."""
    kind, cell = integral.integral_type(), integral.ufl_domain().ufl_coordinate_element().cell_type.name
    if kind not in KINDS or cell not in CELLS:
        return None
    points, weights = quadrature(kind, cell, integral.metadata(), [])
    return (points, weights) if points.size else None


def _places(integral: Any) -> list[Hashable]:
    """The subdomains that an integral is over, one by one."""
    ids = integral.subdomain_id()
    return [(integral.integral_type(), integral.ufl_domain(), one) for one in (ids if isinstance(ids, tuple) else (ids,))]


def _with_second_point(integral: Any, points: Array, weights: Array) -> Any:
    second = points[0] * _TOWARDS_THE_ORIGIN[: points.shape[1]]
    metadata = dict(integral.metadata())
    metadata["quadrature_rule"] = "custom"
    metadata["quadrature_points"] = (tuple(points[0].tolist()), tuple(second.tolist()))
    metadata["quadrature_weights"] = (float(weights[0]), 0.0)
    return integral.reconstruct(metadata=metadata)


def check_rules_of_derivatives(form: ufl.Form, varying: Sequence[Any]) -> None:
    """Refuse a form whose derivative would be integrated by another rule than the form.

    FFCx takes the rule of an element on subdivided cells ("iso") where test or trial function has one; a derivative has the
    element of what it is taken for.

    Args:
        form: UFL form, pinned.
        varying: What derivatives are taken for; of Constants and coordinates nothing is asked.

    Raises:
        UnsupportedForm: Naming the element.
    """
    own = {argument.ufl_element().polyset_type for argument in form.arguments()} or {basix.PolysetType.standard}
    for function in varying:
        if not isinstance(function, fem.Function):
            continue
        element = function.function_space.ufl_element()
        if {element.polyset_type} != own and basix.PolysetType.macroedge in (own | {element.polyset_type}):
            raise UnsupportedForm(
                f"'{function}' has the element {element}, and the form is integrated by the rule of another kind of cells: with "
                "elements on subdivided cells (iso), all Functions of a form must have them. Interpolate what has not."
            )
