"""The report: one HTML file with everything in it, for a browser without a network.

Text comes first and stands without JavaScript; every plot has its table behind it. The page forbids itself any request
by a content security policy.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

from pybatch.base import numerals as n
from pybatch.base.arguments import typed
from pybatch.base.codec import encode
from pybatch.base.errors import UsageError
from pybatch.records import Capacity, Convergence, Environment, Reason, Run, Schedule, Verdict
from pybatch.records.figure import figure_of
from pybatch.report import factors
from pybatch.report.layout import Section, Table
from pybatch.report.output import Output
from pybatch.report.plot import SHADES, Plot
from pybatch.report.record import as_runs
from pybatch.report.run import answer_of, plots, sections, title, titles
from pybatch.report.verdict import first_figures, rest_of


@typed
def write_report(records: Sequence[object] | object, path: str | Path) -> None:
    """Write one self-contained HTML file.

    Args:
        records: runs, in the order they shall be shown. Loose results (`Capacity`, `NoiseScale`, `Convergence`,
            `Verdict`) are taken together as one run without an environment.
        path: where to write; an existing file is replaced in one step.

    Raises:
        UsageError: there is nothing to report, something is not a record, or the file can't be written.
    """
    runs = as_runs(records if isinstance(records, Sequence) else [records])
    with Output(Path(path)) as output:
        output.write(page(runs))


def page(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    drawn = [plots(run, number) for number, run in enumerate(runs)]
    names: list[str | None] = [*titles(runs)] if len(runs) > 1 else [None]  # the page's own heading names a single one
    told = zip(runs, drawn, names, strict=True)
    parts = [_run(run, own, number, name) for number, (run, own, name) in enumerate(told)]
    heading = title(runs[0]) if len(runs) == 1 else f"{len(runs)} runs"
    nav = ""
    if len(runs) > 1:
        nav = "<nav>" + "".join(f'<a href="#run-{i}">{_text(name)}</a>' for i, name in enumerate(names)) + "</nav>"
    parts += [f"<section>\n{section_html(section)}</section>\n" for section in factors.sections(runs)]
    data = [as_data(plot) for own in drawn for plot in own if plot.missing is None]
    script = resource("page.js")
    library = plotly() if data else ""
    allowed = " ".join(_digest(code) for code in (library, script)) if data else "'none'"
    policy = "; ".join(
        [
            "default-src 'none'",
            "style-src 'unsafe-inline'",  # plotly sets styles
            "img-src data: blob:",  # plotly's own download button
            f"script-src {allowed}",
        ]
    )
    drawing = (
        f'<script type="application/json" id="shades">{embedded(SHADES)}</script>\n'
        f'<script type="application/json" id="figures">{embedded(data)}</script>\n'
        f"<script>{library}</script>\n<script>{script}</script>\n"
        if data
        else ""
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>pybatch: {_text(heading)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{resource('page.css')}</style>\n</head>\n<body>\n"
        f"<h1>{_text(heading)}</h1>\n{nav}\n{''.join(parts)}{drawing}</body>\n</html>\n"
    )


def as_data(plot: Plot) -> dict[str, object]:
    """What `page.js` draws a plot from."""
    return {"name": plot.name, "traces": plot.traces, "layout": plot.layout}


def resource(name: str) -> str:
    """The text of a file beside this one."""
    return files("pybatch.report").joinpath(name).read_text(encoding="utf-8")


def plotly() -> str:
    """plotly.js as text; raises UsageError where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError("the HTML report needs plotly, which is not installed. Run: pip install plotly") from None
    code: str = get_plotlyjs()
    return code


def _digest(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def embedded(data: object) -> str:
    """JSON that can't end its script element."""
    return json.dumps(encode(data), separators=(",", ":")).replace("<", "\\u003c")


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _run(run: Run, drawn: Sequence[Plot], number: int, name: str | None) -> str:
    found = sections(run)
    when = f'<p class="soft">{_text(n.when(run.created))}</p>\n' if run.created else ""
    incomplete = "" if run.complete else "<p><strong>Incomplete:</strong> the notes below say what is missing.</p>\n"
    heading = f"<h2>{_text(name)}</h2>\n" if name is not None else ""
    parts = [f'<section id="run-{number}">\n{heading}{when}{incomplete}']
    if (answer := answer_of(run)) is not None:
        parts.append(_answer(answer))
    parts += [_plot(plot) for plot in drawn]
    parts += [section_html(section) for section in found]
    if run.environment is not None:
        parts.append(_provenance(run.environment, run.capacity or run.convergence))
    return "".join([*parts, "</section>\n"])


def _answer(verdict: Verdict | Schedule) -> str:
    """The verdict in a box: what it says, its figures, and the chain behind each on demand."""
    if isinstance(verdict, Schedule):
        said, why = _text(verdict.answer), _text(verdict.because)
        return f'<div class="answer">\n<p class="said">{said}</p>\n<p>{why}</p>\n</div>\n'
    cells = "".join(
        f'<div><div class="name">{_text(name)}</div><div class="value">{_text(value)}</div>'
        f'<div class="band">{_text(band)}</div></div>'
        for name, value, band in first_figures(verdict)
    )
    whys = "".join(_why(reason) for reason in verdict.reasons)
    large, bracket, reasons = verdict.answer.partition(" (")
    small = f"Why {verdict.confidence.level}: {reasons.removesuffix(').')}." if verdict.confidence and bracket else ""
    large = f"{large}." if bracket else large
    return (
        f'<div class="answer">\n<p class="said">{_text(large or verdict.text)}</p>\n'
        f"{f'<p>{_text(small)}</p>' if small else ''}\n"
        f"<p>{_text(verdict.because)}</p>\n"
        f'<div class="figures">{cells}</div>\n'
        f"{''.join(f'<p class=soft>{_text(line)}</p>' for line in [rest_of(verdict)] if line)}\n"
        f"{_details('How each figure came about', whys) if whys else ''}</div>\n"
    )


def _why(reason: Reason) -> str:
    inputs = "".join(
        f"<tr><th>{_text(name.replace('_', ' '))}</th><td>{_text(n.plain(value))}</td></tr>"
        for name, value in reason.inputs.items()
    )
    name = figure_of(Verdict, reason.figure).name
    return f"<h3>{_text(name)} <span class='soft'>({_text(reason.evidence)})</span></h3><p>{_text(reason.text)}</p>" + (
        f"<table class='pairs'>{inputs}</table>" if inputs else ""
    )


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>\n{body}</details>\n"


def _plot(plot: Plot) -> str:
    head = f"<figure>\n<h3>{_text(plot.title)}</h3>\n"
    if plot.missing is not None:
        return f"{head}<figcaption>Not drawn: {_text(plot.missing)}</figcaption>\n</figure>\n"
    table = _details("Table", _table(plot.table)) if plot.table is not None else ""
    label = _text(plot.caption)
    return (
        f'{head}<div class="plot" id="{_text(plot.name)}" role="img" aria-label="{label}"></div>\n'
        f"<figcaption>{label}</figcaption>\n{table}</figure>\n"
    )


def _table(table: Table) -> str:
    heads = "".join(f"<th>{_text(head)}</th>" for head in table.heads)
    rows = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody></table></div>\n'


def run_text(run: Run) -> str:
    """A run's words and tables, without figures: escaped HTML."""
    first = answer_of(run)
    answer = _answer(first) if first is not None else ""
    return "".join([f"<h1>{_text(title(run))}</h1>\n", answer, *map(section_html, sections(run))])


def section_html(section: Section) -> str:
    """A section as escaped HTML."""
    if not (section.table or section.lines or section.text or section.notes or section.details):
        return ""
    parts = [f"<h2>{_text(section.title)}</h2>\n"]
    if section.text and section.title != "Verdict":  # the verdict's words stand at the top
        parts.append(f"<p>{_text(section.text)}</p>\n")
    if section.table is not None:
        parts.append(_table(section.table))
    parts.append(_pairs(section.lines))
    if section.notes:
        parts.append(_notes(section.notes))
    if section.details:
        parts.append(_details(f"Details: {n.counted(len(section.details), 'note')}", _notes(section.details)))
    return "".join(parts)


def _notes(notes: Sequence[str]) -> str:
    return '<ul class="notes">' + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul>\n"


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    body = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="pairs">{body}</table></div>\n'


def _provenance(environment: Environment, measured: Capacity | Convergence | None) -> str:
    """Everything about where and how a run took place, so that someone else can repeat it."""
    rows: list[tuple[str, str]] = []
    parts = (
        ("", environment),
        ("device ", measured.device if measured else None),
        ("workload ", measured.workload if measured else None),
    )
    for prefix, record in parts:
        if record is None:
            continue
        for field in fields(record):
            value = getattr(record, field.name)
            if value not in (None, "", {}):
                figure = figure_of(type(record), field.name)
                rows.append((prefix + figure.label, figure.form(value)))
    return _details("Provenance", _pairs(rows))
