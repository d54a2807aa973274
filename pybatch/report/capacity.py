"""Capacity: the batch sizes timed, the fitted ceiling, and throughput with every limit in one plot."""

from __future__ import annotations

import math
from typing import Any

from pybatch.base import numerals as n
from pybatch.records import BatchPoint, Capacity, Ceilings, CountedNoise, InputPipeline, Verdict
from pybatch.records.capacity import SATURATED
from pybatch.report.layout import Section, details_of, examples_of, lines, notes_of, table
from pybatch.report.plot import Plot, axis, band, batch_axis, line, mark, points, spread

_TIMED = ("batch", "step_ms", "step_ms_low", "step_ms_high", "samples_per_s", "samples")


def section(capacity: Capacity, counted: CountedNoise | None = None) -> Section:
    """A row a batch size, then the limits of the device; the ceiling in parts of examples where they were counted."""
    unit, fit = examples_of(capacity), capacity.model
    gain = n.share(fit.gain) if fit else "5 %"
    nearest = capacity.saturation_measured
    where = f"; {n.count(nearest)} is the smallest measured within 5 % of the ceiling" if nearest else ""
    rate = next((p.samples_per_s for p in capacity.batches if p.batch == nearest), None)
    if nearest and (rate or 0.0) < SATURATED * (capacity.ceiling_samples_per_s or math.inf):
        where += " by its interval"
    how = "a step of it ran" if capacity.max_batch_verified else "predicted, not run"
    words = {
        "ceiling_samples_per_s": lambda text: f"{text}, modelled ({fit.model})" if fit else "",
        "half_batch": lambda text: f"{text}: half the ceiling" if fit else "",
        "saturation_batch": lambda text: f"{text}: doubling gains < {gain}{where}" if fit else "",
        "max_batch": lambda text: f"{text} ({how})",
    }
    said = [*lines(capacity, words, unit), *_modes(capacity)]
    if counted is not None and capacity.ceiling_samples_per_s is not None:
        parts = n.count(capacity.ceiling_samples_per_s * counted.per_example)
        text = f"{parts} {counted.unit}/s, at {n.number(counted.per_example)} {counted.unit} per example"
        said.insert(1, ("the same", text))
    if capacity.input is not None:
        said.append(("input", _input(capacity.input, unit)))
    if capacity.ceilings is not None:
        said.append(("roofs", _roofs(capacity.ceilings)))
    timed = table(BatchPoint, capacity.batches, capacity, unit)
    return Section(
        "Capacity",
        timed,
        tuple(said),
        notes=(*_left_out(capacity), *notes_of(capacity.notes)),
        details=details_of(capacity.notes),
    )


def timed_points(capacity: Capacity | None) -> list[BatchPoint]:
    """The batch sizes that have a throughput."""
    return [p for p in capacity.batches if p.status == "ok" and p.samples_per_s] if capacity is not None else []


def plots(capacity: Capacity | None, verdict: Verdict | None) -> list[Plot]:
    """Throughput, where any was measured."""
    timed = timed_points(capacity)
    return [throughput(capacity, timed, verdict)] if capacity is not None and timed else []


def _modes(capacity: Capacity) -> list[tuple[str, str]]:
    """How steps were run where that was not eagerly, and the first steps after a rest."""
    lines = []
    timed = [p for p in capacity.batches if p.step_ms is not None]
    bursts = [f"{n.number(p.burst_step_ms)} at {n.count(p.batch)}" for p in timed if p.burst_step_ms is not None]
    if bursts:
        lines.append(("burst", f"ms a step in the first 100 after a rest, by batch: {', '.join(bursts)}"))
    if capacity.mode == "eager":
        return lines
    what: list[str] = [capacity.mode]
    compiling = [p.compile_s for p in capacity.batches if p.compile_s is not None]
    if compiling:
        what.append(
            f"compiling took {n.number(sum(compiling))} s for {len(compiling)} batch size{'s' * (len(compiling) > 1)}"
        )
    overheads = [p.launch_overhead_ms for p in timed if p.launch_overhead_ms is not None]
    if overheads:
        what.append(f"launching costs an eager step {n.number(min(overheads))} to {n.number(max(overheads))} ms")
    return [*lines, ("steps", "; ".join(what))]


def _input(pipeline: InputPipeline, unit: str) -> str:
    """What the loader gives, alone and with the step."""
    found = []
    for rate in pipeline.rates:
        step = f" ({n.number(rate.with_step_ms)} ms with the step)" if rate.with_step_ms is not None else ""
        found.append(f"{n.rounded(rate.samples_per_s)} {unit}/s at batch {n.count(rate.batch)}{step}")
    workers = n.counted(pipeline.workers, "worker") if pipeline.workers else "no worker"
    kept = f"it keeps up to batch {n.count(pipeline.kept_batch)}" if pipeline.kept_batch else "at no batch it keeps up"
    return f"{', '.join(found)}; {workers}, {n.rounded(pipeline.one_worker_per_s)}/s each; {kept}"


def _left_out(capacity: Capacity) -> tuple[str, ...]:
    """Why batches have no figures, those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for point in capacity.batches:
        if point.status != "ok":
            reasons.setdefault(point.reason or "no reason was kept", []).append(n.count(point.batch))
    return tuple(f"batch {', '.join(batches)}: {reason}" for reason, batches in reasons.items())


def _roofs(roofs: Ceilings) -> str:
    sheet = f" (datasheet {n.rate(roofs.datasheet_flops, 'FLOP/s')})" if roofs.datasheet_flops else ""
    return f"{n.rate(roofs.gemm_flops, 'FLOP/s')} matrix product{sheet}, {n.rate(roofs.copy_bytes_per_s, 'B/s')} copy"


def reach(capacity: Capacity, timed: list[BatchPoint], verdict: Verdict | None) -> tuple[float, float]:
    """The axis: from the smallest to the largest batch that the page speaks of, memory only where it is near."""
    found = [float(p.batch) for p in timed]
    if capacity.saturation_batch:
        found.append(capacity.saturation_batch)
    if verdict is not None and verdict.critical_batch:
        found.append(verdict.critical_batch)
    if capacity.max_batch and capacity.max_batch <= 64 * max(found):
        found.append(float(capacity.max_batch))
    return min(found), max(found)


def throughput(capacity: Capacity, timed: list[BatchPoint], verdict: Verdict | None) -> Plot:
    """The question of Golmant et al. (2018) in one picture: where is the critical batch, where the device's ceiling?"""
    unit, fit = examples_of(capacity), capacity.model
    low, high = reach(capacity, timed, verdict)
    speeds = [p.samples_per_s or 0.0 for p in timed]
    ends = (min(speeds) / 1.6, 1.6 * max([*speeds, (fit.ceiling or 0.0) if fit else 0.0]))
    traces: list[dict[str, Any]] = []
    if verdict is not None and verdict.critical_batch is not None:
        span = (verdict.critical_low, verdict.critical_high)
        traces += mark("critical batch", verdict.critical_batch, ends, "@orange", span)
    if capacity.saturation_batch is not None:
        span = (capacity.saturation_low, capacity.saturation_high)
        traces += mark("saturation batch", capacity.saturation_batch, ends, "@green", span)
    if capacity.max_batch is not None and capacity.max_batch <= high:
        traces += mark("largest that fits", float(capacity.max_batch), ends, "@purple")
    if verdict is not None and verdict.best_batch is not None:
        traces += mark("best batch", float(verdict.best_batch), ends, "@red", (verdict.best_low, verdict.best_high))
    if fit is not None:
        xs = spread(low, high)
        traces.append(line(f"fit ({fit.model})", xs, [x / fit.step_s(x) for x in xs], "@blue"))
        if fit.ceiling_high is not None:
            both = [low, high]
            traces.append(
                band("ceiling", both, [fit.ceiling_low] * 2, [fit.ceiling_high] * 2, "@gray") | {"showlegend": False}
            )
        if fit.ceiling is not None:
            traces.append(line(f"ceiling {n.count(fit.ceiling)}", [low, high], [fit.ceiling] * 2, "@gray", dash="dot"))
    rates = [(1e3 * p.batch / p.step_ms_high if p.step_ms_high else None) for p in timed]
    tops = [(1e3 * p.batch / p.step_ms_low if p.step_ms_low else None) for p in timed]
    traces.append(points("measured", [p.batch for p in timed], speeds, "@blue", rates, tops))
    outside = (
        f" The largest batch that fits, {n.count(capacity.max_batch)}, lies far to the right of this picture."
        if capacity.max_batch is not None and capacity.max_batch > high
        else ""
    )
    marked = {trace["name"].split(" batch")[0] for trace in traces if trace.get("hoverinfo") == "name"}
    said = [f"{unit.capitalize()} per second at each batch size, with 95 % intervals"]
    said[0] += " and the fitted curve." if fit is not None else "."
    if "critical" in marked:
        said.append("Left of the critical batch more examples per step save almost as many steps.")
    if "saturation" in marked:
        said.append("Right of the saturation batch the device gains next to nothing.")
    if marked:
        said.append("Shaded: the interval of the dashed line in it.")
    return Plot(
        "throughput",
        "Throughput and the batch sizes that matter",
        f"{' '.join(said)}{outside}",
        tuple(traces),
        {
            "xaxis": batch_axis(low, high, f"batch size ({unit})"),
            "yaxis": axis(f"{unit} per second", log=True, values=ends),
        },
        table(BatchPoint, timed, capacity, unit, _TIMED),
    )
