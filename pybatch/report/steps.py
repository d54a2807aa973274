"""Steps to target of a sweep: per batch and rule, the critical batches, and in plots with fit, failures and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pybatch.base import numerals as n
from pybatch.fits.steps_model import NAMES, predicted
from pybatch.records import Convergence, ConvergencePoint, Curve, Note, aim_of
from pybatch.records.figure import figure_of, written
from pybatch.report import rates
from pybatch.report.layout import Section, Table, columns, details_of, notes_of, table
from pybatch.report.plot import COLORS, MARKERS, Plot, axis, batch_axis, line, mark, points, spread

_ABREAST = 3  # rules whose steps and rates fit into 80 columns


def sections(steps: Convergence, unit: str) -> list[Section]:
    """For each split: steps of every batch size and rule, and what was fitted to them; many rules' rates apart."""
    made = []
    for split in dict.fromkeys(curve.split for curve in steps.curves):
        curves = [c for c in steps.curves if c.split == split]
        made.append(_split(split, curves, steps, unit))
        if len(curves) > _ABREAST:
            made.append(rates.section(split, curves))
    return made


def _split(split: str, curves: list[Curve], steps: Convergence, unit: str) -> Section:
    target = curves[0].target
    batches = sorted({p.batch for curve in curves for p in curve.points})
    abreast = len(curves) <= _ABREAST
    cells = [column for curve in curves for column in _columns(curve, batches, with_rates=abreast)]
    found = columns([("batch", [n.count(batch) for batch in batches]), *cells]) if batches else None
    lines = [line for curve in curves for line in _lines(curve, unit, alone=len(curves) == 1)]
    if split == steps.curves[0].split and steps.optimizer:
        lines.append(("trained by", f"{_trained(steps)}, {_of(steps.trials, 'trial')}, {_of(steps.seeds, 'seed')}"))
        if steps.base_rate is not None:
            given = f"with rate {n.number(steps.base_rate)} at batch {n.count(steps.base_batch)}, as given"
            lines.append(("rules start", given))
    if split == steps.curves[0].split and any(p.reached < p.runs for curve in steps.curves for p in curve.points):
        lines.append(("in brackets", "runs that reached the target / runs made, where not all did"))
    notes, details = _merged(curves, notes_of), _merged(curves, details_of)
    if split == steps.curves[-1].split:  # the last section: what holds for all of them
        notes, details = notes + notes_of(steps.notes), details + details_of(steps.notes)
    goal = "target" if target is None else _goal(curves[0])
    return Section(f"Steps to {goal}", found, tuple(lines), notes=notes, details=details)


def _merged(curves: Sequence[Curve], of: Callable[[Sequence[Note]], tuple[str, ...]]) -> tuple[str, ...]:
    """The notes of the rules, each once, with the rules of which it holds where there are several."""
    found: dict[str, list[str]] = {}
    for curve in curves:
        for note in of(curve.notes):
            found.setdefault(note, []).append(curve.rule)
    said = {note: ", ".join(dict.fromkeys(rules)) for note, rules in found.items()}
    return tuple(f"{rules} {note}" if len(curves) > 1 else note for note, rules in said.items())


def _goal(curve: Curve) -> str:
    """The target in words; of a metric with the side from which it counts as reached."""
    side = "" if ":" not in curve.split else "≥ " if curve.higher else "≤ "
    return f"{aim_of(curve.split)} {side}{n.number(curve.target)}"


def _trained(steps: Convergence) -> str:
    """The optimizer, and what of it is not the usual."""
    parts = [str(steps.optimizer)]
    if steps.schedule not in (None, "constant"):
        parts.append(f"schedule {steps.schedule}")
    return ", ".join([*parts, *(f"{name} by {rule}" for name, rule in steps.following.items())])


def _columns(curve: Curve, batches: Sequence[int], with_rates: bool) -> list[tuple[str, list[str]]]:
    """Steps of a rule, with the reach rate in brackets where it is not full, and its learning rates."""
    points = {p.batch: p for p in curve.points}
    steps = [_steps_cell(points[batch]) if batch in points else "" for batch in batches]
    made = [(curve.rule, steps)]
    with_rates = with_rates and any(p.learning_rate is not None for p in curve.points)
    return [*made, ("rate", rates.cells(curve, batches))] if with_rates else made


def _steps_cell(p: ConvergencePoint) -> str:
    value = n.rounded(p.steps) if p.steps is not None else n.words(p.status)
    return value if p.reached >= p.runs else f"{value} ({p.reached}/{p.runs})"


def _lines(curve: Curve, unit: str, alone: bool) -> list[tuple[str, str]]:
    name = figure_of(Curve, "critical_batch").label if alone else f"critical, {curve.rule}"
    if curve.critical_batch is None:
        bound = "not known"
        if curve.low is not None:
            bound = f"at least {n.number(curve.low)} {_units(curve.low, unit)}"
        elif curve.high is not None:
            bound = f"at most {n.number(curve.high)} {_units(curve.high, unit)}"
        return [(name, bound)]
    text = written(curve, "critical_batch", unit)
    if curve.fit is not None and curve.fit.model is not None:
        text += f", fit: {curve.fit.model}"
        text += f", at least {n.number(curve.s_min)} steps" if curve.s_min is not None else ""
    lines = [(name, text)]
    if curve.b_min is not None and curve.points:
        name = figure_of(Curve, "b_min").label if alone else f"fewest, {curve.rule}"
        lines.append((name, _fewest(curve)))
    if curve.noise_ratio is not None:
        lines.append((figure_of(Curve, "noise_ratio").label, written(curve, "noise_ratio")))
    return lines


def _units(value: float, unit: str) -> str:
    return unit.removesuffix("s") if value == 1 else unit


def _fewest(curve: Curve) -> str:
    """At which batch size the fewest examples are taken: those below it cost more steps and more examples."""
    assert curve.b_min is not None
    where = f"at batch {n.count(round(curve.b_min))}"
    tested = [p.batch for p in curve.points]
    if curve.b_min_low is None and curve.b_min_high is None and len(tested) > 1:
        return f"{where} by the fit, and may be at any tested"
    if curve.b_min_low is None and curve.b_min == min(tested):
        further = f", or up to {n.number(curve.b_min_high)}" if (curve.b_min_high or 0.0) > curve.b_min else ""
        return f"{where}, the smallest tested{further}"
    if curve.b_min_high is None and curve.b_min == max(tested):
        further = f", or down to {n.number(curve.b_min_low)}" if (curve.b_min_low or math.inf) < curve.b_min else ""
        return f"{where}, the largest tested{further}"
    return f"{where} {n.interval(curve.b_min_low, curve.b_min_high)}".strip()


def _of(number: int | None, what: str) -> str:
    return f"{n.MISSING} {what}s" if number is None else n.counted(number, what)


def plots(convergence: Convergence, unit: str = "examples") -> list[Plot]:
    """For each split and target: steps and examples against batch size; for each tuned curve, the rates tried."""
    made = []
    groups: dict[tuple[str, float | None], list[Curve]] = {}
    for curve in convergence.curves:
        groups.setdefault((curve.split, curve.target), []).append(curve)
    for number, ((_, target), curves) in enumerate(groups.items()):
        goal = _goal(curves[0]) if target is not None else "target"
        made += [_steps(curves, goal, number, unit), _examples(curves, goal, number, unit)]
        made += [
            rates.heat_map(curve, goal, f"{number}-{i}", unit)
            for i, curve in enumerate(curves)
            if any(len(point.rates) > 1 for point in curve.points)
        ]
    return made


def _steps(curves: Sequence[Curve], goal: str, number: int, unit: str) -> Plot:
    name, title = f"steps-{number}", f"Steps to {goal}"
    reached = {curve.rule: [p for p in curve.points if p.steps is not None] for curve in curves}
    known = [p.steps for found in reached.values() for p in found if p.steps]
    sizes = [p.batch for curve in curves for p in curve.points]
    if not known:
        return Plot(name, title, "", table=_table(curves, unit), missing="No batch size reached this target.")
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
    return Plot(
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
            name = f"{curve.rule}: {n.words(status)}"
            made.append(points(name, lost, [top] * len(lost), color) | {"marker": marker, "showlegend": False})
    return made


def _table(curves: Sequence[Curve], unit: str) -> Table:
    rows = [(curve, p) for curve in curves for p in curve.points]
    return table(ConvergencePoint, [p for _, p in rows], examples=unit, wholes=[curve for curve, _ in rows])


def _examples(curves: Sequence[Curve], goal: str, number: int, unit: str) -> Plot:
    """Cost under perfect parallelism: examples needed, against the fewest."""
    name, title = f"examples-{number}", f"What larger batches cost: examples to {goal}"
    found = {c.rule: [(p.batch, p.batch * p.steps) for p in c.points if p.steps] for c in curves}
    known = [cost for pairs in found.values() for _, cost in pairs]
    if not known:
        return Plot(name, title, "", missing="No batch size reached this target.")
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
    return Plot(
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
        columns(
            {
                "rule": [rule for rule, pairs in found.items() for _ in pairs],
                "batch": [n.count(batch) for pairs in found.values() for batch, _ in pairs],
                unit: [n.count(cost) for cost in known],
                "relative": [n.number(cost / fewest) for cost in known],
            }
        ),
    )
