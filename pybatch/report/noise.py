"""The gradient noise scale: at one place of training, along a run, and over the layers of a model."""

from __future__ import annotations

from pybatch.base import numerals as n
from pybatch.records import LayerNoise, NoisePoint, NoiseScale, NoiseTrajectory
from pybatch.report.layout import Section, Table, details_of, lines, notes_of, table
from pybatch.report.plot import Plot, axis, band, line, points, safe

_MOST_LAYERS = 60  # bars a page holds; the table has all


def section(noise: NoiseScale, unit: str) -> Section:
    """B_simple or its bound, and what it was measured over."""
    instead = {
        "lower_bound": f"at least {n.number(noise.low)} {unit}: |G|² is not separated from zero",
        "unresolved": "unresolved",
    }
    said = lines(noise, {"b_simple": lambda text: instead.get(noise.status, text)}, unit)
    if noise.counted is not None and noise.counted.b_simple is not None:
        own = noise.counted
        value = f"{n.number(own.b_simple)} {n.interval(own.low, own.high)} {own.unit}"
        said.append(("the same", f"{value}, at {n.number(own.per_example)} {own.unit} per example"))
    if noise.warmup_steps is not None:
        loss = f", where the training loss was {n.number(noise.loss)}" if noise.loss is not None else ""
        when = f"after {n.counted(noise.warmup_steps, 'warm-up step')}"
        if noise.stretch_steps:
            when = f"over {n.counted(noise.stretch_steps, 'training step')} {when}"
        said.append(("measured", f"{when}{loss}"))
    elif noise.last_step is not None:
        said.append(("measured", _steps(noise.first_step, noise.last_step)))
    if noise.steps:
        pair = ""
        if noise.small_batch and noise.large_batch:
            pair = f" of gradients over {n.number(noise.small_batch)} and {n.number(noise.large_batch)} {unit}"
        said.append(("from", f"{n.counted(noise.steps, 'pair')} of norms{pair} ({noise.source})"))
    return Section(
        "Gradient noise scale", lines=tuple(said), notes=notes_of(noise.notes), details=details_of(noise.notes)
    )


def trajectory_section(found: NoiseTrajectory) -> Section:
    """One row a stretch of training, those that were not resolved among them."""
    unit = found.unit or "examples"
    where = [("from", f"{found.source}, in {unit}")]
    newest = next((point for point in reversed(found.points) if point.b_simple is not None), None)
    if newest is not None:
        value = f"{n.number(newest.b_simple)} {n.interval(newest.low, newest.high)} {unit}"
        where.insert(0, ("newest", f"{value}, {_steps(newest.first_step, newest.last_step)}"))
    return Section(
        "Noise scale along training",
        _stretches(found),
        tuple(where),
        notes=notes_of(found.notes),
        details=details_of(found.notes),
    )


def _steps(first: int | None, last: int) -> str:
    return f"over steps {n.count(first)} to {n.count(last)}"


def plots(noise: NoiseScale | None, trajectory: NoiseTrajectory | None, unit: str) -> list[Plot]:
    """What there is to draw."""
    made = []
    if trajectory is None and noise is not None and noise.trajectory:
        trajectory = NoiseTrajectory(noise.trajectory, noise.source, noise.unit)
    if trajectory is not None:
        made.append(_along(trajectory, unit))
    if noise is not None and noise.layers:
        made.append(_layers(noise, unit))
    return made


def _stretches(trajectory: NoiseTrajectory) -> Table:
    return table(NoisePoint, trajectory.points)


def _along(trajectory: NoiseTrajectory, unit: str) -> Plot:
    known = [p for p in trajectory.points if p.b_simple is not None and p.b_simple > 0]
    title = "Noise scale along training"
    rows = _stretches(trajectory)
    if not known:
        return Plot("noise-along", title, "", table=rows, missing="No stretch of the run resolved the noise scale.")
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
    drawn = [*values, *(end for _, *ends in bounded for end in ends)]
    layout = {
        "xaxis": axis("training step"),
        "yaxis": axis(f"noise scale ({trajectory.unit or unit})", log=True, values=drawn),
    }
    losses = [(x, p.loss) for x, p in zip(middle, known, strict=True) if p.loss is not None]
    if losses:
        xs, ys = [x for x, _ in losses], [float(y or 0) for _, y in losses]
        traces.append(line("loss", xs, ys, "@blue", dash="dot", yaxis="y2"))
        layout["yaxis2"] = axis("loss", overlaying="y", side="right", showgrid=False)
    caption = (
        "The noise scale usually grows as the loss falls, and the batch size worth using with it. "
        f"Source: {trajectory.source}."
    )
    return Plot("noise-along", title, caption, tuple(traces), layout, rows)


def _layers(noise: NoiseScale, unit: str) -> Plot:
    rows = table(LayerNoise, noise.layers)
    title = "Noise scale by layer"
    resolved = [layer for layer in noise.layers if layer.b_simple is not None and layer.b_simple > 0]
    largest = sorted(resolved, key=lambda layer: layer.b_simple or 0.0, reverse=True)[:_MOST_LAYERS]
    known = [layer for layer in resolved if layer in largest]  # in the order of the model again
    if not known:
        return Plot("noise-layers", title, "", table=rows, missing="No layer's noise scale was resolved.")
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
    drawn = [end for layer in known for end in (layer.b_simple, layer.low, layer.high)]
    layout = {
        "xaxis": axis(f"noise scale ({noise.unit or unit})", log=True, values=drawn),
        "yaxis": {"type": "category", "autorange": "reversed", "title": {"text": ""}},
    }
    caption = "The same measurement for each parameter alone, in the order of the model, with 95 % intervals."
    if len(known) < len(resolved):
        caption += f" Drawn are the {len(known)} largest of {n.count(len(resolved))}; the table has all."
    return Plot("noise-layers", title, caption, (trace,), layout, rows)
