"""The device's steps: their time, its spread and its drift, in plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pybatch.base import numerals as n
from pybatch.records import QUANTILES, BatchPoint, Capacity
from pybatch.report.capacity import timed_points
from pybatch.report.layout import Table, examples_of, table
from pybatch.report.plot import Plot, axis, batch_axis, line, points, safe, spread

_MEDIAN = QUANTILES.index(0.5)
_PERCENTILE_NAMES = {0.0: "least", 0.05: "5 %", 0.25: "25 %", 0.5: "median", 0.75: "75 %", 0.95: "95 %", 1.0: "most"}

_KEPT = ("batch", "status", "step_ms", "memory_bytes", "sm_clock_mhz", "throttled", "joules_per_sample")


def plots(capacity: Capacity | None) -> list[Plot]:
    """Step times, and their spread where samples were kept."""
    timed = timed_points(capacity)
    return [step_time(capacity, timed), *samples(capacity, timed)] if capacity is not None and timed else []


def step_time(capacity: Capacity, timed: list[BatchPoint]) -> Plot:
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
    return Plot(
        "step-time",
        "Step time",
        f"Median milliseconds of a full training step.{drift}",
        tuple(traces),
        {
            "xaxis": batch_axis(low, high, f"batch size ({examples_of(capacity)})"),
            "yaxis": axis("ms per step", log=True, values=[p.step_ms for p in timed]),
        },
        table(BatchPoint, capacity.batches, capacity, names=_KEPT),
    )


def samples(capacity: Capacity, timed: list[BatchPoint]) -> list[Plot]:
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
        Plot(
            "samples",
            title,
            "Step times over the median of their batch size: boxes from the 25th to the 75th percentile, whiskers "
            f"from the 5th to the 95th.{said}",
            tuple(traces),
            {
                "xaxis": {"type": "category", "title": {"text": safe(f"batch size ({examples_of(capacity)})")}},
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
