"""Early stop, best-so-far, and signals: what a fit does other than take all its steps."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mpi4py import MPI

from fem_vi import output
from fem_vi.errors import FemViError, FitInterrupted, InvalidInput, RunFolderError
from fem_vi.vi.discrepancy import MMD
from fem_vi.vi.divergence import ForwardKL, GivenSamples
from fem_vi.vi.fit import fit
from fem_vi.vi.interrupt import noted_signals
from fem_vi.vi.interval import Seconds
from fem_vi.vi.objective import ELBO, TotalDerivative
from fem_vi.vi.optimizer import Adam, ConstantRate
from fem_vi.vi.posterior.low_rank import LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.progress import words_of
from fem_vi.vi.run import Row
from fem_vi.vi.start import PresentParameters
from fem_vi.vi.stopping import Average, Best, Last, Plateau
from tests.vi.helpers import F64, Affine, split_pair

COMM = MPI.COMM_WORLD


def rows(elbo):
    return [Row(k + 1, float(value), 0.0, 0.0, -float(value), 0.0, 0, 0.0) for k, value in enumerate(elbo)]


def test_plateau_is_its_statistic():
    stop = Plateau(window=4, tolerance=0.1)
    assert stop.statistic(rows([0] * 7)) == math.inf
    assert stop.statistic(rows([5, 0, 0, 0, 0, 1, 1, 1, 1])) == 1.0
    assert not stop(rows([0, 0, 0, 0, 1, 1, 1, 1]))
    assert stop(rows([0, 0, 0, 0, 0.05, 0.05, 0.05, 0.05]))
    assert stop(rows([1, 1, 1, 1, 0, 0, 0, 0]))
    # Noise of variance 4/3 in each window: two standard errors are 2 sqrt(8/3/4).
    noisy = rows([1, -1, 1, -1, 1, -1, 1, -1])
    assert stop.statistic(noisy) == pytest.approx(2 * math.sqrt(2 / 3))
    assert not stop(noisy)
    assert not stop(rows([math.nan] * 8))


def test_where_there_is_no_elbo_the_loss_takes_its_place():
    lost = [Row(k + 1, math.nan, math.nan, math.nan, loss, 0.0, 0, 0.0) for k, loss in enumerate([3.0, 3.0, 2.0, 1.0])]
    assert Plateau(window=2).statistic(lost) == 1.5 + 2.0 * math.sqrt(0.5 / 2)
    assert Best(window=2).mean(lost) == -1.5
    assert words_of(lost[0]) == "loss 3"
    assert words_of(rows([2.5])[0]) == "ELBO 2.5  KL 0  misfit 0"


@pytest.mark.parametrize("of", [ForwardKL, MMD])
def test_a_fit_to_samples_stops_and_keeps_its_best(of):
    affine = Affine.create()
    torch.manual_seed(0)
    objective = of(GivenSamples(affine.posterior().sample((500,))))
    options = {"optimizer": Adam(lr=0.02), "schedule": ConstantRate(), "start": PresentParameters(), "steps": 3000}
    run = fit(
        affine.problem(), MeanFieldNormal(affine.prior), objective, stop=Plateau(window=40), keep=Best(window=20), **options
    )
    assert 80 <= len(run.history) < 3000
    losses = torch.tensor([row.loss for row in run.history], dtype=F64)
    assert float(losses[-40:].mean()) < float(losses[:40].mean())
    windows = losses[: len(losses) // 20 * 20].reshape(-1, 20).mean(1)
    shorter = fit(
        affine.problem(), MeanFieldNormal(affine.prior), objective, **{**options, "steps": 20 * (int(windows.argmin()) + 1)}
    )
    assert torch.equal(run.posterior.mu, shorter.posterior.mu)


def test_stops_where_nothing_is_gained_and_not_before():
    affine = Affine.create()
    arguments = {"optimizer": Adam(lr=0.05), "schedule": ConstantRate(), "start": PresentParameters(), "steps": 3000}
    torch.manual_seed(7)
    posterior = LowRankNormal(affine.prior, 3)
    run = fit(affine.problem(), posterior, ELBO(samples=16), stop=Plateau(window=40, tolerance=0.02), **arguments)
    assert 80 < len(run.history) < 1500
    assert abs(sum(row.elbo for row in run.history[-40:]) / 40 - affine.log_evidence()) < 0.1
    assert run.config["stop"] == "Plateau(window=40, tolerance=0.02)"


@pytest.mark.mpi
def test_a_stopped_run_is_done(tmp_path):
    problem, _ = split_pair()
    arguments = {"steps": 50, "stop": Plateau(window=3, tolerance=1e6), "path": tmp_path / "run", "seed": 1}
    torch.manual_seed(3)
    run = fit(problem, LowRankNormal(problem.prior, 2), ELBO(samples=2), **arguments)
    assert len(run.history) == 6
    assert output.newest_sound_step(tmp_path / "run") == 6
    torch.manual_seed(3)
    again = fit(problem, LowRankNormal(problem.prior, 2), ELBO(samples=2), resume=True, **arguments)
    assert [row.elbo for row in again.history] == [row.elbo for row in run.history]
    assert torch.equal(again.posterior.U, run.posterior.U)
    longer = fit(
        problem,
        LowRankNormal(problem.prior, 2),
        ELBO(samples=2),
        resume=True,
        **{**arguments, "stop": lambda rows: len(rows) == 9},
    )
    assert len(longer.history) == 9


class Spoiler:
    """An objective whose gradient turns round after some steps: from then on it gets worse."""

    def __init__(self, turn: int) -> None:
        self.turn, self.calls = turn, 0

    def __call__(self, problem, posterior):
        self.calls += 1
        terms = ELBO(samples=16)(problem, posterior)
        sign = 1.0 if self.calls <= self.turn else -1.0
        return type(terms)(sign * terms.loss, terms.elbo, terms.kl, terms.log_likelihood, terms.log_ratio, terms.weights)

    def __repr__(self) -> str:
        return f"Spoiler({self.turn})"


def test_keeps_the_best():
    arguments = {"steps": 100, "start": PresentParameters(), "optimizer": Adam(lr=0.02), "schedule": ConstantRate()}
    kept = {}
    for keep in (Last(), Best(window=10)):
        problem, _ = split_pair()
        posterior = MeanFieldNormal(problem.prior)
        run = fit(problem, posterior, Spoiler(60), keep=keep, **arguments)
        torch.manual_seed(0)
        kept[type(keep)] = float(ELBO(samples=200)(problem, posterior).elbo)
        means = torch.tensor([row.elbo for row in run.history], dtype=F64).reshape(10, 10).mean(1)
    assert int(means.argmax()) in (5, 6)
    assert kept[Best] > kept[Last] + 0.5
    assert abs(kept[Best] - float(means.max())) < 2.0


def test_keeps_an_average():
    # By hand: the plain mean of three, then a third of the way to each that follows.
    affine, seen = Affine.create(3, 2), []
    posterior = MeanFieldNormal(affine.prior)
    arguments = {"steps": 6, "start": PresentParameters(), "optimizer": Adam(lr=0.05)}
    note = [lambda row: seen.append(posterior.mu.detach().clone())]
    fit(affine.problem(), posterior, ELBO(samples=4), keep=Average(window=3), callbacks=note, **arguments)
    expected = torch.stack(seen[:3]).mean(0)
    for mu in seen[3:]:
        expected = expected + (mu - expected) / 3
    torch.testing.assert_close(posterior.mu, expected, rtol=1e-12, atol=1e-12)
    assert float((posterior.mu.detach() - seen[-1]).abs().max()) > 1e-3


def test_an_average_lies_nearer_to_the_optimum_than_the_last_step():
    affine = Affine.create()
    exact, errors = affine.prior.whiten(affine.posterior().mean), []
    for keep in (Last(), Average(window=100)):
        posterior = MeanFieldNormal(affine.prior)
        options = {"optimizer": Adam(lr=0.2), "schedule": ConstantRate(), "keep": keep, "start": PresentParameters()}
        fit(affine.problem(), posterior, ELBO(samples=2, gradient=TotalDerivative()), steps=300, **options)
        errors.append(float((posterior.mu - exact).norm().detach()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.mpi
@pytest.mark.parametrize("keep", [Best(window=3), Average(window=5)])
def test_what_is_kept_survives_an_interruption(tmp_path, keep):
    arguments = {"steps": 14, "start": PresentParameters(), "optimizer": Adam(lr=0.05), "keep": keep, "seed": 2}

    def fitted(**options):
        problem, _ = split_pair()
        return fit(problem, MeanFieldNormal(problem.prior), ELBO(samples=4), **arguments, **options)

    def stop(row):
        if row.step == 11:
            raise KeyboardInterrupt

    whole = fitted()
    with pytest.raises(KeyboardInterrupt):
        fitted(path=tmp_path / "run", checkpoint_every=4, callbacks=[stop])
    COMM.barrier()
    resumed = fitted(path=tmp_path / "run", resume=True)
    assert torch.equal(resumed.posterior.mu, whole.posterior.mu)
    assert torch.equal(resumed.posterior.log_scale, whole.posterior.log_scale)
    with pytest.raises(RunFolderError, match=rf"keep {type(keep).__name__}\(window=.\).*Last"):
        arguments["keep"] = Last()
        fitted(path=tmp_path / "run", resume=True)


@pytest.mark.mpi
def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    # Ranks whose clocks disagree write together: rank 0's decides.
    problem, _ = split_pair()
    now, written = [0.0], []
    monkeypatch.setattr("fem_vi.vi.interval.time", SimpleNamespace(monotonic=lambda: now[0]))

    def pass_time(row):
        now[0] += 1e3 if COMM.rank > 0 else 61.0 if row.step == 4 else 1.0

    def look(row):
        written.append(output.newest_sound_step(tmp_path / "run"))

    options = {"steps": 6, "path": tmp_path / "run", "start": PresentParameters(), "callbacks": [look, pass_time]}
    torch.manual_seed(1)
    fit(problem, LowRankNormal(problem.prior, 2), ELBO(samples=2), checkpoint_every=Seconds(60.0), **options)
    if COMM.rank == 0:  # looks after a step, before its checkpoint is written
        assert written == [None, None, None, None, 4, 4]
        assert output.newest_sound_step(tmp_path / "run") == 6
    for wrong, words in ((0, r"checkpoint_every is 0"), ("1 min", r"checkpoint_every is '1 min'")):
        with pytest.raises(InvalidInput, match=words):
            fit(problem, LowRankNormal(problem.prior, 2), ELBO(samples=2), checkpoint_every=wrong, **options)
    with pytest.raises(InvalidInput, match="seconds is 0"):
        Seconds(0)


@pytest.mark.mpi
def test_a_finished_fit_is_told(tmp_path, capfd):
    problem, _ = split_pair()
    options = {"steps": 3, "path": tmp_path / "run", "resume": True}
    words = []
    for steps in (3, 3, 4):
        torch.manual_seed(1)
        fit(problem, LowRankNormal(problem.prior, 2), ELBO(samples=2), **{**options, "steps": steps})
        words.append(capfd.readouterr().err)
    assert words[0] == words[2] == ""
    if COMM.rank == 0:
        assert (
            words[1] == f"{tmp_path / 'run'} holds a fit that ended after step 3 of 3: no step was taken. More steps= go on "
            "from there.\n"
        )
    else:
        assert words[1] == ""


def test_a_fit_that_was_stopped_tells_by_what(tmp_path, capfd):
    affine = Affine.create()
    options = {"path": tmp_path / "run", "resume": True, "stop": Plateau(window=2, tolerance=1e9), "steps": 30}
    for _ in range(2):
        run = fit(affine.problem(), LowRankNormal(affine.prior, 2), ELBO(samples=2), **options)
    assert len(run.history) < 30
    assert "Plateau(window=2, tolerance=1000000000.0) stops it there; another stop= goes on." in capfd.readouterr().err
    with pytest.raises(InvalidInput, match="stop is the class Plateau; make one of it"):
        fit(affine.problem(), LowRankNormal(affine.prior, 2), ELBO(samples=2), steps=2, stop=Plateau)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tests.vi.test_stopping import *
affine = Affine.create()
torch.manual_seed(7)
def ask(row):
    if row.step == 5:
        os.kill(os.getpid(), signal.{name})
fit(affine.problem(), LowRankNormal(affine.prior, 2), ELBO(samples=2), steps=8, path={path!r}, callbacks=[ask])
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_leaves_a_checkpoint_and_a_word(tmp_path, name):
    script = SCRIPT.format(root=str(Path(__file__).parents[2]), name=name, path=str(tmp_path / "run"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    word = done.stderr.strip().splitlines()[-1]
    assert word.startswith(f"fem_vi.errors.FitInterrupted: {name} came: the fit stopped after step 5 of 8")
    assert "resume=True" in word
    assert f"\n{name} came: the fit ends after this step, with a checkpoint.\n" in done.stderr
    assert output.newest_sound_step(tmp_path / "run") == 5
    affine = Affine.create()

    def posterior():
        torch.manual_seed(7)
        return LowRankNormal(affine.prior, 2)

    run = fit(affine.problem(), posterior(), ELBO(samples=2), steps=8, path=tmp_path / "run", resume=True)
    whole = fit(affine.problem(), posterior(), ELBO(samples=2), steps=8)
    assert [row.elbo for row in run.history] == [row.elbo for row in whole.history]


@pytest.mark.mpi
def test_a_signal_to_one_rank_ends_all(tmp_path):
    problem, _ = split_pair()

    def ask(row):
        if row.step == 3 and COMM.rank == COMM.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    torch.manual_seed(1)
    with pytest.raises(FitInterrupted, match=r"SIGTERM came: the fit stopped after step 3 of 6"):
        fit(problem, LowRankNormal(problem.prior, 2), ELBO(samples=2), steps=6, path=tmp_path / "run", callbacks=[ask])
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    COMM.barrier()
    assert output.newest_sound_step(tmp_path / "run") == 3


def test_an_interrupted_fit_is_told_from_an_error():
    assert issubclass(FitInterrupted, KeyboardInterrupt)
    assert issubclass(FitInterrupted, FemViError)


def test_a_second_signal_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with & ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt), noted_signals(active=True) as noted:
            os.kill(os.getpid(), signal.SIGINT)
            assert noted.name == "SIGINT"
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second one was noted as well")
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_polite_signal_may_come_again_and_is_left_to_whoever_has_it():
    with noted_signals(active=True) as noted:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert noted.name == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    seen = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with noted_signals(active=True) as noted:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert (seen, noted.name) == ([signal.SIGUSR1], None)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_signals_are_left_alone_without_a_folder_and_off_the_main_thread(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    seen = []
    affine = Affine.create()
    arguments = {"steps": 1, "callbacks": [lambda row: seen.append(signal.getsignal(signal.SIGINT))]}
    fit(affine.problem(), MeanFieldNormal(affine.prior), ELBO(samples=2), **arguments)
    fit(affine.problem(), MeanFieldNormal(affine.prior), ELBO(samples=2), path=tmp_path / "main", **arguments)
    other = {**arguments, "path": tmp_path / "thread"}
    thread = threading.Thread(target=fit, args=(affine.problem(), MeanFieldNormal(affine.prior), ELBO(samples=2)), kwargs=other)
    thread.start()
    thread.join()
    assert seen[0] == before == seen[2]
    assert seen[1] != before
    assert json.loads((tmp_path / "thread" / "config.json").read_text())["keep"] == "Last()"


def test_refusals():
    affine = Affine.create()
    for arguments, words in (
        ({"stop": "plateau"}, r"stop is 'plateau'"),
        ({"keep": Best}, r"keep is .*Last or Best or Average"),
    ):
        with pytest.raises(InvalidInput, match=words):
            fit(affine.problem(), MeanFieldNormal(affine.prior), ELBO(), steps=1, **arguments)
    for make, words in (
        (lambda: Plateau(window=1), r"window is 1"),
        (lambda: Plateau(tolerance=0), r"tolerance is 0"),
        (lambda: Best(window=0), r"window is 0"),
        (lambda: Average(window=0), r"window is 0"),
    ):
        with pytest.raises(InvalidInput, match=words):
            make()
