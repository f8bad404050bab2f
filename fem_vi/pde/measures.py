"""The subdomain data of a form: what its tags mean, once for each kind of integral."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import ufl

from fem_vi.errors import UnsupportedForm

_MEASURES = {"cell": "dx", "exterior_facet": "ds", "interior_facet": "dS"}


def share_subdomain_data(form: ufl.Form) -> ufl.Form:
    """The same form, where integrals of one kind over one mesh have the same subdomain data.

    `ufl.ds` without a tag means all facets, with subdomain data as without; DOLFINx 0.9 does not compile both in one form.

    Raises:
        UnsupportedForm: Where two integrals of one kind have different subdomain data, or a tag has none: DOLFINx would take
            it for an integral over nothing.
    """
    known: dict[Hashable, Any] = {}
    for integral in form.integrals():
        data = integral.subdomain_data()
        if data is not None and known.setdefault(_kind(integral), data) is not data:
            name = _name(integral)
            raise UnsupportedForm(f"the form has two {name} measures with different subdomain data. {_remedy(name)}")
    return ufl.Form([_with_data(integral, known.get(_kind(integral))) for integral in form.integrals()])


def _with_data(integral: Any, data: Any) -> Any:
    if integral.subdomain_data() is not None:
        return integral
    if integral.subdomain_id() not in ("everywhere", "otherwise"):
        name = _name(integral)
        raise UnsupportedForm(
            f"{name}({integral.subdomain_id()}) has no subdomain data, so that its tag means nothing. {_remedy(name)}"
        )
    return integral if data is None else integral.reconstruct(subdomain_data=data)


def _kind(integral: Any) -> Hashable:
    return integral.ufl_domain(), integral.integral_type()


def _name(integral: Any) -> str:
    return _MEASURES.get(integral.integral_type(), integral.integral_type())


def _remedy(name: str) -> str:
    return f'Build the measure once, {name} = ufl.Measure("{name}", domain=mesh, subdomain_data=tags), and use it throughout.'
