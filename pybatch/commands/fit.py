"""`pybatch fit`: the critical batch from a user's own logs, which needs no torch."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from pybatch.base.arguments import check_seed
from pybatch.commands import flags
from pybatch.commands.measuring import Delivery
from pybatch.jobs.fit import run_fit
from pybatch.report.output import Output


def fit(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.csv",
            help="A line a run, under a head: batch,steps[,seed][,rate][,cap][,before][,status], or reached as true or "
            "false. Of a run that did not reach the target, steps are inf; of one that diverged, 'diverged'.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="hyperbola, power, power-law, smooth, u-turn, ... Default: by AICc, the simpler where that is close."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report here as well: one HTML page.")] = None,
    seed: flags.Seed = 0,
    format_: flags.Format = None,
    output: flags.Output = None,
    verbose: flags.Verbose = False,
) -> None:
    """The critical batch from your own logs: steps to a target at several batch sizes, from a CSV file."""
    check_seed(seed)
    with Delivery(format_, output, True, verbose) as delivery, Output(html) if html is not None else nullcontext():
        delivery.run, delivery.kept = run_fit(file, model=model, seed=seed), html
        status = delivery.deliver()
        if html is not None:
            from pybatch.report.formats.html import write_report

            write_report([delivery.run], html)
            print(f"pybatch: wrote {html}", file=sys.stderr)
    raise typer.Exit(status)
