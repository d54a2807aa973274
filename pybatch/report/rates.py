"""Learning rates tried: the table of many rules' rates, and a heat map of steps over batch size and rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from pybatch.base import numerals as n
from pybatch.records import ConvergencePoint, Curve, RateSteps
from pybatch.report.layout import Section, columns
from pybatch.report.plot import Plot, safe


def section(split: str, curves: Sequence[Curve]) -> Section:
    """The rate of every batch size and rule."""
    batches = sorted({p.batch for curve in curves for p in curve.points})
    own = [(curve.rule, cells(curve, batches)) for curve in curves]
    return Section(f"Learning rates, {split}", columns([("batch", [n.count(batch) for batch in batches]), *own]))


def cells(curve: Curve, batches: Sequence[int]) -> list[str]:
    """The learning rate at each batch size; * marks a grid's edge."""
    points = {p.batch: p for p in curve.points}
    return [_cell(points[batch]) if batch in points else "" for batch in batches]


def _cell(point: ConvergencePoint) -> str:
    if point.learning_rate is None:
        return ""
    return n.number(point.learning_rate, 2) + ("*" if point.edge else "")


def heat_map(curve: Curve, goal: str, number: str, unit: str) -> Plot:
    """Heat map of steps over batch size and learning rate, diverged cells marked."""
    sizes = [p.batch for p in curve.points if p.rates]
    grid = sorted({r.learning_rate for p in curve.points for r in p.rates})
    found = {(p.batch, r.learning_rate): _tried(r) for p in curve.points for r in p.rates}
    labels = [n.count(size) for size in sizes]
    names = n.distinct(grid)
    name: dict[float | None, str] = dict(zip(grid, names, strict=True))
    z = [[_log(found.get((size, rate), (None, ""))[0]) for size in sizes] for rate in grid]
    text = [[safe(found.get((size, rate), (None, "not tried"))[1]) for size in sizes] for rate in grid]
    traces: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "x": labels,
            "y": names,
            "z": z,
            "text": text,
            "hovertemplate": "batch %{x}, rate %{y}: %{text}<extra></extra>",
            "colorscale": "Cividis",
            "reversescale": True,
            "xgap": 1,
            "ygap": 1,
            "colorbar": {"title": {"text": "steps"}, **_ticks(z), "thickness": 12},
        }
    ]
    best = [(p.batch, p.learning_rate) for p in curve.points if p.steps and (p.batch, p.learning_rate) in found]
    for sign, color, label, marked in (
        ("x-thin-open", "@ink", "diverged", [key for key, cell in found.items() if cell[1] == "diverged"]),
        # A white disk with a dark edge is seen on every shade of the map, in both themes.
        ("circle", "#ffffff", "best", best),
    ):
        if marked:
            edge = "#1b1f24" if sign == "circle" else color
            marker = {"symbol": sign, "size": 9, "color": color, "line": {"width": 2, "color": edge}}
            xs, ys = [n.count(b) for b, _ in marked], [name[rate] for _, rate in marked]
            traces.append({"type": "scatter", "mode": "markers", "x": xs, "y": ys, "name": label, "marker": marker})
    tried = [(size, rate) for size in sizes for rate in grid if (size, rate) in found]
    return Plot(
        f"rates-{number}",
        f"Learning rates tried, rule {curve.rule}: steps to {goal}",
        "Median steps over seeds at each batch size and learning rate. Circles are the best rate of a batch size, "
        "crosses diverged; empty cells were not tried, or had not reached the target when they were given up.",
        tuple(traces),
        {
            "xaxis": {"type": "category", "title": {"text": safe(f"batch size ({unit})")}},
            "yaxis": {"type": "category", "title": {"text": "learning rate"}, "categoryarray": names},
        },
        columns(
            {
                "batch": [n.count(size) for size, _ in tried],
                "learning rate": [name[rate] for _, rate in tried],
                "steps": [found[key][1] for key in tried],
            }
        ),
    )


def _tried(rate: RateSteps) -> tuple[float | None, str]:
    """Median steps over the seeds run, an unreached target counting as infinite, and the cell in words."""
    ran = [(steps, status) for steps, status in zip(rate.steps, rate.statuses, strict=True) if status != "not_run"]
    values = [math.inf if steps is None else steps for steps, _ in ran]
    middle = median(values) if values else math.inf
    if math.isfinite(middle):
        few = f" ({len(ran)} of {len(rate.statuses)} seeds)" if len(ran) < len(rate.statuses) else ""
        return middle, n.rounded(middle) + few
    if not ran:
        return None, "not tried"
    lost = sum(status == "diverged" for _, status in ran)
    return None, "diverged" if 2 * lost >= len(ran) else "not reached"


def _log(steps: float | None) -> float | None:
    return None if not steps else math.log10(steps)


def _ticks(z: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Labels of the color bar, in steps rather than their logarithm."""
    known = [value for row in z for value in row if value is not None]
    if not known:
        return {}
    values = np.linspace(min(known), max(known), 4)
    return {"tickvals": [float(v) for v in values], "ticktext": [n.number(10**v, 2) for v in values]}
