"""Figures show the numbers they are given: looked up in matplotlib's artists, on any number of ranks."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from dolfinx import fem, mesh
from mpi4py import MPI

import fem_vi
from fem_vi.diagnostic_figures import _band
from tests.vi.helpers import F64, Affine

COMM = MPI.COMM_WORLD


def exact_posterior(affine: Affine) -> fem_vi.FullRankNormal:
    q = fem_vi.FullRankNormal(affine.prior)
    fem_vi.GaussNewton()(affine.problem(), q)
    return q


@pytest.mark.mpi
def test_field_figure_shows_mean_draws_and_spread(tmp_path):
    V = fem.functionspace(mesh.create_unit_square(COMM, 5, 4), ("Lagrange", 1))
    prior = fem_vi.MaternField(V, std=1.0, length=0.4)
    torch.manual_seed(1)
    m = prior.rsample((3, 10))
    figure = fem_vi.plot_posterior_field(V, m, truth=m[0, 0], samples=2)
    rows = m.flatten(0, 1)
    expected = [m[0, 0], rows.mean(0), rows[10], rows[19], rows.std(0)]
    titles = [ax.get_title() for ax in figure.axes[:5]]
    assert titles == ["truth", "posterior mean", "draw 1", "draw 2", "standard deviation"]
    for ax, field in zip(figure.axes, expected, strict=False):
        shown = np.sort(ax.collections[0].get_array())
        np.testing.assert_allclose(shown, np.sort(prior.gather(field).numpy()), rtol=1e-12)
    limits = {ax.collections[0].get_clim() for ax in figure.axes[:4]}
    assert len(limits) == 1  # one scale of colours
    fem_vi.save_figure(figure, tmp_path / "field.png", COMM)
    if COMM.rank == 0:
        assert plt.imread(tmp_path / "field.png").std() > 0.05


@pytest.mark.mpi
def test_field_figure_refuses():
    V = fem.functionspace(mesh.create_unit_square(COMM, 3, 3), ("Lagrange", 1))
    owned = V.dofmap.index_map.size_local
    with pytest.raises(fem_vi.InvalidInput, match="draws of m, at least two"):
        fem_vi.plot_posterior_field(V, torch.zeros(owned))
    with pytest.raises(fem_vi.InvalidInput, match="samples is 9"):
        fem_vi.plot_posterior_field(V, torch.zeros(4, owned), samples=9)
    with pytest.raises(fem_vi.InvalidInput, match="samples is '2'"):
        fem_vi.plot_posterior_field(V, torch.zeros(4, owned), samples="2")
    with pytest.raises(fem_vi.InvalidInput, match=r"truth is \(2,\)"):
        fem_vi.plot_posterior_field(V, torch.zeros(4, owned), truth=torch.zeros(2))


@pytest.mark.mpi
def test_marginals_against_the_prior():
    prior = fem_vi.GaussianVector(torch.tensor([1.0, -2.0]), covariance=torch.diag(torch.tensor([4.0, 0.25])))
    torch.manual_seed(2)
    draws = {"one": prior.sample((5, 2000)), "two": prior.sample((500,)) + 1}
    figure = fem_vi.plot_marginals(prior, draws, truth=torch.tensor([1.5, -2.0], dtype=F64), names=["a", "b"])
    for ax, centre, sd, true in zip(figure.axes, (1.0, -2.0), (2.0, 0.5), (1.5, -2.0), strict=True):
        curve = ax.collections[0].get_paths()[0].vertices
        top = curve[:, 1].argmax()
        assert curve[top, 0] == pytest.approx(centre, abs=0.03 * sd)
        assert curve[top, 1] == pytest.approx(1 / (sd * np.sqrt(2 * np.pi)), rel=1e-3)
        assert ax.lines[0].get_xdata()[0] == true
        heights = np.array([patch.get_xy()[:, 1].max() for patch in ax.patches])
        assert heights[0] == pytest.approx(curve[top, 1], rel=0.2)  # these draws are the prior's
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["prior", "one", "two", "truth"]


def test_marginals_refuse():
    prior = fem_vi.GaussianVector(torch.zeros(2))
    with pytest.raises(fem_vi.InvalidInput, match="draws is empty"):
        fem_vi.plot_marginals(prior, {})
    with pytest.raises(fem_vi.InvalidInput, match=r"draws\['x'\] is \(2,\)"):
        fem_vi.plot_marginals(prior, {"x": torch.zeros(2)})
    with pytest.raises(fem_vi.InvalidInput, match="unknowns is"):
        fem_vi.plot_marginals(prior, {"x": torch.zeros(3, 2)}, unknowns=[2])
    with pytest.raises(fem_vi.InvalidInput, match="names has 1 entries"):
        fem_vi.plot_marginals(prior, {"x": torch.zeros(3, 2)}, names=["a"])
    with pytest.raises(fem_vi.InvalidInput, match=r"draws is a Tensor; .*Name the method"):
        fem_vi.plot_marginals(prior, torch.zeros(3, 2))
    with pytest.raises(fem_vi.InvalidInput, match="truth is 1"):
        fem_vi.plot_marginals(prior, {"x": torch.zeros(3, 2)}, truth=1.0)


def test_few_draws_are_shown_in_few_bins():
    prior = fem_vi.GaussianVector(torch.zeros(1))
    heights = {}
    for count in (200, 8000):
        torch.manual_seed(0)
        figure = fem_vi.plot_marginals(prior, {"x": prior.sample((count,))}, unknowns=torch.tensor([0]))
        heights[count] = figure.axes[0].patches[0].get_xy()[:, 1]
    assert len(heights[200]) < len(heights[8000]) / 2
    assert heights[200].max() == pytest.approx(1 / np.sqrt(2 * np.pi), rel=0.25)


def test_predictive_figure_marks_the_data_outside():
    affine = Affine.create(num_data=20)
    y = affine.y.clone()
    y[3] += 30 * affine.std
    problem = Affine(affine.prior, affine.A, affine.b, affine.std, y).problem()
    check = fem_vi.predictive_check(problem, affine.posterior().sample((200,)))
    figure = fem_vi.plot_predictive(check, y)
    _, inside, outside = figure.axes[0].lines
    assert len(outside.get_xdata()) == len(check.outside)
    assert float(y[3]) in outside.get_ydata()
    assert len(inside.get_xdata()) + len(outside.get_xdata()) == 20
    with pytest.raises(fem_vi.InvalidInput, match="check is of 20 data"):
        fem_vi.plot_predictive(check, y[:3])
    with pytest.raises(fem_vi.InvalidInput, match="It is what predictive_check returns"):
        fem_vi.plot_predictive(y, y)


def test_weights_of_a_right_and_of_a_wrong_posterior():
    affine = Affine.create()
    right, narrow = exact_posterior(affine), exact_posterior(affine)
    with torch.no_grad():
        narrow.log_diagonal -= 1.0
    figure = fem_vi.plot_weights(affine.problem(), {"right": right, "narrow": narrow}, samples=300)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[0] == "right: k-hat 0.00"
    assert labels[1].startswith("narrow: k-hat")
    assert labels[1].endswith("not to be trusted")
    right_line, narrow_line = figure.axes[0].lines[:2]
    np.testing.assert_allclose(right_line.get_xdata(), 1.0, rtol=1e-6)
    assert narrow_line.get_xdata().mean() == pytest.approx(1.0)  # weights over their mean
    assert narrow_line.get_xdata().max() > 10
    with pytest.raises(fem_vi.InvalidInput, match="posteriors is"):
        fem_vi.plot_weights(affine.problem(), {})
    with pytest.raises(fem_vi.InvalidInput, match="samples is '300'"):
        fem_vi.plot_weights(affine.problem(), {"right": right}, samples="300")
    with pytest.raises(fem_vi.InvalidInput, match="posterior is a MultivariateNormal"):
        fem_vi.plot_weights(affine.problem(), {"right": affine.posterior()})


def test_calibration_figure_leaves_its_band_where_ranks_are_not_uniform():
    ranks = torch.stack([torch.arange(100).repeat(2), torch.arange(100).repeat(2) // 3], dim=1)
    calibration = fem_vi.Calibration(("right", "low"), ranks, 99, 20, (1.0, 0.0), (0.5,) * 4, (0.5, 0.8, 0.9, 0.95), "")
    figure = fem_vi.plot_calibration(calibration)
    right, low = figure.axes[0].lines
    assert np.abs(right.get_ydata()).max() < 0.02
    assert low.get_ydata().max() == pytest.approx(2 / 3, abs=0.02)
    lower, upper = _band(200, right.get_xdata())
    assert (right.get_ydata() + right.get_xdata() <= upper + 1e-12).all()
    assert (low.get_ydata() + low.get_xdata() > upper).any()
    assert (lower <= right.get_xdata() + 1e-12).all()


def test_calibration_figure_refuses():
    with pytest.raises(fem_vi.InvalidInput, match="It is what calibrate returns"):
        fem_vi.plot_calibration(None)


def test_the_band_holds_99_percent_of_uniform_ranks():
    grid = np.linspace(0, 1, 101)
    low, high = _band(100, grid)
    u = np.sort(np.random.default_rng(5).random((1500, 100)), axis=1)
    below = np.stack([(u <= point).mean(1) for point in grid], axis=1)
    inside = ((below >= low - 1e-12) & (below <= high + 1e-12)).all(1).mean()
    assert 0.975 < inside <= 1.0
    assert high.max() - 1 < 1e-12
    assert (high - low).max() < 0.4


def test_arviz_draws_traces_of_samples():
    import arviz_plots

    problem = Affine.create(2, 2).problem()
    samples = fem_vi.sample(problem, fem_vi.HMC(step_size=0.3), chains=2, draws=20, warmup=5)
    arviz_plots.plot_trace(samples.to_arviz(), backend="matplotlib")
    lines = [line for ax in plt.gcf().axes for line in ax.lines if len(line.get_ydata()) == 20]
    expected = {tuple(np.round(samples.m[chain, :, k].numpy(), 10)) for chain in range(2) for k in range(2)}
    assert expected <= {tuple(np.round(line.get_ydata(), 10)) for line in lines}
    plt.close("all")
