"""The verdict in words: sentences for a practitioner, made from its figures alone."""

from __future__ import annotations

import math

from pybatch.answer.best import Best, Bound
from pybatch.answer.critical import Critical
from pybatch.answer.limit import Wall
from pybatch.answer.time_model import DISTURBED, EFFICIENCY, Inputs
from pybatch.base.numerals import count, number
from pybatch.records import Capacity, Limit, ThroughputFit

_NOISE = "from gradient noise"


def in_sentences(
    critical: Critical,
    capacity: Capacity | None,
    wall: Wall | None,
    limit: Limit,
    best: Best | None,
    span: tuple[int | None, int | None],
    bound: Bound | None,
    devices: int | None,
    further: Inputs,
) -> str:
    """Two to five sentences a practitioner can act on; every number in them is a field's or a reason's.

    Args:
        critical: the critical batch, or why it is not known.
        capacity, wall: what the device does, and the batch past which it gains nothing; None where not measured.
        limit: which of the two is smaller.
        best: the batch to use; None where only bounds (`span`) or nothing is known.
        span: the least and the largest batch worth using, where not `best`.
        bound: what keeps the least one from being larger; None where nothing does.
        devices: how many are worth it.
        further: what going on to the wall costs, as factors.
    """
    fit = capacity.model if capacity else None
    if best is not None and wall is not None:
        return _distrust(fit) + " ".join(_advice(critical, wall, limit, best, devices, further))
    known = _said(critical)
    if fit is not None and fit.half_batch is None and span != (None, None):
        known = "" if critical.source is None else f" The critical batch is {known}."
        why = "step times do not rise with it" if fit.ceiling is None else "step time is proportional to it"
        return f"{_distrust(fit)}Use batch {_range(span, bound)}: {why}, so {_open(fit)}.{known}"
    if wall is None:
        lack = "Capacity was not measured" if capacity is None else "Too few batch sizes were timed"
        if critical.value is None and critical.low is None and critical.high is None:
            return f"{lack}, and the critical batch is not known ({critical.reason.text}): no batch can be advised."
        return (
            f"The critical batch is {known}: far below it more examples per step save almost as many steps, far "
            f"above it almost none. {lack}, so what batch this device wants is not known."
        )
    assert fit is not None  # there is a wall
    assert fit.half_batch is not None
    device = (
        f"The device reaches half its ceiling at batch {count(math.ceil(fit.half_batch))} and its {wall.name} is "
        f"{_size(wall.value)}"
    )
    if span != (None, None):
        beside = {"hardware": ", above what the device can use", "noise": ", below what the device can use"}
        advice = f"Use batch {_range(span, bound)}: the critical batch is {known}{beside.get(limit, '')}."
        return f"{_distrust(fit)}{advice} {device}. {_more(critical)}"
    return _distrust(fit) + (
        f"No batch can be advised yet: {critical.reason.text}. {device}; below the former it is poorly used, "
        f"past the latter it gains next to nothing. {_more(critical)}"
    )


def _open(fit: ThroughputFit) -> str:
    """What follows from step times without a half batch."""
    if fit.ceiling is not None:
        return "a larger one only costs examples"
    return "a larger one takes no longer. Time larger ones to find where the device's ceiling is"


def _range(span: tuple[int | None, int | None], bound: Bound | None) -> str:
    low, high = span
    if low is None:
        return f"{count(high)} or smaller" if high != 1 else "1"
    if bound is not None:
        return f"{count(low)}, the largest that {bound.name} allows"
    return f"{count(low)} or larger" if high is None else f"{count(low)} to {count(high)}"


def _distrust(fit: ThroughputFit | None) -> str:
    """A sentence to go first where the throughput fit misses so much that nothing can stand on it."""
    if fit is None or fit.rms_log_error <= DISTURBED:
        return ""
    return (
        f"Measure again before trusting this: step times miss any smooth curve by {number(100 * fit.rms_log_error, 2)} "
        "%, as on a machine busy with something else. "
    )


def _advice(
    critical: Critical,
    wall: Wall,
    limit: Limit,
    best: Best,
    devices: int | None,
    further: Inputs,
) -> list[str]:
    size = _size(wall.value)
    two = f"the critical batch is {_said(critical)}, the {wall.name} {size}{' by extrapolation' * wall.extrapolated}"
    reach = f"optimum {_size(best.optimum)}, 95 % interval {count(best.low)}"
    if best.reason.evidence == "measured":
        reach = f"by the measured step times, which the throughput model misses; its {reach}"
    end = f"to {count(best.high)}" if best.high is not None else "upwards"
    beyond = ", by extrapolation past the largest batch timed" if best.extrapolated else ""
    because = {
        "noise": f"Gradient noise sets the limit, not the device: {two}.",
        "hardware": f"The device sets the limit, not gradient noise: {two}.",
        "balanced": f"Gradient noise and device are balanced: {two}, and their errors overlap.",
        "unresolved": f"Which of the two sets the limit is not known: {two}.",
    }
    said = [
        f"Use batch {count(best.batch)}{beyond} ({reach} {end}).",
        because[limit],
    ]
    if further:
        said.append(
            f"At batch {size} the device does {_times(further['throughput_factor'])} the examples per second, but "
            f"training needs {_times(further['examples_factor'])} the examples: the same loss takes "
            f"{_times(further['time_factor'])} the time."
        )
    if devices is not None:
        worth = (
            "A second device is not worth it"
            if devices == 1
            else f"Up to {count(devices)} devices are worth it (parallel efficiency {number(EFFICIENCY, 1)} or better)"
        )
        how = "modelled without communication"
        if best.model.communication is not None:
            how = f"modelled with the communication measured on {best.model.communication.devices} devices"
        said.append(f"{worth}, {how}.")
    if critical.source == "noise":
        said.append(_trial(best.batch))
    return said


def _said(critical: Critical) -> str:
    """The critical batch in words, with its interval and its source."""
    source = {"sweep": "fitted to steps", "branch": "from branched runs"}.get(critical.source or "", _NOISE)
    if critical.value is None:
        ends = (("at least", critical.low), ("at most", critical.high))
        return " and ".join(f"{side} {_size(end)}" for side, end in ends if end is not None) + f" ({source})"
    span = f"{_size(critical.low)} to {_size(critical.high)}, "
    if critical.low is None and critical.high is None:
        span = "interval not known, "
    elif critical.low is None:
        span = f"at most {_size(critical.high)}, "
    elif critical.high is None:
        span = f"at least {_size(critical.low)}, "
    return f"{_size(critical.value)} ({span}{source})"


def _size(batch: float | None) -> str:
    """A modelled batch size: three digits at most, whole from 10 on."""
    if batch is None or batch < 9.95:
        return number(batch, 2)
    return count(batch) if batch < 99.5 else number(batch)


def _times(factor: float | str | None) -> str:
    return f"{number(float(factor or 0.0), 2)} times"


def _trial(batch: int) -> str:
    return (
        "All this takes the noise scale for the critical batch, which on published tasks was off by ten times "
        f"and more: before a long run, train briefly at half and at double batch {count(batch)} as well."
    )


def _more(critical: Critical) -> str:
    if critical.source in ("branch", "sweep"):
        which = "smaller" if critical.low is None else "larger"
        runs = "Branches" if critical.source == "branch" else "A sweep"
        return f"{runs} with {which} batches would close the interval."
    if critical.source is None and not critical.reason.inputs:
        return "Measure the noise scale as well."
    return "A longer --time-budget narrows the noise scale."
