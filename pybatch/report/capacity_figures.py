"""Figures of capacity and verdict: throughput with every limit in one axis, goodput, utilization, roofs, frontier."""

from __future__ import annotations

from typing import Any

from pybatch import numerals as n
from pybatch.records import BatchPoint, Capacity, Run, ThroughputFit, Verdict
from pybatch.report.figure import COLORS, MARKERS, Figure, axis, band, batch_axis, line, mark, points, safe, spread
from pybatch.report.layout import Table
from pybatch.report.sections import communication

_UTILIZATION = (
    ("mfu_measured", "MFU, of the measured matrix product"),
    ("mfu_datasheet", "MFU, of the datasheet"),
    ("sm_active", "SM active"),
    ("tensor_active", "tensor cores active"),
    ("dram_active", "DRAM bandwidth"),
    ("sm_occupancy", "SM occupancy"),
    ("cpu_active", "CPU active"),
    ("host_bound", "waiting for the host"),
)


def capacity_figures(run: Run) -> list[Figure]:
    """Everything that can be drawn from capacity, noise and verdict of one run."""
    capacity = run.capacity
    timed = [p for p in capacity.batches if p.status == "ok" and p.samples_per_s] if capacity else []
    if capacity is None or not timed:
        return []
    made = [throughput(capacity, timed, run.verdict)]
    if run.verdict is not None and capacity.model is not None and run.verdict.critical_batch is not None:
        made.append(goodput(capacity, capacity.model, timed, run.verdict))
    made += [step_time(capacity, timed), utilization(capacity, timed), roofs(capacity, timed)]
    if run.verdict is not None and len(run.verdict.frontier) > 1:
        made.append(frontier(run.verdict))
    return made


def _unit(capacity: Capacity) -> str:
    return capacity.workload.unit if capacity.workload else "examples"


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
    unit, fit = _unit(capacity), capacity.model
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


def goodput(capacity: Capacity, fit: ThroughputFit, timed: list[BatchPoint], verdict: Verdict) -> Figure:
    """Throughput times statistical efficiency (goodput of Qiao et al. 2021), which peaks at the best batch."""
    critical = verdict.critical_batch
    assert critical is not None  # the caller has looked
    low, high = _reach(capacity, timed, verdict)
    xs = spread(low, high)

    def statistical(batch: float) -> float:
        return 1 / (1 + batch / critical)

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
    return Figure(
        "goodput",
        "Why this batch: speed of the device times progress per example",
        "A larger batch uses the device better (dotted) but makes less of each example (dashed: 1/(1 + B/critical "
        "batch)). Their product, goodput, is least time to the loss at its peak. Diamonds use measured step times.",
        tuple(traces),
        {"xaxis": batch_axis(low, high, f"batch size ({_unit(capacity)})"), "yaxis": axis("share", tickformat=".0%")},
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


def step_time(capacity: Capacity, timed: list[BatchPoint]) -> Figure:
    """Step time with its interval, the fit, and drift."""
    low, high = float(timed[0].batch), float(timed[-1].batch)
    traces = [
        points(
            "measured, 95 % interval",
            [p.batch for p in timed],
            [p.step_ms for p in timed],
            "@blue",
            [p.step_ms_low for p in timed],
            [p.step_ms_high for p in timed],
        )
    ]
    if capacity.model is not None:
        xs, fit = spread(low, high), capacity.model
        traces.insert(0, line(f"fit ({fit.model})", xs, [1e3 * fit.step_s(x) for x in xs], "@orange"))
    drift = (
        f" The anchor batch, timed again at the end, had changed by {100 * capacity.drift:+.1f} %."
        if capacity.drift is not None
        else ""
    )
    return Figure(
        "step-time",
        "Step time",
        f"Median milliseconds of a full training step.{drift}",
        tuple(traces),
        {
            "xaxis": batch_axis(low, high, f"batch size ({_unit(capacity)})"),
            "yaxis": axis("ms per step", log=True, values=[p.step_ms for p in timed]),
        },
        Table(
            ("batch", "status", "step ms", "memory", "SM clock MHz", "throttled", "J per example"),
            tuple(
                (
                    n.count(p.batch),
                    p.status.replace("_", " "),
                    n.number(p.step_ms),
                    n.memory(p.memory_bytes),
                    n.number(p.sm_clock_mhz),
                    n.MISSING if p.throttled is None else ("yes" if p.throttled else "no"),
                    n.number(p.joules_per_sample),
                )
                for p in capacity.batches
            ),
        ),
    )


def utilization(capacity: Capacity, timed: list[BatchPoint]) -> Figure:
    """Every share of the device that could be read, by batch."""
    known = [(key, name) for key, name in _UTILIZATION if any(getattr(p, key) is not None for p in timed)]
    title = "Utilization"
    absent = [name for key, name in _UTILIZATION if (key, name) not in known]
    if not known:
        return Figure("utilization", title, "", missing="No counter could be read; the notes give the reasons.")
    low, high = float(timed[0].batch), float(timed[-1].batch)
    traces = tuple(
        points(
            name,
            [p.batch for p in timed],
            [getattr(p, key) for p in timed],
            COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            mode="lines+markers",
        )
        for i, (key, name) in enumerate(known)
    )
    lacking = f" Not read on this device: {', '.join(absent)}; the notes say why." if absent else ""
    return Figure(
        "utilization",
        title,
        f"Shares of what the device can do, during the steady part of each batch size.{lacking}",
        traces,
        {
            "xaxis": batch_axis(low, high, f"batch size ({_unit(capacity)})"),
            "yaxis": axis("share", tickformat=".0%", rangemode="tozero"),
        },
        Table(
            ("batch", *(name for _, name in known)),
            tuple((n.count(p.batch), *(n.share(getattr(p, key)) for key, _ in known)) for p in timed),
        ),
    )


def roofs(capacity: Capacity, timed: list[BatchPoint]) -> Figure:
    """Roofline (Williams et al. 2009) with measured roofs where traffic was counted; else FLOP/s under the roof."""
    title, ceilings = "Roofs", capacity.ceilings
    peak = ceilings.gemm_flops if ceilings else None
    copy = ceilings.copy_bytes_per_s if ceilings else None
    rated = [p for p in timed if p.model_flops and p.step_ms]
    if not rated or peak is None:
        return Figure("roofs", title, "", missing="Model FLOPs or the matrix-product roof were not measured.")
    speed = [1e3 * (p.model_flops or 0.0) / (p.step_ms or 1.0) for p in rated]
    counted = [(p, s) for p, s in zip(rated, speed, strict=True) if p.dram_active and copy]
    table = Table(
        ("batch", "FLOP per step", "achieved", "of the matrix product"),
        tuple(
            (n.count(p.batch), n.rate(p.model_flops, "FLOP"), n.rate(s, "FLOP/s"), n.share(s / peak))
            for p, s in zip(rated, speed, strict=True)
        ),
    )
    if counted and copy is not None:
        intensity = [s / (copy * (p.dram_active or 1.0)) for p, s in counted]
        xs = spread(min([*intensity, peak / copy]) / 4, max([*intensity, peak / copy]) * 4)
        traces = [
            line("measured roofs", xs, [min(peak, copy * x) for x in xs], "@gray"),
            points("batches", intensity, [s for _, s in counted], "@blue")
            | {"text": [f"batch {p.batch}" for p, _ in counted], "hoverinfo": "text+y"},
        ]
        caption = "FLOP per byte of DRAM traffic against FLOP/s, under the two roofs measured on this device."
        layout = {"xaxis": axis("FLOP per byte", log=True), "yaxis": axis("FLOP/s", log=True)}
        return Figure("roofs", "Roofline", caption, tuple(traces), layout, table)
    low, high = float(rated[0].batch), float(rated[-1].batch)
    traces = [
        line(f"matrix product, {n.rate(peak, 'FLOP/s')}", [low, high], [peak, peak], "@gray", dash="dot"),
        points("model FLOP/s", [p.batch for p in rated], speed, "@blue", mode="lines+markers"),
    ]
    if ceilings is not None and ceilings.datasheet_flops:
        sheet = ceilings.datasheet_flops
        traces.append(
            line(f"datasheet, {n.rate(sheet, 'FLOP/s')}", [low, high], [sheet, sheet], "@orange", dash="dash")
        )
    caption = (
        "Model FLOP/s under the largest matrix product this device was measured to do. Bytes moved were not counted "
        "here, so there is no axis of intensity."
    )
    layout = {
        "xaxis": batch_axis(low, high, f"batch size ({_unit(capacity)})"),
        "yaxis": axis("FLOP/s", log=True, values=[*speed, peak]),
    }
    return Figure("roofs", title, caption, tuple(traces), layout, table)


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
