"""Figures of the device's steps: their time, its spread and drift, utilization, roofs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pybatch.base import numerals as n
from pybatch.records import QUANTILES, BatchPoint, Capacity
from pybatch.report.figure import COLORS, MARKERS, Figure, axis, batch_axis, line, points, safe, spread
from pybatch.report.layout import Table

_MEDIAN = QUANTILES.index(0.5)
_PERCENTILE_NAMES = {0.0: "least", 0.05: "5 %", 0.25: "25 %", 0.5: "median", 0.75: "75 %", 0.95: "95 %", 1.0: "most"}

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


def example(capacity: Capacity) -> str:
    return capacity.workload.unit if capacity.workload else "examples"


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
            "xaxis": batch_axis(low, high, f"batch size ({example(capacity)})"),
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


def samples(capacity: Capacity, timed: list[BatchPoint]) -> list[Figure]:
    """How step times of each batch size are distributed, and how those of the anchor moved from start to end."""
    kept = [p for p in timed if len(p.step_ms_quantiles) == len(QUANTILES) and p.step_ms_quantiles[_MEDIAN]]
    if not kept:
        return []
    labels = [n.count(p.batch) for p in kept]
    traces = [_boxes("batch sizes", labels, [_relative(p.step_ms_quantiles) for p in kept], "@blue")]
    anchor, title = capacity.anchor, "Spread of step times"
    said = ""
    rows = [_quantile_row(n.count(p.batch), p.samples, p.step_ms_quantiles) for p in kept]
    if anchor is not None and len(anchor.start_ms) == len(anchor.end_ms) == len(QUANTILES):
        own = anchor.start_ms[_MEDIAN]
        ends = {f"{n.count(anchor.batch)} at first": anchor.start_ms, f"{n.count(anchor.batch)} at last": anchor.end_ms}
        traces.append(_boxes("anchor", list(ends), [_relative(q, own) for q in ends.values()], "@orange"))
        rows += [_quantile_row(name, None, q) for name, q in ends.items()]
        said = (
            f" Batch {n.count(anchor.batch)} was timed first and once more at the end, both over the first median: "
            "what differs is drift of the device."
        )
        title += ", and drift"
    seen = [value for trace in traces for end in ("lowerfence", "upperfence") for value in trace[end]]
    return [
        Figure(
            "samples",
            title,
            "Step times over the median of their batch size: boxes from the 25th to the 75th percentile, whiskers "
            f"from the 5th to the 95th.{said}",
            tuple(traces),
            {
                "xaxis": {"type": "category", "title": {"text": safe(f"batch size ({example(capacity)})")}},
                # Logarithmic: where something else ran meanwhile, the slowest steps take ten times the others.
                "yaxis": axis("step time over its median", log=True, values=seen, tickformat=".3~g"),
            },
            Table(("batch", "steps", *(_PERCENTILE_NAMES[q] for q in QUANTILES)), tuple(rows)),
        )
    ]


def _relative(quantiles: Sequence[float], unit: float | None = None) -> list[float]:
    return [value / (unit or quantiles[_MEDIAN]) for value in quantiles]


def _boxes(name: str, labels: list[str], quantiles: list[list[float]], color: str) -> dict[str, Any]:
    """Box plots from quantiles alone."""
    at = {q: [each[i] for each in quantiles] for i, q in enumerate(QUANTILES)}
    return {
        "type": "box",
        "name": safe(name),
        "x": labels,
        "lowerfence": at[0.05],
        "q1": at[0.25],
        "median": at[0.5],
        "q3": at[0.75],
        "upperfence": at[0.95],
        "marker": {"color": color},
        "line": {"color": color, "width": 2},
        "fillcolor": f"{color}/18",
    }


def _quantile_row(name: str, steps: int | None, quantiles: Sequence[float]) -> tuple[str, ...]:
    return (name, n.count(steps), *(n.number(value) for value in quantiles))


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
            "xaxis": batch_axis(low, high, f"batch size ({example(capacity)})"),
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
        "xaxis": batch_axis(low, high, f"batch size ({example(capacity)})"),
        "yaxis": axis("FLOP/s", log=True, values=[*speed, peak]),
    }
    return Figure("roofs", title, caption, tuple(traces), layout, table)
