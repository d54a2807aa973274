"""Regret of an advice, from records: time to the target at the batch advised over that at the best one. Pure.

T(B) = S(B) t(B): steps of a sweep, and step times of one run of `bench` or of several. Both are drawn as the records
leave them possible, as for a verdict (`pybatch.answer.ensemble`), but from runs that advised nothing; the least time is
sought between the smallest and the largest batch size swept. The interval is 95 % of the draws. What a single figure
over the least of many says, all of them noisy, is told beside: `measured_regret`.
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
from pybatch.fits.throughput import fit_throughput
from pybatch.records import BatchPoint, Capacity, Convergence, Verdict

GOALS = {"noise": 1.25, "branch": 1.10, "sweep": 1.05, "disturbed": 1.15}


@dataclass(frozen=True)
class Judge:
    """What runs that advised nothing say of the time to the train target."""

    measured: dict[int, float]  # seconds by batch size, where the target was reached and the step timed
    ensemble: Ensemble | None  # None: the steps have no curve that could be drawn

    @property
    def fastest(self) -> int:
        return min(self.measured, key=self.measured.__getitem__)


def judge(steps: Convergence, runs: Sequence[Capacity]) -> Judge:
    """By a tuned sweep to one train target, and step times at its batch sizes, by one run of `bench` or more."""
    [curve] = [c for c in steps.curves if c.split == "train"]
    reached = {p.batch: p.steps for p in curve.points if p.status == "reached" and p.steps is not None}
    timed = pooled(runs)
    step = {p.batch: p.step_ms / 1e3 for p in timed.batches if p.step_ms is not None}
    measured = {n: reached[n] * step[n] for n in sorted(reached.keys() & step.keys())}
    critical = critical_of(None, replace(steps, curves=(curve,), branches=()))
    drawn = critical.value is not None and critical.shape is not None and timed.model is not None
    return Judge(measured, ensemble_between(critical, timed, None) if drawn else None)


def pooled(runs: Sequence[Capacity]) -> Capacity:
    """Step times of several runs over the same batch sizes as one.

    A run on a slower machine is slower at all batch sizes, which no ratio of two of them sees; what is left between
    runs, pooled over batch sizes, is their error, unless that within the runs says more.
    """
    if len(runs) == 1:
        return runs[0]
    points = [{p.batch: p for p in run.batches if p.step_ms} for run in runs]
    sizes = sorted(set.intersection(*(set(own) for own in points)))
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
        row["reason"] = "the sweep that judges has no curve of steps"
    else:
        sizes = by.ensemble.size
        sizes = np.append(sizes[(sizes >= min(measured)) & (sizes <= max(measured))], float(batch))
        middle, members = by.ensemble.time(sizes), by.ensemble.time(sizes, members=True)
        low, high = np.quantile(members[:, -1] / members.min(axis=1), [0.025, 0.975])
        value = float(middle[-1] / middle.min())
        row |= {"regret": value, "regret_low": min(float(low), value), "regret_high": max(float(high), value)}
    return row
