"""The study's pictures, by the figures of pybatch's own reports."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pybatch.base import numerals as n
from pybatch.report import steps
from pybatch.report.layout import columns
from pybatch.report.plot import MARKERS, Plot, batch_axis, points
from study.claims import Records, capacity_of, doubted, fits, trainer, tuned, within

Span = tuple[float, float | None, float | None]  # a value and the ends of its interval


def pictures(problems: Mapping[str, Records]) -> list[Plot]:
    """The paper's question in one picture, and a sweep of each domain; only what can be drawn."""
    made = [headline(problems)]
    domains: set[str] = set()
    for name, records in problems.items():
        domain = name.partition("-")[0]
        run = records.get("sweep")
        if domain in domains or run is None or run.convergence is None or run.convergence.workload is None:
            continue
        domains.add(domain)
        found = steps.plots(run.convergence, run.convergence.workload.unit)
        made += [replace(plot, name=f"steps-{name}", title=f"{name}: {plot.title}") for plot in found[:1]]
    return [plot for plot in made if plot.missing is None]


def digest(plot: Plot) -> str:
    """Of all that is drawn, to six digits: tells a picture of other records from this one's."""

    def short(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [short(each) for each in value]
        return f"{value:.6g}" if isinstance(value, float) else value

    drawn = json.dumps(short([plot.title, plot.caption, plot.traces, plot.layout]), sort_keys=True)
    return hashlib.sha256(drawn.encode()).hexdigest()[:16]


def headline(problems: Mapping[str, Records]) -> Plot:
    """Critical batches beside what the device can take, a line a problem."""
    name, title = "headline", "What the problem wants and what the device can take"
    caption = (
        "Critical batch to the train target, by the optimizer named, with rates tuned at each batch size (95 % "
        "interval), the batch that saturates this device, and the largest that it has run or, hollow, is predicted to "
        "have memory for. Problems that are not shown were not swept."
    )
    wanted = {problem: found for problem, records in problems.items() if (found := _critical(records)) is not None}
    if not wanted:
        return Plot(name, title, caption, missing="No critical batch was measured.")
    named = {problem: f"{problem}, {trainer(tuned(problems[problem])[0][0])}" for problem in wanted}
    row = {problem: float(place) for place, problem in enumerate(reversed(wanted))}
    full = {p: found for p in wanted if (found := _saturation(problems[p])) is not None}
    most = {p: found for p in wanted if (found := _largest(problems[p])) is not None}
    ran = [p for p in most if (capacity := capacity_of(problems[p])) is not None and capacity.max_batch_verified]
    busy = [p for p in full if doubted(problems[p])]
    traces = [
        _trace(label, [(span, row[problem]) for problem, span in found.items()], color, marker)
        for label, found, color, marker in (
            ("critical batch", wanted, "@orange", MARKERS[0]),
            ("saturation batch", {p: s for p, s in full.items() if p not in busy}, "@blue", MARKERS[1]),
            (
                "saturation batch, machine disturbed",
                {p: s for p, s in full.items() if p in busy},
                "@blue",
                f"{MARKERS[1]}-open",
            ),
            ("fits in memory", {p: s for p, s in most.items() if p in ran}, "@gray", MARKERS[2]),
            (
                "fits in memory, predicted",
                {p: s for p, s in most.items() if p not in ran},
                "@gray",
                f"{MARKERS[2]}-open",
            ),
        )
        if found
    ]
    if busy:
        caption += f" The machine was disturbed as it was saturated, and that but once: {', '.join(busy)}."
    ends = [end for found in (wanted, full, most) for span in found.values() for end in span if end]
    table = columns(
        {
            "problem": [named[p] for p in wanted],
            "critical batch": [_told(wanted[p]) for p in wanted],
            "saturation batch": [_told(full.get(p)) for p in wanted],
            "fits in memory": [fits(capacity_of(problems[p])) for p in wanted],
        }
    )
    layout = {
        "xaxis": batch_axis(min(ends), max(ends), "batch size (images or sequences)"),
        "yaxis": {"tickvals": list(row.values()), "ticktext": [named[p] for p in row], "range": [-0.6, len(row) - 0.4]},
    }
    return Plot(name, title, caption, tuple(traces), layout, table)


def _trace(label: str, found: Sequence[tuple[Span, float]], color: str, marker: str) -> dict[str, Any]:
    up = [(high or value) - value for (value, _, high), _ in found]
    down = [value - (low or value) for (value, low, _), _ in found]
    error = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": color}
    sizes, rows = [span[0] for span, _ in found], [place for _, place in found]
    return points(label, sizes, rows, color, marker=marker, error_x=error)


def _critical(records: Records) -> Span | None:
    for _, curve in tuned(records):
        if curve.split == "train" and curve.critical_batch:
            return curve.critical_batch, curve.low, curve.high
    return None


def _saturation(records: Records) -> Span | None:
    capacity = capacity_of(records)
    if capacity is None or capacity.saturation_batch is None:
        return None
    return capacity.saturation_batch, capacity.saturation_low, capacity.saturation_high


def _largest(records: Records) -> Span | None:
    capacity = capacity_of(records)
    return (float(capacity.max_batch), None, None) if capacity is not None and capacity.max_batch else None


def _told(span: Span | None) -> str:
    return within(*span) if span is not None else n.MISSING
