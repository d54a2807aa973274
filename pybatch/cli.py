"""The command line: flags in, calls out. Results go to stdout, progress and errors to stderr.

Exit status: 0 done; 1 a condition of --fail-on does not hold; 2 bad arguments, a missing device, or a workload that
fails at once; 3 ran but incomplete, with what was measured written all the same; 130 interrupted before anything was
measured.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pybatch.base.errors import PybatchError
from pybatch.commands import bench, branch, saved, sweep
from pybatch.commands.measuring import BAD_INPUT

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="What batch size, on how many devices, and what does going further cost? Measured on your model and device.",
)


for command in (bench.bench, sweep.sweep, branch.branch, saved.report, saved.compare):
    app.command()(command)


@app.command()
def doctor() -> None:
    """What is compiled, which devices are there, which counters can be read, and why one can't."""
    from pybatch.commands.doctor import examine

    _print_findings(examine())


@app.command("list")
def list_() -> None:
    """The workloads and optimizers that ship."""
    from pybatch.commands.doctor import catalogue

    _print_findings(catalogue())


def _print_findings(findings: list[tuple[str, list[tuple[str, str]]]]) -> None:
    console = Console()
    width = max(len(name) for _, rows in findings for name, _ in rows)
    for heading, rows in findings:
        console.print(Text(heading, style="bold"))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(min_width=width, no_wrap=True)
        for name, text in rows:
            grid.add_row(Text(name), Text(text))
        console.print(Padding(grid, (0, 0, 0, 2)))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"pybatch {installed('pybatch')}")
        raise typer.Exit


def _shorten_spinning() -> None:
    """Waiting OpenMP threads shall spin for some 20 us, then sleep. libgomp reads this when torch is imported.

    It spins for milliseconds by default: on a machine with anything else to do, threads wait for each other's time
    slices, and a step of 0.4 ms takes 90 ms. On an idle one this changes little. A user's own setting is kept;
    the record's environment names whichever holds.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def main() -> None:
    """The `pybatch` command."""
    _shorten_spinning()
    # Closed by the caller (`>&-`): what is printed there is dropped, not taken for a fault or put on the other stream.
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign must not lose the result
    try:
        app()
    except PybatchError as error:
        print(f"pybatch: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
