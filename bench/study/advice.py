"""Regret of the advice, problem by problem, from records: what was advised on some seeds, judged on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from judging import GOALS, regret, resampled, times

from pybatch.base import numerals as n
from pybatch.records import Capacity, Curve, Run, Verdict
from study.claims import Records, critical, wide

# By evidence: the kind of record that advises, and how a user asks for it.
ADVISERS = {"noise": ("bench", "`bench`"), "branch": ("thorough", "`bench --thorough`"), "sweep": ("advice", "a sweep")}


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
    remark: str  # why the goal is missed or the figure is lacking; empty: it is met
    disturbed: bool = False  # the machine, as the judge's steps were timed

    @property
    def met(self) -> str:
        """Against the goal, where interval and step times leave no doubt."""
        if self.regret is None or self.low is None or self.high is None:
            return "not measured"
        if self.disturbed or wide(self.low, self.high) or self.low <= self.goal < self.high:
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
        found.append(_judged(words, level, row, best, adviser, judge, clock))
    return found


def _judged(by: str, level: str, row: dict[str, Any], best: int, adviser: Run, judge: Run, clock: Run) -> Judged:
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
    if made.regret is None or made.met == "met":
        return made
    return Judged(**{**made.__dict__, "remark": "; ".join(_causes(made, adviser.verdict, judge, clock))})


def _causes(made: Judged, verdict: Verdict | None, judge: Run, clock: Run) -> list[str]:
    """What speaks for the regret: the critical batch taken and the judge's, the grid, the machine."""
    assert verdict is not None
    assert judge.convergence is not None
    causes = []
    [curve] = [c for c in judge.convergence.curves if c.split == "train"]
    taken = f"{n.number(verdict.critical_batch)} {n.interval(verdict.critical_low, verdict.critical_high)}".strip()
    causes.append(f"critical batch taken for {taken}, judged {critical(curve)}")
    gap = _gap(curve)
    if gap > 2:
        causes.append(f"the judge's batches lie {n.number(gap)} times apart: between them its time is a chord")
    if (seeds := judge.convergence.seeds or 0) < 3:
        causes.append(f"{n.counted(seeds, 'seed')} judge{'s' * (seeds == 1)}")
    if disturbed(clock.capacity):
        causes.append("the machine was disturbed as the judge's steps were timed")
    return causes


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
