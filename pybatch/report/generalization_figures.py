"""Figures of test loss against batch size, at the train target and at equal epochs and steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from pybatch.base import numerals as n
from pybatch.records import Convergence, ConvergencePoint, Curve
from pybatch.report.figure import COLORS, MARKERS, Figure, axis, batch_axis, points
from pybatch.report.layout import Table

Losses = Callable[[ConvergencePoint], Sequence[float | None]]  # by seed


def generalization_figures(convergence: Convergence, unit: str = "examples") -> list[Figure]:
    """One figure for each budget that leaves two batch sizes with a test loss."""
    epochs = f"{convergence.gap_epochs:g} epochs" if convergence.gap_epochs else ""
    steps = n.counted(convergence.gap_steps, "step") if convergence.gap_steps else ""
    train = [curve for curve in convergence.curves if curve.split == "train"]
    target = n.number(train[0].target) if train else ""
    said = (
        ("target", train, f"where train loss {target} was met", lambda p: p.other_losses),
        ("epochs", convergence.curves, f"after {epochs}", lambda p: p.test_losses_at_epochs),
        ("steps", convergence.curves, f"after {steps}", lambda p: p.test_losses_at_steps),
    )
    made = (_figure(name, curves, when, losses, unit) for name, curves, when, losses in said)
    return [figure for figure in made if figure is not None]


def _figure(name: str, curves: Sequence[Curve], when: str, losses: Losses, unit: str) -> Figure | None:
    found = {c.rule: rows for c in curves if (rows := _rows(c, losses))}
    sizes = [batch for rows in found.values() for batch, *_ in rows]
    if len(set(sizes)) < 2:
        return None
    low, high = float(min(sizes)), float(max(sizes))
    traces = []
    for i, (rule, rows) in enumerate(found.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        batches, kept = [batch for batch, _, _ in rows], [values for _, values, _ in rows]
        middle, least, most = ([f(values) for values in kept] for f in (median, min, max))
        joined = {"mode": "lines+markers", "line": {"color": color, "width": 1}}
        traces.append(points(rule, batches, middle, color, least, most, marker, **joined))
    values = [value for rows in found.values() for _, kept, _ in rows for value in kept]
    return Figure(
        f"test-loss-{name}",
        f"Test loss {when}",
        "Median of the smoothed test loss over seeds, bars from least to most. Rates are those with the fewest steps "
        "to the target: none was chosen for its test loss.",
        tuple(traces),
        {
            "xaxis": batch_axis(low, high, f"batch size ({unit})"),
            "yaxis": axis("test loss", log=min(values) > 0 and max(values) > 4 * min(values), values=values),
        },
        Table(
            ("rule", "batch", "test loss", "least", "most", "seeds"),
            tuple(
                (rule, n.count(batch), *(n.number(f(kept)) for f in (median, min, max)), f"{len(kept)} of {seeds}")
                for rule, rows in found.items()
                for batch, kept, seeds in rows
            ),
        ),
    )


def _rows(curve: Curve, losses: Losses) -> list[tuple[int, list[float], int]]:
    """Batch size, the losses of its seeds that have one, and the number of seeds."""
    found = ((p, [loss for loss in losses(p) if loss is not None]) for p in curve.points)
    return [(p.batch, kept, p.seeds) for p, kept in found if kept]
