"""Commands on saved records, which need no torch: `pybatch report` and `pybatch compare`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pybatch.commands.measuring import BROKEN, DONE
from pybatch.comparison import Condition, broken, compare_runs, parse_condition
from pybatch.errors import UsageError
from pybatch.noise.trajectory import read_trajectory
from pybatch.records import NoiseTrajectory, Run
from pybatch.report.comparison import comparison_sections
from pybatch.report.formats import markdown, print_sections


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


def read_record(path: Path) -> Run | NoiseTrajectory:
    """A saved run, or the noise trajectory of a training run."""
    return read_trajectory(path) if path.suffix == ".jsonl" else read_run(path)


def report(
    records: Annotated[
        list[Path], typer.Argument(help="Saved runs (FILE.json), and a noise trajectory (FILE.jsonl) if there is one.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """One self-contained HTML page from saved runs, for a browser without a network."""
    from pybatch.report.page import write_report

    write_report([read_record(path) for path in records], output)
    print(f"pybatch: wrote {output}", file=sys.stderr)


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
    comparison = compare_runs(old, new)
    failures = broken(conditions, comparison)
    parts = comparison_sections(comparison)
    if format_ == "json":
        print(json.dumps(asdict(comparison) | {"broken": failures}, indent=2))
    elif format_ == "md":
        sys.stdout.write(markdown("pybatch compare", parts))
    else:
        print_sections(parts, Console())
    for failure in failures:
        print(f"pybatch: {failure}", file=sys.stderr)
    return BROKEN if failures else DONE
