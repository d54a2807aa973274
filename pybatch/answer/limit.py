"""What one device can take against what the problem can use: which sets the limit, and what going on costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pybatch.answer.best import Best
from pybatch.answer.critical import Critical
from pybatch.answer.time_model import Inputs
from pybatch.records import Capacity, Limit

FURTHER = 1.1  # factor from the best batch to the wall below which going on is no choice worth telling


@dataclass(frozen=True)
class Wall:
    """What one device can take: its saturation batch, or the largest batch that fits where that is smaller."""

    name: str
    value: float
    low: float
    high: float
    extrapolated: bool = False  # past the largest batch measured


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


def limit_of(critical: Critical, wall: Wall | None) -> tuple[Limit, str]:
    """Which of the two is smaller beyond the error of both."""
    if wall is None:
        return "unresolved", "the throughput of this device has no fit to compare with"
    low, high = critical.low, critical.high
    if low is not None and low > wall.high:
        return "hardware", f"the critical batch lies above the {wall.name} beyond the error of both"
    if high is not None and high < wall.low:
        return "noise", f"the critical batch lies below the {wall.name} beyond the error of both"
    if critical.value is None or low is None or high is None:  # an open end may lie on either side
        return "unresolved", f"the critical batch is not known well enough to compare it with the {wall.name}"
    return "balanced", f"the critical batch and the {wall.name} agree within their errors"


def further_on(best: Best | None, wall: Wall | None) -> Inputs:
    """What going from the best batch to what the device can take costs, as factors; empty where it is no further."""
    if best is None or wall is None:
        return {}
    model, to = best.model, wall.value
    if not FURTHER * best.batch <= to <= min(model.most, model.most_global):
        return {}
    if model.time(to) < model.time(best.batch):  # where measured times overruled the model, it can't tell the cost
        return {}
    return {
        "examples_factor": float(model.examples(to) / model.examples(best.batch)),
        "time_factor": float(model.time(to) / model.time(best.batch)),
        "throughput_factor": (to / model.fit.step_s(to)) / (best.batch / model.fit.step_s(best.batch)),
    }
