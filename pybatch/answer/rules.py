"""How far a learning-rate rule holds, against rates tuned at each batch size and against a constant rate. Pure.

A rule fails where it takes over BROKEN times the tuned steps, by the whole interval of the seeds' ratios, or where its
seeds do not reach and those with tuned rates do, in more runs than chance would have it (one-sided, 5 %, all batch
sizes together). It beats a constant rate only beyond the spread of two draws of one rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pybatch.answer.claim import Claim, Finding
from pybatch.answer.pairing import (
    Estimate,
    coarseness,
    counts,
    difference_of,
    fewer_reach,
    logs_of,
    mean_of,
    shortfall,
    steps_by_seed,
)
from pybatch.base import numerals as n
from pybatch.records import ConvergencePoint, Curve, Run, aim_of
from pybatch.scaling import SEARCHED

BROKEN = 2.0  # times the tuned rate's steps, from which a rule counts as broken
CHANCE = 0.05
CONSTANT = "constant"


@dataclass(frozen=True)
class Hold:
    """How far a rule holds past the base batch."""

    rule: str
    finding: Finding  # whether it fails
    held: int | None  # the largest batch size up to which nothing speaks against it
    broken: int | None  # the first at which it fails
    ratio: Estimate | None  # of its steps to the tuned ones: there, or else at `held`
    text: str


@dataclass(frozen=True)
class Broken:
    """How far one rule holds on one problem."""

    problem: str
    hold: Hold


def breaks(runs: Sequence[Run]) -> tuple[Broken, ...]:
    """Every rule on every problem: a workload's split and target, with its optimizer. Empty below two problems."""
    found: dict[tuple[str, str], Broken] = {}
    for run in runs:
        steps = run.convergence
        if steps is None:
            continue
        for curve in steps.curves:
            if curve.rule == SEARCHED:
                continue
            curves = [other for other in steps.curves if other.split == curve.split]
            problem = _problem(run, curve)
            found[problem, curve.rule] = Broken(problem, hold(curve, curves, steps.base_batch))
    return tuple(found.values()) if len({problem for problem, _ in found}) > 1 else ()


def _problem(run: Run, curve: Curve) -> str:
    steps = run.convergence
    assert steps is not None
    work, parts = steps.workload, []
    if work is not None:
        parts = [work.name, *([work.model] if work.model else [])]
        parts += [f"{name} {n.plain(value)}" for name, value in work.options.items()]
    parts += [steps.optimizer] if steps.optimizer else []
    return ", ".join([*parts, f"{aim_of(curve.split)} {n.number(curve.target)}"])


def rule_fails(curve: Curve, curves: Sequence[Curve], base: int | None) -> Claim:
    """Whether a rule that scales the rate fails, and where."""
    found = hold(curve, curves, base)
    name, claim = f"{curve.split}, {curve.rule} fails", "a rule that scales the rate fails past some batch size"
    ratio = found.ratio
    if ratio is None:
        return Claim(name, claim, found.finding, found.text)
    low, high = (ratio.low, ratio.high) if ratio.seeds > 1 else (None, None)
    return Claim(name, claim, found.finding, found.text, ratio.value, low, high)


def hold(curve: Curve, curves: Sequence[Curve], base: int | None) -> Hold:
    """How far a rule holds: to the last batch size before the first past the base one at which it fails."""
    tuned = {p.batch: p for c in curves if c.rule == SEARCHED for p in c.points}
    points = _above(curve, base)
    if not points:
        return Hold(curve.rule, "not measured", None, None, None, "no batch size above the base one was run")
    failing = _failing(points, tuned)
    held: ConvergencePoint | None = None
    broken: ConvergencePoint | None = None
    texts: list[str] = []
    clear = True  # that it holds everywhere
    for p in points:
        best, at = tuned.get(p.batch), n.count(p.batch)
        ratio = _ratio(p, best)
        if p.batch in failing:
            broken = p
            texts.append(f"fails at {at}: {_words(ratio) if ratio and _reaches(p) else _reach(p, best)}")
            break
        if best is not None and not _reaches(best):
            texts.append(f"at {at} tuned rates fail too")
            clear = False
            break
        whole = counts(p)[0] == counts(p)[1]
        clear &= ratio is not None and ratio.high <= BROKEN and whole
        if _reaches(p) and (best is None or (ratio is not None and ratio.high <= BROKEN)):
            held = p if not texts else held
        elif not texts:  # the first batch size at which it is not known
            texts.append(f"open at {at}: {_open(p, best, ratio)}")
    at_hold = _ratio(held, tuned.get(held.batch)) if held is not None else None
    if held is not None:
        against = f" ({_words(at_hold)})" if at_hold is not None else ""
        texts.insert(0, f"{'holds' if against else 'reaches'} to {n.count(held.batch)}{against}")
    if not tuned:
        texts.append("no tuned rates to compare with")
    at_break = _ratio(broken, tuned.get(broken.batch)) if broken is not None and _reaches(broken) else None
    text = "; ".join(texts) + shortfall([p for p in points if p is not broken])
    finding: Finding = "yes" if broken is not None else "no" if clear else "undetermined"
    shown = at_hold if broken is None else at_break
    return Hold(curve.rule, finding, held.batch if held else None, broken.batch if broken else None, shown, text)


def _failing(points: Sequence[ConvergencePoint], tuned: Mapping[int, ConvergencePoint]) -> set[int]:
    """Batch sizes at which a rule surely fails.

    By steps: at 95 % of all batch sizes together; and at 95 % each from the largest one down, as far as it fails there
    throughout, which takes no more chances than a single look.
    """
    compared = [p for p in points if p.batch in tuned and _reaches(tuned[p.batch])]
    lost = fewer_reach([(*counts(p), *counts(tuned[p.batch])) for p in compared]) <= CHANCE + 1e-9
    level = 1 - CHANCE / max(1, len(compared))
    found, throughout = set(), True
    for p in reversed(compared):
        once, all_ = (_ratio(p, tuned[p.batch], given) for given in (1 - CHANCE, level))
        stuck = lost and not _reaches(p)
        throughout &= stuck or (once is not None and once.low > BROKEN)
        if throughout or stuck or (all_ is not None and all_.low > BROKEN):
            found.add(p.batch)
    return found


def beats_constant(curve: Curve, curves: Sequence[Curve], base: int | None) -> list[Claim]:
    """Whether a rule takes fewer steps than a constant rate, by more than one rule's runs differ from seed to seed."""
    plain = {p.batch: p for c in curves if c.rule == CONSTANT for p in c.points}
    points = [p for p in _above(curve, base) if p.batch in plain and steps_by_seed(p) is not None]
    if curve.rule == CONSTANT or not plain:
        return []
    name, claim = f"{curve.split}, {curve.rule} beats {CONSTANT}", "a rule that scales the rate helps at first"
    compared = [(p, these, those) for p in points if (these := logs_of(p)) and (those := logs_of(plain[p.batch]))]
    # Half the chance is left to the runs that do not reach, half to the steps of those that do: each at either side.
    level = 1 - CHANCE / max(1, len(compared))
    found = {
        p.batch: difference_of(
            these, those, coarseness(math.exp(min(these))) + coarseness(math.exp(min(those))), level
        ).ratio
        for p, these, those in compared
    }
    whole = {p.batch for p in points if counts(p)[0] == counts(p)[1]}  # a rule's own lost runs are no fewer steps
    better = [batch for batch, ratio in found.items() if ratio.high < 1 and batch in whole]
    chance = fewer_reach([(*counts(plain[p.batch]), *counts(p)) for p in points])
    missing = shortfall(points) + shortfall([plain[p.batch] for p in points], f"{CONSTANT} ")
    if better:
        least = min(better, key=lambda batch: found[batch].value)
        text = f"fewer steps than {CONSTANT} at {', '.join(map(n.count, better))}"
        text += f": {found[least].words()} times at {n.count(least)}{missing}"
        return [_against(name, claim, "yes", text, found[least])]
    if points and chance <= CHANCE / 2:
        return [Claim(name, claim, "yes", f"more runs reach than with {CONSTANT}{missing}")]
    if not found:
        return [Claim(name, claim, "not measured", f"no batch size was reached by both{missing}")]
    least = min(found, key=lambda batch: found[batch].value)
    # Where the constant rate's runs are lost, those left may be its best.
    worse = all(ratio.low > 1 for ratio in found.values()) and len(found) == len(points)
    worse &= all(counts(plain[batch])[0] == counts(plain[batch])[1] for batch in found)
    text = f"{found[least].words()} times the steps of {CONSTANT} at {n.count(least)}, where they are fewest{missing}"
    return [_against(name, claim, "no" if worse else "undetermined", text, found[least])]


def _against(name: str, claim: str, finding: Finding, text: str, found: Estimate) -> Claim:
    low, high = (found.low, found.high) if found.seeds > 1 else (None, None)
    return Claim(name, claim, finding, text, found.value, low, high)


def _above(curve: Curve, base: int | None) -> list[ConvergencePoint]:
    return sorted((p for p in curve.points if base is None or p.batch > base), key=lambda p: p.batch)


def _reaches(p: ConvergencePoint) -> bool:
    return p.status == "reached" and p.steps is not None


def _ratio(p: ConvergencePoint, tuned: ConvergencePoint | None, level: float = 1 - CHANCE) -> Estimate | None:
    """Steps over the tuned ones, of the seeds that reached with both; None where there is no such pair."""
    if tuned is None:
        return None
    pairs = zip(steps_by_seed(p) or (), steps_by_seed(tuned) or (), strict=False)
    both = [(a, b) for a, b in pairs if a and b]
    if not both:
        return None
    error = sum(coarseness(a) + coarseness(b) for a, b in both) / len(both)
    return mean_of([math.log(a / b) for a, b in both], error, level).ratio


def _words(ratio: Estimate) -> str:
    if ratio.value == 1 and ratio.seeds > 1:
        return f"as many steps as tuned {ratio.span}"
    return f"{ratio.words()} times the tuned steps"


def _open(p: ConvergencePoint, tuned: ConvergencePoint | None, ratio: Estimate | None) -> str:
    if not _reaches(p):
        return _reach(p, tuned)
    return _words(ratio) if ratio is not None else "no seed has steps to compare"


def _reach(p: ConvergencePoint, tuned: ConvergencePoint | None) -> str:
    reached, ran = counts(p)
    there = f", {counts(tuned)[0]} of {counts(tuned)[1]} with tuned rates" if tuned is not None else ""
    return f"{reached} of {ran} reach{there}"
