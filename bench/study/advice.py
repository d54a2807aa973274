"""Regret of the advice, problem by problem, from records: what was advised on some seeds, judged on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from judging import GOALS, regret, resampled, times

from pybatch.base import numerals as n
from pybatch.records import Capacity, Curve, Run
from study.claims import Records, critical, wide

# By evidence: the kind of record that advises, and how a user asks for it.
ADVISERS = {
    "noise": ("bench", "`bench`"),
    "branch": ("thorough", "`bench --thorough`"),
    "sweep": ("advice", "`bench` and a sweep"),
}


@dataclass(frozen=True)
class Judged:
    """One advice and what following it costs; without a figure, why there is none."""

    by: str
    batch: int | None
    best: int | None  # the fastest batch measured
    regret: float | None
    low: float | None
    high: float | None
    goal: float
    remark: str  # what it stands on, or why the figure is lacking
    disturbed: bool = False  # the machine, as the judge's steps were timed

    @property
    def met(self) -> str:
        """Against the goal, where interval and step times leave no doubt."""
        if self.regret is None:
            return "not measured"
        if self.disturbed or self.low is None or self.high is None or wide(self.low, self.high):
            return "undetermined"
        if self.low <= self.goal < self.high:
            return "undetermined"
        return "met" if self.high <= self.goal else "missed"


def judged(records: Records) -> list[Judged]:
    """Every kind of evidence on one problem."""
    judge, clock = records.get("judge"), records.get("times")
    lacking = [kind for kind, run in (("judge", judge), ("times", clock)) if run is None]
    found: list[Judged] = []
    measured: dict[int, float] = {}
    drawn: list[dict[int, float]] = []
    if judge is not None and clock is not None and judge.convergence is not None and clock.capacity is not None:
        measured, drawn = times(clock.capacity, judge.convergence), resampled(clock.capacity, judge.convergence)
    for level, (kind, words) in ADVISERS.items():
        adviser = records.get(kind)
        missing = ([kind] if adviser is None else []) + lacking
        if adviser is None or judge is None or clock is None:
            why = f"not run: {', '.join(dict.fromkeys(missing))}"
            found.append(Judged(words, None, None, None, None, None, GOALS[level], why))
            continue
        if len(measured) < 2:
            why = f"{n.counted(len(measured), 'batch size')} of the judge reached the target"
            found.append(Judged(words, None, None, None, None, None, GOALS[level], why))
            continue
        row = regret(adviser.verdict, measured, drawn)
        best = min(measured, key=measured.__getitem__)
        found.append(_judged(words, level, row, best, adviser, clock))
    return found


def _judged(by: str, level: str, row: dict[str, Any], best: int, adviser: Run, clock: Run) -> Judged:
    made = Judged(
        by,
        row["best_batch"],
        best,
        row["regret"],
        row.get("regret_low"),
        row.get("regret_high"),
        GOALS[level],
        row.get("reason", ""),
        disturbed(clock.capacity),
    )
    if made.regret is None:
        return made
    assert adviser.verdict is not None
    taken = n.number(adviser.verdict.critical_batch)
    ends = n.interval(adviser.verdict.critical_low, adviser.verdict.critical_high)
    told = f"critical batch {taken} {ends}".strip()
    return replace(made, remark=told + ", on a disturbed machine" * disturbed(adviser.capacity))


def judge_of(records: Records) -> list[str]:
    """What the judge of a problem found, and what takes from its word: its grid, its seeds, its machine."""
    judge, clock = records.get("judge"), records.get("times")
    if judge is None or clock is None or judge.convergence is None:
        return []
    curves = [c for c in judge.convergence.curves if c.split == "train"]
    if len(curves) != 1:
        return [f"{n.counted(len(curves), 'curve')} to a train target, where one judges"]
    [curve] = curves
    seeds = judge.convergence.seeds or 0
    said = [f"critical batch {critical(curve)}", n.counted(seeds, "seed") + ", too few for an interval" * (seeds < 3)]
    gap = _gap(curve)
    if gap > 2:
        said.append(f"batches {n.number(gap)} times apart: between them its time is a chord")
    if disturbed(clock.capacity):
        said.append("its steps were timed on a disturbed machine")
    return said


def _gap(curve: Curve) -> float:
    sizes = sorted(p.batch for p in curve.points)
    return max((b / a for a, b in pairwise(sizes)), default=1.0)


def disturbed(capacity: Capacity | None) -> bool:
    return capacity is not None and bool(capacity.disturbed)


def goals_met(found: Sequence[Judged]) -> str:
    """How many of these advices meet their goal, in words."""
    words = [row.met for row in found]
    counts = {word: words.count(word) for word in ("met", "missed", "undetermined", "not measured")}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)
