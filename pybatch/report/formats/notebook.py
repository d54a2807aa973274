"""A record as a piece of HTML for a notebook's output: tables and words, no scripts, no styles outside itself."""

from __future__ import annotations

from dataclasses import fields

from pybatch.base.numerals import number
from pybatch.records import Run, StepsFit, ThroughputFit, Verdict
from pybatch.report.formats.html import as_runs, resource, run_text, section_html
from pybatch.report.layout import Section
from pybatch.report.sections import sections

_NAMES = {"StepsFit": "Steps to target against batch size", "ThroughputFit": "Step time against batch size"}


def render(record: object) -> str:
    """The HTML of one record.

    Raises:
        UsageError: it is no record of a run, a part of one, or a fit.
    """
    if isinstance(record, StepsFit | ThroughputFit):
        body = section_html(_fit(record))
    elif isinstance(record, Run):
        body = run_text(record)
    else:
        [run] = as_runs([record])
        body = run_text(run) if isinstance(record, Verdict) else "".join(map(section_html, sections(run)))
    # Every rule of the style names the class: the rest of a notebook keeps its own.
    return f'<div class="pybatch"><style>{resource("notebook.css")}</style>\n{body}</div>'


def _fit(fit: StepsFit | ThroughputFit) -> Section:
    """Every figure of a fit, its bounds beside it."""
    values = {f.name: getattr(fit, f.name) for f in fields(fit)}
    lines = []
    for name, value in values.items():
        if name in ("notes", "regimes", "measured_regimes") or value in (None, {}, ()):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number(item)}" for key, item in value.items())
        lines.append((name.replace("_", " "), value if isinstance(value, str) else number(value)))
    for name in ("regimes", "measured_regimes"):
        if values.get(name):
            lines.append((name.replace("_", " "), ", ".join(f"{batch}: {label}" for batch, label in values[name])))
    notes = tuple(f"{note.figure}: {note.text}" for note in values.get("notes", ()))
    return Section(_NAMES[type(fit).__name__], lines=tuple(lines), notes=notes)
