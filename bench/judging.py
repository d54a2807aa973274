"""Regret of an advice, from records: time to the target at the batch advised over that at the best one. Pure.

T(B) = S(B) t(B), of a sweep and of step times at the same batches. Between batches measured, ln S and ln t are
interpolated in ln B. The interval is 95 %: the sweep's seeds drawn anew, and step times within their errors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pybatch.answer.step_times import variance_of
from pybatch.records import Capacity, Convergence, Verdict

GOALS = {"noise": 1.25, "branch": 1.10, "sweep": 1.05, "disturbed": 1.15}
RESAMPLES = 400
LEAST_SEEDS = 3  # for an interval


def times(capacity: Capacity, steps: Convergence) -> dict[int, float]:
    """Seconds to the train target by batch size, where the target was reached and the step timed."""
    [curve] = [c for c in steps.curves if c.split == "train"]
    reached = {p.batch: p.steps for p in curve.points if p.status == "reached" and p.steps is not None}
    step = {p.batch: p.step_ms / 1e3 for p in capacity.batches if p.step_ms is not None}
    return {n: reached[n] * step[n] for n in sorted(reached.keys() & step.keys())}


def resampled(capacity: Capacity, steps: Convergence) -> list[dict[int, float]]:
    """`times` as they could have been: seeds drawn anew with the rate chosen anew, and step times within their errors.

    Infinite where the median of the seeds drawn does not reach. Empty below LEAST_SEEDS, of which no interval is made.
    """
    [curve] = [c for c in steps.curves if c.split == "train"]
    timed = {p.batch: p for p in capacity.batches if p.step_ms is not None}
    rng, drawn = np.random.default_rng(0), {}
    for p in sorted(curve.points, key=lambda p: p.batch):
        if p.status != "reached" or p.batch not in timed or not p.rates:
            continue
        if p.seeds < LEAST_SEEDS:
            return []
        runs = np.array([[math.inf if s is None else s for s in rate.steps] for rate in p.rates])
        chosen = rng.integers(runs.shape[1], size=(RESAMPLES, runs.shape[1]))
        medians = np.median(runs[:, chosen], axis=2).min(axis=0)
        error = math.sqrt(variance_of(timed[p.batch])) * rng.standard_normal(RESAMPLES)
        drawn[p.batch] = medians * (timed[p.batch].step_ms or math.nan) / 1e3 * np.exp(error)
    tables = [{n: float(s[i]) for n, s in drawn.items()} for i in range(RESAMPLES)]
    return [table for table in tables if len(table) > 1 and math.isfinite(min(table.values()))]


def at(batch: float, measured: dict[int, float]) -> float | None:
    """Time at this batch; None beyond those measured, where nothing is known. Beside an infinite one it is infinite."""
    sizes = np.array(list(measured))
    if not sizes[0] <= batch <= sizes[-1]:
        return None
    if batch in measured:
        return measured[int(batch)]
    right = int(np.searchsorted(sizes, batch))
    ends = [measured[int(n)] for n in sizes[right - 1 : right + 1]]
    if not all(map(math.isfinite, ends)):
        return math.inf
    return math.exp(np.interp(math.log(batch), np.log(sizes[right - 1 : right + 1]), np.log(ends)))


def regret(verdict: Verdict | None, measured: dict[int, float], drawn: list[dict[int, float]]) -> dict[str, Any]:
    """What following this verdict costs, and why there is no figure where there is none."""
    batch = verdict.best_batch if verdict is not None else None
    found = at(batch, measured) if batch is not None else None
    row: dict[str, Any] = {
        "critical_batch": verdict.critical_batch if verdict is not None else None,
        "best_batch": batch,
        "seconds_to_target": found,
        "regret": found / min(measured.values()) if found is not None else None,
    }
    again = [seconds / min(table.values()) for table in drawn if batch and (seconds := at(batch, table)) is not None]
    if found is not None and again:
        low, high = np.quantile(again, [0.025, 0.975], method="inverted_cdf").tolist()
        row["regret_low"], row["regret_high"] = low, high if math.isfinite(high) else None  # None: open
    if batch is None:
        row["reason"] = "no batch was recommended"
    elif found is None:
        row["reason"] = f"batch {batch} is outside those the sweep measured, {min(measured)} to {max(measured)}"
    return row
