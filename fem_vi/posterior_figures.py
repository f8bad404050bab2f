"""Pictures of posteriors: fields on the mesh, marginals against the prior, predictions against data.

Each returns a matplotlib figure, for `fem_vi.save_figure`. Traces and ranks of chains are ArviZ's: pass `samples.to_arviz()` to
`arviz_plots.plot_trace` or `arviz_plots.plot_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fem_vi.arguments import described, instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.parallel import max_over_ranks, raise_on_all
from fem_vi.plot import plot_field
from fem_vi.vi.predictive import PredictiveCheck
from fem_vi.vi.prior import FieldPrior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_MARGINALS = 12
MOST_SAMPLES = 4
MOST_BINS = 40


def _rows(name: str, m: object, n_owned: int) -> Tensor:
    """Draws `(draws, n_owned)`, checked."""
    if not isinstance(m, Tensor) or m.ndim < 2 or m.shape[-1] != n_owned or m.shape[:-1].numel() < 2:
        given = tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__
        raise InvalidInput(f"{name} is {given}; it must be draws of m, at least two, (..., {n_owned}).")
    return m.detach().reshape(-1, n_owned)


def _check_truth(truth: object, n_owned: int) -> None:
    if truth is not None and not (isinstance(truth, Tensor) and truth.shape == (n_owned,)):
        given = tuple(truth.shape) if isinstance(truth, Tensor) else described(truth)
        raise InvalidInput(f"truth is {given}; it must be one m, a tensor of shape ({n_owned},).")


def plot_posterior_field(V: Any, m: Tensor, *, truth: Tensor | None = None, samples: int = 2, label: str = "m") -> Figure:
    """Mean, standard deviation and a few draws of a field, side by side on the mesh.

    Mean, draws and truth share a scale of colours, so that the draws show what the mean leaves out.

    Args:
        V: Scalar continuous Lagrange space of degree 1 on a plane mesh.
        m: Draws from the posterior, field tensors `(..., n_owned)`.
        truth: Field tensor `(n_owned,)` to show first, where it is known.
        samples: How many draws to show, at most four.
        label: Of the scale of colours, with its unit.

    Returns:
        The figure; empty but on rank 0.

    Raises:
        InvalidInput: For other spaces, types and shapes.

    MPI: Collective.

    Example:
        >>> figure = fem_vi.plot_posterior_field(V, samples.m, label="log-transmissivity [-]")
        >>> fem_vi.save_figure(figure, "posterior.png", V.mesh.comm)
    """
    from matplotlib.figure import Figure

    comm = V.mesh.comm
    with raise_on_all(comm):
        rows = _rows("m", m, V.dofmap.index_map.size_local)
        _check_truth(truth, rows.shape[-1])
        if whole("samples", samples, least=0) > MOST_SAMPLES:
            raise InvalidInput(f"samples is {samples}; from 0 to {MOST_SAMPLES} draws fit in a row.")
    chosen = torch.linspace(0, len(rows) - 1, samples + 2).round().long()[1:-1]
    shown = {} if truth is None else {"truth": truth.detach()}
    shown |= {"posterior mean": rows.mean(0)} | {f"draw {k + 1}": rows[index] for k, index in enumerate(chosen.tolist())}
    every = torch.cat([field.reshape(-1) for field in shown.values()])
    high = max_over_ranks(comm, float(every.max()) if len(every) else -math.inf)
    low = -max_over_ranks(comm, -float(every.min()) if len(every) else -math.inf)
    figure = Figure(figsize=(3.1 * (len(shown) + 1), 3.2), layout="constrained")
    axes = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
    for ax, (title, field) in zip(axes[:-1], shown.items(), strict=True):
        artist = plot_field(ax, V, field, vmin=low, vmax=high, cmap="viridis")
        ax.set_title(title)
    figure.colorbar(artist, ax=list(axes[:-1]), label=label, shrink=0.8)
    spread = plot_field(axes[-1], V, rows.std(0), vmin=0.0, cmap="magma")
    axes[-1].set_title("standard deviation")
    figure.colorbar(spread, ax=axes[-1], shrink=0.8)
    for ax in axes:
        ax.set_axis_off()
    return figure


def plot_marginals(
    prior: FieldPrior,
    draws: Mapping[str, Tensor],
    *,
    unknowns: Sequence[int] | None = None,
    truth: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    """Densities of single unknowns, of one posterior or of several, against the prior.

    Args:
        prior: Prior of m.
        draws: m by name of the method, `(..., n_owned)`: `{"HMC": samples.m, "Laplace": posterior().sample((2000,))}`.
        unknowns: Numbers of the unknowns, in the order of `prior.gather`; None for up to six, evenly spread.
        truth: `(n_owned,)`, shown as a line, where it is known.
        names: Of the unknowns.

    Returns:
        The figure.

    Raises:
        InvalidInput: For other types, shapes and numbers.

    MPI: Collective.

    Example:
        >>> fem_vi.plot_marginals(prior, {"HMC": samples.m}, unknowns=[0, 1])
    """
    from matplotlib.figure import Figure

    count = prior.num_global
    with raise_on_all(prior.comm):
        instance("draws", draws, Mapping, way_out='Name the method: {"HMC": samples.m}.')
        if unknowns is not None:
            instance("unknowns", unknowns, Sequence, Tensor, np.ndarray)
        even = torch.linspace(0, count - 1, min(count, 6)).round().long().tolist()
        given = even if unknowns is None else [whole("unknowns: an entry", k) for k in np.asarray(unknowns).tolist()]
        rows = {name: _rows(f"draws[{name!r}]", m, prior.event_shape[0]) for name, m in draws.items()}
        _check_truth(truth, prior.event_shape[0])
        if not rows:
            raise InvalidInput("draws is empty; it must hold draws of m by the name of their method.")
        if not 1 <= len(given) <= MOST_MARGINALS or not all(0 <= k < count for k in given):
            raise InvalidInput(f"unknowns is {given!r:.80}; it must be 1 to {MOST_MARGINALS} numbers from 0 to {count - 1}.")
        if names is not None and len(names) != len(given):
            raise InvalidInput(f"names has {len(names)} entries; there are {len(given)} unknowns.")
    values = {name: prior.gather(m)[:, given].numpy() for name, m in rows.items()}
    centre, spread = (prior.gather(x)[given].numpy() for x in (prior.mean, prior.variance.sqrt()))
    known = None if truth is None else prior.gather(truth.detach())[given].numpy()
    columns = min(len(given), 3)
    lines = math.ceil(len(given) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.4 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for k, (ax, number) in enumerate(zip(axes, given, strict=False)):
        line = np.linspace(centre[k] - 3.5 * spread[k], centre[k] + 3.5 * spread[k], 300)
        density = np.exp(-0.5 * ((line - centre[k]) / spread[k]) ** 2) / (spread[k] * math.sqrt(2 * math.pi))
        ax.fill_between(line, density, color="0.85", label="prior")
        for name, m in values.items():
            ax.hist(
                m[:, k],
                bins=min(MOST_BINS, max(10, round(2 * len(m) ** (1 / 3)))),
                density=True,
                histtype="step",
                linewidth=1.4,
                label=name,
            )
        if known is not None:
            ax.axvline(known[k], color="k", linestyle="--", linewidth=1, label="truth")
        ax.set_title(f"unknown {number}" if names is None else names[k], fontsize="medium")
        ax.set_yticks([])
        ax.set_ylim(bottom=0.0)
    for ax in list(axes)[len(given) :]:
        ax.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def plot_predictive(check: PredictiveCheck, y: Tensor, *, x: Tensor | None = None, label: str = "datum") -> Figure:
    """Data over the 90 % intervals of their replicates, those outside marked.

    Args:
        check: What `predictive_check` returned.
        y: Data, `(num_data,)`.
        x: Where to put each datum on the axis, `(num_data,)`; None sorts data by their predictions.
        label: Of the axis.

    Returns:
        The figure.

    Raises:
        InvalidInput: Where an argument is of the wrong type, or lengths differ.

    MPI: Not collective.
    """
    from matplotlib.figure import Figure

    instance("check", check, PredictiveCheck, way_out="It is what predictive_check returns.")
    instance("y", y, Tensor)
    if y.shape != check.median.shape or (x is not None and x.shape != y.shape):
        raise InvalidInput(f"y has shape {tuple(y.shape)}; the check is of {len(check.median)} data (x, where given, too).")
    order = check.median.argsort() if x is None else x.argsort()
    place = np.arange(len(y)) if x is None else x[order].numpy()
    low, median, high, data = (value[order].numpy() for value in (check.low, check.median, check.high, y))
    outside = (data < low) | (data > high)
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    ax = figure.subplots()
    ax.vlines(
        place, low, high, color="tab:blue", alpha=0.35, linewidth=max(1.5, min(6.0, 250.0 / len(y))), label="90 % of replicates"
    )
    ax.plot(place, median, "_", color="tab:blue", label="their median")
    ax.plot(place[~outside], data[~outside], ".", color="k", label="data inside")
    ax.plot(place[outside], data[outside], "x", color="tab:red", label="data outside")
    ax.set_xlabel(f"{label}, sorted by prediction" if x is None else label)
    ax.set_title(f"{100 * check.coverage:.0f} % of the data inside, p = {check.p_value:.3f}", fontsize="medium")
    ax.legend(frameon=False, ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return figure
