"""A plot as data: what plotly.js draws in the page, and the table that says the same in numbers.

Traces and layout are plotly's JSON. A color is a name with "@" in front ("@blue"): the page puts in the shade that the
reader's theme needs. The palette is Okabe & Ito's (2008), which people of any color vision can tell apart; lines differ
in dash and marker as well.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pybatch.base import numerals as n
from pybatch.report.layout import Table

COLORS = ("@blue", "@orange", "@green", "@red", "@purple", "@sky")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
_MOST_TICKS = 9  # labels a phone's width holds


SHADES = {
    "light": {
        "blue": "#0072b2",
        "orange": "#d55e00",
        "green": "#009e73",
        "red": "#b0305c",
        "purple": "#8e5ea2",
        "sky": "#3a9bd1",
        "gray": "#6e7781",
        "ink": "#1b1f24",
        "grid": "#e4e8ec",
    },
    "dark": {
        "blue": "#56b4e9",
        "orange": "#f0a04b",
        "green": "#3fc79a",
        "red": "#ff7b9c",
        "purple": "#cc9fdb",
        "sky": "#9ad4f5",
        "gray": "#9aa4af",
        "ink": "#e6edf3",
        "grid": "#2b3138",
    },
}
_SHADE = re.compile(r"@([a-z]+)(?:/(\d+))?")  # a color, and how opaque it is in percent


@dataclass(frozen=True)
class Plot:
    """One plot of the page. `missing` says why it can't be drawn; `traces` is then empty."""

    name: str  # its anchor in the page
    title: str
    caption: str
    traces: tuple[dict[str, Any], ...] = ()
    layout: dict[str, Any] = field(default_factory=dict)
    table: Table | None = None
    missing: str | None = None


def safe(text: str) -> str:
    """A name from outside as plotly shall show it: plotly reads some tags and links in labels."""
    return html.escape(text, quote=True)


def themed(value: Any, theme: str) -> Any:
    """Traces or layout with every color in the shade of a theme, as `page.js` has it."""
    if isinstance(value, str):
        found = _SHADE.fullmatch(value)
        return value if found is None else _shade(SHADES[theme][found[1]], found[2])
    if isinstance(value, dict):
        return {key: themed(item, theme) for key, item in value.items()}
    return [themed(item, theme) for item in value] if isinstance(value, list | tuple) else value


def _shade(color: str, percent: str | None) -> str:
    if percent is None:
        return color
    parts = ",".join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))
    return f"rgba({parts},{int(percent) / 100})"


def batch_axis(low: float, high: float, title: str) -> dict[str, Any]:
    """A logarithmic axis of batch sizes with powers of two (or of 4, 16, ...) written out."""
    first, last = math.floor(math.log2(max(low, 1))), math.ceil(math.log2(max(high, 2)))
    every = 1
    while (last - first) / every > _MOST_TICKS - 1:
        every *= 2
    values = [2**power for power in range(first, last + 1, every)]
    ends = [math.log10(max(low, 0.7) / 1.25), math.log10(high * 1.25)]
    return {
        "type": "log",
        "title": {"text": safe(title)},
        "tickvals": values,
        "ticktext": [_short(value) for value in values],
        "range": ends,
    }


def _short(value: int) -> str:
    """4096 as 4k: ticks are read at a glance."""
    for scale, unit in ((2**20, "M"), (2**10, "k")):
        if value >= scale and value % scale == 0:
            return f"{value // scale}{unit}"
    return str(value)


def axis(title: str, log: bool = False, values: Sequence[float | None] = (), **more: Any) -> dict[str, Any]:
    """An axis of anything else.

    A logarithmic one is labelled at powers of ten over two decades of `values` (all that is drawn), at 1, 2 and 5 over
    half a decade, each label with the whole number: plotly's own are single digits there.
    """
    made: dict[str, Any] = {"title": {"text": safe(title)}, "type": "log" if log else "linear"}
    known = [value for value in values if value]
    if log and known and max(known) >= 4 * min(known):
        made["dtick"] = 1 if max(known) >= 100 * min(known) else "D2"
        made["tickformat"] = "~s" if min(known) >= 1 else ".3~g"  # SI prefixes: 1k; but 0.5, not 500m
    return made | more


def line(name: str, x: Sequence[float], y: Sequence[float], color: str, **more: Any) -> dict[str, Any]:
    """A line without markers; `dash` and others as plotly's."""
    dash = more.pop("dash", "solid")
    return {
        "type": "scatter",
        "mode": "lines",
        "name": safe(name),
        "x": list(x),
        "y": list(y),
        "line": {"color": color, "dash": dash, "width": 2},
    } | more


def points(
    name: str,
    x: Sequence[float],
    y: Sequence[float | None],
    color: str,
    low: Sequence[float | None] | None = None,
    high: Sequence[float | None] | None = None,
    marker: str = "circle",
    **more: Any,
) -> dict[str, Any]:
    """Measured points, with error bars where an interval is known."""
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "name": safe(name),
        "x": list(x),
        "y": list(y),
        "marker": {"color": color, "symbol": marker, "size": 8},
    }
    if low is not None and high is not None:
        up = [b - v if b is not None and v is not None else 0.0 for v, b in zip(y, high, strict=True)]
        down = [v - a if a is not None and v is not None else 0.0 for v, a in zip(y, low, strict=True)]
        trace["error_y"] = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": color}
    return trace | more


def band(name: str, x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str) -> dict[str, Any]:
    """The area between two curves."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": safe(name),
        "x": [*x, *reversed(x)],
        "y": [*low, *reversed(high)],
        "fill": "toself",
        "fillcolor": f"{color}/18",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def mark(
    name: str, at: float, ends: tuple[float, float], color: str, span: tuple[float | None, float | None] | None = None
) -> list[dict[str, Any]]:
    """A vertical line at a batch size, with the band of its interval where that is known."""
    low, high = span or (None, None)
    known = n.interval(low, high) if span else ""
    label = f"{name} {n.number(at)} {known}".strip()
    made = []
    if low is not None and high is not None and high > low:
        made.append(band(label, [low, high], [ends[0]] * 2, [ends[1]] * 2, color) | {"showlegend": False})
    return [*made, line(label, [at, at], ends, color, dash="dash", hoverinfo="name")]


def spread(low: float, high: float, count: int = 120) -> list[float]:
    """Batch sizes evenly apart in logarithm, for a smooth curve."""
    low, high = max(low, 1e-9), max(high, low * 1.0001)
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]
