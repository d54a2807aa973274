"""Sections of a sweep: the table of steps per batch and rule, and the critical batches."""

from __future__ import annotations

from pybatch.base import numerals as n
from pybatch.records import Convergence, Curve
from pybatch.report.layout import Section, Table

_ABREAST = 3  # rules whose steps and rates fit into 80 columns
_WORDS = {"not_reached": "not reached", "diverged": "diverged"}


def sections(steps: Convergence, unit: str) -> list[Section]:
    """For each split: steps of every batch size and rule, and what was fitted to them; many rules' rates apart."""
    made = []
    for split in dict.fromkeys(curve.split for curve in steps.curves):
        curves = [c for c in steps.curves if c.split == split]
        made.append(_split(split, curves, steps, unit))
        if len(curves) > _ABREAST:
            made.append(_rates(split, curves))
    return made


def _split(split: str, curves: list[Curve], steps: Convergence, unit: str) -> Section:
    target = n.number(curves[0].target)
    batches = sorted({p.batch for curve in curves for p in curve.points})
    columns = 2 if len(curves) <= _ABREAST else 1
    heads = ("batch", *(head for curve in curves for head in (curve.rule, "rate")[:columns]))
    rows = tuple(
        (n.count(batch), *(cell for curve in curves for cell in _cells(curve, batch)[:columns])) for batch in batches
    )
    lines = [line for curve in curves for line in _lines(curve, unit, alone=len(curves) == 1)]
    if split == steps.curves[0].split and steps.optimizer:
        lines.append(("trained by", f"{steps.optimizer}, {_of(steps.trials, 'trial')}, {_of(steps.seeds, 'seed')}"))
        if steps.base_rate is not None:
            given = f"with rate {n.number(steps.base_rate)} at batch {n.count(steps.base_batch)}, as given"
            lines.append(("rules start", given))
        if any(p.reached < p.runs for curve in steps.curves for p in curve.points):
            lines.append(("in brackets", "runs that reached the target, where not all did"))
    notes = tuple(
        dict.fromkeys(
            f"{_named(curve, len(curves))}{note.figure}: {note.text}" for curve in curves for note in curve.notes
        )
    )
    if split == steps.curves[-1].split:  # the last section: what holds for all of them
        notes += tuple(f"{note.figure}: {note.text}" for note in steps.notes)
    return Section(f"Steps to {split} loss {target}", Table(heads, rows) if rows else None, tuple(lines), notes=notes)


def _rates(split: str, curves: list[Curve]) -> Section:
    batches = sorted({p.batch for curve in curves for p in curve.points})
    rows = tuple((n.count(batch), *(_cells(curve, batch)[1] for curve in curves)) for batch in batches)
    return Section(f"Learning rates, {split}", Table(("batch", *(curve.rule for curve in curves)), rows))


def _named(curve: Curve, curves: int) -> str:
    return f"{curve.rule} " if curves > 1 else ""


def _cells(curve: Curve, batch: int) -> tuple[str, str]:
    """Steps, with the reach rate in brackets where it is not full, and the learning rate; * marks a grid's edge."""
    p = next((p for p in curve.points if p.batch == batch), None)
    if p is None:
        return "", ""
    value = n.count(round(p.steps)) if p.steps is not None else _WORDS[p.status]
    if p.reached < p.runs:
        value += f" ({p.reached}/{p.runs})"
    rate = n.number(p.learning_rate, 2) + ("*" if p.edge else "") if p.learning_rate is not None else ""
    return value, rate


def _lines(curve: Curve, unit: str, alone: bool) -> list[tuple[str, str]]:
    name = "critical batch" if alone else f"critical, {curve.rule}"
    if curve.critical_batch is None:
        bound = "not known"
        if curve.low is not None:
            bound = f"at least {n.number(curve.low)} {unit}"
        elif curve.high is not None:
            bound = f"at most {n.number(curve.high)} {unit}"
        return [(name, bound)]
    text = f"{n.number(curve.critical_batch)} {n.interval(curve.low, curve.high)} {unit}"
    if curve.fit is not None and curve.fit.model is not None:
        text += f", fit: {curve.fit.model}, at least {n.number(curve.s_min)} steps"
    lines = [(name, text)]
    if curve.noise_ratio is not None:
        band = n.interval(curve.noise_ratio_low, curve.noise_ratio_high)
        lines.append(("B_simple over it", f"{n.number(curve.noise_ratio)} {band}"))
    return lines


def _of(number: int | None, what: str) -> str:
    return f"{n.MISSING} {what}s" if number is None else n.counted(number, what)
