"""Figures of convergence: steps against batch size with fit and failures, their cost in examples, rates tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from pybatch.base import numerals as n
from pybatch.fits.steps_model import NAMES, predicted
from pybatch.records import Convergence, ConvergencePoint, Curve, RateSteps
from pybatch.report.figure import COLORS, MARKERS, Figure, axis, batch_axis, line, mark, points, safe, spread
from pybatch.report.layout import Table

_STATUS = {"reached": "reached", "not_reached": "not reached", "diverged": "diverged"}


def convergence_figures(convergence: Convergence, unit: str = "examples") -> list[Figure]:
    """For each split and target: steps and examples against batch size; for each tuned curve, the rates tried."""
    made = []
    groups: dict[tuple[str, float | None], list[Curve]] = {}
    for curve in convergence.curves:
        groups.setdefault((curve.split, curve.target), []).append(curve)
    for number, ((split, target), curves) in enumerate(groups.items()):
        goal = f"{split} loss {n.number(target)}" if target is not None else f"{split} loss target"
        made += [_steps(curves, goal, number, unit), _examples(curves, goal, number, unit)]
        made += [
            _rates(curve, goal, f"{number}-{i}", unit)
            for i, curve in enumerate(curves)
            if any(len(point.rates) > 1 for point in curve.points)
        ]
    return made


def _steps(curves: Sequence[Curve], goal: str, number: int, unit: str) -> Figure:
    name, title = f"steps-{number}", f"Steps to {goal}"
    reached = {curve.rule: [p for p in curve.points if p.steps is not None] for curve in curves}
    known = [p.steps for found in reached.values() for p in found if p.steps]
    sizes = [p.batch for curve in curves for p in curve.points]
    if not known:
        return Figure(name, title, "", table=_table(curves, unit), missing="No batch size reached this target.")
    low, high = float(min(sizes)), float(max(sizes))
    top, bottom = 1.6 * max([*known, *(curve.cap or 0 for curve in curves)]), min(known) / 2
    traces: list[dict[str, Any]] = []
    first = min((p for found in reached.values() for p in found), key=lambda p: (p.batch, p.steps))
    ideal = [(first.steps or 0) * first.batch / b for b in (low, high)]
    traces.append(line("ideal: steps ∝ 1/batch", [low, high], ideal, "@gray", dash="dot"))
    judge = min(curves, key=lambda c: (c.critical_batch is None, c.rule != "tuned"))
    if judge.critical_batch is not None:
        span = (judge.low, judge.high)
        traces += mark(f"critical batch ({judge.rule})", judge.critical_batch, (bottom, top), "@orange", span)
    for i, curve in enumerate(curves):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        traces += _fitted(curve, low, high, color)
        found = reached[curve.rule]
        spans = [_seeds(p) for p in found]
        traces.append(
            points(
                curve.rule,
                [p.batch for p in found],
                [p.steps for p in found],
                color,
                [span[0] for span in spans],
                [span[1] for span in spans],
                marker=marker,
                mode="lines+markers",
                line={"color": color, "width": 1},
            )
        )
        traces += _failed(curve, top, color)
    return Figure(
        name,
        title,
        "Optimizer steps until the smoothed loss is at the target: median over seeds, bars from fewest to most. The "
        "dotted line is perfect scaling; where points leave it, larger batches no longer pay in full. Signs at the top "
        "are batch sizes that did not get there: × diverged, open signs ran into the cap on steps.",
        tuple(traces),
        {
            "xaxis": batch_axis(low, high, f"batch size ({unit})"),
            # The ideal line may leave the picture below: it would press all points together.
            "yaxis": axis(
                "steps to target",
                log=True,
                values=[*known, top],
                range=[math.log10(bottom), math.log10(1.3 * top)],
            ),
        },
        _table(curves, unit),
    )


def _seeds(point: ConvergencePoint) -> tuple[float | None, float | None]:
    """Fewest and most steps over the seeds that reached the target at the point's rate."""
    chosen = next((r for r in point.rates if r.learning_rate == point.learning_rate), None)
    steps = [s for s in chosen.steps if s is not None] if chosen else []
    return (min(steps), max(steps)) if steps else (None, None)


def _fitted(curve: Curve, low: float, high: float, color: str) -> list[dict[str, Any]]:
    fit = curve.fit
    if fit is None or fit.model not in NAMES or not all(key in fit.parameters for key in NAMES[fit.model]):
        return []
    xs = spread(low, high)
    ys = [predicted(fit.model, fit.parameters, x) for x in xs]
    name = f"fit: {curve.rule} ({fit.model})"
    return [line(name, xs, ys, color, dash="dash", opacity=0.8)]


def _failed(curve: Curve, top: float, color: str) -> list[dict[str, Any]]:
    made = []
    for status, sign in (("diverged", "x-thin-open"), ("not_reached", "circle-open")):
        lost = [p.batch for p in curve.points if p.status == status]
        if lost:
            marker = {"color": color, "symbol": sign, "size": 10, "line": {"width": 2, "color": color}}
            name = f"{curve.rule}: {_STATUS[status]}"
            made.append(points(name, lost, [top] * len(lost), color) | {"marker": marker, "showlegend": False})
    return made


def _table(curves: Sequence[Curve], unit: str) -> Table:
    rows = []
    for curve in curves:
        regimes = dict(curve.regimes)
        for p in curve.points:
            rows.append(
                (
                    curve.rule,
                    n.count(p.batch),
                    n.rounded(p.steps),
                    n.count(p.steps * p.batch) if p.steps else n.MISSING,
                    _STATUS[p.status],
                    f"{p.reached} of {p.runs}",
                    n.number(p.learning_rate) + (" (edge)" if p.edge else ""),
                    regimes.get(p.batch, n.MISSING),
                )
            )
    return Table(("rule", "batch", "steps", unit, "status", "runs", "learning rate", "regime"), tuple(rows))


def _examples(curves: Sequence[Curve], goal: str, number: int, unit: str) -> Figure:
    """Cost under perfect parallelism: examples needed, against the fewest."""
    name, title = f"examples-{number}", f"What larger batches cost: examples to {goal}"
    found = {c.rule: [(p.batch, p.batch * p.steps) for p in c.points if p.steps] for c in curves}
    known = [cost for pairs in found.values() for _, cost in pairs]
    if not known:
        return Figure(name, title, "", missing="No batch size reached this target.")
    fewest = min(known)
    sizes = [batch for pairs in found.values() for batch, _ in pairs]
    low, high = float(min(sizes)), float(max(sizes))
    traces = [line("twice the fewest", [low, high], [2.0, 2.0], "@gray", dash="dot")]
    for i, (rule, pairs) in enumerate(found.items()):
        color = COLORS[i % len(COLORS)]
        traces.append(
            points(
                rule,
                [batch for batch, _ in pairs],
                [cost / fewest for _, cost in pairs],
                color,
                marker=MARKERS[i % len(MARKERS)],
                mode="lines+markers",
                line={"color": color, "width": 1},
            )
        )
    return Figure(
        name,
        title,
        f"Examples processed until the target over the fewest of any batch size and rule here ({n.count(fewest)} "
        f"{unit}): the cost in compute. Dotted: twice that. The critical batch takes twice the fewest of its fitted "
        "curve, which may be fewer than any measured here.",
        tuple(traces),
        {
            "xaxis": batch_axis(low, high, f"batch size ({unit})"),
            "yaxis": axis("examples, relative", log=True, values=[cost / fewest for cost in known]),
        },
        Table(
            ("rule", "batch", unit, "relative"),
            tuple(
                (rule, n.count(batch), n.count(cost), n.number(cost / fewest))
                for rule, pairs in found.items()
                for batch, cost in pairs
            ),
        ),
    )


def _rates(curve: Curve, goal: str, number: str, unit: str) -> Figure:
    """Heat map of steps over batch size and learning rate, diverged cells marked."""
    sizes = [p.batch for p in curve.points if p.rates]
    grid = sorted({r.learning_rate for p in curve.points for r in p.rates})
    cells = {(p.batch, r.learning_rate): _cell(r) for p in curve.points for r in p.rates}
    labels = [n.count(size) for size in sizes]
    names = n.distinct(grid)
    name: dict[float | None, str] = dict(zip(grid, names, strict=True))
    z = [[_log(cells.get((size, rate), (None, ""))[0]) for size in sizes] for rate in grid]
    text = [[safe(cells.get((size, rate), (None, "not tried"))[1]) for size in sizes] for rate in grid]
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
    for sign, color, label, found in (
        ("x-thin-open", "@ink", "diverged", [key for key, cell in cells.items() if cell[1] == "diverged"]),
        # A white disk with a dark edge is seen on every shade of the map, in both themes.
        ("circle", "#ffffff", "best", [(p.batch, p.learning_rate) for p in curve.points if p.steps and p.rates]),
    ):
        if found:
            edge = "#1b1f24" if sign == "circle" else color
            marker = {"symbol": sign, "size": 9, "color": color, "line": {"width": 2, "color": edge}}
            xs, ys = [n.count(b) for b, _ in found], [name[rate] for _, rate in found]
            traces.append({"type": "scatter", "mode": "markers", "x": xs, "y": ys, "name": label, "marker": marker})
    rows = tuple(
        (n.count(size), name[rate], cells[size, rate][1]) for size in sizes for rate in grid if (size, rate) in cells
    )
    return Figure(
        f"rates-{number}",
        f"Learning rates tried, rule {curve.rule}: steps to {goal}",
        "Median steps over seeds at each batch size and learning rate. Circles are the best rate of a batch size, "
        "crosses diverged; empty cells did not reach the target or were not tried.",
        tuple(traces),
        {
            "xaxis": {"type": "category", "title": {"text": safe(f"batch size ({unit})")}},
            "yaxis": {"type": "category", "title": {"text": "learning rate"}, "categoryarray": names},
        },
        Table(("batch", "learning rate", "steps"), rows),
    )


def _cell(rate: RateSteps) -> tuple[float | None, str]:
    """Median steps over the seeds run, an unreached target counting as infinite, and the cell in words."""
    ran = [(steps, status) for steps, status in zip(rate.steps, rate.statuses, strict=True) if status in _STATUS]
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
