"""Figures of capacity and verdict: throughput with every limit in one axis, goodput, frontier, and `step_figures`."""

from __future__ import annotations

from typing import Any

from pybatch.answer.tradeoff import TimeModel
from pybatch.answer.verdict import time_model
from pybatch.base import numerals as n
from pybatch.records import BatchPoint, Capacity, Run, Verdict
from pybatch.report.figure import Figure, axis, band, batch_axis, line, mark, points, safe, spread
from pybatch.report.layout import Table
from pybatch.report.sections import communication
from pybatch.report.step_figures import example, roofs, samples, step_time, utilization


def capacity_figures(run: Run) -> list[Figure]:
    """Everything that can be drawn from capacity, noise and verdict of one run."""
    capacity = run.capacity
    timed = [p for p in capacity.batches if p.status == "ok" and p.samples_per_s] if capacity else []
    if capacity is None or not timed:
        return []
    made = [throughput(capacity, timed, run.verdict)]
    if run.verdict is not None and run.verdict.critical_batch is not None and capacity.model is not None:
        model = time_model(capacity, run.noise, run.convergence)
        model = model or TimeModel(capacity.model, run.verdict.critical_batch)  # the verdict alone was given
        made.append(goodput(capacity, model, timed, run.verdict))
    made += [step_time(capacity, timed), *samples(capacity, timed)]
    made += [utilization(capacity, timed), roofs(capacity, timed)]
    if run.verdict is not None and len(run.verdict.frontier) > 1:
        made.append(frontier(run.verdict))
    return made


def _reach(capacity: Capacity, timed: list[BatchPoint], verdict: Verdict | None) -> tuple[float, float]:
    """The axis: from the smallest to the largest batch that the page speaks of, memory only where it is near."""
    found = [float(p.batch) for p in timed]
    if capacity.saturation_batch:
        found.append(capacity.saturation_batch)
    if verdict is not None and verdict.critical_batch:
        found.append(verdict.critical_batch)
    if capacity.max_batch and capacity.max_batch <= 64 * max(found):
        found.append(float(capacity.max_batch))
    return min(found), max(found)


def throughput(capacity: Capacity, timed: list[BatchPoint], verdict: Verdict | None) -> Figure:
    """The question of Golmant et al. (2018) in one picture: where is the critical batch, where the device's ceiling?"""
    unit, fit = example(capacity), capacity.model
    low, high = _reach(capacity, timed, verdict)
    speeds = [p.samples_per_s or 0.0 for p in timed]
    ends = (min(speeds) / 1.6, 1.6 * max([*speeds, fit.ceiling if fit else 0.0]))
    traces: list[dict[str, Any]] = []
    if verdict is not None and verdict.critical_batch is not None:
        span = (verdict.critical_low, verdict.critical_high)
        traces += mark("critical batch", verdict.critical_batch, ends, "@orange", span)
    if capacity.saturation_batch is not None:
        span = (capacity.saturation_low, capacity.saturation_high)
        traces += mark("saturation batch", capacity.saturation_batch, ends, "@green", span)
    if capacity.max_batch is not None and capacity.max_batch <= high:
        traces += mark("largest that fits", float(capacity.max_batch), ends, "@red")
    if fit is not None:
        xs = spread(low, high)
        traces.append(line(f"fit ({fit.model})", xs, [x / fit.step_s(x) for x in xs], "@blue"))
        if fit.ceiling_high is not None:
            both = [low, high]
            traces.append(
                band("ceiling", both, [fit.ceiling_low] * 2, [fit.ceiling_high] * 2, "@gray") | {"showlegend": False}
            )
        traces.append(line(f"ceiling {n.count(fit.ceiling)}", [low, high], [fit.ceiling] * 2, "@gray", dash="dot"))
    rates = [(1e3 * p.batch / p.step_ms_high if p.step_ms_high else None) for p in timed]
    tops = [(1e3 * p.batch / p.step_ms_low if p.step_ms_low else None) for p in timed]
    traces.append(points("measured", [p.batch for p in timed], speeds, "@blue", rates, tops))
    outside = (
        f" The largest batch that fits, {n.count(capacity.max_batch)}, lies far to the right of this picture."
        if capacity.max_batch is not None and capacity.max_batch > high
        else ""
    )
    return Figure(
        "throughput",
        "Throughput and the batch sizes that matter",
        f"{unit.capitalize()} per second at each batch size, with 95 % intervals and the fitted curve. Left of the "
        "critical batch more examples per step save almost as many steps; right of the saturation batch the device "
        f"gains next to nothing. Dashed lines carry the bands of their intervals.{outside}",
        tuple(traces),
        {
            "xaxis": batch_axis(low, high, f"batch size ({unit})"),
            "yaxis": axis(f"{unit} per second", log=True, values=ends),
        },
        Table(
            ("batch", "step ms", "low", "high", f"{unit}/s", "steps timed"),
            tuple(
                (
                    n.count(p.batch),
                    n.number(p.step_ms),
                    n.number(p.step_ms_low),
                    n.number(p.step_ms_high),
                    n.rounded(p.samples_per_s),
                    n.count(p.samples),
                )
                for p in timed
            ),
        ),
    )


def goodput(capacity: Capacity, model: TimeModel, timed: list[BatchPoint], verdict: Verdict) -> Figure:
    """Throughput times statistical efficiency (goodput of Qiao et al. 2021), which peaks at the best batch."""
    fit = model.fit
    low, high = _reach(capacity, timed, verdict)
    xs = spread(low, high)
    # 1 / (1 + B / B_c) for the hyperbola; of other curves the fewest examples of this picture are the whole.
    fewest = model.critical if model.shape is None else min(float(model.examples(x)) for x in xs)

    def statistical(batch: float) -> float:
        return fewest / float(model.examples(batch))

    def device(batch: float) -> float:
        return batch / fit.step_s(batch) / fit.ceiling

    useful = [device(x) * statistical(x) for x in xs]
    peak = max(useful)
    traces = [
        line("throughput, of the ceiling", xs, [device(x) for x in xs], "@blue", dash="dot"),
        line("progress per example", xs, [statistical(x) for x in xs], "@orange", dash="dash"),
        line("goodput, of its peak", xs, [value / peak for value in useful], "@green"),
    ]
    measured = [p for p in timed if p.samples_per_s]
    rates = [(p.samples_per_s or 0.0) / fit.ceiling * statistical(p.batch) / peak for p in measured]
    traces.append(points("goodput of measured times", [p.batch for p in measured], rates, "@green", marker="diamond"))
    if verdict.best_batch is not None:
        traces += mark("best batch", verdict.best_batch, (0.0, 1.05), "@red", (verdict.best_low, verdict.best_high))
    law = "1/(1 + B/critical batch)" if model.shape is None else f"by the {model.shape.model} fit to measured steps"
    return Figure(
        "goodput",
        "Why this batch: speed of the device times progress per example",
        f"A larger batch uses the device better (dotted) but makes less of each example (dashed: {law}). Their "
        "product, goodput, is least time to the loss at its peak. Diamonds use measured step times.",
        tuple(traces),
        {"xaxis": batch_axis(low, high, f"batch size ({example(capacity)})"), "yaxis": axis("share", tickformat=".0%")},
        Table(
            ("batch", "throughput of ceiling", "progress per example", "goodput of peak"),
            tuple(
                (
                    n.count(p.batch),
                    n.share((p.samples_per_s or 0.0) / fit.ceiling),
                    n.share(statistical(p.batch)),
                    n.share(rate),
                )
                for p, rate in zip(measured, rates, strict=True)
            ),
        ),
    )


def frontier(verdict: Verdict) -> Figure:
    """Time against cost for 1, 2, 4, ... devices."""
    found = verdict.frontier
    labels = [safe(f"{p.devices}") for p in found]
    trace = points(
        "devices, each number at its own best batch",
        [p.cost_factor for p in found],
        [p.time_factor for p in found],
        "@blue",
        mode="lines+markers+text",
        text=labels,
        textposition="top right",
        cliponaxis=False,
    )
    useful = [p for p in found if verdict.useful_devices and p.devices <= verdict.useful_devices]
    worth = points(
        "worth it by the verdict",
        [p.cost_factor for p in useful],
        [p.time_factor for p in useful],
        "@green",
        marker="diamond",
    )
    with_energy = any(p.energy_factor is not None for p in found)
    return Figure(
        "frontier",
        "What more devices buy",
        "Time to the loss against device-seconds, both relative to one device at its best batch; "
        f"{communication(verdict)}.",
        (trace, worth),
        {"xaxis": axis("device-seconds, relative", log=True), "yaxis": axis("time, relative", log=True)},
        Table(
            ("devices", "batch", "time", "device-seconds", *(("energy",) if with_energy else ())),
            tuple(
                (
                    n.count(p.devices),
                    n.count(p.batch),
                    n.share(p.time_factor),
                    n.share(p.cost_factor),
                    *((n.share(p.energy_factor),) if with_energy else ()),
                )
                for p in found
            ),
        ),
    )
