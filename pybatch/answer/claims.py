"""What Golmant et al. (2018) claim of large batches, each checked on a sweep of one's own. Pure: a record in.

A finding is "yes" or "no" where the 95 % interval leaves no doubt, and "undetermined" otherwise. Figures are taken
seed by seed, over all batch sizes; seeds that did not reach the target are counted, and no finding leans on leaving
them out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from pybatch.answer.claim import Claim, Finding
from pybatch.answer.gap import gap_claims
from pybatch.answer.pairing import Trend, coarseness, ran_by_seed, shortfall, steps_by_seed, trend, trend_of
from pybatch.answer.rules import beats_constant, rule_fails
from pybatch.base import numerals as n
from pybatch.records import Capacity, Convergence, ConvergencePoint, Curve, Run
from pybatch.scaling import SEARCHED


def check_claims(run: Run) -> tuple[Claim, ...]:
    """The claims that the curves of a run's sweep can speak of; empty where it has none.

    Args:
        run: a sweep, or a run and a sweep joined as `pybatch report` does: only then capacity is known.
    """
    steps = run.convergence
    if steps is None or not steps.curves:
        return ()
    found: list[Claim] = []
    for split in dict.fromkeys(curve.split for curve in steps.curves):
        curves = [curve for curve in steps.curves if curve.split == split]
        best = next((c for c in curves if c.rule == SEARCHED), curves[0])
        found += [_stagnation(best), _cost(best), _capacity(best, run.capacity)]
        for curve in curves:
            if curve.rule != SEARCHED:
                found += [rule_fails(curve, curves, steps.base_batch), *beats_constant(curve, curves, steps.base_batch)]
        for curve in curves:
            found += gap_claims(steps, curve)
    return tuple(found)


def notes_on_claims(steps: Convergence) -> tuple[str, ...]:
    """What no claim here can speak of."""
    notes = []
    if not any(curve.split == "train" for curve in steps.curves):
        notes.append("test loss at equal train loss: not measured, as no train target was swept")
    if steps.gap_epochs is None:
        notes.append(
            "gap of test and train loss at equal epochs and at equal steps: not measured, as trainings end at their "
            "target. Sweep with --gap-epochs 30"
        )
    return tuple(notes)


def _stagnation(curve: Curve) -> Claim:
    name, claim = f"{curve.split} steps level off", "steps stop falling past some batch size"
    fit, reached = curve.fit, [p.batch for p in _reached(curve)]
    if fit is None or fit.model is None or not reached:
        return Claim(name, claim, "not measured", "too few batch sizes reached the target for a fit")
    smallest, largest = min(reached), max(reached)
    value, low, high = fit.b_stag, fit.b_stag_low, fit.b_stag_high
    finding: Finding = "undetermined"
    flat = curve.critical_batch is None and curve.high is not None  # steps that never bend, as they never fall
    if high is not None and high <= largest and (value is not None or flat):
        finding = "yes"
    elif low is not None and low >= largest:
        finding = "no"
    if value is not None:
        band = n.interval(low, high) or "(no interval)"
        text = f"doubling saves less than 10 % of the steps from {n.number(value)} {band} on"
    elif finding == "no":
        text = "every doubling saves more than 10 % of the steps"
    elif finding == "yes" and high is not None and high > smallest:
        text = f"doubling saves less than 10 % of the steps from at most {n.number(high)} on"
    elif finding == "yes":
        text = "steps hardly fall at all"
    elif curve.critical_batch is not None:
        text = f"the fit puts no batch size to it {n.interval(low, high)}".rstrip()
    else:
        text = f"no bend stands out of the scatter {n.interval(low, high)}".rstrip()
    text += f", tested to {n.count(largest)}{shortfall(curve.points)}"
    return Claim(name, claim, finding, text, value, low, high)


def _cost(curve: Curve) -> Claim:
    """Examples a doubling, seed by seed, from the batch size that is cheapest by the other seeds.

    Cheapest by its own it would be so by luck as well; and from the smallest one on, where small batches cost more, a
    rise would be hidden by the fall before it.
    """
    name, claim = f"{curve.split} cost rises", "a larger batch raises the total of examples"
    points = _reached(curve)
    if len(points) < 2:
        return Claim(name, claim, "not measured", f"fewer than two batch sizes reached the target{_short(curve)}")
    by_seed = {p.batch: steps for p in points if (steps := steps_by_seed(p)) is not None}
    ran = {p.batch: ran_by_seed(p) for p in points}
    first, last = points[0].batch, points[-1].batch
    if len(by_seed) < len(points):
        text = f"no steps by seed are in the record: no interval{_short(curve)}"
        return Claim(name, claim, "not measured", text)
    trends: list[Trend] = []
    starts: list[int] = []
    lost = {"at the start": 0, "at the end": 0}
    for seed in range(max(map(len, by_seed.values()))):
        start = _cheapest(by_seed, seed, last) or first
        own = {b: s for b, steps in by_seed.items() if b >= start and (s := _at(steps, seed)) is not None}
        if start not in own or last not in own:
            lost["at the start"] += start not in own and last in own and seed in ran[start]
            lost["at the end"] += last not in own and start in own and seed in ran[last]
            continue
        costs = {b: math.log(b * s) for b, s in own.items()}
        trends.append(trend(costs, {b: coarseness(s) for b, s in own.items()}))
        starts.append(start)
    if not trends:
        text = f"no seed reached the target at both ends{_short(curve)}"
        return Claim(name, claim, "not measured", text)
    found = trend_of(trends)
    unmet = any(p.batch > last for p in curve.points)  # larger ones that most seeds could not do
    finding: Finding = "undetermined"
    if found.low > 0 and not lost["at the start"]:
        finding = "yes"
    elif found.high < 0 and not lost["at the end"] and not unmet:
        finding = "no"
    here = n.count(min(starts)) + (f" to {n.count(max(starts))}" if len(set(starts)) > 1 else "")
    told = f" (the fewest examples by the other seeds: {here})" if len(set(starts)) > 1 else ""
    ratio = found.ratio
    text = f"each doubling from {n.count(min(starts))} to {n.count(last)} takes {ratio.words()} times the examples"
    text += f"{told}{_of(len(trends), len(trends) + sum(lost.values()))}{_short(curve)}"
    low, high = (ratio.low, ratio.high) if ratio.seeds > 1 else (None, None)
    return Claim(name, claim, finding, text, ratio.value, low, high)


def _cheapest(by_seed: Mapping[int, tuple[float | None, ...]], seed: int, last: int) -> int | None:
    """The batch size below the last one with the fewest examples, by the median of the other seeds."""
    costs = {}
    for batch, steps in by_seed.items():
        others = [s * batch if s is not None else math.inf for i, s in enumerate(steps) if i != seed]
        if batch < last and others:
            costs[batch] = median(others)
    least = min(costs.values(), default=math.inf)
    return min(b for b, cost in costs.items() if cost == least) if math.isfinite(least) else None


def _capacity(curve: Curve, capacity: Capacity | None) -> Claim:
    name, claim = f"{curve.split} below capacity", "the critical batch lies below what the device can take"
    if capacity is None:
        why = "no capacity stands beside this sweep: give the report a run of 'pybatch bench' as well"
        return Claim(name, claim, "not measured", why)
    walls = []
    if capacity.saturation_batch is not None:
        ends = capacity.saturation_low, capacity.saturation_high
        walls.append(("saturation batch", capacity.saturation_batch, *ends))
    if capacity.max_batch is not None:
        most = float(capacity.max_batch)
        walls.append(("largest batch that fits", most, most, most))
    if not walls:
        why = "neither the saturation batch nor the largest that fits is known"
        return Claim(name, claim, "not measured", why)
    wall_name, wall, least, most_ = min(walls, key=lambda found: found[1])
    low = curve.low / most_ if curve.low and most_ else None
    high = curve.high / least if curve.high and least else None
    value = curve.critical_batch / wall if curve.critical_batch else None
    if value is None and low is None and high is None:
        return Claim(name, claim, "not measured", f"the critical batch is not known{_short(curve)}")
    said = f"{n.number(value)} " if value is not None else ""
    text = f"critical batch over {wall_name}: {said}{n.interval(low, high) or '(no interval)'}{_short(curve)}"
    finding: Finding = "undetermined"
    if high is not None and high < 1:
        finding = "yes"
    elif low is not None and low > 1:
        finding = "no"
    return Claim(name, claim, finding, text, value, low, high)


def _reached(curve: Curve) -> list[ConvergencePoint]:
    return sorted((p for p in curve.points if p.status == "reached" and p.steps), key=lambda p: p.batch)


def _short(curve: Curve) -> str:
    return shortfall(curve.points)


def _of(seeds: int, ran: int) -> str:
    return f" ({seeds} of {n.counted(ran, 'seed')})" if seeds < ran else ""


def _at(steps: tuple[float | None, ...], seed: int) -> float | None:
    return steps[seed] if seed < len(steps) and steps[seed] else None
