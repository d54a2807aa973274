"""A comparison of two runs as sections, for the same formats as a run."""

from __future__ import annotations

from collections.abc import Sequence

from pybatch.answer.changes import FIGURES, Change, Comparison
from pybatch.base import numerals as n
from pybatch.report.layout import Section, Table, columns

_OTHER = ("workload", "model", "device", "machine")  # differences after which a change says little of the code


def sections(comparison: Comparison) -> list[Section]:
    """What changed, and throughput batch by batch."""
    figures = [(n.words(change.figure), change) for change in comparison.changes]
    other = tuple(text for text in comparison.differences if text.startswith(_OTHER))
    notes = tuple(f"differs between the runs: {text}" for text in comparison.differences if text not in other)
    disturbed = [text for text in other if text.startswith("machine")]
    what = [*(["not of the same thing"] if len(disturbed) < len(other) else []), *(["disturbed"] if disturbed else [])]
    title = f"{' and '.join(what).capitalize()}: what changed may be that"
    made = [Section(title, notes=other)] if other else []
    made.append(Section("Change, new against old", _table("figure", figures), notes=notes))
    if comparison.batches:
        batches = [(n.count(batch), change) for batch, change in comparison.batches]
        made.append(Section("Throughput by batch", _table("batch", batches)))
    return made


def _table(what: str, rows: Sequence[tuple[str, Change]]) -> Table:
    return columns(
        {
            what: [name for name, _ in rows],
            "old": [FIGURES[change.figure].form(change.old) for _, change in rows],
            "new": [FIGURES[change.figure].form(change.new) for _, change in rows],
            "change, % [95 % interval]": [_ratio(change) for _, change in rows],
            "judged": [_judged(change) for _, change in rows],
        }
    )


def _ratio(change: Change) -> str:
    span = change.low is not None and change.high is not None
    ends = f" [{_percent(change.low or 0)} to {_percent(change.high or 0)}]" if span else ""
    return _percent(change.ratio) + ends


def _percent(ratio: float) -> str:
    change = 100 * (ratio - 1)
    return f"{change:+.1f}" if abs(change) < 100 else f"{change:+.0f}"


def _judged(change: Change) -> str:
    if change.low is None:
        return n.MISSING
    if not change.significant:
        return "unclear"
    better = FIGURES[change.figure].better
    if better is None:
        return "changed"
    return "better" if (change.ratio > 1) == better else "worse"
