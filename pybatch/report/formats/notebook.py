"""A record as a piece of HTML for a notebook's output: tables and words, no scripts, no styles outside itself."""

from __future__ import annotations

from pybatch.records import Run, Verdict
from pybatch.report.formats.html import resource, run_text, section_html
from pybatch.report.record import as_runs, sections_of


def render(record: object) -> str:
    """The HTML of one record.

    Raises:
        UsageError: it is no record of a run, a part of one, or a fit.
    """
    if isinstance(record, Run | Verdict):
        body = run_text(as_runs([record])[0])
    else:
        body = "".join(map(section_html, sections_of(record)))
    # Every selector of the style names the class: the rest of a notebook keeps its own.
    return f'<div class="pybatch"><style>{resource("notebook.css")}</style>\n{body}</div>'
