"""Figures of the noise scale: along a training run, and over the layers of a model."""

from __future__ import annotations

from pybatch.base import numerals as n
from pybatch.records import NoiseScale, NoiseTrajectory
from pybatch.report.figure import Figure, axis, band, line, points, safe
from pybatch.report.layout import Table

_MOST_LAYERS = 60  # bars a page holds; the table has all


def noise_figures(noise: NoiseScale | None, trajectory: NoiseTrajectory | None, unit: str) -> list[Figure]:
    """What there is to draw."""
    made = []
    if trajectory is not None:
        made.append(_along(trajectory, unit))
    if noise is not None and noise.layers:
        made.append(_layers(noise, unit))
    return made


def trajectory_table(trajectory: NoiseTrajectory) -> Table:
    """One row a stretch of training, those that were not resolved among them."""
    return Table(
        ("steps", "B_simple", "low", "high", "status", "loss"),
        tuple(
            (
                f"{n.count(p.first_step)} to {n.count(p.last_step)}",
                n.number(p.b_simple),
                n.number(p.low),
                n.number(p.high),
                p.status.replace("_", " "),
                n.number(p.loss),
            )
            for p in trajectory.points
        ),
    )


def _along(trajectory: NoiseTrajectory, unit: str) -> Figure:
    known = [p for p in trajectory.points if p.b_simple is not None and p.b_simple > 0]
    title = "Noise scale along training"
    table = trajectory_table(trajectory)
    if not known:
        return Figure("noise-along", title, "", table=table, missing="No stretch of the run resolved the noise scale.")
    middle = [(p.first_step + p.last_step) / 2 for p in known]
    values = [p.b_simple for p in known]
    bounded = [
        (x, p.low, p.high) for x, p in zip(middle, known, strict=True) if p.low is not None and p.high is not None
    ]
    traces = []
    if len(bounded) > 1:
        low, high = [float(b[1] or 0) for b in bounded], [float(b[2] or 0) for b in bounded]
        traces.append(band("95 % interval", [b[0] for b in bounded], low, high, "@orange"))
    traces.append(points("B_simple", middle, values, "@orange", mode="lines+markers"))
    layout = {
        "xaxis": axis("training step"),
        "yaxis": axis(f"noise scale ({trajectory.unit or unit})", log=True, values=values),
    }
    losses = [(x, p.loss) for x, p in zip(middle, known, strict=True) if p.loss is not None]
    if losses:
        xs, ys = [x for x, _ in losses], [float(y or 0) for _, y in losses]
        traces.append(line("loss", xs, ys, "@blue", dash="dot", yaxis="y2"))
        layout["yaxis2"] = axis("loss", overlaying="y", side="right", showgrid=False)
    caption = (
        "The noise scale usually grows as the loss falls, and the batch size worth using with it. "
        f"Measured from {trajectory.source}."
    )
    return Figure("noise-along", title, caption, tuple(traces), layout, table)


def _layers(noise: NoiseScale, unit: str) -> Figure:
    table = Table(
        ("layer", "B_simple", "low", "high", "status"),
        tuple(
            (
                layer.name,
                n.number(layer.b_simple),
                n.number(layer.low),
                n.number(layer.high),
                layer.status.replace("_", " "),
            )
            for layer in noise.layers
        ),
    )
    title = "Noise scale by layer"
    resolved = [layer for layer in noise.layers if layer.b_simple is not None and layer.b_simple > 0]
    largest = sorted(resolved, key=lambda layer: layer.b_simple or 0.0, reverse=True)[:_MOST_LAYERS]
    known = [layer for layer in resolved if layer in largest]  # in the order of the model again
    if not known:
        return Figure("noise-layers", title, "", table=table, missing="No layer's noise scale was resolved.")
    trace = points(
        "B_simple",
        [layer.b_simple or 0.0 for layer in known],
        [],
        "@orange",
    ) | {"y": [safe(layer.name) for layer in known]}
    trace["error_x"] = {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, (layer.high or layer.b_simple or 0.0) - (layer.b_simple or 0.0)) for layer in known],
        "arrayminus": [max(0.0, (layer.b_simple or 0.0) - (layer.low or layer.b_simple or 0.0)) for layer in known],
        "color": "@orange",
    }
    values = [layer.b_simple for layer in known]
    layout = {
        "xaxis": axis(f"noise scale ({noise.unit or unit})", log=True, values=values),
        "yaxis": {"type": "category", "autorange": "reversed", "title": {"text": ""}},
    }
    caption = "The same measurement for each parameter alone, in the order of the model, with 95 % intervals."
    if len(known) < len(resolved):
        caption += f" Drawn are the {len(known)} largest of {n.count(len(resolved))}; the table has all."
    return Figure("noise-layers", title, caption, (trace,), layout, table)
