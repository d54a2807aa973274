"""The batch to use: of those that fit, the one of least expected time to the loss, and the interval of the optimum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pybatch.answer.critical import Critical
from pybatch.answer.ensemble import Ensemble, ensemble_of
from pybatch.answer.evidence import NORMAL
from pybatch.records import BatchPoint, Capacity, Distributed, Evidence, Inputs, Reason

MULTIPLE = 8  # a batch bounded by memory is rounded down to a multiple of this, which suits every device
LOOKS = 2  # by `closer`, at most
_SURE = 3.0  # standard errors of a batch size that was timed, below one that is advised
DISTURBED = 0.3  # rms of ln(measured / fitted) from which no advice stands on the fit: caches and tiles bend it less


@dataclass(frozen=True)
class Bound:
    """The largest batch that can be used, and what sets it."""

    value: float
    name: str | None  # "memory", "the data set"; None: unbounded


@dataclass(frozen=True)
class Best:
    """The batch to use, and the 95 % interval of the batch of least time."""

    batch: int
    optimum: float
    low: int
    high: int | None  # None: open
    extrapolated: str | None  # where it lies past the batches timed
    ensemble: Ensemble
    reason: Reason
    regret: tuple[float, float]  # of this batch: mean over the ensemble, and the 95 % point
    cut: int | None = None  # the largest batch that reached the target, where a larger one would be advised


def best_of(critical: Critical, capacity: Capacity, distributed: Distributed | None) -> Best:
    """The batch of least expected time among those measured, powers of two, and the largest that fits."""
    fit, value, bound = capacity.model, critical.value, bound_of(capacity)
    assert fit is not None  # the caller has looked
    assert value is not None
    ensemble = ensemble_between(critical, capacity, distributed)
    measured = [p.batch for p in capacity.batches if p.status == "ok" and p.step_ms]
    largest = max((p.batch for p in capacity.batches if p.status == "ok"), default=None)
    reach = critical.reached if critical.reached is not None else math.inf
    most = int(min(bound.value, ensemble.size[-1], reach))
    whole = most - most % MULTIPLE if bound.name == "memory" and most > MULTIPLE else most
    candidates = sorted(
        {b for b in (*measured, *_round(most)) if b <= most} | ({whole} if bound.value <= most + 1 else set())
    )
    batch = _measured(ensemble.best(candidates), candidates, ensemble, capacity.batches)
    optimum = ensemble.optimum()
    timed = batch in measured
    text = "least expected time to the loss: steps as the evidence leaves them possible times seconds per step"
    if optimum > most >= reach:
        text = f"{text}, bounded by runs: past batch {critical.reached} they did not reach the target"
    elif batch == whole and bound.name is not None and optimum > 0.9 * bound.value:
        text = f"{text}, bounded by {bound.name}"
    elif timed:
        text = f"{text}, at a batch size that was timed"
    low, high = (min(end, reach) for end in _ends(ensemble, critical, fit.half_high, bound))
    low, high = min(low, batch), max(high, batch)
    regret = ensemble.regret(float(batch))
    mean, tail = float(regret.mean()), float(np.quantile(regret, 0.95))
    inputs: Inputs = {
        "optimum": optimum,
        "optimum_low": low,
        "optimum_high": high if math.isfinite(high) else None,
        "critical_batch": value,
        "half_batch": fit.half_batch,
        "largest_measured": largest,
        "expected_regret": mean,
        "regret_95": tail,
    }
    evidence: Evidence = "measured" if ensemble.absolute and timed else "modelled"
    reason = Reason("best_batch", text, evidence, inputs)
    upper = math.ceil(high) if math.isfinite(high) else None
    past = "past the largest timed" if batch > (largest or 0) else None
    if measured and batch < min(measured):
        past = "below the smallest timed"
    return Best(
        batch,
        optimum,
        max(1, math.floor(low)),
        upper,
        past,
        ensemble,
        reason,
        (mean, tail),
        critical.reached if optimum > reach else None,
    )


def _measured(batch: int, candidates: Sequence[int], ensemble: Ensemble, batches: Sequence[BatchPoint]) -> int:
    """This batch; or another that was timed, and by that surely takes less time: the ensemble may have smoothed a cliff
    or a wave away. Of twice and half of it 97.5 % is sure; of any, which are many, three standard errors."""
    found = {}
    for other in candidates:
        if other == batch:
            continue
        middle, spread, timed = ensemble.ratio(float(batch), float(other), batches, mixed=True)
        sure = NORMAL if other in (2 * batch, batch // 2) else _SURE
        if timed and middle + sure * spread < 0:
            found[other] = middle
    best = min(found, key=lambda other: found[other], default=None)
    return batch if best is None else best


def closer(capacity: Capacity, batch: int) -> list[int]:
    """What to time once a batch is advised: it, where that was not done; else the sizes to either side of it.

    Waves and cliffs of step times lie between the sizes timed, and show in no other way (bench/planted_verdict.py).
    """
    timed = {p.batch for p in capacity.batches if p.status != "skipped"}
    if batch not in timed:
        return [batch]
    most = int(min(2 * batch, bound_of(capacity).value))
    sizes = [n for n in _round(most) if n <= most]
    below, above = [n for n in sizes if n < batch][-1:], [n for n in sizes if n > batch][:1]
    return [n for n in (*below, *above) if n not in timed]


def _round(most: int) -> list[int]:
    """Batch sizes people use, four an octave: 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ... Powers of two alone cost
    3 % more time (bench/planted_verdict.py)."""
    octaves = int(math.log2(max(most, 1))) + 1
    return sorted({(4 + quarter) * 2**octave // 4 for octave in range(octaves) for quarter in range(4)})


def _ends(ensemble: Ensemble, critical: Critical, half_high: float | None, bound: Bound) -> tuple[float, float]:
    """95 % of the members' best batches; the upper end is open where that of a side is."""
    optima = ensemble.optima
    low, high = (float(v) for v in np.quantile(optima, [0.025, 0.975], method="nearest"))
    if (half_high is None or critical.high is None) and high < bound.value:
        high = math.inf
    if critical.low is None:
        low = 1.0
    return low, high


def ensemble_between(critical: Critical, capacity: Capacity, distributed: Distributed | None) -> Ensemble:
    """Time to the loss within memory and data."""
    memory, data = _bounds(capacity)
    return ensemble_of(critical, capacity, memory.value, data.value, distributed.fit if distributed else None)


def bound_of(capacity: Capacity) -> Bound:
    return min(_bounds(capacity), key=lambda bound: bound.value)


def _bounds(capacity: Capacity) -> tuple[Bound, Bound]:
    """The largest batch on one device, and the largest at all."""
    examples = capacity.workload.examples if capacity.workload else None
    memory = Bound(float(capacity.max_batch), "memory") if capacity.max_batch is not None else Bound(math.inf, None)
    data = Bound(float(examples), "the data set") if examples is not None else Bound(math.inf, None)
    return memory, data
