"""Fitting a posterior: the optimisation loop, its run folder, and how it goes on after an interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from types import NoneType

import torch
from torch import nn

from fem_vi.arguments import instance, whole
from fem_vi.errors import FitInterrupted, InvalidInput, NotFinite
from fem_vi.output import HistoryFile
from fem_vi.parallel import agree_on_error, all_values, raise_on_all, shared_seed
from fem_vi.vi.description import name_of
from fem_vi.vi.interrupt import noted_signals
from fem_vi.vi.interval import Clock, Seconds, checked_interval
from fem_vi.vi.lbfgs import LBFGS
from fem_vi.vi.minibatch import MinibatchProblem
from fem_vi.vi.natural import NaturalGradient
from fem_vi.vi.objective import Objective, Terms
from fem_vi.vi.optimizer import (
    Adam,
    Clipped,
    ConstantRate,
    Cosine,
    OptimizerFactory,
    default_optimizer,
    set_learning_rate,
    shorten,
)
from fem_vi.vi.problem import Cost, InverseProblem, Problem
from fem_vi.vi.progress import progress_bar, tell
from fem_vi.vi.randomness import private_generator
from fem_vi.vi.run import COLUMNS, Row, Run, describe_forward
from fem_vi.vi.run_folder import describe, restore, save, stored_start, write_results
from fem_vi.vi.session import Session
from fem_vi.vi.start import GaussNewton, NewtonCG, PresentParameters, default_start, starts_linearised
from fem_vi.vi.state import is_field
from fem_vi.vi.stopping import AllSteps, Average, Best, Last, Plateau

# Where nothing but rounding errors is left, Adam would scale them up to full steps, and precise data make these costly. Two
# signs of it. A gradient this small, in nats per whitened unit, leaves less than 1e-11 nats to gain, the bound's curvature being
# at least one. And log p(y, m) - log q(m) is the same for all samples where q is the posterior: half its variance is the
# divergence that is left, so that a range this small, in nats, is of an exact posterior, however steep its gradient.
STATIONARY = 1e-6
EXACT = 1e-4

Unclipped = OptimizerFactory | NaturalGradient | LBFGS


def fit(
    problem: Problem,
    posterior: nn.Module,
    objective: Objective,
    *,
    steps: int,
    path: str | Path | None = None,
    resume: bool = False,
    optimizer: Unclipped | Clipped | None = None,
    schedule: Callable[[float], float] | Cosine | ConstantRate = Cosine(),  # noqa: B008 - frozen
    start: GaussNewton | NewtonCG | PresentParameters | None = None,
    seed: int = 0,
    checkpoint_every: int | Seconds = 50,
    stop: Callable[[Sequence[Row]], bool] | AllSteps | Plateau = AllSteps(),  # noqa: B008 - frozen
    keep: Last | Best | Average = Last(),  # noqa: B008 - frozen
    callbacks: Sequence[Callable[[Row], None]] = (),
) -> Run:
    """Fit a posterior to an inverse problem, or a model to one stage of its training, by stochastic gradients.

    With a path, the run folder holds config.json, history.csv, checkpoints, the fitted parameters as safetensors and the
    mean and standard deviation as fields. A fit that was killed goes on with `resume=True` from its newest sound checkpoint,
    and on the same number of ranks gives the same numbers, bit for bit, as one that was not. There, SIGINT, SIGTERM and SIGUSR1
    end it between two steps, with a checkpoint and `FitInterrupted`, which says so; a second SIGINT or SIGTERM acts at once.
    OpenMPI's mpirun passes SIGUSR1 on; after a SIGINT or SIGTERM of its own it kills its ranks within half a second.

    Args:
        problem: `InverseProblem`: prior, forward map, likelihood, data; or another that the objective knows (`Problem`).
        posterior: Module whose `forward()` is a distribution; changed in place.
        objective: `ELBO(samples=8)`, for example.
        steps: Steps of the whole run; with `resume`, including those done before.
        path: Run folder to write, or None. The same for all ranks.
        resume: Go on with the run in `path`, where there is one.
        optimizer: Makes a torch optimiser from parameters; for fields an elementwise one (Adam, SGD, RMSprop), or
            `NaturalGradient()` for the normal families, or `LBFGS()`, with one draw of noise for the whole fit; `Clipped(...)`
            of the first kind shortens long gradients. None takes Adam with `lr` 0.003 / sqrt(unknowns) after `GaussNewton()`,
            0.5 / sqrt(unknowns) otherwise, and for the entries of a dense factor `lr` / sqrt(unknowns); a `Flow` has its own.
        schedule: Factor on the learning rate after a fraction of the steps: `Cosine()`, `ConstantRate()`, or a function.
        start: `GaussNewton()`, `NewtonCG()` or `PresentParameters()`; None takes the first for a new posterior with at most
            1,000 data.
        seed: Of the samples; rank 0's counts. The state of torch's generator is left as it was found.
        checkpoint_every: Steps between checkpoints, or `Seconds(60)`.
        stop: Whether to stop before all steps are done, from the history: `Plateau()`, for example.
        keep: `Last()`; or `Best()` to end with the parameters that had the best mean ELBO over a window, `Average()` with a mean
            of those of the last steps.
        callbacks: Called with each row of the history, on every rank.

    Returns:
        The fitted module, its history and cost.

    Raises:
        InvalidInput: Where an argument is of the wrong type, `steps` or `checkpoint_every` is below 1, arguments differ
            between ranks, gradients are switched off, or `LBFGS()` is given a `MinibatchProblem`.
        FitInterrupted: Where SIGINT, SIGTERM or SIGUSR1 came, and a checkpoint was written.
        NotFinite: Where the loss or its gradient stops being finite.
        RunFolderError: Where `path` is a file or holds something else, what it holds of a run is damaged, or another process is
            at work on it.

    MPI: Collective. Rank 0 writes; `path` must be on a file system that all ranks see.
    """
    instance("problem", problem, Problem, way_out="An InverseProblem is one.")
    comm = problem.prior.comm
    with raise_on_all(comm):
        instance("posterior", posterior, nn.Module)
        if not any(value.requires_grad for value in posterior.parameters()):
            raise InvalidInput(f"posterior: {type(posterior).__name__} has no parameter that requires a gradient. Is it frozen?")
        instance("objective", objective, Callable)  # type: ignore[arg-type]
        instance("path", path, str, PathLike, NoneType)
        instance("resume", resume, bool)
        instance("optimizer", optimizer, Callable, Clipped, NaturalGradient, LBFGS, NoneType)  # type: ignore[arg-type]
        if isinstance(optimizer, LBFGS) and isinstance(problem, MinibatchProblem):
            raise InvalidInput(
                "LBFGS() has one draw of noise for the whole fit, and so one batch of a MinibatchProblem: all other data would "
                "count for nothing. Give fit problem.whole(), or another optimizer."
            )
        instance("schedule", schedule, Callable)  # type: ignore[arg-type]
        if isinstance(schedule, type):
            raise InvalidInput(f"schedule is the class {schedule.__name__}; make one of it: {schedule.__name__}().")
        instance("start", start, GaussNewton, NewtonCG, PresentParameters, NoneType)
        instance("stop", stop, Callable)  # type: ignore[arg-type]
        if isinstance(stop, type):
            raise InvalidInput(f"stop is the class {stop.__name__}; make one of it: {stop.__name__}().")
        instance("keep", keep, Last, Best, Average)
        instance("callbacks", callbacks, Sequence)
        for callback in callbacks:
            instance("callbacks: an entry", callback, Callable)  # type: ignore[arg-type]
        steps, checkpoint_every = whole("steps", steps, least=1), checked_interval(checkpoint_every)
        seed = whole("seed", seed)
        if not torch.is_grad_enabled():
            raise InvalidInput("fit takes gradients, and torch.no_grad or inference_mode is on. Call it outside of that block.")
    folder = None if path is None else Path(path)
    given: dict[str, object] = {"objective": objective, "optimizer": optimizer, "schedule": schedule, "start": start}
    given |= {"stop": stop, "keep": keep}
    given |= {"steps": steps, "path": folder, "resume": resume, "checkpoint_every": checkpoint_every}
    _check_same_on_all_ranks(problem, posterior, given)
    seed = shared_seed(comm, seed)
    with private_generator(seed), ExitStack() as holding:
        begin = default_start(problem, posterior) if start is None else start
        if resume and folder is not None and start is None:
            begin = stored_start(problem, folder, begin)
        optimizer, longest = _chosen(optimizer, problem, posterior, begin)
        steps_of = _create(optimizer, problem, posterior, objective)
        session = Session(problem, posterior, objective, steps_of, schedule, steps, keep=keep, longest=longest)
        session.noise = seed if isinstance(optimizer, LBFGS) else None
        session.continue_from(Cost(), 0.0)
        named = optimizer if longest == math.inf else Clipped(optimizer, longest)  # type: ignore[arg-type]
        choices: dict[str, object] = {"objective": objective, "optimizer": named, "schedule": schedule, "start": begin}
        choices |= {"stop": stop, "keep": keep}
        config = describe(session, choices, seed)
        if folder is not None and isinstance(problem, InverseProblem):
            config["problem"]["forward"] = describe_forward(problem)
        if folder is None or not restore(session, folder, config, resume, holding):
            begin(problem, posterior)  # type: ignore[arg-type]  # only an InverseProblem can be linearised
        elif session.step == steps or stop(session.history):
            words = f"{folder} holds a fit that ended after step {session.step} of {steps}: no step was taken."
            way_on = (
                "More steps= go on from there."
                if session.step == steps
                else f"{name_of(stop)} stops it there; another stop= goes on."
            )
            tell(f"{words} {way_on}", show=comm.rank == 0)
        _loop(session, folder, Clock(checkpoint_every), callbacks, stop)
        session.take_kept()
        if folder is not None:
            write_results(session, folder)
    return Run(posterior, tuple(session.history), config, session.cost(), folder)


def _chosen(
    optimizer: Unclipped | Clipped | None,
    problem: Problem,
    posterior: nn.Module,
    begin: GaussNewton | NewtonCG | PresentParameters,
) -> tuple[Unclipped, float]:
    """The optimiser, that of the posterior where none was given, and how long gradients may be."""
    given = optimizer.optimizer if isinstance(optimizer, Clipped) else optimizer
    longest = optimizer.norm if isinstance(optimizer, Clipped) else math.inf
    if given is None:
        linearised = starts_linearised(begin, posterior)
        given = default_optimizer(posterior, problem.prior.num_global, linearised=linearised)
    return given, longest


def _create(
    optimizer: Unclipped,
    problem: Problem,
    posterior: nn.Module,
    objective: Objective,
) -> torch.optim.Optimizer:
    """The optimiser of a posterior; errors on all ranks. Collective."""
    with raise_on_all(problem.prior.comm):
        if isinstance(optimizer, NaturalGradient | Adam):
            return optimizer.create(posterior)
        if isinstance(optimizer, LBFGS):
            return optimizer.create(posterior, problem.prior, objective)
        made = optimizer(posterior.parameters())
        instance("what optimizer makes of the parameters", made, torch.optim.Optimizer)
        if isinstance(made, torch.optim.LBFGS):
            raise InvalidInput("optimizer makes a torch.optim.LBFGS, whose sums are rank-local, over fresh noise: take LBFGS().")
        return made


def _check_same_on_all_ranks(problem: Problem, posterior: nn.Module, given: Mapping[str, object]) -> None:
    """Raise on all ranks where they were given different arguments, which would leave some waiting for others. Collective."""
    comm = problem.prior.comm
    own = {name: name_of(value) for name, value in given.items()}
    # The last axis of a field tensor is what a rank owns.
    for name, value in posterior.named_parameters():
        own[f"posterior.{name}"] = str(tuple(value.shape[:-1] if is_field(posterior, name) else value.shape))
    ranks = all_values(comm, own)
    for name in sorted(set().union(*ranks)):
        values = [words.get(name, "missing") for words in ranks]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise InvalidInput(
                f"{name} is {values[0]} on rank 0 and {values[other]} on rank {other}; fit needs the same on all ranks."
            )


def _loop(
    session: Session,
    folder: Path | None,
    clock: Clock,
    callbacks: Sequence[Callable[[Row], None]],
    stop: Callable[[Sequence[Row]], bool],
) -> None:
    """Take the steps that are left, on disk as they come. Collective."""
    comm = session.problem.prior.comm
    file: HistoryFile | None = None
    with raise_on_all(comm):
        if folder is not None and comm.rank == 0:
            file = HistoryFile(folder / "history.csv", COLUMNS, [row.values() for row in session.history])
    try:
        with (
            progress_bar(session.steps, done=session.step, show=comm.rank == 0) as show,
            noted_signals(active=folder is not None, says=comm.rank == 0) as signals,
        ):
            while session.step < session.steps and not stop(session.history):
                row = _take_step(session)
                session.history.append(row)
                session.note()
                with raise_on_all(comm):
                    if file is not None:
                        file.append(row.values())
                show(row)
                for callback in callbacks:
                    with raise_on_all(comm):
                        callback(row)
                if folder is None:
                    continue
                names, due = zip(*all_values(comm, (signals.name, clock.is_due(session.step))), strict=True)
                names = tuple(name for name in names if name is not None)
                ends = session.step == session.steps or stop(session.history) or bool(names)
                if due[0] or ends:
                    save(session, folder, file)
                    clock.reset()
                if names:
                    raise FitInterrupted(
                        f"{names[0]} came: the fit stopped after step {session.step} of {session.steps}, and {folder} holds a "
                        "checkpoint of it. fit(..., resume=True) goes on from there."
                    )
    finally:
        if file is not None:
            file.close()


def _take_step(session: Session) -> Row:
    """Evaluate the objective, and move the parameters. Collective."""
    set_learning_rate(session.optimizer, session.schedule(session.step / session.steps))
    session.optimizer.zero_grad()
    terms = session.evaluate()
    _check_finite(session, terms)
    terms.loss.backward()  # type: ignore[no-untyped-call]
    norm = _grad_norm(session)
    if norm > session.longest:
        shorten(session.posterior.parameters(), session.longest / norm)
    if norm > STATIONARY and not _is_exact(terms):
        session.optimizer.step(session.loss) if session.noise is not None else session.optimizer.step()
    session.step += 1
    return Row(
        step=session.step,
        elbo=float(terms.elbo),
        kl=float(terms.kl),
        misfit=float(terms.misfit),
        loss=float(terms.loss.detach()),
        grad_norm=norm,
        solves=session.cost().solves,
        seconds=time.monotonic() - session.began,
    )


def _is_exact(terms: Terms) -> bool:
    """Whether all samples, two at least, give the same estimate of the evidence."""
    log_weights = terms.log_likelihood - terms.log_ratio
    return len(log_weights) > 1 and float(log_weights.max() - log_weights.min()) < EXACT


def _check_finite(session: Session, terms: Terms) -> None:
    """Raise on all ranks where the loss is not a finite number."""
    error: NotFinite | None = None
    if not bool(torch.isfinite(terms.loss)):
        parts = {"log p(y | m)": terms.log_likelihood, "log q(m) - log p(m)": terms.log_ratio, "KL": terms.kl[None]}
        bad = {name: int((~torch.isfinite(value)).sum()) for name, value in parts.items()}
        causes = [f"{name} ({count} of {len(parts[name])})" for name, count in bad.items() if count] or ["the loss alone"]
        error = NotFinite(
            f"step {session.step + 1}: the loss is {float(terms.loss.detach())}; not finite: {', '.join(causes)}. "
            "Lower the learning rate, or check the forward map at samples of the prior."
        )
    agree_on_error(session.problem.prior.comm, error)


def _grad_norm(session: Session) -> float:
    """Norm of the gradient over all parameters on all ranks, checked. Collective."""
    prior = session.problem.prior
    named = [(name, value.grad) for name, value in session.posterior.named_parameters() if value.grad is not None]
    zero = torch.zeros((), dtype=torch.float64)
    owned = sum((g.square().sum() for name, g in named if is_field(session.posterior, name)), zero)
    shared = sum((g.square().sum() for name, g in named if not is_field(session.posterior, name)), zero)
    norm = float((prior.all_sum(owned) + shared).sqrt())
    error = None
    if not norm < float("inf"):
        bad = [name for name, g in named if not bool(torch.isfinite(g).all())]
        error = NotFinite(
            f"step {session.step + 1}: the loss is finite, its gradient is not, in {', '.join(bad) or 'another part'}. "
            "Does the forward map have a singular derivative (a root or logarithm at zero)?"
        )
    agree_on_error(prior.comm, error)
    return norm
