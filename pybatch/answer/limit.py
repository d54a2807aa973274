"""What one device can take against what the problem can use: which sets the limit, and what going on costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pybatch.answer.best import Best
from pybatch.answer.critical import Critical
from pybatch.records import BatchPoint, Capacity, Inputs, Limit

FALL = 0.1  # below the best throughput: past it caches overflow or memory is scarce, and no ceiling is approached
FURTHER = 1.1  # factor from the best batch to the wall below which going on is no choice worth telling
SAME_TIME = 1.05  # likewise of the time there: "1.0 times" tells nothing


@dataclass(frozen=True)
class Wall:
    """What one device can take: its saturation batch, or the largest batch that fits where that is smaller."""

    name: str
    value: float
    low: float
    high: float
    extrapolated: bool = False  # past the largest batch measured


def before_fall(timed: Sequence[BatchPoint]) -> Sequence[BatchPoint]:
    """The batch sizes up to the last one whose throughput, at its best, is near the highest.

    Args:
        timed: points with a step time, ascending.
    """
    highest = max((p.samples_per_s or 0.0 for p in timed), default=0.0)
    near = [i for i, p in enumerate(timed) if fastest(p) >= (1 - FALL) * highest]
    return timed[: near[-1] + 1] if near else timed


def fastest(p: BatchPoint) -> float:
    """Examples/s at the lower end of the step time's interval."""
    milliseconds = p.step_ms_low or p.step_ms
    return p.batch / (milliseconds / 1e3) if milliseconds else 0.0


def wall_of(capacity: Capacity | None) -> Wall | None:
    """What this device can take; None without a throughput fit, or where that shows no saturation batch."""
    if capacity is None or capacity.model is None:
        return None
    fit, most = capacity.model, capacity.max_batch
    if most is not None and most < fit.saturation_low:
        return Wall("largest batch that fits", most, most, most)
    if fit.saturation_batch is None:  # its bounds alone are known, and a note of the fit says why
        return None
    largest = max((p.batch for p in capacity.batches if p.status == "ok"), default=math.inf)
    beyond = fit.saturation_batch > largest
    high = fit.saturation_high if fit.saturation_high is not None else math.inf
    return Wall("saturation batch", fit.saturation_batch, fit.saturation_low, high, beyond)


def limit_of(critical: Critical, capacity: Capacity | None) -> tuple[Limit, str]:
    """Which ends first, beyond the error of both: the steps that batch saves, or the speed that it gains.

    The critical batch is compared with the half batch, its counterpart: at either, half of what there is to gain is
    gained. A device that holds less than its half batch is limited by its memory.
    """
    fit = capacity.model if capacity is not None else None
    if capacity is None or fit is None:
        return "unresolved", "the throughput of this device has no fit to compare with"
    name = "batch at half of the device's ceiling"
    low, high = fit.half_low, fit.half_high if fit.half_high is not None else math.inf
    if capacity.max_batch is not None and capacity.max_batch < low:
        name, low, high = "largest batch that fits", float(capacity.max_batch), float(capacity.max_batch)
    if critical.low is not None and critical.low > high:
        return "hardware", f"the critical batch lies above the {name} beyond the error of both"
    if critical.high is not None and critical.high < low:
        return "noise", f"the critical batch lies below the {name} beyond the error of both"
    if critical.value is None or critical.low is None or critical.high is None:  # an open end may lie on either side
        return "unresolved", f"the critical batch is not known well enough to compare it with the {name}"
    if math.isinf(high):
        return "unresolved", f"the {name} is not known well enough to compare the critical batch with it"
    return "balanced", f"the critical batch and the {name} agree within their errors"


def further_on(best: Best | None, wall: Wall | None) -> Inputs:
    """What going from the best batch to what the device can take costs, as factors; empty where it is no further."""
    if best is None or wall is None:
        return {}
    model, to = best.ensemble, wall.value
    if not FURTHER * best.batch <= to <= model.bound:
        return {}
    times = model.time(to, members=True) / model.time(best.batch, members=True)
    time = float(np.exp(np.log(times).mean()))
    if time < SAME_TIME:
        return {}
    examples = float(model.examples(to) / model.examples(best.batch))
    faster = float(to / model.step_s(to) / (best.batch / model.step_s(best.batch)))
    if faster < 1:
        return {}  # timed past a cliff that the wall's curve does not have: nothing that the device can take
    return {
        "examples_factor": examples,
        "time_factor": time,
        "throughput_factor": faster,
        "time_factor_low": float(np.quantile(times, 0.025)),
        "time_factor_high": float(np.quantile(times, 0.975)),
    }
