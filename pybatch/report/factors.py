"""What moves the critical batch, from several sweeps, as a section of the report."""

from __future__ import annotations

from collections.abc import Sequence

from pybatch.answer.factors import Effect, effects
from pybatch.base import numerals as n
from pybatch.records import Run
from pybatch.report.layout import Section

TITLE = "What moves the critical batch"


def sections(runs: Sequence[Run]) -> list[Section]:
    """One line a dial and pair of levels; none where no two sweeps differ in one dial alone."""
    found = effects(runs)
    if not found:
        return []
    lines = tuple((f"{e.dial} {_level(e.old)} to {_level(e.new)}", _text(e)) for e in found)
    note = "each is the ratio of critical batches of sweeps that differ in this dial alone, both with tuned rates"
    return [Section(TITLE, lines=lines, details=(note,))]


def _text(e: Effect) -> str:
    pairs = f", mean of {e.pairs} pairs" if e.pairs > 1 else ""
    doubt = "" if e.determined else "; undetermined"
    ratio = f"{n.number(e.ratio)} {n.interval(e.low, e.high)}".strip()
    return f"{ratio} times, {e.split} loss {n.number(e.target)}{pairs}{doubt}"


def _level(value: float | str) -> str:
    return value if isinstance(value, str) else n.number(value)
