"""The verdict: its figures and words, and why this batch and these devices in plots."""

from __future__ import annotations

from pybatch.answer.ensemble import Ensemble
from pybatch.answer.verdict import ensemble
from pybatch.base import numerals as n
from pybatch.records import BatchPoint, Capacity, FrontierPoint, Run, Verdict
from pybatch.records.figure import figure_of, interval_of
from pybatch.records.verdict import said_by
from pybatch.report.capacity import reach, timed_points
from pybatch.report.layout import Section, columns, details_of, examples_of, lines, notes_of, table
from pybatch.report.plot import Plot, axis, batch_axis, line, mark, points, safe, spread

# The figures that an answer opens with.
_FIRST = ("best_batch", "critical_batch", "saturation_batch", "learning_rate", "useful_devices", "time_to_target")


def section(verdict: Verdict, capacity: Capacity | None = None, price: float | None = None) -> Section:
    """The figures of the verdict, and what its words say beyond the answer.

    Args:
        verdict: the answer.
        capacity: it stands on.
        price: of a device-hour; None: no money is spoken of.
    """
    optimum = n.interval(verdict.best_low, verdict.best_high, n.count)
    words = {
        "critical_batch": lambda text: f"{text} {said_by(verdict.evidence, verdict.critical_source)}".strip(),
        "saturation_batch": lambda text: "",  # the capacity says it, with its interval
        "best_batch": lambda text: f"{text} {optimum}".strip(),
        "limit": lambda text: "" if text in ("balanced", "unresolved") else text,
        "time_to_target": lambda text: f"{text} on one device (modelled)",
        "useful_devices": lambda text: f"{text} ({communication(verdict)})",
        "learning_rate": lambda text: f"{text}: {verdict.why('learning_rate').text}",
    }
    said = lines(verdict, words)
    twice = next((reason.inputs for reason in verdict.reasons if reason.figure == "doubling"), None)
    if twice is not None:
        factors = ", ".join(
            f"{n.number(factor, 2)} times the {name}"
            for name in ("steps", "examples", "time", "energy")
            if (factor := _number(twice.get(f"{name}_factor"))) is not None
        )
        low, high = (_number(twice.get(f"time_factor_{end}")) for end in ("low", "high"))
        ends = n.interval(low, high, lambda value: n.number(value, 2))
        said.append(("twice the batch", f"{factors}; time {ends} by {twice.get('step_times', 'modelled')} step times"))
    if price is not None:
        said.append(cost(verdict, capacity, price))
    return Section(
        "Verdict",
        lines=tuple(said),
        text=rest_of(verdict),
        notes=notes_of(verdict.notes),
        details=details_of(verdict.notes),
    )


def rest_of(verdict: Verdict) -> str:
    """What the verdict says beyond its answer and the sentence why."""
    return verdict.text.removeprefix(verdict.answer).strip().removeprefix(verdict.because).strip()


def _number(value: float | str | None) -> float | None:
    """What a reason rests on, where that is a number: names are the record's own."""
    return float(value) if isinstance(value, int | float) else None


def cost(verdict: Verdict | None, capacity: Capacity | None, price: float) -> tuple[str, str]:
    """What training on one device costs at the best batch, at a price per device-hour; or why that is not known."""
    parts = []
    if verdict is not None and verdict.time_to_target is not None:
        parts.append(f"{n.number(price * verdict.time_to_target / 3600)} to the target")
    fit = capacity.model if capacity is not None else None
    if verdict is not None and fit is not None and verdict.best_batch:
        seconds = 1e6 / verdict.best_batch * fit.step_s(verdict.best_batch)
        parts.append(f"{n.number(price * seconds / 3600)} a million {examples_of(capacity)}")
    lack = "step times were not measured" if capacity is None else "no batch is advised"
    text = f"{', '.join(parts)}, at {n.number(price)} a device-hour (modelled)" if parts else f"not known: {lack}"
    return "cost", text


def first_figures(verdict: Verdict) -> list[tuple[str, str, str]]:
    """Label, value and interval of what a reader looks for first."""
    found = []
    for name in _FIRST:
        figure, value = figure_of(Verdict, name), getattr(verdict, name)
        band = interval_of(verdict, name)
        if name == "best_batch":
            band = n.interval(verdict.best_low, verdict.best_high, n.count)
        if name == "learning_rate" and value is not None:
            band = "a rule, not measured" if verdict.why(name).evidence == "assumed" else "tuned"
        if value is not None or name not in ("time_to_target", "learning_rate"):
            found.append((figure.label, f"{figure.form(value)} {figure.unit}".strip(), band))
    return found


def communication(verdict: Verdict) -> str:
    """What the verdict's figures of several devices stand on."""
    inputs = next((r.inputs for r in verdict.reasons if r.figure == "useful_devices"), {})
    measured = _number(inputs.get("measured_devices"))
    if measured is None:
        return "modelled, without communication"
    return f"modelled, with the communication measured on {n.count(measured)} devices"


def goodput_plots(run: Run) -> list[Plot]:
    """Goodput, where the verdict has a critical batch and the device a fit."""
    capacity, verdict, timed = run.capacity, run.verdict, timed_points(run.capacity)
    if capacity is None or verdict is None or not timed or verdict.critical_batch is None or capacity.model is None:
        return []
    model = ensemble(capacity, run.noise, run.convergence)
    return [goodput(capacity, model, timed, verdict)] if model is not None else []


def frontier_plots(run: Run) -> list[Plot]:
    """What more devices buy, where the verdict looked at several."""
    there = run.verdict is not None and len(run.verdict.frontier) > 1 and timed_points(run.capacity)
    return [frontier(run.verdict)] if there and run.verdict is not None else []


def goodput(capacity: Capacity, model: Ensemble, timed: list[BatchPoint], verdict: Verdict) -> Plot:
    """Throughput times statistical efficiency (goodput of Qiao et al. 2021), which peaks at the best batch."""
    fit = capacity.model
    assert fit is not None
    ceiling = fit.ceiling or 1.0
    low, high = reach(capacity, timed, verdict)
    xs = spread(low, high)
    fewest = min(float(model.examples(x)) for x in xs)  # the fewest examples of this picture are the whole

    def statistical(batch: float) -> float:
        return fewest / float(model.examples(batch))

    def device(batch: float) -> float:
        return batch / float(model.step_s(batch)) / ceiling

    useful = [device(x) * statistical(x) for x in xs]
    peak = max(useful)
    traces = [
        line("throughput, of the ceiling", xs, [device(x) for x in xs], "@blue", dash="dot"),
        line("progress per example", xs, [statistical(x) for x in xs], "@orange", dash="dash"),
        line("goodput, of its peak", xs, [value / peak for value in useful], "@green"),
    ]
    measured = [p for p in timed if p.samples_per_s]
    rates = [(p.samples_per_s or 0.0) / ceiling * statistical(p.batch) / peak for p in measured]
    traces.append(points("goodput of measured times", [p.batch for p in measured], rates, "@green", marker="diamond"))
    if verdict.best_batch is not None:
        traces += mark("best batch", verdict.best_batch, (0.0, 1.05), "@red", (verdict.best_low, verdict.best_high))
    law = "by measured steps" if model.absolute else "by the critical batch and its error"
    return Plot(
        "goodput",
        "Why this batch: speed of the device times progress per example",
        f"A larger batch uses the device better (dotted) but makes less of each example (dashed: {law}). Their "
        "product, goodput, is least time to the loss at its peak. Diamonds use measured step times.",
        tuple(traces),
        {
            "xaxis": batch_axis(low, high, f"batch size ({examples_of(capacity)})"),
            "yaxis": axis("share", tickformat=".0%"),
        },
        columns(
            {
                "batch": [n.count(p.batch) for p in measured],
                "throughput of ceiling": [n.share(p.of_ceiling(capacity)) for p in measured],
                "progress per example": [n.share(statistical(p.batch)) for p in measured],
                "goodput of peak": [n.share(rate) for rate in rates],
            }
        ),
    )


def frontier(verdict: Verdict) -> Plot:
    """Time against cost for 1, 2, 4, ... devices."""
    found = verdict.frontier
    labels = [safe(f"{p.devices}") for p in found]
    trace = points(
        "devices, each number at its own best batch",
        [p.cost_factor for p in found],
        [p.time_factor for p in found],
        "@blue",
        mode="lines+markers+text",
        text=labels,
        textposition="top right",
        cliponaxis=False,
    )
    useful = [p for p in found if verdict.useful_devices and p.devices <= verdict.useful_devices]
    worth = points(
        "worth it by the verdict",
        [p.cost_factor for p in useful],
        [p.time_factor for p in useful],
        "@green",
        marker="diamond",
    )
    return Plot(
        "frontier",
        "What more devices buy",
        "Time to the loss against device-seconds, both relative to one device at its best batch; "
        f"{communication(verdict)}.",
        (trace, worth),
        {
            "xaxis": axis("device-seconds, relative", log=True, values=[p.cost_factor for p in found]),
            "yaxis": axis("time, relative", log=True, values=[p.time_factor for p in found]),
        },
        table(FrontierPoint, found),
    )
