"""The claims of the seed paper: what was found of each, and test loss against batch size in plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from pybatch.answer.claims import check_claims, notes_on_claims
from pybatch.base import numerals as n
from pybatch.records import Convergence, ConvergencePoint, Curve, Run
from pybatch.report.layout import Section, Table, columns
from pybatch.report.plot import COLORS, MARKERS, Plot, axis, batch_axis, points

MISSING = "not measured"
TITLE = "Claims of Golmant et al. (2018), on this workload"

Losses = Callable[[ConvergencePoint], Sequence[float | None]]  # by seed


def sections(run: Run) -> list[Section]:
    """One line a claim: what was found, and the figures it was found by. None of a run without a sweep."""
    claims = check_claims(run)
    if not claims or run.convergence is None:
        return []
    lines = tuple((claim.name, f"{claim.finding}: {claim.text}") for claim in claims if claim.finding != MISSING)
    if not lines:  # with two batch sizes that reach a target there is a finding on cost
        return [Section(TITLE, notes=(f"{MISSING}: fewer than two batch sizes reached a target",))]
    lacking: dict[str, list[str]] = {}  # claims by what they lack
    for claim in claims:
        if claim.finding == MISSING:
            lacking.setdefault(claim.text, []).append(claim.name)
    notes = tuple(f"{', '.join(names)}: {MISSING}, {why}" for why, names in lacking.items())
    return [Section(TITLE, lines=lines, details=(*notes, *notes_on_claims(run.convergence)))]


def plots(convergence: Convergence, unit: str = "examples") -> list[Plot]:
    """One plot for each budget that leaves two batch sizes with a test loss."""
    epochs = f"{convergence.gap_epochs:g} epochs" if convergence.gap_epochs else ""
    steps = n.counted(convergence.gap_steps, "step") if convergence.gap_steps else ""
    train = [curve for curve in convergence.curves if curve.split == "train"]
    target = n.number(train[0].target) if train else ""
    said = (
        ("target", train, f"where train loss {target} was met", lambda p: p.other_losses),
        ("epochs", convergence.curves, f"after {epochs}", lambda p: p.test_losses_at_epochs),
        ("steps", convergence.curves, f"after {steps}", lambda p: p.test_losses_at_steps),
    )
    made = (_test_loss(name, curves, when, losses, unit) for name, curves, when, losses in said)
    return [plot for plot in made if plot is not None]


def _test_loss(name: str, curves: Sequence[Curve], when: str, losses: Losses, unit: str) -> Plot | None:
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
    return Plot(
        f"test-loss-{name}",
        f"Test loss {when}",
        "Median of the smoothed test loss over seeds, bars from least to most. Rates are those with the fewest steps "
        "to the target: none was chosen for its test loss.",
        tuple(traces),
        {
            "xaxis": batch_axis(low, high, f"batch size ({unit})"),
            "yaxis": axis("test loss", log=min(values) > 0 and max(values) > 4 * min(values), values=values),
        },
        _table(found),
    )


def _table(found: dict[str, list[tuple[int, list[float], int]]]) -> Table:
    rows = [(rule, *row) for rule, of_rule in found.items() for row in of_rule]
    return columns(
        {
            "rule": [rule for rule, *_ in rows],
            "batch": [n.count(batch) for _, batch, *_ in rows],
            "test loss": [n.number(median(kept)) for _, _, kept, _ in rows],
            "least": [n.number(min(kept)) for _, _, kept, _ in rows],
            "most": [n.number(max(kept)) for _, _, kept, _ in rows],
            "seeds": [f"{len(kept)} of {seeds}" for _, _, kept, seeds in rows],
        }
    )


def _rows(curve: Curve, losses: Losses) -> list[tuple[int, list[float], int]]:
    """Batch size, the losses of its seeds that have one, and the number of seeds."""
    found = ((p, [loss for loss in losses(p) if loss is not None]) for p in curve.points)
    return [(p.batch, kept, p.seeds) for p, kept in found if kept]
