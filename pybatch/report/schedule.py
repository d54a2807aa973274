"""A batch-size schedule: its stages, what it saves, and the stages over the noise scale they were made from."""

from __future__ import annotations

from typing import Any

from pybatch.base import numerals as n
from pybatch.records import Run, Schedule, Stage
from pybatch.report.layout import Section, details_of, lines, notes_of, table
from pybatch.report.plot import Plot, axis, band, line

_RULES = {
    "sqrt": "the square root of the batch ratio",
    "linear": "the batch ratio",
    "constant": "nothing: it stays",
}


def section(found: Schedule, unit: str) -> Section:
    """One row a stage."""
    sizes = " → ".join(n.count(stage.batch) for stage in found.stages)
    words = {"rate_rule": lambda text: f"times {_RULES[text]}" if text in _RULES else text}
    if len(found.stages) == 1:  # it is itself the fixed batch, and saves nothing against it
        words |= {"fixed_batch": lambda text: "", "steps_saved": lambda text: ""}
    names = [name for name in _COLUMNS if name != "passes" or any(stage.passes > 1 for stage in found.stages)]
    return Section(
        "Batch-size schedule",
        table(Stage, found.stages, examples=unit, names=names),
        (("batch", sizes), *lines(found, words, unit)),
        notes=notes_of(found.notes),
        details=details_of(found.notes),
    )


_COLUMNS = ("first_step", "steps", "first_example", "batch", "critical_batch", "rate_factor", "passes")


def plots(run: Run) -> list[Plot]:
    """Batch size against the examples seen, beside the critical batch it follows."""
    found = run.batch_schedule
    if found is None or not found.stages:
        return []
    xs, ys = [], []
    for stage in found.stages:
        xs += [stage.first_example, stage.first_example + stage.examples]
        ys += [stage.batch, stage.batch]
    middles = [s.first_example + s.examples / 2 for s in found.stages if s.critical_batch]
    critical = [s.critical_batch for s in found.stages if s.critical_batch]
    traces = [
        *_measured(run, found.base_batch),
        line("critical batch", middles, critical, "@orange", dash="dot"),
        line("batch size", xs, ys, "@blue"),
    ]
    values = [float(v) for v in (*ys, *critical) if v]
    layout = {"xaxis": axis("examples seen"), "yaxis": axis("batch size", log=True, values=values)}
    caption = f"{found.because} The critical batch is that of the run it was made from."
    return [Plot("schedule", "Batch-size schedule", caption, tuple(traces), layout, table(Stage, found.stages))]


def _measured(run: Run, batch: int) -> list[dict[str, Any]]:
    """The band of the noise scale that it was made from, against the examples of that run."""
    found = run.trajectory.points if run.trajectory is not None else run.noise.trajectory if run.noise else ()
    known = [((p.first_step + p.last_step) / 2 * batch, p.low, p.high) for p in found if p.low and p.high]
    if len(known) < 2:
        return []
    low, high = [float(p[1] or 0.0) for p in known], [float(p[2] or 0.0) for p in known]
    return [band("noise scale, 95 %", [p[0] for p in known], low, high, "@orange")]
