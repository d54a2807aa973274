"""Time, cost and energy to a loss over (batch, devices).

Steps S(B) times t(B / K), by the middle of the `ensemble`. Where steps on several devices were not measured,
communication is not counted and time on them is a lower bound. All figures are factors of one device at its own best
batch.
"""

from __future__ import annotations

import math
from itertools import pairwise

from pybatch.answer.best import Best
from pybatch.answer.ensemble import Ensemble
from pybatch.answer.evidence import NORMAL
from pybatch.records import BatchPoint, FrontierPoint, Inputs

_POINTS = 11  # 1, 2, ..., 1024 devices at most: further ones tell nothing new


def frontier(model: Ensemble, useful: int, batches: tuple[BatchPoint, ...]) -> tuple[FrontierPoint, ...]:
    """The best batch for 1, 2, 4, ... devices, up to four times the useful number, and what each buys.

    Args:
        model: of time to the loss.
        useful: devices worth it, by the verdict.
        batches: measured batch sizes, whose energy per example is taken where a device's share lies among them.
    """
    base = float(model.optimum())
    found = []
    for exponent in range(_POINTS):
        devices = 2**exponent
        if devices > 4 * useful:
            break
        batch = float(model.optimum(float(devices)))
        if devices > 1 and batch < devices:  # less than one example each
            break
        time = float(model.time(batch, float(devices)) / model.time(base))
        energy = _energy(model, batch, batch / devices, base, batches)
        found.append(FrontierPoint(devices, max(1, round(batch)), time, devices * time, energy))
    return tuple(found)


def _energy(model: Ensemble, batch: float, share: float, base: float, batches: tuple[BatchPoint, ...]) -> float | None:
    """Joules to the loss over those at the base batch; None where no energy was measured."""
    here, there = joules(share, batches), joules(base, batches)
    if here is None or there is None:
        return None
    return here * float(model.examples(batch)) / (there * float(model.examples(base)))


def joules(batch: float, batches: tuple[BatchPoint, ...]) -> float | None:
    """Measured joules per example at this batch, between two measured ones by their logarithms; None outside."""
    known = sorted((p.batch, p.joules_per_sample) for p in batches if p.joules_per_sample)
    for (low, at_low), (high, at_high) in pairwise(known):
        if low <= batch <= high:
            share = math.log(batch / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(at_low) + share * math.log(at_high))
    return next((value for size, value in known if size == batch), None)


def doubling(best: Best, batches: tuple[BatchPoint, ...]) -> Inputs:
    """What twice the best batch costs on one device, as factors; empty where it can't be used."""
    model, once = best.ensemble, float(best.batch)
    return change(model, once, 2 * once, batches) if 2 * once <= model.bound else {}


def change(model: Ensemble, once: float, other: float, batches: tuple[BatchPoint, ...]) -> Inputs:
    """What another batch costs on one device, as factors of the first one's.

    Step times are the measured ones where both batches were timed. Time has its 95 % interval.
    """
    here, there = joules(other, batches), joules(once, batches)
    examples = float(model.examples(other) / model.examples(once))
    middle, spread, timed = model.ratio(once, other, batches)
    return {
        "batch": other,
        "steps_factor": examples * once / other,
        "examples_factor": examples,
        "time_factor": math.exp(middle),
        "time_factor_low": math.exp(middle - NORMAL * spread),
        "time_factor_high": math.exp(middle + NORMAL * spread),
        "energy_factor": examples * here / there if here and there else None,
        "step_times": "measured" if timed else "modelled",
    }
