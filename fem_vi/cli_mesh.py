"""The commands `fem-vi mesh info` and `fem-vi mesh convert`. What a command needs is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fem_vi.pde.mesh_quality import MeshSummary

app = typer.Typer(help="Look at mesh files, and convert them.", no_args_is_help=True)

BAR = 40  # characters of the longest bar of a histogram


def _on_rank_0(work: Callable[[Console], None]) -> None:
    """Do the work on rank 0 alone; where it fails, all ranks end with status 1 and rank 0 says why."""
    from mpi4py.MPI import COMM_WORLD  # a command starts a program: here is where its communicator comes from
    from rich.console import Console

    from fem_vi.errors import FemViError
    from fem_vi.parallel import raise_on_all
    from fem_vi.report import console

    try:
        with raise_on_all(COMM_WORLD):
            if COMM_WORLD.rank == 0:
                work(console())
    except FemViError as error:
        if COMM_WORLD.rank == 0:
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _lines(summary: MeshSummary) -> list[tuple[str, str]]:
    """The rows of the table above the histogram."""
    cells = summary.shape if summary.order == 1 else f"{summary.shape}, geometry of order {summary.order}"
    low, high = (", ".join(f"{value:.6g}" for value in corner) for corner in summary.box)
    return [
        ("cells", f"{summary.num_cells} ({cells}, {summary.gdim}D)"),
        ("vertices", str(summary.num_vertices)),
        *([("nodes", str(summary.num_nodes))] if summary.order > 1 else []),
        ("box", f"({low}) to ({high})"),
        ("edges", f"{summary.edges[0]:.4g} to {summary.edges[1]:.4g}"),
        *((f"dofs of degree {degree}", str(count)) for degree, count in summary.dofs.items()),
    ]


def _print_summary(summary: MeshSummary, console: Console) -> None:
    import numpy as np
    from rich.table import Table

    table = Table(show_header=False, box=None, title=str(summary.path), title_justify="left")
    for row in _lines(summary):
        table.add_row(*row)
    console.print(table)
    worst = int(summary.quality.argmin())
    console.print(
        f"\nquality: {summary.measure}, 1 is ideal; worst {summary.quality[worst]:.3f} in cell {worst}, "
        f"mean {summary.quality.mean():.3f}",
        highlight=False,
    )
    counts, ends = np.histogram(np.clip(summary.quality, 0.0, 1.0), bins=10, range=(0.0, 1.0))
    for count, low, high in zip(counts, ends, ends[1:], strict=False):
        console.print(f"  {low:.1f} to {high:.1f} {count:9d} {'#' * -(-BAR * int(count) // int(counts.max()))}", highlight=False)
    tags = Table("name", "of", "dimension", "tag", "count", box=None)
    for tag in summary.tags:
        tags.add_row(tag.name or "-", "cells" if tag.dim == summary.dim else "facets", str(tag.dim), str(tag.tag), str(tag.count))
    console.print()
    console.print(tags if summary.tags else "no tags")
    for warning in summary.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


@app.command()
def info(file: Annotated[Path, typer.Argument(help="A mesh file.")]) -> None:
    """Describe a mesh: cells, sizes, degrees of freedom, quality, tags."""

    def work(console: Console) -> None:
        from fem_vi.pde.mesh_quality import summarise

        _print_summary(summarise(file), console)

    _on_rank_0(work)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A mesh file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; its extension says the format.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT where it exists.")] = False,
) -> None:
    """Write a mesh in another format, with its tags and their names."""

    def work(console: Console) -> None:
        from fem_vi.pde.mesh_write import convert_mesh

        for note in convert_mesh(source, target, overwrite=force):
            console.print(f"warning: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        console.print(f"wrote {target}", markup=False, highlight=False, soft_wrap=True)

    _on_rank_0(work)
