"""One record by itself, as runs or as sections: for a page, a notebook, and `print`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from pybatch.base import numerals as n
from pybatch.base.errors import UsageError
from pybatch.records import (
    Capacity,
    Convergence,
    NoiseScale,
    NoiseTrajectory,
    Run,
    Schedule,
    StepsFit,
    ThroughputFit,
    Training,
    Verdict,
)
from pybatch.records.figure import figure_of
from pybatch.report.layout import Section, details_of, notes_of
from pybatch.report.run import sections

_FITS = {StepsFit: "Steps to target against batch size", ThroughputFit: "Step time against batch size"}
_PARTS = {  # where in a run
    Capacity: "capacity",
    NoiseScale: "noise",
    NoiseTrajectory: "trajectory",
    Convergence: "convergence",
    Training: "training",
    Schedule: "batch_schedule",
    Verdict: "verdict",
}


def as_runs(records: Sequence[object]) -> list[Run]:
    """Runs as they are, and loose results together as one more; raises UsageError as `write_report`."""
    runs = [record for record in records if isinstance(record, Run)]
    loose: dict[str, object] = {}
    for record in records:
        if isinstance(record, Run):
            continue
        name = _PARTS.get(type(record))
        if name is None or name in loose:
            why = f"a second {type(record).__name__}" if name else f"{type(record).__name__} {record!r:.60}"
            raise UsageError(f"write_report: {why} can't be reported. Give Runs, or one result of each kind.")
        loose[name] = record
    if loose:
        runs.append(Run(created="", environment=None, **loose))  # type: ignore[arg-type]
    if not runs:
        raise UsageError("write_report: no records were given. Give at least one.")
    return runs


def sections_of(record: object) -> list[Section]:
    """What one part of a run, or a fit, shows; raises UsageError as `as_runs`."""
    if isinstance(record, StepsFit | ThroughputFit):
        return [_fit(record)]
    [run] = as_runs([record])
    return sections(run)


def _fit(fit: StepsFit | ThroughputFit) -> Section:
    """Every figure of a fit, with its interval."""
    names, lines = [field.name for field in fields(fit) if field.name != "notes"], []
    ends = {name: pair for name in names if (pair := _ends(name, names))}
    for name in names:
        if any(name in pair for pair in ends.values()):
            continue
        figure, value = figure_of(type(fit), name), getattr(fit, name)
        low, high = (getattr(fit, end) for end in ends.get(name, ())) if name in ends else (None, None)
        if value not in (None, {}, ()) or low is not None or high is not None:
            lines.append((figure.label, f"{figure.form(value)} {n.interval(low, high)}".strip()))
    return Section(_FITS[type(fit)], lines=tuple(lines), notes=notes_of(fit.notes), details=details_of(fit.notes))


def _ends(name: str, names: Sequence[str]) -> tuple[str, str] | None:
    """The fields of a figure's interval."""
    for stem in (f"{name}_", f"{name.removesuffix('_batch')}_", "" if name == "critical_batch" else "-"):
        if f"{stem}low" in names:
            return f"{stem}low", f"{stem}high"
    return None
