"""PDDLVM: forward and inverse networks of a parametric PDE, trained together on virtual data, without solves.

z are parameters, u states, r(u, z) the residual, eps the noise of the virtual data r = 0:

    p(r = 0 | u, z) = N(r(u, z); 0, eps^2 I),   p_b(z | u) inverse network,   q_a(u | z) forward network,   z ~ p(z).

Both networks maximise the bound

    E_{p(z) q_a(u | z)} [ log p(r = 0 | u, z) + log p_b(z | u) - log q_a(u | z) ].

For a linear PDE, r = A(z) u - f(z), and without p_b, the best q_a among all is N(A^-1 f, eps^2 (A'A)^-1); among those with
independent coordinates the variances are eps^2 / diag(A'A), and the mean is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from fem_vi.arguments import described, instance, whole
from fem_vi.bridge.layout import OWNED, all_sum, check_last_axis
from fem_vi.bridge.residual import Residual
from fem_vi.bridge.square import square_norm
from fem_vi.bridge.state_map import Nodal, ReducedBasis
from fem_vi.errors import InvalidInput
from fem_vi.models.measure import Measure, Plain, Preconditioned, SolutionUnits
from fem_vi.models.model_file import read_model, write_model
from fem_vi.models.virtual_data import VirtualData
from fem_vi.parallel import raise_on_all
from fem_vi.pde.compiled import CompiledKernel
from fem_vi.pde.kernels import Kernel
from fem_vi.pde.petsc_options import Option
from fem_vi.pde.weak_form import WeakForm
from fem_vi.vi.posterior.on_mesh import LivesOnMesh
from fem_vi.vi.prior import FieldPrior, check_prior
from fem_vi.vi.problem import Cost
from fem_vi.vi.virtual_noise import AnnealedEps, Eps, FixedEps, LearnedEps


@dataclass(frozen=True)
class FieldMoments:
    """What a distribution over fields says at each node.

    Attributes:
        mean: Field tensor, `(*batch, n_owned)`.
        std: Standard deviation, likewise; zero where values are prescribed.
    """

    mean: Tensor
    std: Tensor


_SIZES = "u counts by its coefficients without a prescribed value, or by its modes; z by the unknowns of the prior."


def _alone(z: Tensor) -> Tensor:
    return z


class PDDLVM(LivesOnMesh):
    """A physics-driven deep latent variable model: q_a(u | z) and p_b(z | u) for a weak form, from its residuals.

    Networks are modules whose `forward` returns a `Distribution` in float64, such as `nn.Sequential(layers, DiagonalHead(...))`.
    They see z whitened, as N(0, I), and the state by its coordinates; both are replicated, on any number of ranks.

    **What r = 0 alone does not say.** With a flat p(u), integrating u out of p(r = 0 | u, z) multiplies p(z) by 1 / |det A(z)|,
    A = dr/du, and by more on finer meshes: on a rod whose Bayesian posterior mean is 0.015 it gives -0.068 with 10 elements,
    -0.141 with 20, -0.255 with 40 and -0.413 with 80. The networks trained here do not notice, since z is drawn from p(z):
    q_a(u | z) is normalised for each z, and p_b(z | u) inverts it. A posterior of z from recorded data does; see `DataStage`,
    which offers the remedies. A constant preconditioner is none.

    Args:
        pde: The weak form.
        prior: p(z); `GaussianVector`, `KarhunenLoeveField`, or a field.
        forward: z `(*batch, num_z)` to q_a, with `event_shape == (state.size,)`.
        inverse: Coordinates of u `(*batch, state.size)` to p_b over whitened z, with `event_shape == (num_z,)`; None leaves the
            term out.
        inputs: z `(*batch, n_owned)` to the inputs of the weak form, a tensor or a tuple of them; None passes z on.
        state: Coordinates of u: `Nodal()`, or a `ReducedBasis`.
        eps: `FixedEps`, `AnnealedEps` or `LearnedEps`.
        measure: In which units r is measured: `Plain()`, `Preconditioned(reference)` or `SolutionUnits()`.
        kernel: Who evaluates residuals, as for `Residual`.
        petsc_options: For `Preconditioned` and `SolutionUnits`, as for `Solve`.

    Attributes:
        problem: What `fit` takes for the first stage: virtual data r = 0 for all z.
        state: The map between coordinates and fields; `state.size` coordinates.
        noise: eps as a part of the model.
        residual: The `Residual`.
        cost: Samples solved so far: none, but for `SolutionUnits()`.

    Raises:
        InvalidInput: Where an argument is of the wrong type, or a network returns something else than asked for.
        UnsupportedForm: Where the kernel does not take the form.

    MPI: Collective. Parameters are replicated: build the networks with the same seed on all ranks.

    References:
        Vadeboncoeur, Akyildiz, Kazlauskaite, Girolami, Cirak (2023), Fully probabilistic deep models for forward and inverse
        problems in parametric PDEs.

    Example:
        >>> body = nn.Sequential(nn.Linear(16, 128), nn.SiLU()).double()  # 16 modes of a KarhunenLoeveField
        >>> model = PDDLVM(  # num_free: coefficients of u that no Dirichlet condition prescribes
        ...     pde, prior=prior, inputs=prior.field, forward=nn.Sequential(body, DiagonalHead(128, num_free)),
        ...     measure=Preconditioned(prior.field_mean), eps=LearnedEps(),
        ... )
        >>> run = fem_vi.fit(model.problem, model, VirtualELBO(samples=64), steps=2000, optimizer=fem_vi.Adam(1e-3))
        >>> u = model.predict(z)
    """

    fields: tuple[str, ...] = ()
    shared = ("pde", "prior", "measure", "cost", "residual", "state", "problem", "_measured", "_inputs")

    def __init__(
        self,
        pde: WeakForm,
        *,
        prior: FieldPrior,
        forward: nn.Module,
        inverse: nn.Module | None = None,
        inputs: Callable[[Tensor], Tensor | tuple[Tensor, ...]] | None = None,
        state: Nodal | ReducedBasis = Nodal(),  # noqa: B008 - frozen
        eps: Eps = FixedEps(),  # noqa: B008 - frozen
        measure: Measure = Plain(),  # noqa: B008 - frozen
        kernel: Kernel = CompiledKernel(),  # noqa: B008 - frozen
        petsc_options: Mapping[str, Option] | None = None,
    ) -> None:
        super().__init__()
        instance("pde", pde, WeakForm)
        check_prior(prior)
        with raise_on_all(pde.comm):
            instance("forward", forward, nn.Module)
            instance("inverse", inverse, nn.Module, type(None))
            instance("inputs", inputs, Callable, type(None))  # type: ignore[arg-type]
            instance("state", state, Nodal, ReducedBasis)
            instance("eps", eps, FixedEps, AnnealedEps, LearnedEps)
            instance("measure", measure, Plain, Preconditioned, SolutionUnits)
        self.pde, self.prior, self.measure = pde, prior, measure
        self._inputs = _alone if inputs is None else inputs
        self.cost = Cost()
        self.residual = Residual(pde, kernel=kernel, petsc_options=petsc_options)
        self.state = state.create(pde)
        self._measured = measure.create(self.residual)
        self.num_residuals = int(all_sum(torch.tensor(pde.unknown.size - pde.boundary.owned.size), pde.comm))
        self.noise = eps.create()
        self.forward_network, self.inverse_network = forward, inverse
        self.problem = VirtualData(prior, self.cost, self._describe(eps))
        with raise_on_all(pde.comm):
            check_network("forward", forward, prior.num_global, self.state.size)
            if inverse is not None:
                check_network("inverse", inverse, self.state.size, prior.num_global)
        with torch.no_grad():
            self.inputs(prior.unwhiten(torch.zeros(2, *prior.event_shape, dtype=torch.float64)))

    def forward(self, z: Tensor) -> Distribution:
        """q_a(u | z) over coordinates; see `coordinates_given`."""
        return self.coordinates_given(z)

    # ## The two networks

    def whitened(self, z: Tensor) -> Tensor:
        """What networks see of z `(*batch, n_owned)`: `(*batch, num_z)`, replicated, N(0, I) under the prior. Collective."""
        return self.prior.gather(self.prior.whiten(z))

    def coordinates_given(self, z: Tensor) -> Distribution:
        """q_a(u | z), over the coordinates of u.

        Args:
            z: `(*batch, n_owned)` in the prior's layout.

        Returns:
            A distribution with `event_shape == (state.size,)`, replicated.

        Raises:
            InvalidInput: Where z has another shape, or is not finite.

        MPI: Collective.
        """
        self._check("z", z, self.prior.event_shape[0], "as the prior has.")
        return self.forward_network(self.whitened(z))

    @torch.no_grad()
    def predict(self, z: Tensor) -> FieldMoments:
        """Mean and standard deviation of u given z, of each sample of a batch, without a solve.

        Args:
            z: `(*batch, n_owned)` in the prior's layout.

        Raises:
            InvalidInput: Where z has another shape, or is not finite.

        MPI: Collective.
        """
        q = self.coordinates_given(z)
        return FieldMoments(self.state.lift(q.mean, *self.inputs(z)), self.state.deviation(q))

    def sample(self, z: Tensor, samples: int) -> Tensor:
        """Draws of u given z, `(samples, *batch, n_owned)`, differentiable. Collective; torch's generators must agree."""
        with raise_on_all(self.pde.comm):
            whole("samples", samples, least=1)
        return self.state.lift(self.coordinates_given(z).rsample(torch.Size([samples])), *self.inputs(z))

    def invert(self, u: Tensor) -> Distribution:
        """p_b(z | u), over whitened z.

        Args:
            u: Whole fields, `(*batch, n_owned)`.

        Returns:
            A distribution over xi with `event_shape == (num_z,)`, replicated: z is `prior.unwhiten(prior.scatter(xi))`.

        Raises:
            InvalidInput: Where the model has no inverse network, or u has another shape or is not finite.

        MPI: Collective.
        """
        if self.inverse_network is None:
            raise InvalidInput("invert: the model has no inverse network. Build it with PDDLVM(inverse=...).")
        self._check("invert: u", u, self.pde.unknown.size, OWNED)
        return self.inverse_network(self.state.coordinates(u))

    # ## Their probabilities

    def inputs(self, z: Tensor) -> tuple[Tensor, ...]:
        """The inputs of the weak form for z.

        Raises:
            InvalidInput: Where the function that was given as `inputs` returns other than one tensor of the right shape for each.

        MPI: Collective where that function is.
        """
        given = self._inputs(z)
        several = (given,) if isinstance(given, Tensor) else given
        with raise_on_all(self.pde.comm):
            if not isinstance(several, Sequence) or not all(isinstance(x, Tensor) for x in several):
                raise InvalidInput(f"inputs returned {described(given)}; it must return a tensor, or a tuple of tensors.")
            if len(several) != len(self.pde.inputs):
                raise InvalidInput(f"inputs returned {len(several)} tensors; the weak form has {len(self.pde.inputs)} inputs.")
            for x, expected in zip(several, self.pde.inputs, strict=True):
                if x.shape[x.ndim - len(expected.shape) :] != expected.shape:
                    raise InvalidInput(
                        f"{expected.label} would be a tensor of shape {tuple(x.shape)} for z of shape {tuple(z.shape)}; its last "
                        f"axes must be {tuple(expected.shape)}. Give PDDLVM inputs=, the function of z that makes it: of a "
                        "KarhunenLoeveField it is inputs=prior.field."
                    )
        return tuple(several)

    def log_virtual(self, u: Tensor, *inputs: Tensor) -> Tensor:
        """Log p(r = 0 | u, z) = log N(r(u, z); 0, eps^2 I), over the test functions where nothing is prescribed.

        Args:
            u: States that keep the Dirichlet conditions, where r is then zero, `(*batch, n_owned)`.
            inputs: Those of the weak form, `inputs(z)`. Batch axes broadcast.

        Returns:
            `(*batch,)`, replicated.

        MPI: Collective, forward and backward.
        """
        r = self._measured(u, *inputs)
        if isinstance(self.measure, SolutionUnits):
            self._count(r, any(x.requires_grad for x in inputs))
        log_eps = self.noise.log_eps()
        square = square_norm(r, self.pde.comm)
        constant = 0.5 * self.num_residuals * math.log(2.0 * math.pi)
        return -0.5 * square * (-2.0 * log_eps).exp() - self.num_residuals * log_eps - constant

    def log_eps_prior(self) -> Tensor:
        """Log p(eps), up to a constant; zero unless eps is learned."""
        return self.noise.log_prior(self.num_residuals)

    def _check(self, name: str, x: Tensor, size: int, meaning: str) -> None:
        """Refuse another shape, or what is not finite; on all ranks. Collective."""
        with raise_on_all(self.pde.comm):
            check_last_axis(name, x, size, meaning)
            if not bool(x.isfinite().all()):
                raise InvalidInput(f"{name} contains values that are not finite.")

    def _count(self, r: Tensor, differentiated: bool) -> None:
        samples = r[..., 0].numel()
        self.cost.forward += samples
        if r.requires_grad and (differentiated or not self.pde.is_linear):

            def count(_: Tensor) -> None:
                self.cost.backward += samples

            r.register_hook(count)

    # ## On disk

    def save(self, path: str | Path) -> None:
        """Write all parameters to `path` (.safetensors) and what they belong to beside it (.json); nothing is pickled.

        Raises:
            RunFolderError: Where a file cannot be written.

        MPI: Collective; rank 0 writes.
        """
        write_model(path, self, self.about(), self.pde.comm)

    def load(self, path: str | Path) -> None:
        """Take the parameters that `save` wrote.

        Raises:
            RunFolderError: Where a file is missing or damaged, or is of another model.

        MPI: Collective.
        """
        read_model(path, self, self.about(), self.pde.comm)

    def about(self) -> dict[str, Any]:
        """What must be the same where parameters are loaded."""
        return {
            "model": type(self).__name__,
            "unknowns": self.prior.num_global,
            "coordinates": self.state.size,
            "order": self.state.order,
            "eps": type(self.noise).__name__,
            "measure": type(self.measure).__name__,
        }

    def _describe(self, eps: Eps) -> dict[str, Any]:
        return {**self.about(), "prior": repr(self.prior), "eps": repr(eps)}


@torch.no_grad()
def check_network(name: str, network: nn.Module, size_in: int, size_out: int) -> None:
    """Refuse a network that does not give a distribution over vectors of the right size. Not collective.

    Raises:
        InvalidInput: Naming it.
    """
    if any(value.dtype is torch.float32 for value in network.parameters()):
        raise InvalidInput(f"{name} has parameters in float32; fields are in float64. Give {name}=network.double().")
    try:
        q = network(torch.zeros(2, size_in, dtype=torch.float64))
    except RuntimeError as error:
        raise InvalidInput(f"{name} does not take shape (2, {size_in}): {error}. {_SIZES}") from error
    if not isinstance(q, Distribution):
        raise InvalidInput(f"{name} returned {type(q).__name__}; it must return a torch Distribution. Does it end in a head?")
    if q.event_shape != (size_out,) or q.batch_shape != (2,):
        raise InvalidInput(
            f"{name} took shape (2, {size_in}) and returned a distribution with batch shape {tuple(q.batch_shape)} and event "
            f"shape {tuple(q.event_shape)}; they must be (2,) and ({size_out},). {_SIZES}"
        )
