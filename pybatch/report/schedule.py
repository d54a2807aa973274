"""A batch-size schedule: its stages, what it saves, and the stages over the noise scale they were made from."""

from __future__ import annotations

from pybatch.records import Run, Schedule, Stage
from pybatch.report.layout import Section, details_of, lines, notes_of, table
from pybatch.report.plot import Plot, axis, line

_RULES = {
    "sqrt": "the square root of the batch ratio",
    "linear": "the batch ratio",
    "constant": "nothing: it stays",
}


def section(found: Schedule, unit: str) -> Section:
    """One row a stage."""
    said = lines(found, {"rate_rule": lambda text: f"times {_RULES[text]}" if text in _RULES else text}, unit)
    names = [name for name in _COLUMNS if name != "passes" or any(stage.passes > 1 for stage in found.stages)]
    return Section(
        "Stages",
        table(Stage, found.stages, examples=unit, names=names),
        tuple(said),
        notes=notes_of(found.notes),
        details=details_of(found.notes),
    )


_COLUMNS = ("first_step", "steps", "first_example", "batch", "critical_batch", "rate_factor", "passes")


def plots(run: Run) -> list[Plot]:
    """Batch size against the examples seen, beside the critical batch it follows."""
    found = run.schedule
    if found is None or not found.stages:
        return []
    xs, ys = [], []
    for stage in found.stages:
        xs += [stage.first_example, stage.first_example + stage.examples]
        ys += [stage.batch, stage.batch]
    middles = [s.first_example + s.examples / 2 for s in found.stages if s.critical_batch]
    critical = [s.critical_batch for s in found.stages if s.critical_batch]
    traces = (
        line("batch size", xs, ys, "@blue"),
        line("critical batch", middles, critical, "@orange", dash="dot"),
    )
    values = [float(v) for v in (*ys, *critical) if v]
    layout = {"xaxis": axis("examples seen"), "yaxis": axis("batch size", log=True, values=values)}
    caption = f"{found.because} The critical batch is that of the run it was made from."
    return [Plot("schedule", "Batch-size schedule", caption, traces, layout, table(Stage, found.stages))]
