"""Amortised inversion: one network for the posteriors of all data sets of a problem."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fem_vi.arguments import instance
from fem_vi.errors import InvalidInput
from fem_vi.models.model_file import read_model, write_model
from fem_vi.parallel import raise_on_all
from fem_vi.vi.encoder.encoder import Encoder
from fem_vi.vi.fit import fit
from fem_vi.vi.objective import ELBO, Objective
from fem_vi.vi.posterior.amortised import Amortised, AmortisedDistribution, LatentCorrection, Refined
from fem_vi.vi.posterior.heads import FullHead, Head
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.run import Run
from fem_vi.vi.sensors import AllSensors, Data, Sensors
from fem_vi.vi.start import PresentParameters


class AmortisedInversion(Amortised):
    """p(m, y) = p(m) p(y | m), and a network q(m | y) for every y.

    A module for `fit`, with one of the objectives

        ExpectedELBO        -E_{p(y)} E_{q(m | y)} [log p(y, m) - log q(m | y)]     the solver in the loop, with its adjoint
        ExpectedForwardKL   -E_{p(m, y)} log q(m | y)                               simulated pairs, no adjoint
        InTurn              some of each

    Args:
        problem: Prior, forward map and likelihood; its data only give their number.
        encoder: Makes features of data: `DenseEncoder(num_data)`, `SetEncoder(dim)`, `GraphEncoder(...)`.
        head: Makes the head of features and unknowns: `FullHead`, `DiagonalHead`, `FlowHead`, or
            `partial(LowRankPrecisionHead, rank=20)`.
        sensors: `AllSensors()`, or `RandomSensors(points, fewest, most)` where they fail and move.

    Attributes:
        problem: That problem.
        sensors: Those sensors.

    Raises:
        InvalidInput: Where an argument is of another kind.

    MPI: Collective. The network is replicated, and data are.

    References:
        Glyn-Davies, Vadeboncoeur, Akyildiz, Kazlauskaite, Girolami (2025), A primer on variational inference for physics-informed
        deep generative modelling.
        Siahkoohi, Rizzuti, Orozco, Herrmann (2023), Reliable amortized variational inference with physics-based latent
        distribution correction.

    Example:
        >>> model = fem_vi.models.AmortisedInversion(problem, fem_vi.DenseEncoder(60), head=fem_vi.FlowHead)
        >>> simulations = fem_vi.simulate(problem, 5000, path="runs/simulations")
        >>> fem_vi.fit(problem, model, fem_vi.ExpectedForwardKL(fem_vi.Stored(simulations)), steps=2000)
        >>> q = model.posterior(y)
    """

    shared = ("prior", "problem")

    def __init__(
        self,
        problem: InverseProblem,
        encoder: Encoder,
        *,
        head: Callable[[int, int], Head] = FullHead,
        sensors: Sensors = AllSensors(),  # noqa: B008 - frozen
    ) -> None:
        instance("problem", problem, InverseProblem)
        super().__init__(problem.prior, encoder, head=head)
        with raise_on_all(problem.prior.comm):
            instance("sensors", sensors, Sensors)
        self.problem = problem
        self.sensors = sensors

    @torch.no_grad()
    def posterior(self, y: Data) -> AmortisedDistribution:
        """The posterior of one data set, or of each of a batch: one pass of the network, no solve.

        It is worth as much as the data are like those of the training: see `TypicalData`.

        Args:
            y: `(*batch, num_data)`, or `SensorData`; replicated.

        Returns:
            A distribution with `batch_shape == batch`.

        Raises:
            InvalidInput: Where y does not fit the encoder, or is not finite.

        MPI: Not collective; drawing samples is.
        """
        if isinstance(y, torch.Tensor) and not bool(y.isfinite().all()):
            raise InvalidInput("y contains values that are not finite. Leave missing data out: see RandomSensors and SensorData.")
        return self(y)

    def problem_of(self, y: Data) -> InverseProblem:
        """The inverse problem of one data set, for `diagnose` or a sampler. Collective."""
        return self.sensors.problem_of(self.problem, y)

    def at(self, y: Data) -> Refined:
        """What the network says of one data set, as a module: for `diagnose` and for objectives. Not collective."""
        return Refined(self, y)

    def refine(
        self,
        y: Data,
        objective: Objective = ELBO(samples=16),  # noqa: B008 - frozen
        *,
        problem: InverseProblem | None = None,
        steps: int = 300,
        **options: Any,
    ) -> Run:
        """Fit further what the network says of one data set, by solves: it closes the amortisation gap.

        Args:
            y: One data set.
            objective: What to fit to.
            problem: Its inverse problem, where sensors lie elsewhere than those of the training; None for `problem_of(y)`.
            steps: Steps of the fit.
            options: More for `fit`: `path`, `optimizer`, `stop`.

        Returns:
            The fit; `run.posterior()` is the distribution.

        Raises:
            InvalidInput: Where y is no single data set, or not of this problem.

        MPI: Collective.
        """
        problem = self.problem_of(y) if problem is None else problem
        return fit(problem, self.at(y), objective, steps=steps, start=PresentParameters(), **options)

    def correct(
        self,
        y: Data,
        objective: Objective = ELBO(samples=16),  # noqa: B008 - frozen
        *,
        problem: InverseProblem | None = None,
        steps: int = 200,
        **options: Any,
    ) -> Run:
        """Correct what the network says of one data set unlike the training data, by other noise under its map.

        As `refine`, with two parameters for each unknown, and the network as it is: fewer solves, and less freedom. Collective.
        """
        problem = self.problem_of(y) if problem is None else problem
        return fit(problem, LatentCorrection(self, y), objective, steps=steps, start=PresentParameters(), **options)

    def save(self, path: str | Path) -> None:
        """Write the network to `path` (.safetensors), and what it is of beside it (.json); nothing is pickled.

        Raises:
            RunFolderError: Where a file cannot be written.

        MPI: Collective; rank 0 writes.
        """
        write_model(path, self, self._about(), self.prior.comm)

    def load(self, path: str | Path) -> None:
        """Take the network that `save` wrote; this model must have been built with the same parts.

        Raises:
            RunFolderError: Where a file is missing or damaged, or of another model.

        MPI: Collective.
        """
        read_model(path, self, self._about(), self.prior.comm)

    def _about(self) -> dict[str, Any]:
        problem = {name: value for name, value in self.problem.describe().items() if name not in ("data", "noise")}
        return {"model": type(self).__name__, **problem}
