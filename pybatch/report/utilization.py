"""How much of the device the steps use: shares by counter, and the roofs, in plots."""

from __future__ import annotations

from pybatch.base import numerals as n
from pybatch.records import BatchPoint, Capacity
from pybatch.records.figure import figures
from pybatch.report.capacity import timed_points
from pybatch.report.layout import columns, examples_of
from pybatch.report.plot import COLORS, MARKERS, Plot, axis, batch_axis, line, points, spread

_SHARES = {name: figure for name, figure in figures(BatchPoint).items() if figure.group == "utilization"}


def plots(capacity: Capacity | None) -> list[Plot]:
    """Utilization and roofs, where anything was timed."""
    timed = timed_points(capacity)
    return [utilization(capacity, timed), roofs(capacity, timed)] if capacity is not None and timed else []


def utilization(capacity: Capacity, timed: list[BatchPoint]) -> Plot:
    """Every share of the device that could be read, by batch."""
    known = {key: figure.name for key, figure in _SHARES.items() if any(getattr(p, key) is not None for p in timed)}
    title = "Utilization"
    on_gpu = capacity.device is None or capacity.device.kind != "cpu"  # a CPU has none of the others
    absent = [figure.name for key, figure in _SHARES.items() if on_gpu and key not in known]
    if not known:
        return Plot("utilization", title, "", missing="No counter could be read; the notes give the reasons.")
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
        for i, (key, name) in enumerate(known.items())
    )
    lacking = f" Not read on this device: {', '.join(absent)}; the notes say why." if absent else ""
    return Plot(
        "utilization",
        title,
        f"Shares of what the device can do, during the steady part of each batch size.{lacking}",
        traces,
        {
            "xaxis": batch_axis(low, high, f"batch size ({examples_of(capacity)})"),
            "yaxis": axis("share", tickformat=".0%", rangemode="tozero"),
        },
        columns(
            {"batch": [n.count(p.batch) for p in timed]}
            | {name: [n.share(getattr(p, key)) for p in timed] for key, name in known.items()}
        ),
    )


def roofs(capacity: Capacity, timed: list[BatchPoint]) -> Plot:
    """Roofline (Williams et al. 2009) with measured roofs where traffic was counted; else FLOP/s under the roof."""
    title, ceilings = "Roofs", capacity.ceilings
    peak = ceilings.gemm_flops if ceilings else None
    copy = ceilings.copy_bytes_per_s if ceilings else None
    rated = [p for p in timed if p.model_flops and p.step_ms]
    if not rated or peak is None:
        return Plot("roofs", title, "", missing="Model FLOPs or the matrix-product roof were not measured.")
    speed = [1e3 * (p.model_flops or 0.0) / (p.step_ms or 1.0) for p in rated]
    counted = [(p, s) for p, s in zip(rated, speed, strict=True) if p.dram_active and copy]
    table = columns(
        {
            "batch": [n.count(p.batch) for p in rated],
            "FLOP per step": [n.rate(p.model_flops, "FLOP") for p in rated],
            "achieved": [n.rate(s, "FLOP/s") for s in speed],
            "of the matrix product": [n.share(s / peak) for s in speed],
        }
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
        layout = {
            "xaxis": axis("FLOP per byte", log=True, values=xs),
            "yaxis": axis("FLOP/s", log=True, values=[*speed, peak, copy * xs[0]]),
        }
        return Plot("roofs", "Roofline", caption, tuple(traces), layout, table)
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
        "xaxis": batch_axis(low, high, f"batch size ({examples_of(capacity)})"),
        "yaxis": axis("FLOP/s", log=True, values=[*speed, peak]),
    }
    return Plot("roofs", title, caption, tuple(traces), layout, table)
