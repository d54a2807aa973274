"""Regret of an advice, from records: time to the target at the batch advised over that at the best one. Pure.

T(B) = S(B) t(B): steps of a sweep, and step times of one run of `bench` or of several. Both are drawn as the records
leave them possible, as for a verdict (`pybatch.answer.ensemble`), but from runs that advised nothing; the least time is
sought between the smallest and the largest batch size swept. What a single figure over the least of many says, all of
them noisy, is told beside: `measured_regret`.

The upper end is the 97.5 % point of the draws, each over its own least. The lower end is the 2.5 % point over each
draw's time at one batch size, the best by all of them: no time is less than the least, so that it bounds from below
(bench/planted_verdict.py's truths: tests/bench/test_study.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pybatch.answer.best import ensemble_between
from pybatch.answer.critical import critical_of
from pybatch.answer.ensemble import Ensemble
from pybatch.answer.evidence import NORMAL
from pybatch.answer.step_times import variance_of
from pybatch.base import numerals as n
from pybatch.fits.throughput import fit_throughput
from pybatch.records import BatchPoint, Capacity, Convergence, Verdict

Array = np.ndarray
NEXT = 2.0  # times a batch size, or less: beside it
GOALS = {"noise": 1.25, "branch": 1.10, "sweep": 1.05, "disturbed": 1.15}


@dataclass(frozen=True)
class Judge:
    """What runs that advised nothing say of the time to the train target."""

    measured: dict[int, float]  # seconds by batch size, where the target was reached and the step timed
    ensemble: Ensemble | None
    reason: str = ""  # why there is none
    lost: tuple[int, ...] = ()  # batch sizes at which some runs did not reach: what they would take is in no draw

    @property
    def fastest(self) -> int:
        return min(self.measured, key=self.measured.__getitem__)

    @property
    def sizes(self) -> Array:
        """Of the grid, between the smallest and the largest batch size swept."""
        assert self.ensemble is not None
        size = self.ensemble.size
        within: Array = size[(size >= min(self.measured)) & (size <= max(self.measured))]
        return within

    @property
    def best(self) -> float:
        """Batch of least time, by all draws together."""
        assert self.ensemble is not None
        return float(self.sizes[int(np.argmin(self.ensemble.time(self.sizes)))])

    @property
    def at_edge(self) -> bool:
        """Whether time is least at an end of what was swept: regret over what lies beyond is more."""
        return self.ensemble is not None and self.best in (min(self.measured), max(self.measured))

    def doubts(self, batch: float) -> bool:
        """Whether runs were lost next to this batch, or to the best one."""
        near = [batch] + ([self.best] if self.ensemble is not None else [])
        return any(max(lost / one, one / lost) <= NEXT for lost in self.lost for one in near)


def judge(steps: Convergence, runs: Sequence[Capacity]) -> Judge:
    """By a tuned sweep to one train target, and step times at its batch sizes, by one run of `bench` or more."""
    [curve] = [c for c in steps.curves if c.split == "train"]
    reached = {p.batch: p.steps for p in curve.points if p.status == "reached" and p.steps is not None}
    timed = pooled(runs)
    step = {p.batch: p.step_ms / 1e3 for p in timed.batches if p.step_ms is not None}
    measured = {size: reached[size] * step[size] for size in sorted(reached.keys() & step.keys())}
    lost = tuple(p.batch for p in curve.points if p.batch in measured and (p.reached or 0) < p.seeds)
    critical = critical_of(None, replace(steps, curves=(curve,), branches=()))
    reason = ""
    if len(measured) < 2:
        reason = f"{n.counted(len(measured), 'batch size')} of the judge reached the target and had its steps timed"
    elif critical.value is None or critical.shape is None:
        reason = "the sweep that judges has no critical batch"
    elif timed.model is None:
        reason = "fewer than three of the judge's batch sizes were timed by every run"
    return Judge(measured, None if reason else ensemble_between(critical, timed, None), reason, lost)


def pooled(runs: Sequence[Capacity]) -> Capacity:
    """Step times of several runs over the same batch sizes as one.

    A run on a slower machine is slower at all batch sizes, which no ratio of two of them sees; what is left between
    runs, pooled over batch sizes, is their error, unless that within the runs says more.
    """
    points = [{p.batch: p for p in run.batches if p.step_ms} for run in runs]
    sizes = sorted(set.intersection(*(set(own) for own in points)))
    if len(runs) == 1 or not sizes:
        return replace(runs[0], batches=runs[0].batches if sizes else ())
    log = np.log([[own[size].step_ms or math.nan for size in sizes] for own in points])
    level = log.mean(axis=1, keepdims=True)
    log = log - level + level.mean()
    free = (len(runs) - 1) * max(len(sizes) - 1, 1)
    between = float(np.sum((log - log.mean(axis=0)) ** 2)) / free
    made = []
    for place, size in enumerate(sizes):
        within = float(np.mean([variance_of(own[size]) for own in points]))
        error = NORMAL * math.sqrt(max(between, within) / len(runs))
        ms = math.exp(float(log[:, place].mean()))
        samples = sum(own[size].samples for own in points)
        ends = ms * math.exp(-error), ms * math.exp(error)
        made.append(BatchPoint(size, "ok", ms, *ends, 1e3 * size / ms, samples=samples))
    fit = fit_throughput(sizes, np.exp(log.T) / 1e3) if len(sizes) > 2 else None
    told = tuple(dict.fromkeys(text for run in runs for text in run.disturbed))
    return replace(runs[0], batches=tuple(made), model=fit, disturbed=told)


def at(batch: float, measured: dict[int, float]) -> float | None:
    """Time at this batch, ln T linear in ln B between those measured; None beyond them, where nothing is known."""
    sizes = np.array(list(measured))
    if not len(sizes) or not sizes[0] <= batch <= sizes[-1]:
        return None
    return math.exp(np.interp(math.log(batch), np.log(sizes), np.log(list(measured.values()))))


def regret(verdict: Verdict | None, by: Judge) -> dict[str, Any]:
    """What following this verdict costs, and why there is no figure where there is none."""
    batch, measured = verdict.best_batch if verdict is not None else None, by.measured
    found = at(batch, measured) if batch is not None else None
    row: dict[str, Any] = {
        "critical_batch": verdict.critical_batch if verdict is not None else None,
        "best_batch": batch,
        "seconds_to_target": found,
        "measured_regret": found / min(measured.values()) if found is not None else None,
        "regret": None,
    }
    if batch is None:
        row["reason"] = "no batch was recommended"
    elif found is None:
        row["reason"] = f"batch {batch} is outside those the sweep measured, {min(measured)} to {max(measured)}"
    elif by.ensemble is None:
        row["reason"] = by.reason
    else:
        sizes = np.append(by.sizes, float(batch))
        middle, members = by.ensemble.time(sizes), by.ensemble.time(sizes, members=True)
        value = float(middle[-1] / middle.min())
        low = max(1.0, float(np.quantile(members[:, -1] / members[:, middle.argmin()], 0.025)))
        high = float(np.quantile(members[:, -1] / members.min(axis=1), 0.975))
        row |= {"regret": value, "regret_low": min(low, value), "regret_high": max(high, value)}
    return row
