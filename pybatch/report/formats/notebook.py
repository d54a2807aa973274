"""A record as a piece of HTML for a notebook's output: tables and words, no scripts, no styles outside itself."""

from __future__ import annotations

from dataclasses import fields

from pybatch.records import Run, StepsFit, ThroughputFit, Verdict
from pybatch.records.figure import figure_of
from pybatch.report.formats.html import as_runs, resource, run_text, section_html
from pybatch.report.layout import Section, details_of, notes_of
from pybatch.report.run import sections

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
    # Every selector of the style names the class: the rest of a notebook keeps its own.
    return f'<div class="pybatch"><style>{resource("notebook.css")}</style>\n{body}</div>'


def _fit(fit: StepsFit | ThroughputFit) -> Section:
    """Every figure of a fit, its bounds beside it."""
    lines = []
    for field in fields(fit):
        figure, value = figure_of(type(fit), field.name), getattr(fit, field.name)
        if field.name != "notes" and value not in (None, {}, ()):
            lines.append((figure.label, figure.form(value)))
    told = getattr(fit, "notes", ())
    return Section(_NAMES[type(fit).__name__], lines=tuple(lines), notes=notes_of(told), details=details_of(told))
