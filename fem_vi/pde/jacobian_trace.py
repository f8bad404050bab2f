"""The gradient of log |det A| for A = dF/du of a weak form: tr(A^-1 dA) = sum_ij (A^-T)_ij dA_ij, without approximation.

Only entries of A^-T on the pattern of A take part. Entity by entity (a cell, or a facet with its two cells) A is a sum of blocks
A_e = T_e A_ref T_e^T, where T_e turns the dofs of the reference cell into those of the cell, so that

    sum_ij (A^-T)_ij dA_ij = sum_e G_e : d(T_e A_ref T_e^T) = sum_e (T_e^T G_e T_e) : dA_ref,      G_e = (A^-T)[dofs_e, dofs_e].

For each local dof i let l have the coefficient one there in *every* cell, and w the coefficients of row i of T_e^T G_e T_e. Then
sum_i a(m; w_i, l_i) is the contraction. Such w and l are no functions of any space, but a form reads its coefficients cell by
cell from a packed array, which may hold anything. So d/dm a(m; w, l) is derived and compiled once, as for functions, and is
assembled once for each local dof.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ufl
from dolfinx import fem, la
from numpy.typing import NDArray
from ufl.algorithms import expand_derivatives

from fem_vi.errors import UnsupportedForm
from fem_vi.parallel import sum_over_ranks
from fem_vi.pde import _compat
from fem_vi.pde.adjoint import constant_slope
from fem_vi.pde.dof_transformations import dof_transformations
from fem_vi.pde.inputs import Array, ConstantInput, FunctionInput, Input
from fem_vi.pde.region import find_entities
from fem_vi.pde.selected_inverse import SelectedInverse
from fem_vi.pde.weak_form import WeakForm

Key = tuple[str, int]
Blocks = dict[Key, Array]


class JacobianBlocks:
    """The blocks of A^-T that belong to the integrals of dF/du.

    Args:
        pde: The weak form.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm) -> None:
        self._space = space = pde.space
        index_map, bs = space.dofmap.index_map, space.dofmap.index_map_bs
        size = int(index_map.size_global * bs)
        self._cells: dict[Key, NDArray[np.int32]] = {
            (kind.name, tag): entities[:, ::2]
            for kind, tags in find_entities(pde.jacobian).items()
            for tag, entities in tags.items()
        }
        names, free = _global_dofs(space), np.ones(index_map.size_local * bs + index_map.num_ghosts * bs, dtype=bool)
        free[pde.boundary.dofs] = False
        local = _cell_dofs(space)
        places, self._shapes, self._masks = [np.empty(0, dtype=np.int64)], {}, {}
        for key, cells in self._cells.items():
            dofs = local[cells].reshape(len(cells), -1)
            places.append((names[dofs][:, :, None] * size + names[dofs][:, None, :]).ravel())
            self._shapes[key] = len(cells), dofs.shape[1], dofs.shape[1]
            self._masks[key] = free[dofs][:, :, None] & free[dofs][:, None, :]
        wanted, self._positions = np.unique(np.concatenate(places), return_inverse=True)
        self._inverse = SelectedInverse(space.mesh.comm, size, wanted // size, wanted % size)
        self._turns = _transposed_transformations(space)

    def compute(self, factor: Any) -> Blocks:
        """T_e^T G_e T_e of all entities of each integral, from a factor by MUMPS; zero at prescribed dofs. Collective."""
        values = self._inverse.compute(factor)[self._positions.ravel()]
        out, first = {}, 0
        for key, shape in self._shapes.items():
            last = first + int(np.prod(shape))
            out[key] = self._turned(np.where(self._masks[key], values[first:last].reshape(shape), 0.0), self._cells[key])
            first = last
        return out

    def _turned(self, blocks: Array, cells: NDArray[np.int32]) -> Array:
        """T^T G T, where T has a block for each of the cells of an entity."""
        if self._turns is None:
            return blocks
        matrices, class_of = self._turns
        sides, dim = cells.shape[1], matrices.shape[1]
        for _ in range(2):  # the rows, and after transposition the columns
            rows = [matrices[class_of[cells[:, side]]] @ blocks[:, side * dim : (side + 1) * dim] for side in range(sides)]
            blocks = np.concatenate(rows, axis=1).transpose(0, 2, 1)
        return blocks


class TraceGradient:
    """sum_e H_e : dA_ref/dm for blocks H_e, for the state and the inputs of a weak form, at what is loaded.

    Args:
        pde: The weak form.

    MPI: Collective.
    """

    def __init__(self, pde: WeakForm) -> None:
        self._symbols = fem.Function(pde.space), fem.Function(pde.space)
        test, trial = self._symbols
        self._form = ufl.replace(pde.jacobian, {pde.test: test, pde.trial: trial})
        self._given = [pde.unknown, *pde.inputs]
        self.positions = [k for k, given in enumerate(self._given) if given.occurs_in(pde.jacobian)]
        self._parts: dict[int, _Contraction | None] = {}

    def assemble(self, position: int, blocks: Blocks) -> Array:
        """The gradient for the state (position 0) or for input position - 1.

        Args:
            position: Which; see `positions` for those whose gradient is not zero anyway.
            blocks: See `JacobianBlocks.compute`.

        Returns:
            As `FormGradient.assemble`.

        MPI: Collective.
        """
        given = self._given[position]
        if position not in self._parts:
            self._parts[position] = self._create(given)
        part = self._parts[position]
        return np.zeros(given.size) if part is None else part.assemble(blocks)

    def _create(self, given: Input) -> _Contraction | None:
        direction: Any
        try:
            if isinstance(given, FunctionInput):
                direction = ufl.TestFunction(given.space)
                form = expand_derivatives(ufl.derivative(self._form, given.symbol, direction))
            else:
                direction = fem.Constant(given.symbol.ufl_domain(), np.zeros(given.shape))
                form = expand_derivatives(constant_slope(self._form, given.symbol, direction))
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedForm(f"The Jacobian cannot be differentiated for {given.label}: {error}") from error
        if form.empty():
            return None
        if isinstance(given, ConstantInput):
            return _ConstantContraction(form, self._symbols, direction)
        return _FieldContraction(form, self._symbols)


class _Contraction:
    """A form of two Functions w and l, assembled with coefficients of theirs that differ from entity to entity."""

    def __init__(self, form: ufl.Form, symbols: tuple[fem.Function, fem.Function]) -> None:
        self._compiled = fem.form(form)
        ufcx, given = self._compiled.ufcx_form, form.coefficients()
        order = [given[ufcx.original_coefficient_positions[k]] for k in range(ufcx.num_coefficients)]
        sizes = [symbol.function_space.element.space_dimension for symbol in order]
        starts = np.cumsum([0, *sizes])
        self._starts = [int(starts[next(k for k, c in enumerate(order) if c is symbol)]) for symbol in symbols]
        self._keys = {(kind, key): (kind.name, tag) for kind, key, tag, _ in _compat.integral_domains(self._compiled)}

    def _passes(self, blocks: Blocks) -> Any:
        """The packed coefficients of each pass: for the local dofs i one after another, l = e_i and w = H_i."""
        packed = _compat.pack_coefficients(self._compiled)
        parts = []
        for where, name in self._keys.items():
            block = blocks[name]
            sides = 2 if name[0] == "interior_facet" else 1
            array = packed[where].reshape(len(block), -1)
            test, trial = (array[:, sides * start : sides * start + block.shape[1]] for start in self._starts)
            parts.append((block, test, trial))
        for row in range(max((block.shape[1] for block, _, _ in parts), default=0)):
            for block, test, trial in parts:
                test.fill(0.0)
                if row < block.shape[1]:
                    test[:, row] = 1.0
                    trial[:] = block[:, row]
            yield packed

    def assemble(self, blocks: Blocks) -> Array:
        """See `TraceGradient.assemble`."""
        raise NotImplementedError


class _FieldContraction(_Contraction):
    def __init__(self, form: ufl.Form, symbols: tuple[fem.Function, fem.Function]) -> None:
        super().__init__(form, symbols)
        space = form.arguments()[0].ufl_function_space()
        self._vector = la.vector(space.dofmap.index_map, space.dofmap.index_map_bs)
        self._owned = space.dofmap.index_map.size_local * space.dofmap.index_map_bs

    def assemble(self, blocks: Blocks) -> Array:
        self._vector.array.fill(0.0)
        for coefficients in self._passes(blocks):
            fem.assemble_vector(self._vector.array, self._compiled, coeffs=coefficients)
        self._vector.scatter_reverse(la.InsertMode.add)
        return self._vector.array[: self._owned].copy()


class _ConstantContraction(_Contraction):
    def __init__(self, form: ufl.Form, symbols: tuple[fem.Function, fem.Function], direction: fem.Constant) -> None:
        super().__init__(form, symbols)
        self._direction = direction
        self._comm = self._compiled.mesh.comm

    def assemble(self, blocks: Blocks) -> Array:
        entries = self._direction.value.reshape(-1)
        gradient = np.zeros(entries.size)
        for coefficients in self._passes(blocks):
            for entry in range(entries.size):
                entries[:] = 0.0
                entries[entry] = 1.0
                gradient[entry] += fem.assemble_scalar(self._compiled, coeffs=coefficients)
        return sum_over_ranks(self._comm, gradient)


def _transposed_transformations(space: Any) -> tuple[Array, NDArray[np.int32]] | None:
    """T^T of each class of cells, `(num_classes, n, n)`, and the class of each local cell; None where T is the identity."""
    given = dof_transformations(space)
    if given is None:
        return None
    stored, _ = given
    size = stored.ptr.shape[1] - 1
    matrices = np.zeros((len(stored.ptr), size, size))
    for matrix, starts in zip(matrices, stored.ptr, strict=True):
        rows = np.repeat(np.arange(size), np.diff(starts))
        matrix[rows, stored.col[starts[0] : starts[-1]]] = stored.val[starts[0] : starts[-1]]
    return matrices, stored.class_of


def _cell_dofs(space: Any) -> NDArray[np.int64]:
    """Unrolled local dofs of each local cell."""
    bs = space.dofmap.bs
    blocks = np.asarray(space.dofmap.list, dtype=np.int64)
    return (blocks[:, :, None] * bs + np.arange(bs)).reshape(len(blocks), -1)


def _global_dofs(space: Any) -> NDArray[np.int64]:
    """The number on all ranks of each unrolled local dof."""
    index_map, bs = space.dofmap.index_map, space.dofmap.index_map_bs
    blocks = index_map.local_to_global(np.arange(index_map.size_local + index_map.num_ghosts, dtype=np.int32))
    return (np.asarray(blocks, dtype=np.int64)[:, None] * bs + np.arange(bs)).ravel()
