"""What fem_vi asks of FFCx, and every difference between its versions: the code of a 1-form as trees, and where it integrates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import basix
import ffcx
import ffcx.options
import numpy as np
import ufl
from dolfinx import fem
from ffcx.analysis import analyze_ufl_objects
from ffcx.codegeneration.backend import FFCXBackend
from ffcx.codegeneration.integral_generator import IntegralGenerator
from ffcx.ir.representation import compute_ir
from numpy.typing import NDArray

from fem_vi.errors import UnsupportedForm
from fem_vi.pde._compat import DOLFINX_VERSION

Entities = NDArray[np.int32]

ENTITY_WIDTHS = {"cell": 1, "exterior_facet": 2, "interior_facet": 4}
"""How many numbers name one entity of an integral: a cell, or cells and their local facets."""

_OTHERWISE = -1


@dataclass(frozen=True)
class IntegralCode:
    """The code that FFCx makes of the integrals of one kind with one integrand.

    Attributes:
        kind: "cell", "exterior_facet" or "interior_facet".
        ids: The subdomains that it is integrated over; -1 is the whole mesh.
        tree: Body of the function `tabulate_tensor`, FFCx's LNodes.
        offsets: Where the coefficients that it reads begin in its argument `w`, by their positions among the form's coefficients.
        size: Entries of the element tensor, of both cells of an interior facet.
        permutes: Whether it reads `quadrature_permutation`.
    """

    kind: str
    ids: tuple[int, ...]
    tree: Any
    offsets: Mapping[int, int]
    size: int
    permutes: bool


def generator_version() -> str:
    """What the generated code depends on besides the form: versions, and FFCx's options."""
    versions = [ffcx.__version__, basix.__version__, ufl.__version__]
    return " ".join([*versions, str(sorted((key, str(value)) for key, value in ffcx.options.get_options().items()))])


def integral_codes(form: ufl.Form) -> list[IntegralCode]:
    """The code of a 1-form, integral by integral. Not collective.

    Raises:
        UnsupportedForm: Where FFCx has no code for it, or code for several types of facets.
    """
    options = ffcx.options.get_options({"scalar_type": np.float64})
    try:
        analysis = analyze_ufl_objects([form], options["scalar_type"])
        representation = compute_ir(analysis, {}, "fem_vi", options, False)
        (data,) = analysis.form_data
        return [
            _code(form, integral, ir, options) for integral, ir in zip(data.integral_data, representation.integrals, strict=True)
        ]
    except (NotImplementedError, RuntimeError, ValueError, KeyError) as error:
        raise UnsupportedForm(f"FFCx generates no code for the form, for any kernel: {error}") from error


def _code(form: ufl.Form, integral: Any, ir: Any, options: dict[str, Any]) -> IntegralCode:
    expression = ir.expression
    generator = IntegralGenerator(ir, FFCXBackend(ir, options))
    if DOLFINX_VERSION < (0, 10):
        tree = generator.generate()
    else:
        domains = {domain for domain, _ in expression.integrand}
        if len(domains) > 1:
            raise UnsupportedForm(
                f"CompiledKernel cannot integrate over facets of several types ({integral.integral_type}); AssembledKernel can."
            )
        tree = generator.generate(domains.pop())
    numbers, positions = expression.coefficient_numbering, {c: k for k, c in enumerate(form.coefficients())}
    return IntegralCode(
        integral.integral_type,
        tuple(_OTHERWISE if given == "otherwise" else int(given) for given in integral.subdomain_id),
        tree,
        {positions[c]: int(expression.coefficient_offsets[c]) for c, k in numbers.items() if ir.enabled_coefficients[k]},
        int(np.prod(expression.tensor_shape)),
        bool(expression.needs_facet_permutations),
    )


class IntegrationDomains:
    """The entities of this rank that the integrals of a form run over, and of forms derived from it.

    Args:
        form: UFL form; its integrands do not matter.

    MPI: Collective.
    """

    def __init__(self, form: ufl.Form) -> None:
        one = fem.Constant(form.ufl_domain(), 1.0)
        self._form = fem.form(ufl.Form([integral.reconstruct(integrand=one) for integral in form.integrals()]))

    def entities(self, kind: str, subdomain: int) -> Entities:
        """Cells `(n, 1)`; cells and local facets `(n, 2)`; both sides of interior facets, `(n, 4)`. Not collective."""
        integral_type = getattr(fem.IntegralType, kind)
        form = self._form._cpp_object
        if DOLFINX_VERSION < (0, 10):
            found = form.domains(integral_type, subdomain)
        else:
            found = form.domains(integral_type, self._position(integral_type, subdomain))
        return np.ascontiguousarray(found, dtype=np.int32).reshape(-1, ENTITY_WIDTHS[kind])

    def _position(self, integral_type: Any, subdomain: int) -> int:
        compiled = self._form.ufcx_form
        kind = int(integral_type.value if hasattr(integral_type, "value") else integral_type)
        first, last = compiled.form_integral_offsets[kind], compiled.form_integral_offsets[kind + 1]
        return [compiled.form_integral_ids[k] for k in range(first, last)].index(subdomain)
