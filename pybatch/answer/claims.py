"""What Golmant et al. (2018) claim of large batches, each checked on a sweep of one's own. Pure: a record in.

A finding is "yes" or "no" where the 95 % interval leaves no doubt, and "undetermined" otherwise. Whether a rule fails
is read from medians over the seeds, against a factor of BROKEN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtrit

from pybatch.base import numerals as n
from pybatch.records import Capacity, Convergence, ConvergencePoint, Curve, Run
from pybatch.scaling import SEARCHED

Finding = Literal["yes", "no", "undetermined", "not measured"]
BROKEN = 2.0  # times the tuned rate's steps, from which a rule counts as broken
CONSTANT = "constant"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, and what this sweep says of it."""

    name: str  # a label of a few words
    claim: str  # as the paper has it
    finding: Finding
    text: str  # what was seen here, with its figures


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
        found += [_rule(curve, curves, steps.base_batch) for curve in curves if curve.rule != SEARCHED]
        if split == "train":
            found += [_generalization(curve, _AT_TARGET) for curve in curves]
        found += [_generalization(curve, budget) for curve in curves for budget in _budgets(steps, curve)]
    return tuple(found)


def notes_on_claims(steps: Convergence) -> tuple[str, ...]:
    """What no claim here can speak of."""
    notes = []
    if not any(curve.split == "train" for curve in steps.curves):
        notes.append("test loss at equal train loss: not measured, as no train target was swept")
    if steps.gap_epochs is None:
        notes.append(
            "test loss at equal epochs and at equal steps: not measured, as trainings end at their target. Sweep with "
            "--gap-epochs 30"
        )
    return tuple(notes)


def _stagnation(curve: Curve) -> Claim:
    def said(finding: Finding, text: str) -> Claim:
        name = f"{curve.split} steps level off"
        return Claim(name, "steps stop falling past some batch size", finding, text)

    fit, largest = curve.fit, max((p.batch for p in _reached(curve)), default=None)
    if fit is None or fit.model is None or largest is None:
        return said("not measured", "too few batch sizes reached the target for a fit")
    tested = f"tested to {n.count(largest)}"
    if fit.b_stag is None:
        if curve.critical_batch is not None or (curve.low is None and curve.high is None):
            return said("undetermined", f"the fit puts no batch size to it, {tested}")
        if curve.high is None:
            return said("no", f"steps fall with every batch size, {tested}")
        most, smallest = fit.b_stag_high, min(p.batch for p in _reached(curve))
        if most is None or most > largest:
            return said("undetermined", f"no bend stands out of the scatter, {tested}")
        if most > smallest:
            return said("yes", f"doubling saves less than 10 % of the steps from at most {n.number(most)} on, {tested}")
        return said("yes", f"steps hardly fall at all, {tested}")
    band = n.interval(fit.b_stag_low, fit.b_stag_high)
    text = f"doubling saves less than 10 % of the steps from {n.number(fit.b_stag)} {band} on, {tested}"
    if fit.b_stag_high is not None and fit.b_stag_high <= largest:
        return said("yes", text)
    return said("no" if fit.b_stag_low is not None and fit.b_stag_low > largest else "undetermined", text)


def _cost(curve: Curve) -> Claim:
    def said(finding: Finding, text: str) -> Claim:
        name = f"{curve.split} cost rises"
        return Claim(name, "a larger batch raises the total of examples", finding, text)

    points = _reached(curve)
    if len(points) < 2:
        return said("not measured", "fewer than two batch sizes reached the target")
    small, large = points[0], points[-1]  # not the cheapest one: chosen by its cost, it would be so by luck as well
    logs = [
        math.log(large.batch * a / (small.batch * b))
        for a, b in zip(_by_seed(large), _by_seed(small), strict=False)
        if a and b
    ]
    if not logs:
        return said("not measured", "no seed reached the target at both ends")
    mean, low, high = _mean(logs)
    factor, ends = n.number(math.exp(mean)), n.interval(math.exp(low), math.exp(high)) if len(logs) > 1 else ""
    times = " ".join(filter(None, (factor, ends)))
    text = f"batch {n.count(large.batch)} took {times} times the examples of {n.count(small.batch)}"
    finding: Finding = "yes" if low > 0 else "no" if high < 0 else "undetermined"
    return said(finding, text if len(logs) > 1 else f"{text} (one seed: no interval)")


def _capacity(curve: Curve, capacity: Capacity | None) -> Claim:
    def said(finding: Finding, text: str) -> Claim:
        name = f"{curve.split} below capacity"
        return Claim(name, "the critical batch lies below what the device can take", finding, text)

    if capacity is None or capacity.saturation_batch is None:
        why = "no throughput fit stands beside this sweep: give the report a run of 'pybatch bench' as well"
        return said("not measured", why)
    walls = [("saturation batch", capacity.saturation_batch, capacity.saturation_low, capacity.saturation_high)]
    if capacity.max_batch is not None:
        most = float(capacity.max_batch)
        walls.append(("largest batch that fits", most, most, most))
    name, wall, least, most_ = min(walls, key=lambda found: found[1])
    low = curve.low / most_ if curve.low and most_ else None
    high = curve.high / least if curve.high and least else None
    if curve.critical_batch is None and low is None and high is None:
        return said("not measured", "the critical batch is not known")
    value = f"{n.number(curve.critical_batch / wall)} " if curve.critical_batch else ""
    text = f"critical batch over {name}: {value}{n.interval(low, high)}"
    if high is not None and high < 1:
        return said("yes", text)
    return said("no" if low is not None and low > 1 else "undetermined", text)


def _rule(curve: Curve, curves: Sequence[Curve], base: int | None) -> Claim:
    """How far a rule holds: up to the first batch past the base one at which it fails."""

    def said(finding: Finding, text: str) -> Claim:
        name = f"{curve.split}, {curve.rule} fails"
        return Claim(name, "a rule that scales the rate helps at first, then fails", finding, text)

    tuned = {p.batch: p for c in curves if c.rule == SEARCHED for p in c.points}
    plain = {p.batch: p for c in curves if c.rule == CONSTANT and curve.rule != CONSTANT for p in c.points}
    points = sorted((p for p in curve.points if base is None or p.batch > base), key=lambda p: p.batch)
    if not points:
        return said("not measured", "no batch size above the base one was run")
    texts, held = [], []
    broken: ConvergencePoint | None = None
    unknown = not tuned  # whether a failure may have been missed, or may not be the rule's
    for p in points:
        best = tuned.get(p.batch)
        if best is not None and not _reaches(best):
            texts.append(f"at {n.count(p.batch)} tuned rates fail too")
            unknown = True
            break
        unknown |= best is None
        if _fails(p, best):
            broken = p
            break
        held.append(p)
    if held:
        against = _ratio(held[-1], tuned.get(held[-1].batch))
        held_to = f"{'holds' if against else 'reaches'} to {n.count(held[-1].batch)}"
        texts.insert(0, held_to + (f" ({against})" if against else ""))
    if broken is not None:
        against = _ratio(broken, tuned.get(broken.batch))
        what = against if against else f"{broken.reached} of {broken.runs} reach"
        texts.append(f"fails at {n.count(broken.batch)}: {what}")
    elif not tuned:
        texts.append("no tuned rates to compare with")
    better = [p.batch for p in points if p.steps and (o := plain.get(p.batch)) and (o.steps or math.inf) > p.steps]
    if plain:
        texts.append(f"fewer steps than {CONSTANT} up to {n.count(max(better))}" if better else "no help")
    return said("yes" if broken is not None else "undetermined" if unknown else "no", "; ".join(texts))


def _reaches(p: ConvergencePoint) -> bool:
    return p.status == "reached" and p.steps is not None


def _fails(p: ConvergencePoint, tuned: ConvergencePoint | None) -> bool:
    if not _reaches(p) or p.steps is None:
        return True
    return tuned is not None and tuned.steps is not None and p.steps > BROKEN * tuned.steps


def _ratio(p: ConvergencePoint, tuned: ConvergencePoint | None) -> str:
    if tuned is None or not tuned.steps or p.steps is None:
        return ""
    ratio = p.steps / tuned.steps
    return f"{n.number(ratio)} times the tuned steps" if ratio != 1 else "as many steps as tuned"


@dataclass(frozen=True)
class _Budget:
    """What runs of all batch sizes have in common where their test losses are compared."""

    name: str  # after "test loss" in a label
    text: str
    end: str  # what no seed came to, where none did
    losses: Callable[[ConvergencePoint], Sequence[float | None]]  # by seed


_AT_TARGET = _Budget("", "at the train target", "reached the target", lambda p: p.other_losses if _reaches(p) else ())


def _budgets(steps: Convergence, curve: Curve) -> list[_Budget]:
    """Equal epochs and equal steps, where a sweep measured them."""
    if steps.gap_epochs is None or not any(p.test_losses_at_epochs for p in curve.points):
        return []
    epochs = f"{steps.gap_epochs:g} epoch{'s' * (steps.gap_epochs != 1)}"
    updates = n.counted(steps.gap_steps or 0, "step")
    return [
        _Budget(f", {epochs}", f"after {epochs}", "got so far", lambda p: p.test_losses_at_epochs),
        _Budget(f", {updates}", f"after {updates}", "got so far", lambda p: p.test_losses_at_steps),
    ]


def _generalization(curve: Curve, budget: _Budget) -> Claim:
    def said(finding: Finding, text: str) -> Claim:
        name = f"{curve.rule}: test loss{budget.name}"
        return Claim(name, "a larger batch generalizes worse", finding, text)

    points = sorted(curve.points, key=lambda p: p.batch)
    known = [p for p in points if any(loss is not None for loss in budget.losses(p))]
    if len(known) < 2:
        return said("not measured", f"fewer than two batch sizes have a test loss {budget.text}")
    small, large = known[0], known[-1]
    pairs = zip(budget.losses(large), budget.losses(small), strict=False)
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not both:
        return said("not measured", f"no seed {budget.end} at both ends")
    mean, low, high = _mean([a - b for a, b in both])
    there, here = (sum(values) / len(both) for values in zip(*both, strict=True))
    text = (
        f"{budget.text} {n.number(there)} with batch {n.count(large.batch)}, {n.number(here)} with "
        f"{n.count(small.batch)}: {'+' if mean >= 0 else ''}{n.number(mean)} {_ends(low, high)}"
    ).rstrip()
    if len(both) < large.seeds:  # the others diverged or never came there, and would have been worse
        text += f"; {len(both)} of {n.counted(large.seeds, 'seed')}"
    if broken := [n.count(p.batch) for p in points if p.batch > large.batch and p.status == "diverged"]:
        text += f"; diverged at {', '.join(broken)}"
    return said("yes" if low > 0 else "no" if high < 0 else "undetermined", text)


def _reached(curve: Curve) -> list[ConvergencePoint]:
    return sorted((p for p in curve.points if p.status == "reached" and p.steps), key=lambda p: p.batch)


def _by_seed(p: ConvergencePoint) -> tuple[float | None, ...]:
    """Steps by seed at the rate that was chosen."""
    return next((rate.steps for rate in p.rates if rate.learning_rate == p.learning_rate), (p.steps,))


def _ends(low: float, high: float) -> str:
    return n.interval(low, high) if math.isfinite(high) else "(one seed: no interval)"


def _mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with its 95 % interval by Student's t; of one value the interval is open."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = float(stdtrit(len(values) - 1, 0.975)) * spread / math.sqrt(len(values))
    return mean, mean - half, mean + half
