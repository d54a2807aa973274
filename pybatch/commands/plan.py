"""`pybatch plan`: a global batch as micro-batch x accumulation x devices, which needs no torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pybatch.answer.plan import MOST_DEVICES, MOST_EXAMPLES, exact, of_record, plan_accumulation, sentence
from pybatch.base.errors import UsageError, unknown
from pybatch.base.numerals import count, counted, interval
from pybatch.base.plain import visible
from pybatch.base.terminal import tell
from pybatch.commands.measuring import check_between
from pybatch.commands.saved import read_run
from pybatch.records import AccumulationPlan, Run
from pybatch.report.snippets import LAUNCHED, TRAINERS, snippet


def plan(
    record: Annotated[
        Path | None,
        typer.Argument(help="A saved run: its best batch, devices worth it and largest batch, where not given."),
    ] = None,
    global_batch: Annotated[int | None, typer.Option(help="Examples of an update, over all devices.")] = None,
    devices: Annotated[int | None, typer.Option(help="That share it. Default: the record's, else 1.")] = None,
    largest: Annotated[
        int | None, typer.Option(help="Examples that one device takes in a pass at most. Default: the record's.")
    ] = None,
    for_: Annotated[
        str | None, typer.Option("--for", help=f"Print it as options of: {', '.join(TRAINERS)}. Default: in words.")
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="table or json; without --for. Default: table.")
    ] = None,
) -> None:
    """Micro-batch, accumulation and devices for a global batch, as your trainer spells them."""
    if for_ is not None and for_ not in TRAINERS:
        raise unknown("--for", for_, TRAINERS)
    if for_ is not None and format_ is not None:
        raise UsageError(f"--for {for_} prints options, and --format {format_} a plan. Give one of them.")
    if format_ not in (None, "table", "json"):
        raise UsageError(f"format {format_!r} is not known here. Use one of: table, json.")
    check_between("global batch", global_batch, 1, MOST_EXAMPLES)
    check_between("devices", devices, 1, MOST_DEVICES)
    check_between("largest", largest, 1, MOST_EXAMPLES)
    run = read_run(record) if record is not None else None
    if run is None and global_batch is None:
        raise UsageError("no batch was given. Give --global-batch N, or a record of 'pybatch bench' to take it from.")
    made, notes = _planned(run, global_batch, devices, largest)
    unit = run.capacity.workload.unit if run is not None and run.capacity and run.capacity.workload else "examples"
    told = sentence(made, unit)
    if for_ is not None:
        sys.stdout.write(snippet(made, for_))
        if made.devices > 1 and for_ in LAUNCHED:
            notes.append(f"{LAUNCHED[for_]} must be {made.devices}")
        tell(visible(told))
    elif format_ == "json":
        print(json.dumps(asdict(made), indent=2))
    else:
        print(visible(told))
    for note in notes:
        tell(visible(note))


def _planned(
    run: Run | None, wanted: int | None, devices: int | None, largest: int | None
) -> tuple[AccumulationPlan, list[str]]:
    """The plan, and what a reader must know of it."""
    notes = []
    capacity = run.capacity if run is not None else None
    timed = [p.batch for p in capacity.batches if p.status == "ok"] if capacity is not None else []
    if largest is None and capacity is not None and capacity.max_batch is not None and not capacity.max_batch_verified:
        notes.append(f"the largest batch that fits, {count(capacity.max_batch)}, is predicted; it was not run")
    if wanted is not None:
        devices = devices or 1
        if largest is None and (capacity is None or capacity.max_batch is None):
            largest = max(1, wanted // devices)
            if largest > max(timed, default=0):
                fits = f"whether {count(largest)} fit a device is not known: "
                notes.append(f"{fits}give a record of 'pybatch bench', or --largest N")
        notes += _past_worth(run, devices)
        return plan_accumulation(capacity, wanted, devices, largest=largest), notes
    assert run is not None
    advised, devices = of_record(run, devices)
    notes += _past_worth(run, devices)
    most = largest if largest is not None else capacity.max_batch if capacity is not None else None
    if most is None and timed:  # what was run fits
        most = largest = max(timed)
        notes.append(f"the largest batch that fits is not known; {count(most)} was timed")
    if most is None:
        raise UsageError("the record has no largest batch that fits, which bounds a micro-batch. Give --largest N.")
    batch = exact(advised, devices, most)
    notes.append(f"{count(advised)} on {counted(devices, 'device')} is the batch that the record advises")
    if batch != advised:
        notes.append(f"{count(batch)} is the nearest to it that divides into equal micro-batches")
    return plan_accumulation(capacity, batch, devices, largest=largest), notes


def _past_worth(run: Run | None, devices: int) -> list[str]:
    """What to say where the record finds fewer devices worth it."""
    verdict = run.verdict if run is not None else None
    useful = verdict.useful_devices if verdict is not None else None
    if verdict is None or useful is None or devices <= useful:
        return []
    span = interval(verdict.useful_devices_low, verdict.useful_devices_high, count)
    found = f"{counted(useful, 'device')} {span}".strip()
    return [f"{counted(devices, 'device')}: the record finds {found} worth it, not {count(devices)}"]
