"""Truncated Taylor polynomials at points of reference cells: derivatives of any order, on any cell, by exact arithmetic.

A polynomial in the reference coordinates X is an array `(num_terms, *shape)`: its coefficients for the multi-indices of total
degree <= order, in Basix's order, in which those of lower degree come first. Where a function is only known to lower order,
the array is shorter. Products, determinants, inverses and derivatives of such arrays are exact to the lowest order that enters:
the gradient in x, K^T grad_X with the inverse K of the map's Jacobian, can be taken again and again, also where K varies.
"""

from __future__ import annotations

import itertools
import math

import basix
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class TaylorPolynomials:
    """Arithmetic of polynomials in `dim` variables up to a total degree.

    Args:
        dim: Number of variables, 1 to 3.
        order: Highest total degree.
    """

    def __init__(self, dim: int, order: int) -> None:
        self.dim = dim
        exponents = [e for e in itertools.product(range(order + 1), repeat=dim) if sum(e) <= order]
        self._exponents = sorted(exponents, key=lambda e: basix.index(*e))
        self._position = {e: k for k, e in enumerate(self._exponents)}

    def from_derivatives(self, table: Array) -> Array:
        """The polynomials whose derivatives are given, `(num_terms, *shape)`, as Basix tabulates them."""
        factorials = [math.prod(map(math.factorial, e)) for e in self._exponents[: len(table)]]
        return table / np.array(factorials, dtype=np.float64).reshape(-1, *[1] * (table.ndim - 1))

    def product(self, spec: str, a: Array, b: Array) -> Array:
        """The product of two arrays of polynomials, contracted as by `numpy.einsum(spec, ...)`."""
        out: list[Array] = []
        for exponent in self._exponents[: min(len(a), len(b))]:
            out.append(sum(np.einsum(spec, a[i], b[j]) for i, j in self._splits(exponent)))  # type: ignore[arg-type]
        return np.stack(out)

    def derivative(self, a: Array, axis: int) -> Array:
        """The derivative for one variable, of one order less."""
        out = []
        for exponent in self._exponents:
            raised = tuple(e + (k == axis) for k, e in enumerate(exponent))
            position = self._position.get(raised, len(a))
            if position >= len(a):
                break
            out.append(raised[axis] * a[position])
        return np.stack(out)

    def gradient(self, a: Array) -> Array:
        """The derivatives for all variables, in a last axis."""
        parts = [self.derivative(a, axis) for axis in range(self.dim)]
        return np.stack(parts, axis=-1)

    def inverse(self, a: Array) -> Array:
        """The inverse of square matrices of polynomials, `(num_terms, ..., n, n)`, from a^-1 a = 1, degree by degree."""
        first = np.linalg.inv(a[0])
        out = [first]
        for exponent in self._exponents[1 : len(a)]:
            rest = sum(a[i] @ out[j] for i, j in self._splits(exponent) if i > 0)
            out.append(-first @ rest)
        return np.stack(out)

    def determinant(self, a: Array) -> Array:
        """The determinant of square matrices of polynomials, `(num_terms, ..., n, n)`, along the first row."""
        if a.shape[-1] == 1:
            return a[..., 0, 0]
        minors = [self.determinant(np.delete(a[..., 1:, :], k, axis=-1)) for k in range(a.shape[-1])]
        terms = [(-1) ** k * self.product("...,...->...", a[..., 0, k], minor) for k, minor in enumerate(minors)]
        return np.sum(terms, axis=0)

    def _splits(self, exponent: tuple[int, ...]) -> list[tuple[int, int]]:
        """The positions of all pairs of exponents with this sum."""
        lower = itertools.product(*(range(e + 1) for e in exponent))
        return [(self._position[i], self._position[tuple(e - k for e, k in zip(exponent, i, strict=True))]) for i in lower]
