"""The command `fem-vi`. What a command needs is imported when it runs, so that `fem-vi --help` is quick."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

from fem_vi import __version__, cli_mesh

app = typer.Typer(
    name="fem-vi",
    help="Variational inference for PDEs on meshes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_mesh.app, name="mesh")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fem_vi {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Variational inference for PDEs on meshes."""


@app.command()
def doctor() -> None:
    """Print what this machine has, and one line for each thing that will hurt, with its remedy."""
    from fem_vi.doctor import look, problems, report
    from fem_vi.report import console

    findings = look()
    report(findings, console(quiet=findings.rank > 0))
    if any(problem.essential for problem in problems(findings)):
        raise typer.Exit(1)


def start() -> None:
    """Run the command as a program, which ends in silence where its reader does (`fem-vi doctor | head -1`)."""
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # PETSc, which a command may load later, would take the signal for a crash, and say so at length.
    os.environ["PETSC_OPTIONS"] = f"{os.environ.get('PETSC_OPTIONS', '')} -no_signal_handler".strip()
    app()
