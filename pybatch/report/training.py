"""A training that was watched: what it is, and where the time of its steps goes."""

from __future__ import annotations

from pybatch.base import numerals as n
from pybatch.records import Training
from pybatch.report.layout import Section, columns, details_of, lines, notes_of
from pybatch.report.plot import COLORS, Plot, axis

WORTH = 0.05  # of a step spent waiting for data, below which workers are no matter
_PARTS = {
    "waiting": "waiting for data",
    "script": "the script between steps",
    "forward": "forward and loss",
    "backward": "backward",
    "between": "between backward and step",
    "update": "update",
}


def section(training: Training, unit: str) -> Section:
    """What is trained, its step and the shares of it."""
    words = {
        "waiting": lambda text: f"{text} {_workers(training)}".strip(),
        "micro_batch": lambda text: text if training.batch != training.micro_batch else "",
        "accumulation": lambda text: text if training.accumulation != 1 else "",
    }
    if training.devices > 1:
        words["batch"] = lambda text: f"{text} over {n.count(training.devices)} processes"
    return Section(
        "Training",
        lines=tuple(lines(training, words, unit)),
        notes=notes_of(training.notes),
        details=details_of(training.notes),
    )


def _workers(training: Training) -> str:
    if training.workers is None:
        return ""
    needed = training.workers_needed if (training.waiting or 0.0) >= WORTH else None
    more = f", {n.count(needed)} would keep up" if needed is not None and needed > training.workers else ""
    return f"({n.counted(training.workers, 'DataLoader worker')}{more})"


def plots(training: Training | None) -> list[Plot]:
    """Where the time of a step goes, as one bar."""
    known = [(label, getattr(training, name)) for name, label in _PARTS.items()] if training is not None else []
    known = [(label, value) for label, value in known if value is not None]
    if not known:
        return []
    traces = tuple(
        {
            "type": "bar",
            "orientation": "h",
            "name": label,
            "y": ["step"],
            "x": [value],
            "marker": {"color": COLORS[i % len(COLORS)]},
            "texttemplate": "%{x:.0%}",
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "constraintext": "inside",
        }
        for i, (label, value) in enumerate(known)
    )
    assert training is not None
    took = f", {n.number(training.step_ms)} ms" if training.step_ms is not None else ""
    return [
        Plot(
            "step-parts",
            "Where the time of a step goes",
            f"Shares of the time from one step's end to the next's{took}, in the order in which it is spent.",
            traces,
            {
                "barmode": "stack",
                "bargap": 0.5,
                "xaxis": axis("share of a step", tickformat=".0%", range=[-0.01, 1.03]),
                "yaxis": axis("", type="category", visible=False),
                "legend": {"traceorder": "normal"},
            },
            columns({"part": [label for label, _ in known], "share of a step": [n.share(value) for _, value in known]}),
        )
    ]
