"""Branches as a section of the report."""

from __future__ import annotations

from pybatch.base import numerals as n
from pybatch.records import Convergence
from pybatch.report.layout import Section, Table


def section(steps: Convergence, unit: str) -> Section:
    """One row a checkpoint: the loss there, the critical batch with its interval, the batch within the tolerance."""
    rows, notes = [], []
    for at in steps.branches:
        fit = at.fit
        critical = n.number(fit.critical_batch) if fit else n.MISSING
        ends = n.interval(fit.low, fit.high) if fit else ""
        largest = f"{n.count(at.largest)} {n.interval(at.largest_low, at.largest_high, n.count)}"
        rows.append((n.count(at.step), n.number(at.loss), critical, ends, largest.strip()))
        for note in (*at.notes, *(fit.notes if fit else ())):
            notes.append(f"step {n.count(at.step)}, {note.figure}: {note.text}")
    first = steps.branches[0]
    within = f"within {n.share(first.tolerance)}"
    lines = (
        ("base batch", f"{n.count(first.base_batch)} {unit}"),
        ("repeats", n.count(steps.seeds)),
        (
            "branches",
            f"batches {', '.join(n.count(p.batch) for p in first.points)}, {n.count(first.window)} {unit} each",
        ),
    )
    table = Table(("step", "loss", "critical batch", "95 %", within), tuple(rows))
    notes += [f"{note.figure}: {note.text}" for note in steps.notes]
    return Section("Critical batch along the run", table, lines, notes=tuple(notes))
