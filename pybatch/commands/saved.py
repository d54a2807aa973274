"""Commands on saved records, which need no torch: `pybatch report` and `pybatch compare`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from pybatch.answer import changes
from pybatch.answer.changes import Condition, broken, parse_condition
from pybatch.answer.merge import join
from pybatch.base.errors import UsageError, unknown
from pybatch.base.numerals import counted
from pybatch.base.plain import visible
from pybatch.base.terminal import tell
from pybatch.commands import flags
from pybatch.commands.assignments import parse_targets
from pybatch.commands.interrupting import termination_heard
from pybatch.commands.measuring import BROKEN, DONE, check_price
from pybatch.commands.printing import ResultConsole, drop_stdout
from pybatch.noise.trajectory import read_trajectory
from pybatch.records import NoiseTrajectory, Run
from pybatch.report.changes import sections
from pybatch.report.formats.text import SUFFIXES, markdown, print_sections, render_all
from pybatch.report.output import Output
from pybatch.report.run import answer_of, titles
from pybatch.sweep.archive import is_store, read_store
from pybatch.training.trajectory import SPLITS, split_of


def read_run(path: Path) -> Run:
    """A saved run; raises UsageError with the file's name where it is not one."""
    try:
        return Run.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{str(path)!r} is not text. Give a file written by 'pybatch bench -o run.json'.") from None
    except UsageError as error:
        raise UsageError(f"{str(path)!r}: {error}") from None


def read_records(path: Path, targets: Mapping[str, float] | None = None) -> Sequence[Run | NoiseTrajectory]:
    """What a file holds: a saved run, the noise trajectory of a training run, or the sweeps of a store.

    Raises:
        UsageError: it is none of these, or a store without targets; the message has the file's name.
    """
    if is_store(path):
        return read_store(path, targets)
    if path.suffix != ".jsonl":
        return [_at(path, read_run(path), targets)]
    try:
        return [read_trajectory(path)]
    except UsageError as error:
        raise UsageError(f"{error} A run saved as .jsonl is for other programs: save it as .json too.") from None


def read_sweep(path: Path) -> Run:
    """The one sweep that a saved run or a store holds; raises UsageError where it holds none or several."""
    found = [run for run in read_records(path) if isinstance(run, Run) and run.convergence and run.convergence.curves]
    if len(found) != 1:
        many = f"{len(found)} sweeps" if found else "no sweep"
        raise UsageError(
            f"{str(path)!r} holds {many}. Give the record of one, as 'pybatch sweep -o RUN.json' writes it."
        )
    return found[0]


def _at(path: Path, run: Run, targets: Mapping[str, float] | None) -> Run:
    """A saved run; raises UsageError where it has steps to other targets than those asked for."""
    curves = run.convergence.curves if run.convergence is not None else ()
    own = {curve.split: curve.target for curve in curves if curve.target is not None}
    if targets is not None and own and own != targets:
        said = ",".join(f"{split}={loss:g}" for split, loss in own.items())
        raise UsageError(
            f"--target: {str(path)!r} has the steps to {said} and no losses, from which those to another target could "
            "be read. Give the store of its sweep (--store FILE), or leave --target out."
        )
    return run


def report(
    records: Annotated[
        list[Path],
        typer.Argument(help="Saved runs (FILE.json), stores of sweeps (FILE.db), a noise trajectory (FILE.jsonl)."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="FILE.html (default: report.html), .md, .csv, .jsonl, .json or .txt."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for every figure as a PNG file; needs Chromium.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Losses to report a store at: 'train=0.1'. Default: those of its sweeps. Not for FILE.json."),
    ] = None,
    verbose: flags.Verbose = False,
    price: flags.Price = None,
) -> None:
    """One self-contained HTML page from saved runs and sweeps, for a browser without a network; or text, or figures.

    A run and a sweep of the same workload on the same device become one, with a verdict that stands on the sweep.
    """
    from pybatch.report.formats.html import page
    from pybatch.report.record import as_runs

    check_price(price)
    targets = parse_targets(target) if target is not None else None
    for split in targets or ():
        if split_of(split) not in SPLITS:
            raise unknown("target split", split_of(split), SPLITS)
    if output is None and png is None:
        output = Path("report.html")
    format_ = _report_format(output) if output is not None else None
    runs = as_runs([record for path in records for record in _told(path, read_records(path, targets))])
    if price is not None:
        runs = [replace(run, price=price) for run in runs]
    if output is not None and format_ is not None:
        with termination_heard(), Output(output) as file:
            # Rows are of one kind each; all else is of one run, whose verdict may stand on both measurements.
            shown = runs if format_ in ("csv", "jsonl") else join(runs)
            file.write(page(shown) if format_ == "html" else render_all(shown, format_, verbose))
        for run, name in zip(shown, titles(shown), strict=True):
            if (found := answer_of(run)) is not None:
                print(visible(f"pybatch: {name}: {found.answer}"), file=sys.stderr)
        print(visible(f"pybatch: wrote {output}"), file=sys.stderr)
    if png is not None:
        from pybatch.report.formats.png import write_pngs

        written = write_pngs(join(runs), png)
        print(visible(f"pybatch: wrote {counted(len(written), 'figure')} to {png}"), file=sys.stderr)


def _report_format(output: Path) -> str:
    suffix = output.suffix.lower()
    if suffix in (".html", ".htm"):
        return "html"
    if suffix in (".png", ".svg", ".pdf"):
        raise UsageError(f"output {str(output)!r} would hold one figure of several. Give a folder: --png FOLDER.")
    if suffix not in SUFFIXES:
        known = ", ".join([".html", *SUFFIXES])
        raise UsageError(f"output {str(output)!r} ends in no format known here ({known}). Give it such an ending.")
    return SUFFIXES[suffix]


def _told(path: Path, records: Sequence[Run | NoiseTrajectory]) -> Sequence[Run | NoiseTrajectory]:
    if len(records) > 1:
        tell(visible(f"{path} holds {len(records)} sweeps; each has a part of its own"))
    return records


def compare(
    old: Annotated[Path, typer.Argument(help="The run to compare with.")],
    new: Annotated[Path, typer.Argument(help="The run that may have changed.")],
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="Exit with status 1 if a figure changed by more: 'throughput:-3%'. May be repeated."),
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="table, md or json.")] = "table",
) -> None:
    """What changed between two saved runs, with intervals."""
    conditions = [parse_condition(text) for text in fail_on or []]
    if format_ not in ("table", "md", "json"):
        raise UsageError(f"format {format_!r} is not known here. Use one of: table, md, json.")
    raise typer.Exit(tell_changes(read_run(old), read_run(new), conditions, format_))


def tell_changes(old: Run, new: Run, conditions: Sequence[Condition], format_: str = "table") -> int:
    """Print what changed; the exit status says whether every condition holds."""
    comparison = changes.compare(old, new)
    failures = broken(conditions, comparison)
    parts = sections(comparison)
    try:
        if format_ == "json":
            print(json.dumps(asdict(comparison) | {"broken": failures}, indent=2))
        elif format_ == "md":
            sys.stdout.write(markdown("pybatch compare", parts))
        else:
            print_sections(parts, ResultConsole())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; whether a condition holds is still to be told
        drop_stdout()
    for failure in failures:
        tell(visible(failure))
    return BROKEN if failures else DONE
