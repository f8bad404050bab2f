"""Fitting: exact answers, the run folder, interruptions, and the same numbers on any number of ranks."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

import fem_vi
from fem_vi import output
from fem_vi.errors import InvalidInput, RunFolderError
from fem_vi.vi.correlated_noise import CorrelatedNoise, LowRankNoise
from fem_vi.vi.diagnostics import diagnose
from fem_vi.vi.fit import NotFinite, fit
from fem_vi.vi.likelihood import GaussianNoise
from fem_vi.vi.multiplicative_noise import MultiplicativeNoise
from fem_vi.vi.objective import ELBO, AnalyticKL, PathDerivative
from fem_vi.vi.optimizer import Adam, Clipped, ConstantRate, Cosine, default_optimizer
from fem_vi.vi.posterior.full_rank import FullRankNormal
from fem_vi.vi.posterior.low_rank import FreeDiagonal, LowRankNormal
from fem_vi.vi.posterior.mean_field import MeanFieldNormal
from fem_vi.vi.posterior.mixture import Mixture
from fem_vi.vi.prior import GaussianVector
from fem_vi.vi.problem import InverseProblem
from fem_vi.vi.run import COLUMNS
from fem_vi.vi.start import GaussNewton, PresentParameters
from fem_vi.vi.student_noise import StudentNoise
from fem_vi.vi.unknown_scale import UnknownScale
from tests.vi.helpers import F64, FAMILIES, Affine, split_pair


def numbers_of(run):
    """The history without its clock."""
    return [(row.step, row.elbo, row.kl, row.misfit, row.grad_norm, row.solves) for row in run.history]


def low_rank(prior, rank=2):
    torch.manual_seed(7)
    return LowRankNormal(prior, rank)


class Interrupt:
    """Stops a fit like Ctrl-C, on all ranks, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, row) -> None:
        if row.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "steps"), [("full-rank", 700), ("low-rank", 1500)])
def test_finds_the_exact_posterior_from_the_prior(name, steps):
    # From the prior by gradients alone, without the linearised start.
    affine = Affine.create()
    run = fit(
        affine.problem(),
        FullRankNormal(affine.prior) if name == "full-rank" else low_rank(affine.prior, 3),
        ELBO(samples=8),
        steps=steps,
        start=PresentParameters(),
    )
    q, exact = run.posterior(), affine.posterior()
    torch.testing.assert_close(q.mean, exact.mean, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(q.variance, exact.variance, rtol=5e-3, atol=5e-3)
    assert abs(run.history[-1].elbo - affine.log_evidence()) < 5e-3


def test_stays_at_the_exact_posterior():
    affine = Affine.create()
    run = fit(affine.problem(), LowRankNormal(affine.prior, 3), ELBO(samples=2), steps=50)
    assert all(abs(row.elbo - affine.log_evidence()) < 1e-6 for row in run.history)
    torch.testing.assert_close(run.posterior().variance, affine.posterior().variance)


@pytest.mark.parametrize("gradient", [PathDerivative(), AnalyticKL()])
def test_stays_at_the_exact_posterior_of_precise_data(gradient):
    # Curvatures above 1e6: the rounding errors of the gradient are large, those of the evidence are not.
    affine = Affine.create(std=1e-3)
    run = fit(affine.problem(), LowRankNormal(affine.prior, 3), ELBO(samples=2, gradient=gradient), steps=20)
    assert all(row.grad_norm > 1e-3 for row in run.history)
    torch.testing.assert_close(run.posterior().mean, affine.posterior().mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(run.posterior().variance, affine.posterior().variance, rtol=1e-8, atol=0.0)
    if isinstance(gradient, PathDerivative):
        assert all(abs(row.elbo - affine.log_evidence()) < 1e-4 for row in run.history)


def test_mean_field_from_the_prior():
    affine = Affine.create()
    run = fit(
        affine.problem(),
        MeanFieldNormal(affine.prior),
        ELBO(samples=64),
        steps=800,
        optimizer=Adam(lr=0.05),
        schedule=Cosine(final=1e-4),
        start=PresentParameters(),
    )
    variance = (2 * run.posterior.log_scale).exp().detach()
    # The noise of the last gradients is left: measured 0.5 %.
    torch.testing.assert_close(variance, 1 / affine.whitened_precision().diagonal(), rtol=0.03, atol=0.0)
    torch.testing.assert_close(run.posterior().mean.detach(), affine.posterior().mean, rtol=0.0, atol=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_same_seed_same_numbers_and_the_callers_generator_untouched(name):
    affine = Affine.create()
    runs = []
    for user_seed in (1, 2):
        torch.manual_seed(7)
        posterior = FAMILIES[name](affine.prior)
        torch.manual_seed(user_seed)
        state = torch.get_rng_state()
        runs.append(fit(affine.problem(), posterior, ELBO(samples=3), steps=6, seed=4))
        assert torch.equal(state, torch.get_rng_state())
    assert numbers_of(runs[0]) == numbers_of(runs[1])


def test_counts_what_it_costs():
    affine = Affine.create()
    problem = affine.problem()
    problem.cost.forward = 1000  # spent before, by somebody else
    run = fit(problem, low_rank(affine.prior), ELBO(samples=3), steps=4, start=PresentParameters())
    assert (run.cost.forward, run.cost.backward) == (12, 12)
    assert [row.solves for row in run.history] == [6, 12, 18, 24]
    assert [row.step for row in run.history] == [1, 2, 3, 4]


def test_run_folder(tmp_path):
    affine = Affine.create()
    posterior = low_rank(affine.prior)
    run = fit(affine.problem(), posterior, ELBO(samples=3), steps=5, path=tmp_path / "a" / "run", checkpoint_every=2)
    folder = tmp_path / "a" / "run"
    with (folder / "history.csv").open() as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [tuple(row) for row in rows[1:]] == [row.values() for row in run.history]
    assert float(rows[3][1]) == run.history[2].elbo
    config = json.loads((folder / "config.json").read_text())
    assert config["objective"] == "ELBO(samples=3, gradient=PathDerivative(), noise=Independent())"
    assert config["posterior"] == {"family": "LowRankNormal", "parameters": {"U": [2, 5], "mu": [5]}}
    assert (config["steps"], config["seed"], config["ranks"]) == (5, 0, 1)
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["fem_vi"] == fem_vi.__version__
    assert config == run.config
    tensors, about = output.read_tensors(folder / "posterior.safetensors")
    assert about["family"] == "LowRankNormal"
    assert torch.equal(tensors["mu"], posterior.mu.detach())
    names = {file.name for file in folder.rglob("*") if file.is_file()}
    checkpoints = {f"step-0000000{k}.{kind}" for k in (4, 5) for kind in ("json", "safetensors")}
    assert names == checkpoints | {".lock", "config.json", "history.csv", "posterior.json", "posterior.safetensors"}


def test_fields_are_written_where_the_prior_can(tmp_path):
    affine = Affine.create()
    written = {}
    affine.prior.write_fields = lambda path, fields: written.update({"path": path, **fields})
    run = fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=1, path=tmp_path / "run")
    assert written["path"] == tmp_path / "run" / "fields.xdmf"
    torch.testing.assert_close(written["sd"], run.posterior().variance.sqrt().detach())


def test_adam_takes_one_pass_where_parameters_lie_row_by_row_and_the_same_step_elsewhere():
    """torch's fused step looks at no strides: of a transposed parameter it would mix up the entries without a word."""
    torch.manual_seed(0)
    start, slope = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    ends = []
    for rows in (True, False):
        value = torch.nn.Parameter(start.clone() if rows else start.T.contiguous().T)
        steps = fem_vi.Adam(0.1)([value])
        assert steps.param_groups[0]["fused"] is rows
        for k in range(3):
            steps.zero_grad()
            (value.square() @ slope.T).sum().mul(k + 1.0).backward()
            steps.step()
        ends.append(value.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=0)
    assert fem_vi.Adam(0.1)([torch.nn.Parameter(torch.zeros(0))]).param_groups[0]["fused"], "a rank may own nothing"


@pytest.mark.mpi
@pytest.mark.parametrize("stop", [3, 6])
def test_resume_gives_the_same_bits(tmp_path, stop):
    split, _ = split_pair()
    arguments = {"objective": ELBO(samples=2), "steps": 9, "checkpoint_every": 2, "seed": 3}
    whole = fit(split, low_rank(split.prior), path=tmp_path / "whole", **arguments)
    again, _ = split_pair()
    with pytest.raises(KeyboardInterrupt):
        fit(again, low_rank(again.prior), path=tmp_path / "cut", callbacks=[Interrupt(stop)], **arguments)
    MPI.COMM_WORLD.barrier()
    fresh, _ = split_pair()
    resumed = fit(fresh, low_rank(fresh.prior), path=tmp_path / "cut", resume=True, **arguments)
    assert numbers_of(resumed) == numbers_of(whole)
    assert torch.equal(resumed.posterior.U, whole.posterior.U)
    assert resumed.cost == whole.cost
    if MPI.COMM_WORLD.rank == 0:
        rows = (tmp_path / "cut" / "history.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in rows[1:]] == [str(step) for step in range(1, 10)]


@pytest.mark.mpi
def test_resume_of_nothing_and_of_a_finished_run(tmp_path):
    split, _ = split_pair()
    arguments = {"objective": ELBO(samples=2), "steps": 3, "path": tmp_path / "run", "resume": True}
    first = fit(split, low_rank(split.prior), **arguments)
    second = fit(split, low_rank(split.prior), **arguments)
    assert numbers_of(first) == numbers_of(second)
    assert torch.equal(first.posterior.mu, second.posterior.mu)
    longer = fit(split, low_rank(split.prior), **{**arguments, "steps": 5})
    assert numbers_of(longer)[:3] == numbers_of(first)
    assert len(longer.history) == 5


def test_killed_process_leaves_a_run_that_goes_on(tmp_path):
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.vi.test_fit import *
affine = Affine.create()
def kill(row):
    if row.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=8, path={str(tmp_path / "run")!r}, checkpoint_every=2,
    callbacks=[kill])
"""
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=60)
    assert done.returncode == -signal.SIGKILL
    affine = Affine.create()
    run = fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=8, path=tmp_path / "run", resume=True)
    whole = fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=8)
    assert numbers_of(run) == numbers_of(whole)


def damaged_run(folder):
    affine = Affine.create()
    with pytest.raises(KeyboardInterrupt):
        fit(
            affine.problem(),
            low_rank(affine.prior),
            ELBO(samples=2),
            steps=9,
            path=folder,
            checkpoint_every=2,
            callbacks=[Interrupt(7)],
        )
    return affine


@pytest.mark.parametrize("damage", ["flip", "truncate", "no tensors", "json"])
def test_corrupt_newest_checkpoint_falls_back(tmp_path, damage):
    affine = damaged_run(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000006.safetensors"
    if damage == "flip":
        content = bytearray(newest.read_bytes())
        content[-1] ^= 1
        newest.write_bytes(bytes(content))
    elif damage == "truncate":
        newest.write_bytes(newest.read_bytes()[:100])
    elif damage == "no tensors":
        newest.unlink()
    else:
        newest.with_suffix(".json").write_text('{"step": 6, "numb')
    with pytest.warns(UserWarning, match="step-00000006.*older checkpoint"):
        run = fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=9, path=tmp_path / "run", resume=True)
    whole = fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=9)
    assert numbers_of(run) == numbers_of(whole)


def go_on(affine, folder):
    return fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=9, path=folder, resume=True)


def rewrite(file, **changes):
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "numbers",
    [None, [], {}, {"forward": 1, "backward": 1}, {"forward": "x", "backward": 1, "seconds": 1.0}, {"forward": None}],
)
def test_checkpoint_whose_numbers_are_garbled_is_passed_over(tmp_path, numbers):
    affine = damaged_run(tmp_path / "run")
    rewrite(tmp_path / "run" / "checkpoints" / "step-00000006.json", numbers=numbers)
    (tmp_path / "run" / "checkpoints" / "step-00000006 (copy).json").write_text("{}")
    with pytest.warns(UserWarning, match="step-00000006.json is damaged.*older checkpoint"):
        run = go_on(affine, tmp_path / "run")
    assert numbers_of(run) == numbers_of(fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=9))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda rows: [*rows[:3], rows[3].replace(rows[3].split(",")[1], "x1.5"), *rows[4:]], "history.csv is damaged in line 4"),
        (lambda rows: [*rows[:3], "3.5" + rows[3][1:], *rows[4:]], "history.csv is damaged in line 4"),
        (lambda rows: [*rows[:3], rows[3][:-25], *rows[4:]], "history.csv is damaged.*steps 1 to 6"),
        (lambda rows: rows[:3], "history.csv is damaged.*steps 1 to 6"),
        (lambda rows: [*rows[:3], *rows[4:]], "history.csv is damaged.*steps 1 to 6"),
        (lambda rows: ["\x00", *rows[1:]], "history.csv does not start with the header"),
    ],
    ids=["no number", "half a step", "torn row", "cut off", "a row less", "header"],
)
def test_garbled_history_is_an_error_that_names_it(tmp_path, spoil, words):
    affine = damaged_run(tmp_path / "run")
    file = tmp_path / "run" / "history.csv"
    file.write_text("\n".join(spoil(file.read_text().splitlines())) + "\n")
    with pytest.raises(RunFolderError, match=words):
        go_on(affine, tmp_path / "run")


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (None, "differ in prior"),
        ([1], "differ in prior"),
        ({"data": [1.0]}, "differ in the data y"),
        ({"data": ["a", "b", "c"]}, "differ in the data y"),
        ({"data": [float("nan")] * 3}, "differ in the data y"),
        ({"forward": {}}, "differ in the forward map"),
    ],
)
def test_garbled_description_of_the_problem_is_an_error_that_names_it(tmp_path, problem, words):
    affine = damaged_run(tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    stored = json.loads(file.read_text())["problem"]
    rewrite(file, problem={**stored, **problem} if isinstance(problem, dict) else problem)
    with pytest.raises(RunFolderError, match=f"config.json is of a run of another problem: they {words}"):
        go_on(affine, tmp_path / "run")


@pytest.mark.parametrize("spoil", ["generator", "posterior.mu"])
def test_checkpoint_of_something_else_is_an_error_that_names_it(tmp_path, spoil):
    affine = damaged_run(tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000006.safetensors"
    tensors, about = output.read_tensors(file)
    output.write_tensors(file, {**tensors, spoil: torch.zeros(2)}, about)
    with pytest.raises(RunFolderError, match="checkpoints, step 6: "):
        go_on(affine, tmp_path / "run")


@pytest.mark.mpi
def test_a_file_in_place_of_the_folder(tmp_path):
    split, _ = split_pair()
    if MPI.COMM_WORLD.rank == 0:
        (tmp_path / "run").write_text("precious")
    MPI.COMM_WORLD.barrier()
    for resume in (False, True):
        with pytest.raises(RunFolderError, match="run is a file"):
            fit(split, low_rank(split.prior), ELBO(samples=2), steps=2, path=tmp_path / "run", resume=resume)
    assert (tmp_path / "run").read_text() == "precious"


def test_goes_on_where_the_forward_map_overflows_near_the_prior_mean(tmp_path):
    prior = GaussianVector(torch.zeros(2))

    def problem():
        return InverseProblem(prior, lambda m: torch.exp(800 * (m + 1)), GaussianNoise(1.0), torch.ones(2))

    arguments = {"path": tmp_path / "run", "start": PresentParameters(), "resume": True, "optimizer": Adam(lr=1e-9)}
    fit(problem(), far_from_overflow(prior), ELBO(samples=2), steps=1, **arguments)
    assert len(fit(problem(), far_from_overflow(prior), ELBO(samples=2), steps=2, **arguments).history) == 2


def far_from_overflow(prior):
    """A narrow posterior, where exp(800 (m + 1)) is small."""
    posterior = MeanFieldNormal(prior)
    with torch.no_grad():
        posterior.mu.fill_(-1.0)
        posterior.log_scale.fill_(-9.0)
    return posterior


def test_no_sound_checkpoint_is_an_error(tmp_path):
    affine = damaged_run(tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*.safetensors"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(RunFolderError, match="can be trusted"):
        fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=9, path=tmp_path / "run", resume=True)


def test_torn_last_row_of_the_history(tmp_path):
    affine = damaged_run(tmp_path / "run")
    with (tmp_path / "run" / "history.csv").open("a") as file:
        file.write("8,1.2")
    run = fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=9, path=tmp_path / "run", resume=True)
    assert [row.step for row in run.history] == list(range(1, 10))


@pytest.mark.mpi
def test_does_not_overwrite(tmp_path):
    split, _ = split_pair()
    arguments = {"steps": 2, "path": tmp_path / "run"}
    fit(split, low_rank(split.prior), ELBO(samples=2), **arguments)
    with pytest.raises(RunFolderError, match="already holds files"):
        fit(split, low_rank(split.prior), ELBO(samples=2), **arguments)
    with pytest.raises(RunFolderError, match=r"objective ELBO\(samples=2"):
        fit(split, low_rank(split.prior), ELBO(samples=3), resume=True, **arguments)
    with pytest.raises(RunFolderError, match="at step 2 already"):
        fit(split, low_rank(split.prior), ELBO(samples=2), **{**arguments, "steps": 1}, resume=True)
    with pytest.raises(RunFolderError, match="problem"):
        other = InverseProblem(split.prior, split.forward, GaussianNoise(0.2), split.y)
        fit(other, low_rank(split.prior), ELBO(samples=2), resume=True, **arguments)


def test_keeps_other_processes_out_of_its_folder(tmp_path):
    affine = Affine.create()
    arguments = {"path": tmp_path / "run", "resume": True}
    code = f"from fem_vi.output import held; from pathlib import Path\nwith held(Path({str(tmp_path / 'run')!r})): input()"

    def intrude(row):
        done = subprocess.run(
            [sys.executable, "-c", code], input="\n", capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        assert done.returncode == 1 and "another process is at work" in done.stderr

    fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=1, callbacks=[intrude], **arguments)
    other = subprocess.Popen(
        [sys.executable, "-uc", code.replace("input()", "print(); input()")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    other.stdout.readline()
    try:
        with pytest.raises(RunFolderError, match=r"another process is at work on the run in .*choose another path"):
            fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=2, **arguments)
    finally:
        other.kill()
        other.communicate()
    fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=2, **arguments)  # a lock dies with its process


@pytest.mark.parametrize("what", ["history", "checkpoint"])
def test_a_full_disk_is_named_and_the_run_goes_on(tmp_path, what):
    """No file may grow: a limit of the operating system, which tells as a full disk does."""
    affine, folder = Affine.create(), tmp_path / "run"
    arguments = {"steps": 8, "path": folder, "checkpoint_every": 2 if what == "checkpoint" else 5}

    def fill(row):
        if row.step == 3:
            size = 1500 if what == "checkpoint" else (folder / "history.csv").stat().st_size + 10
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    try:
        with pytest.raises(RunFolderError, match=f"{what}.*cannot be written"):
            fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), callbacks=[fill], **arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run = fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), resume=True, **arguments)
    assert numbers_of(run) == numbers_of(fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=8))


def test_a_run_that_was_killed_before_it_began(tmp_path):
    affine, folder = Affine.create(), tmp_path / "run"
    output.create_run_folder(folder)
    with output.held(folder):
        (folder / ".config.json.tmp").write_text("{")
    fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=1, path=folder, resume=True)


@pytest.mark.parametrize(
    "noises",
    [
        lambda s: StudentNoise(s),
        lambda s: MultiplicativeNoise(StudentNoise(s)),
        lambda s: CorrelatedNoise(torch.eye(4) + s[0] * (torch.ones(4, 4) - torch.eye(4))),
        lambda s: UnknownScale(LowRankNoise(0.1, s[:, None])),
    ],
    ids=["Student", "multiplicative", "correlations", "factors"],
)
def test_does_not_go_on_with_another_noise(tmp_path, noises):
    prior = GaussianVector(torch.zeros(2))
    A, scales = torch.randn(5, 2, dtype=F64), torch.linspace(0.1, 0.4, 4, dtype=F64)

    def problem(scales):
        noise = noises(scales)
        count = 5 if isinstance(noise, UnknownScale) else 4
        return InverseProblem(prior, lambda m: (0.1 * m @ A[:count].T).exp(), noise, torch.ones(4))

    fit(problem(scales), FullRankNormal(prior), ELBO(samples=2), steps=1, path=tmp_path / "run")
    with pytest.raises(RunFolderError, match="noise's numbers"):
        fit(problem(scales.flip(0)), FullRankNormal(prior), ELBO(samples=2), steps=2, path=tmp_path / "run", resume=True)


@pytest.mark.mpi
@pytest.mark.parametrize("what", ["data", "order", "std", "forward"])
def test_does_not_go_on_with_another_problem(tmp_path, what):
    problem, _ = split_pair()
    std = torch.full((4,), 0.1, dtype=F64)

    def make(y, std, forward):
        return InverseProblem(problem.prior, forward, GaussianNoise(std), y)

    original = make(problem.y, std, problem.forward)
    fit(original, low_rank(problem.prior), ELBO(samples=2), steps=2, path=tmp_path / "run")
    other, words = {
        "data": (make(problem.y + torch.tensor([1e-4, 0, 0, 0]), std, problem.forward), "the data y"),
        "order": (make(problem.y.flip(0), std, problem.forward), "the data y"),
        "std": (make(problem.y, std * torch.tensor([1, 1, 2, 1]), problem.forward), "the noise's numbers"),
        "forward": (make(problem.y, std, lambda m: 1.01 * problem.forward(m)), "the forward map"),
    }[what]
    with pytest.raises(RunFolderError, match=words):
        fit(other, low_rank(problem.prior), ELBO(samples=2), steps=3, path=tmp_path / "run", resume=True)
    nearly = make(problem.y * (1 + 1e-11), std, lambda m: problem.forward(m) * (1 + 1e-8))
    fit(nearly, low_rank(problem.prior), ELBO(samples=2), steps=3, path=tmp_path / "run", resume=True)


@pytest.mark.parametrize("where", ["value", "gradient"])
def test_not_finite_names_step_and_part(where):
    calls = []

    def forward(m):
        calls.append(1)
        if len(calls) < 3:
            return m
        return m / 0.0 if where == "value" else torch.sqrt(m * 0.0)

    prior = GaussianVector(torch.zeros(2))
    problem = InverseProblem(prior, forward, GaussianNoise(1.0), torch.ones(2))
    words = r"step 3: .*log p\(y \| m\) \(4 of 4\)" if where == "value" else r"step 3: .*gradient is not, in .*mu"
    with pytest.raises(NotFinite, match=words):
        fit(problem, MeanFieldNormal(prior), ELBO(samples=4), steps=5, start=PresentParameters())


@pytest.mark.mpi
@pytest.mark.parametrize("what", ["steps", "objective", "schedule", "optimizer", "path", "checkpoint_every", "rank", "start"])
def test_arguments_that_differ_between_ranks(tmp_path, what):
    comm = MPI.COMM_WORLD
    last = comm.rank == comm.size - 1 and comm.size > 1
    split, _ = split_pair()
    arguments = {"objective": ELBO(samples=2), "steps": 2, "path": tmp_path / "run"}
    others = {
        "steps": 3,
        "objective": ELBO(samples=3),
        "schedule": ConstantRate(),
        "optimizer": Adam(),
        "path": None,
        "checkpoint_every": 3,
        "start": PresentParameters(),
    }
    if last and what in others:
        arguments[what] = others[what]
    posterior = low_rank(split.prior, 3 if last and what == "rank" else 2)
    if comm.size == 1:
        assert len(fit(split, posterior, **arguments).history) == 2
        return
    with pytest.raises(InvalidInput, match=r"posterior.U is \(2,\) on rank 0" if what == "rank" else f"{what} is .* on rank 0"):
        fit(split, posterior, **arguments)


def test_goes_on_with_the_posterior_it_fitted(tmp_path):
    affine = Affine.create()
    for name, start in {"default": None, "prior": PresentParameters()}.items():
        posterior = low_rank(affine.prior)
        arguments = {"path": tmp_path / name, "start": start}
        fit(affine.problem(), posterior, ELBO(samples=2), steps=3, schedule=ConstantRate(), **arguments)
        run = fit(affine.problem(), posterior, ELBO(samples=2), steps=6, schedule=ConstantRate(), resume=True, **arguments)
        whole = fit(affine.problem(), low_rank(affine.prior), ELBO(samples=2), steps=6, schedule=ConstantRate(), start=start)
        assert numbers_of(run) == numbers_of(whole)


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_refuses_to_work_without_gradients(block):
    affine = Affine.create()
    with block(), pytest.raises(InvalidInput, match="no_grad or inference_mode"):
        fit(affine.problem(), low_rank(affine.prior), ELBO(), steps=1)


@pytest.mark.parametrize("number", [2.5, 2.0, True, "2"])
def test_refuses_what_is_no_whole_number(number):
    affine = Affine.create()
    for name in ("steps", "checkpoint_every", "seed"):
        with pytest.raises(InvalidInput, match=f"{name} is .*whole"):
            fit(affine.problem(), low_rank(affine.prior), ELBO(), **{"steps": 1, name: number})
    for name in ("samples", "batch", "seed"):
        with pytest.raises(InvalidInput, match=f"{name} is .*whole"):
            diagnose(affine.problem(), low_rank(affine.prior), **{name: number})
    with pytest.raises(InvalidInput, match=r"samples is .*whole"):
        ELBO(samples=number)
    with pytest.raises(InvalidInput, match=r"iterations is .*whole"):
        GaussNewton(iterations=number)
    with pytest.raises(InvalidInput, match=r"rank is .*whole"):
        LowRankNormal(affine.prior, number)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("problem", "abc"),
        ("posterior", "abc"),
        ("posterior", MeanFieldNormal),
        ("objective", "ELBO"),
        ("objective", None),
        ("path", 3),
        ("optimizer", "Adam"),
        ("schedule", "cosine"),
        ("start", GaussNewton),
        ("callbacks", print),
        ("callbacks", ["print"]),
    ],
)
def test_refuses_arguments_of_another_type(name, value):
    affine = Affine.create()
    given = {"problem": affine.problem(), "posterior": low_rank(affine.prior), "objective": ELBO(), "steps": 1}
    with pytest.raises(InvalidInput, match=f"{name}.* is .*must be"):
        fit(**{**given, name: value})


@pytest.mark.parametrize("number", ["0.1", None, -1.0, float("nan"), True, 1j])
def test_refuses_what_is_no_positive_number(number):
    for name in ("lr", "eps"):
        with pytest.raises(InvalidInput, match=f"{name} is .*positive"):
            Adam(**{name: number})
    with pytest.raises(InvalidInput, match=r"rtol is .*positive"):
        GaussNewton(rtol=number)


def test_refuses_choices_that_it_does_not_know():
    # The class in place of a value of it would pass for the other choice.
    with pytest.raises(InvalidInput, match=r"gradient is .*PathDerivative or TotalDerivative or AnalyticKL"):
        ELBO(gradient=PathDerivative)
    with pytest.raises(InvalidInput, match=r"diagonal is .*UnitDiagonal or FreeDiagonal"):
        LowRankNormal(Affine.create().prior, 2, diagonal=FreeDiagonal)


def test_start_steps_back_from_where_the_forward_map_is_not_defined():
    # The first full Gauss-Newton step, from 0 towards -2.9, is beyond the logarithm's pole.
    prior = GaussianVector(torch.zeros(1))
    problem = InverseProblem(prior, lambda m: torch.log(1 + m), GaussianNoise(0.1), torch.tensor([-2.9]))
    run = fit(problem, MeanFieldNormal(prior), ELBO(samples=1), steps=1, optimizer=Adam(lr=1e-9), start=GaussNewton())
    assert -1 < float(run.posterior.mu) < -0.8


def test_refuses_no_steps():
    affine = Affine.create()
    with pytest.raises(InvalidInput, match="steps is 0"):
        fit(affine.problem(), low_rank(affine.prior), ELBO(), steps=0)


def test_other_optimisers_and_schedules(tmp_path):
    affine = Affine.create()

    def momentum(parameters):
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    arguments = {
        "objective": ELBO(samples=2),
        "optimizer": momentum,
        "schedule": ConstantRate(),
        "start": GaussNewton(),
        "checkpoint_every": 2,
    }
    whole = fit(affine.problem(), low_rank(affine.prior), steps=6, **arguments)
    fit(affine.problem(), low_rank(affine.prior), steps=4, path=tmp_path / "run", **arguments)
    run = fit(affine.problem(), low_rank(affine.prior), steps=6, path=tmp_path / "run", resume=True, **arguments)
    assert numbers_of(run) == numbers_of(whole)
    assert "momentum" in run.config["optimizer"]


def test_entries_of_a_dense_factor_take_steps_of_their_own():
    prior = Affine.create().prior
    posterior = Mixture([FullRankNormal(prior), MeanFieldNormal(prior)])
    before = {name: value.detach().clone() for name, value in posterior.named_parameters()}
    optimizer = Adam(lr=0.1, pair_lr=0.01).create(posterior)
    for value in posterior.parameters():
        value.grad = torch.full_like(value, 3.0)
    optimizer.step()
    steps = {name: float((before[name] - value).detach().mean()) for name, value in posterior.named_parameters()}
    assert steps.pop("components.0.below") == pytest.approx(0.01)
    assert list(steps.values()) == pytest.approx([0.1] * 5)
    assert (
        repr(default_optimizer(posterior, 4, linearised=False)) == "Adam(lr=0.25, betas=(0.9, 0.999), eps=1e-08, pair_lr=0.125)"
    )
    assert repr(default_optimizer(MeanFieldNormal(prior), 4, linearised=False)) == "Adam(lr=0.25, betas=(0.9, 0.999), eps=1e-08)"
    with pytest.raises(InvalidInput, match="pair_lr is 0"):
        Adam(pair_lr=0)


def gradient_steps(parameters):
    return torch.optim.SGD(parameters, lr=1e-2)


@pytest.mark.mpi
def test_long_gradients_are_shortened():
    # A step of gradient descent is as long as the gradient, over fields, replicated parameters and ranks together.
    states = []
    for problem in split_pair():
        for norm in (0.5, 1e9):
            posterior = low_rank(problem.prior)
            before = [value.detach().clone() for value in posterior.parameters()]
            options = {"schedule": ConstantRate(), "start": PresentParameters()}
            run = fit(problem, posterior, ELBO(samples=4), steps=1, optimizer=Clipped(gradient_steps, norm), **options)
            moved = sum((value - old).square().sum() for value, old in zip(posterior.parameters(), before, strict=True))
            length = float(problem.prior.all_sum(moved.detach()).sqrt())
            assert run.history[0].grad_norm > 5.0
            assert length == pytest.approx(1e-2 * min(norm, run.history[0].grad_norm), rel=1e-9)
            states.append(problem.prior.gather(posterior.mu.detach()))
    torch.testing.assert_close(states[0], states[2], rtol=1e-10, atol=1e-12)
    assert run.config["optimizer"] == "Clipped(optimizer=tests.vi.test_fit.gradient_steps, norm=1000000000.0)"


def test_clipping_takes_the_default_optimiser_and_changes_no_short_gradient():
    affine = Affine.create()
    plain = fit(affine.problem(), low_rank(affine.prior), ELBO(samples=4), steps=20)
    clipped = fit(affine.problem(), low_rank(affine.prior), ELBO(samples=4), steps=20, optimizer=Clipped(norm=1e6))
    assert numbers_of(clipped) == numbers_of(plain)
    assert clipped.config["optimizer"] == f"Clipped(optimizer={plain.config['optimizer']}, norm=1000000.0)"
    for wrong, words in ((lambda: Clipped(norm=0.0), "norm is 0"), (lambda: Clipped("adam"), "optimizer is 'adam'")):
        with pytest.raises(InvalidInput, match=words):
            wrong()


def test_a_clipped_fit_goes_on_bit_by_bit(tmp_path):
    affine = Affine.create()
    options = {"objective": ELBO(samples=2), "optimizer": Clipped(Adam(0.1), norm=0.2), "start": PresentParameters()}
    options |= {"schedule": ConstantRate()}
    whole = fit(affine.problem(), low_rank(affine.prior), steps=8, **options)
    fit(affine.problem(), low_rank(affine.prior), steps=4, path=tmp_path / "run", **options)
    run = fit(affine.problem(), low_rank(affine.prior), steps=8, path=tmp_path / "run", resume=True, **options)
    assert numbers_of(run) == numbers_of(whole)
    with pytest.raises(RunFolderError, match=r"norm=0\.2.*norm=0\.3"):
        again = {**options, "optimizer": Clipped(Adam(0.1), norm=0.3)}
        fit(affine.problem(), low_rank(affine.prior), steps=8, path=tmp_path / "run", resume=True, **again)


@pytest.mark.parametrize(("start", "named"), [(None, "GaussNewton("), (PresentParameters(), "PresentParameters()")])
def test_config_names_the_start_that_was_made(tmp_path, start, named):
    affine = Affine.create()
    options = {"objective": ELBO(samples=2), "path": tmp_path / "run", "start": start}
    posterior = low_rank(affine.prior)
    fit(affine.problem(), posterior, steps=2, **options)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["start"].startswith(named)
    # A posterior that is not new any more would start elsewhere by default; the run knows where it did, whatever the optimiser.
    fit(affine.problem(), posterior, steps=3, resume=True, **options)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_configuration_says_what_to_do(tmp_path, content):
    affine = damaged_run(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"config.json is damaged: .*Restore it from a copy, or start anew"):
        go_on(affine, tmp_path / "run")


def last_first(parameters):
    given = list(parameters)[::-1]
    return torch.optim.Adam([{"params": given[:1], "lr": 3e-3}, {"params": given[1:]}], lr=1e-2)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", [last_first, torch.optim.NAdam, torch.optim.Rprop, torch.optim.Adadelta, torch.optim.ASGD])
def test_any_optimiser_of_torch_goes_on_bit_by_bit(tmp_path, kind):
    problem, _ = split_pair()
    options = {"objective": ELBO(samples=2), "optimizer": kind, "start": PresentParameters(), "schedule": ConstantRate()}
    whole = fit(problem, low_rank(problem.prior), steps=8, **options)
    fit(problem, low_rank(problem.prior), steps=3, path=tmp_path / "run", **options)
    run = fit(problem, low_rank(problem.prior), steps=8, path=tmp_path / "run", resume=True, **options)
    assert numbers_of(run) == numbers_of(whole)


def test_refuses_optimisers_that_it_cannot_step():
    affine = Affine.create()
    for optimizer, words in (
        (torch.optim.LBFGS, r"makes a torch\.optim\.LBFGS.*take LBFGS\(\)"),
        (lambda parameters: None, "what optimizer makes of the parameters is None"),
    ):
        with pytest.raises(InvalidInput, match=words):
            fit(affine.problem(), low_rank(affine.prior), ELBO(), steps=1, optimizer=optimizer)


@pytest.mark.mpi
@pytest.mark.parametrize("name", FAMILIES)
def test_split_over_ranks(name):
    runs = []
    for problem in split_pair():
        torch.manual_seed(3)
        posterior = FAMILIES[name](problem.prior)
        runs.append(fit(problem, posterior, ELBO(samples=4), steps=10))
    ours, reference = runs
    torch.testing.assert_close(
        ours.posterior.prior.gather(ours.posterior().mean), reference.posterior().mean, rtol=1e-7, atol=1e-7
    )
    for a, b in zip(ours.history, reference.history, strict=True):
        assert a.solves == b.solves
        torch.testing.assert_close(
            torch.tensor([a.elbo, a.kl, a.grad_norm], dtype=F64),
            torch.tensor([b.elbo, b.kl, b.grad_norm], dtype=F64),
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.mpi
def test_checkpoint_moves_between_numbers_of_ranks(tmp_path):
    # Written by all ranks together, taken up by each rank alone: what is on disk does not know the partition.
    split, alone = split_pair()
    with pytest.raises(KeyboardInterrupt):
        fit(
            split,
            low_rank(split.prior),
            ELBO(samples=2),
            steps=6,
            path=tmp_path / "run",
            checkpoint_every=2,
            callbacks=[Interrupt(5)],
        )
    MPI.COMM_WORLD.barrier()
    tensors = output.read_checkpoint(tmp_path / "run", 4).tensors
    reference = low_rank(alone.prior)
    with pytest.raises(KeyboardInterrupt):
        fit(alone, reference, ELBO(samples=2), steps=6, callbacks=[Interrupt(4)])
    torch.testing.assert_close(tensors["posterior.U"], reference.U.detach(), rtol=1e-7, atol=1e-7)
    own = tmp_path / f"rank-{MPI.COMM_WORLD.rank}"
    shutil.copytree(tmp_path / "run", own)
    config = json.loads((own / "config.json").read_text())
    config["problem"]["prior"], config["problem"]["likelihood"] = repr(alone.prior), repr(alone.likelihood)
    (own / "config.json").write_text(json.dumps(config))
    resumed = fit(alone, low_rank(alone.prior), ELBO(samples=2), steps=6, path=own, resume=True)
    whole = fit(alone, low_rank(alone.prior), ELBO(samples=2), steps=6)
    for a, b in zip(resumed.history, whole.history, strict=True):
        assert a.elbo == pytest.approx(b.elbo, rel=1e-6)
