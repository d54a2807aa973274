"""A run in the formats of `--format`: table, md, json, jsonl, csv."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from pybatch.base import numerals as n
from pybatch.base.errors import UsageError
from pybatch.base.plain import visible
from pybatch.records import Branching, Convergence, ConvergencePoint, Run, Schedule, Verdict, to_dict
from pybatch.report import factors
from pybatch.report.layout import Section, Table
from pybatch.report.record import sections_of
from pybatch.report.run import answer_of, sections, title

SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".md": "md", ".txt": "table"}


def format_of(path: Path) -> str:
    """The format a file's suffix asks for; UsageError where it asks for none."""
    try:
        return SUFFIXES[path.suffix.lower()]
    except KeyError:
        known = ", ".join(SUFFIXES)
        raise UsageError(
            f"output {str(path)!r} ends in no format known here ({known}). Add --format, or such an ending."
        ) from None


def render(run: Run, format_: str, verbose: bool = False) -> str:
    """The run as text in one of `FORMATS`, ending in a newline; with every note where a table is to be verbose."""
    return FORMATS[format_](run, verbose)


def printed(record: object) -> str:
    """What `print` shows of a record: a run in the table format, of a part of one its sections.

    Raises:
        UsageError: it is no record of a run, a part of one, or a fit.
    """
    if isinstance(record, Run):
        return render(record, "table").rstrip("\n")
    return _printed(lambda console: print_sections(sections_of(record), console)).rstrip("\n")


def render_all(runs: Sequence[Run], format_: str, verbose: bool = False) -> str:
    """Several runs one after another; raises UsageError for JSON, which holds one."""
    if format_ == "csv":
        return _csv_of([row for run in runs for row in _rows(run)])
    if format_ == "json" and len(runs) > 1:
        raise UsageError(f"a .json file holds one run, and these are {len(runs)}. Use .jsonl, or give one of them.")
    between = "" if format_ == "jsonl" else "\n"
    parts = [render(run, format_, verbose) for run in runs]
    if format_ in _OF_ALL:
        parts += [_OF_ALL[format_](section) for section in factors.sections(runs)]
    return between.join(parts)


def notes_in(kept: Path | None) -> str:
    """Where a reader finds the notes that were not printed, now that the run is over.

    Args:
        kept: a page, a saved record or a store that has them; None: nothing was kept.
    """
    if kept is None:
        return "--verbose, or keep them: -o run.json, --html page.html"
    where = visible(shlex.quote(str(kept)))
    if kept.suffix.lower() in (".html", ".htm"):
        return f"{where}, under Details"
    return f"'pybatch report {where}' makes a page with all of them"


def print_run(run: Run, console: Console, verbose: bool = False, *, more: str | None = None) -> None:
    """The table format of a run, the answer first, with the colours and the width of the console it goes to.

    Args:
        run: what to print.
        console: where.
        verbose: every note, not only those that change the answer.
        more: where the other notes are; None: how to have them the next time.
    """
    console.print(Text(visible(title(run)), style="bold"))
    console.print()
    answer = answer_of(run)
    if answer is not None and answer.answer:
        console.print(Padding(Text(visible(answer.answer), style="bold"), (0, 0, 0, 2)))
        console.print(Padding(Text(visible(answer.because)), (0, 0, 0, 2)))
        console.print()
    parts = sections(run)
    print_sections(parts, console, verbose)
    if left := 0 if verbose else sum(len(part.details) for part in parts):
        console.print()
        console.print(Text(f"{n.counted(left, 'more note')}: {more or notes_in(None)}", style="dim"))


def print_sections(parts: Sequence[Section], console: Console, verbose: bool = False) -> None:
    """Titles, tables, lines and notes, a blank line between sections; details where they are asked for."""
    parts = [part for part in parts if part.table or part.lines or part.text or part.notes or verbose]
    for number, section in enumerate(parts):
        if number:
            console.print()
        console.print(Text(visible(section.title), style="bold cyan"))
        for part in _abreast(_shown(section.table), console.width) if section.table is not None else ():
            console.print(_rich_table(part, console.width), crop=False)
        if section.lines:
            grid = RichTable.grid(padding=(0, 2))
            for label, value in section.lines:
                grid.add_row(Text(visible(label), style="dim"), Text(visible(value.strip())))
            console.print(Padding(grid, (0, 0, 0, 2)))
        if section.text:
            console.print()
            console.print(Padding(Text(visible(section.text, lines=True)), (0, 0, 0, 2)))
        for note in (*section.notes, *(section.details if verbose else ())):
            console.print(Padding(Text(f"· {visible(note)}", style="dim"), (0, 0, 0, 2)))


_GAP, _LEAST_GAP = 3, 2  # between the columns of a table: usual, and where it is tight


def _abreast(table: Table, width: int) -> list[Table]:
    """The table in parts that fit the width, its first column in each."""
    widths = _widths(table)
    parts = [[0]]
    for i in range(1, len(widths)):
        taken = widths[i] + sum(widths[j] + _LEAST_GAP for j in parts[-1])
        if taken > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(i)
    return [
        Table(tuple(table.heads[i] for i in part), tuple(tuple(row[i] for i in part) for row in table.rows))
        for part in parts
    ]


def _shown(table: Table) -> Table:
    """The table with control characters of names written out, before widths are taken."""
    return Table(tuple(map(visible, table.heads)), tuple(tuple(map(visible, row)) for row in table.rows))


def _widths(table: Table) -> list[int]:
    return [max(map(cell_len, column)) for column in zip(table.heads, *table.rows, strict=True)]


def _rich_table(table: Table, width: int) -> RichTable:
    widths = _widths(table)
    roomy = sum(widths) + _GAP * (len(widths) - 1) <= width
    rich = RichTable(box=box.SIMPLE, pad_edge=False, show_edge=False, padding=(0, 1) if roomy else (0, 0, 0, 1))
    for head, least in zip(table.heads, widths, strict=True):
        # A narrow terminal may wrap lines, but it must not cut figures.
        rich.add_column(Text(head), justify="right", no_wrap=True, min_width=least)
    for row in table.rows:
        rich.add_row(*(Text(cell) for cell in row))
    return rich


def _plain(run: Run, verbose: bool) -> str:
    return _printed(lambda console: print_run(run, console, verbose))


def _printed(work: Callable[[Console], None]) -> str:
    text = io.StringIO()
    work(Console(file=text, width=80, color_system=None))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _markdown(run: Run, verbose: bool) -> str:
    return markdown(title(run), sections(run), answer_of(run), verbose)


def markdown(
    heading: str, parts: Sequence[Section], answer: Verdict | Schedule | None = None, verbose: bool = False
) -> str:
    """Sections under a heading, the answer first, ending in a newline."""
    first = [f"**{_escape(answer.answer)}** {_escape(answer.because)}"] if answer is not None and answer.answer else []
    parts = [part for part in parts if part.table or part.lines or part.text or part.notes or verbose]
    return "\n\n".join([f"# {_escape(heading)}", *first, *(_markdown_section(part, verbose) for part in parts)]) + "\n"


def _markdown_section(section: Section, verbose: bool = False) -> str:
    parts = [f"## {_escape(section.title)}"]
    if section.text:
        parts.append(_escape(section.text))
    if section.table is not None:
        lines = [section.table.heads, ("--:",) * len(section.table.heads), *section.table.rows]
        parts.append("\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines))
    if section.lines:
        parts.append("\n".join(f"- **{_escape(label)}**: {_escape(value.strip())}" for label, value in section.lines))
    if notes := (*section.notes, *(section.details if verbose else ())):
        parts.append("\n".join(f"- {_escape(note)}" for note in notes))
    return "\n\n".join(parts)


def _escape(text: str) -> str:
    text = visible(text)
    for mark in "\\|<>*_`[]~&#$":
        text = text.replace(mark, "\\" + mark)
    return text


def _rows(run: Run) -> list[dict[str, object]]:
    """One flat row a batch size, each with what it was measured on; of a sweep alone, one a point of its curves.

    Of branches, one a batch size and checkpoint; of a noise trajectory, one a stretch of training.
    """
    measured = run.capacity or run.convergence
    if measured is None and run.batch_schedule is not None:
        return [to_dict(stage) for stage in run.batch_schedule.stages]
    if measured is None:
        return [to_dict(point) for point in run.trajectory.points] if run.trajectory is not None else []
    head = {
        "created": run.created,
        "device": measured.device.name if measured.device else None,
        "workload": measured.workload.name if measured.workload else None,
        "dtype": measured.workload.dtype if measured.workload else None,
    }
    if isinstance(measured, Convergence):
        return [
            head | {"rule": curve.rule, "split": curve.split, "target": curve.target} | _flat(point)
            for curve in measured.curves
            for point in curve.points
        ] + [head | row for at in measured.branches for row in _branch_rows(at)]
    return [head | to_dict(point) for point in measured.batches]


def _branch_rows(at: Branching) -> list[dict[str, object]]:
    """The branches of one checkpoint, each with what all of them together say."""
    whole: dict[str, object] = to_dict(dataclasses.replace(at, points=(), notes=(), fit=None))
    shared = {key: value for key, value in whole.items() if key not in ("points", "notes", "fit")}
    if at.fit is not None:
        shared |= {"critical_batch": at.fit.critical_batch, "low": at.fit.low, "high": at.fit.high}
    return [{"step": at.step} | to_dict(point) | shared for point in at.points]


def _flat(point: ConvergencePoint) -> dict[str, object]:
    whole: dict[str, object] = to_dict(point)
    return {key: value for key, value in whole.items() if key != "rates"}


def _cell(value: object) -> object:
    if isinstance(value, list | dict):
        return json.dumps(value)
    return visible(value) if isinstance(value, str) else value


def _csv(run: Run) -> str:
    """The batches, points of a sweep, branches, or stretches of a trajectory alone: one row each.

    All else is in the other formats.
    """
    return _csv_of(_rows(run))


def _csv_of(rows: Sequence[dict[str, object]]) -> str:
    """Rows under the names of them all, in order of appearance; what a row has not is empty, lists are JSON."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(
            text, fieldnames=list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows({k: _cell(v) for k, v in row.items()} for row in rows)
    return text.getvalue()


_PARTS = ("batches", "capacity", "noise", "convergence", "verdict")


def _jsonl(run: Run) -> str:
    """One object a line: the run, each batch or point, then the sections; "record" says which."""
    whole = to_dict(run)
    lines: list[dict[str, object]] = [{"record": "run"} | {name: whole[name] for name in whole if name not in _PARTS}]
    lines += [{"record": "point" if run.capacity is None else "batch"} | row for row in _rows(run)]
    for name in ("capacity", "noise", "convergence", "verdict"):
        section = getattr(run, name)
        if section is not None:
            lines.append({"record": name} | to_dict(section))
    return "".join(json.dumps(line) + "\n" for line in lines)


# What is said of several runs together, in the formats that are read.
_OF_ALL: dict[str, Callable[[Section], str]] = {
    "table": lambda section: _printed(lambda console: print_sections([section], console)),
    "md": lambda section: _markdown_section(section) + "\n",
}

FORMATS: dict[str, Callable[[Run, bool], str]] = {
    "table": _plain,
    "md": _markdown,
    "json": lambda run, _: run.to_json() + "\n",
    "jsonl": lambda run, _: _jsonl(run),
    "csv": lambda run, _: _csv(run),
}
