"""The critical batch along a run, by branches from its checkpoints."""

from __future__ import annotations

from pybatch.base import numerals as n
from pybatch.records import Branching, Convergence
from pybatch.report.layout import Section, details_of, notes_of, table


def section(steps: Convergence, unit: str) -> Section:
    """One row a checkpoint: the loss there, the critical batch with its interval, the batch within the tolerance."""
    notes: list[str] = []
    details: list[str] = []
    for at in steps.branches:
        own = (*at.notes, *(at.fit.notes if at.fit else ()))
        notes += notes_of(own, before=f"step {n.count(at.step)}, ")
        details += details_of(own, before=f"step {n.count(at.step)}, ")
    first = steps.branches[0]
    batches = ", ".join(n.count(p.batch) for p in first.points)
    lines = (
        ("tolerance", f"{n.share(first.tolerance)} of the base branch's last loss"),
        ("base batch", f"{n.count(first.base_batch)} {unit}"),
        ("repeats", n.count(steps.seeds)),
        ("branches", f"batches {batches}, {n.count(first.window)} {unit} each"),
    )
    found = table(Branching, steps.branches)
    notes, details = [*notes, *notes_of(steps.notes)], [*details, *details_of(steps.notes)]
    return Section("Critical batch along the run", found, lines, notes=tuple(notes), details=tuple(details))
