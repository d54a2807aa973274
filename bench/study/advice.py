"""Regret of the advice, problem by problem, from records: what was advised on some seeds, judged on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import judging
from judging import GOALS, Judge

from pybatch.base import numerals as n
from pybatch.records import Capacity, Run
from study.claims import Records, critical, wide, within

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
    measured: float | None = None  # the same of measured times alone, whose least is too low by chance
    doubts: str = ""  # why the judge's word on this batch is no sure one

    @property
    def met(self) -> str:
        """Against the goal, where interval and step times leave no doubt."""
        if self.regret is None:
            return "not measured"
        if self.doubts or self.low is None or self.high is None or wide(self.low, self.high):
            return "undetermined"
        if self.low <= self.goal < self.high:
            return "undetermined"
        return "met" if self.high <= self.goal else "missed"


def judged(records: Records) -> list[Judged]:
    """Every kind of evidence on one problem."""
    found: list[Judged] = []
    judge, clocks = records.get("judge"), clocks_of(records)
    steps = judge.convergence if judge is not None else None
    by = judging.judge(steps, clocks) if steps is not None and clocks else None
    lacking = ["judge"] * (steps is None) + ["times"] * (not clocks)
    for level, (kind, words) in ADVISERS.items():
        adviser = records.get(kind)
        if adviser is None or by is None:
            why = f"not run: {', '.join([kind] * (adviser is None) + lacking)}"
        elif len(by.measured) < 2:
            why = by.reason
        else:
            found.append(_judged(words, level, by, adviser, clocks))
            continue
        found.append(Judged(words, None, None, None, None, None, GOALS[level], why))
    return found


def _judged(words: str, level: str, by: Judge, adviser: Run, clocks: Sequence[Capacity]) -> Judged:
    row: dict[str, Any] = judging.regret(adviser.verdict, by)
    made = Judged(
        words,
        row["best_batch"],
        by.fastest,
        row["regret"],
        row.get("regret_low"),
        row.get("regret_high"),
        GOALS[level],
        row.get("reason", ""),
        row["measured_regret"],
        _doubts(by, clocks, row["best_batch"] or by.fastest),
    )
    if made.regret is None:
        return made
    assert adviser.verdict is not None
    advice = adviser.verdict
    told = within(advice.critical_batch, advice.critical_low, advice.critical_high)
    return replace(made, remark="; ".join([told, *([made.doubts] if made.doubts else [])]))


def _doubts(by: Judge, clocks: Sequence[Capacity], batch: float) -> str:
    """Why the judge's word on a batch is no sure one; empty where it is."""
    why = ["steps timed once, on a disturbed machine"] if len(clocks) < 2 and any(map(disturbed, clocks)) else []
    why += ["the judge's best is at an end of its sweep"] if by.at_edge else []
    why += ["judge runs lost beside it"] if by.doubts(batch) else []
    return ", ".join(why)


def judge_of(records: Records) -> list[str]:
    """What the judge of a problem found, and what takes from its word: its seeds, its machine."""
    judge, clocks = records.get("judge"), clocks_of(records)
    if judge is None or not clocks or judge.convergence is None:
        return []
    curves = [c for c in judge.convergence.curves if c.split == "train"]
    if len(curves) != 1:
        return [f"{n.counted(len(curves), 'curve')} to a train target, where one judges"]
    said = [f"critical batch {critical(curves[0])}", n.counted(judge.convergence.seeds or 0, "seed")]
    by = judging.judge(judge.convergence, clocks)
    if by.lost:
        said.append(f"some of its runs did not reach at batch {', '.join(map(n.count, by.lost))}")
    if by.at_edge:
        said.append(f"its best batch, {n.count(round(by.best))}, is at an end of those it swept: regret may be more")
    if busy := sum(map(disturbed, clocks)):
        said.append(f"its steps were timed {n.counted(len(clocks), 'time')}, {busy} of them on a disturbed machine")
    return said


def clocks_of(records: Records) -> list[Capacity]:
    """The runs that timed the judge's steps."""
    return [run.capacity for kind, run in records.items() if kind.startswith("times") and run.capacity is not None]


def disturbed(capacity: Capacity | None) -> bool:
    return capacity is not None and bool(capacity.disturbed)


def goals_met(found: Sequence[Judged]) -> str:
    """How many of these advices meet their goal, in words."""
    words = [row.met for row in found]
    counts = {word: words.count(word) for word in ("met", "missed", "undetermined", "not measured")}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)
