"""`pybatch schedule`: batch sizes by stages from what a record holds along a run; needs no torch."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from pybatch.answer.course import Course, course_of, law
from pybatch.answer.schedule import COST, plan_schedule, rate_rule_of
from pybatch.base.errors import UsageError, unknown
from pybatch.base.plain import said, visible
from pybatch.base.terminal import tell
from pybatch.commands import flags
from pybatch.commands.measuring import Delivery, check_between
from pybatch.commands.saved import read_records
from pybatch.records import NoiseTrajectory, Run
from pybatch.report.output import Output
from pybatch.report.stages import TRAINERS, staged

_MOST = 2**40


def schedule(
    record: Annotated[
        Path | None,
        typer.Argument(help="A run with a noise scale or branches along it: of watch or branch, or a trajectory."),
    ] = None,
    steps: Annotated[float | None, typer.Option(help="Of the run to come, at the batch of the record.")] = None,
    examples: Annotated[float | None, typer.Option(help="Of the run to come, in place of --steps.")] = None,
    cost: Annotated[
        float, typer.Option(help="Examples above the fewest that any batch needs, as a share; more buys fewer steps.")
    ] = COST,
    law_: Annotated[
        str | None,
        typer.Option("--law", help="a,b: the critical batch is a D^b after D examples; in place of a record."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Of the run as it is. Default: the record's.")] = None,
    least: Annotated[int | None, typer.Option("--min-batch", help="Smallest batch. Default: none.")] = None,
    most: Annotated[int | None, typer.Option("--max-batch", help="Largest batch. Default: the critical batch.")] = None,
    devices: Annotated[int, typer.Option(help="That share the batch.")] = 1,
    rule: Annotated[
        str | None, typer.Option("--rate", help="constant, linear or sqrt. Default: by the optimizer.")
    ] = None,
    for_: Annotated[str | None, typer.Option("--for", help=f"Print it as options of: {', '.join(TRAINERS)}.")] = None,
    sequence: Annotated[
        int | None, typer.Option("--sequence-length", help="Tokens of an example, for trainers that count in them.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the record's page here, with the schedule.")] = None,
    format_: flags.Format = None,
    output: flags.Output = None,
    verbose: flags.Verbose = False,
) -> None:
    """A batch-size schedule: fewer steps for the same examples, from what was measured along a run."""
    if for_ is not None and for_ not in TRAINERS:
        raise unknown("--for", for_, TRAINERS)
    if for_ is not None and format_ is not None and output is None:
        raise UsageError(f"--for {for_} prints options, and --format {format_} a record. Give one of them, or -o FILE.")
    for name, value in (
        ("batch", batch),
        ("--min-batch", least),
        ("--max-batch", most),
        ("--sequence-length", sequence),
    ):
        check_between(name, value, 1, _MOST)
    check_between("devices", devices, 1, 2**20)
    with Delivery(format_, output, True, verbose) as delivery, Output(html) if html is not None else nullcontext():
        run, course = _course(record, law_, batch, steps, examples)
        fits = run.capacity.max_batch if run is not None and run.capacity is not None else None
        found = plan_schedule(
            course,
            steps=steps,
            examples=examples,
            cost=cost,
            least=least,
            most=most,
            fits=fits,
            devices=devices,
            rate_rule=rule or (rate_rule_of(run) if run is not None else "sqrt"),
        )
        made = datetime.now(UTC).isoformat(timespec="seconds")
        delivery.run = Run(made, None, batch_schedule=found)
        if for_ is None:
            status = delivery.deliver()
        else:
            sys.stdout.write(staged(found, for_, sequence))
            tell(visible(str(found)))
            status = delivery.keep()
        if html is not None:
            from pybatch.report.formats.html import write_report

            write_report([replace(run or delivery.run, batch_schedule=found)], html)
            print(visible(f"pybatch: wrote {html}"), file=sys.stderr)
    raise typer.Exit(status)


def _course(
    record: Path | None, law_: str | None, batch: int | None, steps: float | None, examples: float | None
) -> tuple[Run | None, Course]:
    """What the record holds along its run, or what the law says."""
    if (record is None) == (law_ is None):
        raise UsageError("give a record, RUN.json, or --law a,b --batch N, one of them.")
    if law_ is not None:
        if batch is None:
            raise UsageError("--law needs the batch of the run as it is: add --batch N.")
        length = examples if examples is not None else (steps or 0) * batch
        check_between("length of the run", length, 1, _MOST)
        return None, law(*_pair(law_), length, batch)
    assert record is not None
    runs = read_records(record)
    if len(runs) != 1:
        raise UsageError(f"{str(record)!r} holds {len(runs)} runs. Give a file of one.")
    [one] = runs
    run = Run("", None, trajectory=one) if isinstance(one, NoiseTrajectory) else one
    return run, course_of(run, batch)


def _pair(text: str) -> tuple[float, float]:
    """a,b as typed."""
    try:
        a, b = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--law {said(text)} is no pair of numbers. Write a,b, such as 0.3,0.5.") from None
    return a, b
