"""A comparison of two runs as sections, for the same formats as a run."""

from __future__ import annotations

from pybatch.answer.changes import FIGURES, Change, Comparison
from pybatch.base import numerals as n
from pybatch.report.layout import Section, Table


def sections(comparison: Comparison) -> list[Section]:
    """What changed, and throughput batch by batch."""
    rows = tuple(_row(change.figure.replace("_", " "), change) for change in comparison.changes)
    made = [
        Section(
            "Change, new against old",
            Table(("figure", "old", "new", "change, % [95 % interval]", ""), rows),
            notes=tuple(f"differs between the runs: {text}" for text in comparison.differences),
        )
    ]
    if comparison.batches:
        per_batch = tuple(_row(n.count(batch), change) for batch, change in comparison.batches)
        made.append(
            Section("Throughput by batch", Table(("batch", "old", "new", "change, % [95 % interval]", ""), per_batch))
        )
    return made


def _row(name: str, change: Change) -> tuple[str, ...]:
    ratio = _percent(change.ratio)
    if change.low is not None and change.high is not None:
        ratio += f" [{_percent(change.low)} to {_percent(change.high)}]"
    return name, n.number(change.old), n.number(change.new), ratio, _judgment(change)


def _percent(ratio: float) -> str:
    change = 100 * (ratio - 1)
    return f"{change:+.1f}" if abs(change) < 100 else f"{change:+.0f}"


def _judgment(change: Change) -> str:
    if change.low is None:
        return n.MISSING
    if not change.significant:
        return "unclear"
    better = FIGURES[change.figure]
    if better is None:
        return "changed"
    return "better" if (change.ratio > 1) == better else "worse"
