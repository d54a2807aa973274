"""The verdict in words: sentences for a practitioner, made from its figures alone."""

from __future__ import annotations

from dataclasses import dataclass

from pybatch.answer.best import DISTURBED, Best, Bound
from pybatch.answer.critical import Critical
from pybatch.answer.ensemble import EFFICIENCY, MAX_DEVICES
from pybatch.answer.limit import Wall
from pybatch.base.numerals import batch_size, count, number
from pybatch.fits.throughput import grows
from pybatch.records import Capacity, Confidence, Inputs, Limit, ThroughputFit
from pybatch.records.verdict import said_by

_AT_BOUND = 0.7  # of the bound: a smaller batch advised is not one that it keeps from being larger
_NO_LESS = 0.95  # of the time on one device: what a second one saves is then within the error of any run


@dataclass(frozen=True)
class Answer:
    """The first line, one sentence why, and what there is to say beside."""

    answer: str
    because: str
    rest: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return " ".join(part for part in (self.answer, self.because, *self.rest) if part)


def advice(
    critical: Critical,
    capacity: Capacity,
    limit: Limit,
    best: Best,
    bound: Bound,
    confidence: Confidence,
    devices: tuple[int, int, int],
    wall: Wall | None,
    further: Inputs,
    second: Inputs,
) -> Answer:
    """The batch to use; every number is a field's of the verdict or a reason's input.

    Args:
        critical, capacity: both sides.
        limit: which of them ends first.
        best, bound: the batch to use, and the largest there can be.
        confidence: with its reasons, of which the first is told.
        devices: how many are worth it, with the ends of their interval.
        wall, further: what the device can take, and what going on to it costs as factors; where it is worth telling.
        second: what a second device buys, as factors.
    """
    beyond = f", {best.extrapolated}" if best.extrapolated else ""
    reasons = "; ".join(confidence.reasons)
    answer = f"Use batch {count(best.batch)}{beyond}, {_between(best)}. Confidence: {confidence.level} ({reasons})."
    rest = list(_disagreement(critical))
    if further and wall is not None:
        rest.append(
            f"At batch {batch_size(wall.value)}, the {wall.name}{' by extrapolation' * wall.extrapolated}, the same "
            f"loss takes {_times(further['time_factor'])} the time: {_times(further['throughput_factor'])} the "
            f"examples per second, {_times(further['examples_factor'])} the examples."
        )
    rest.append(_devices(best, devices, second))
    if critical.source == "noise" and best.batch > 1:
        sides = "half and at double" if 2 * best.batch <= bound.value else "half"
        rest.append(f"Before a long run, train briefly at {sides} batch {count(best.batch)} as well.")
    return Answer(answer, _because(critical, capacity, limit, best, bound), tuple(rest))


def _between(best: Best) -> str:
    if best.high is None:
        return f"{count(best.low)} or more"
    if best.low == best.high:
        return "with no other in question" if best.cut is None else "the largest that reached the target"
    return f"between {count(best.low)} and {count(best.high)}"


def _because(critical: Critical, capacity: Capacity, limit: Limit, best: Best, bound: Bound) -> str:
    """One sentence why."""
    fit = capacity.model
    assert fit is not None
    noise = f"twice the fewest examples are needed at batch {_said(critical)}"
    device = f"the device is at half its ceiling at batch {batch_size(fit.half_batch)}"
    if best.optimum > 0.9 * bound.value and best.batch > _AT_BOUND * bound.value and bound.name is not None:
        return f"{bound.name.capitalize()} ends at batch {count(bound.value)}, below what would be fastest: {noise}."
    ends = sorted((critical.value or 0.0, fit.half_batch or 0.0))
    between = "; between them time is least" if ends[0] <= best.batch <= ends[1] else ""
    return {
        "noise": f"Gradient noise sets the limit, not the device: {noise}, {device}{between}.",
        "hardware": f"The device sets the limit, not gradient noise: {device}, {noise}{between}.",
        "balanced": f"Time is steps times step time: {noise}, {device}.",
        "unresolved": f"Time is steps times step time: {noise}, {device}.",
    }[limit]


def _devices(best: Best, devices: tuple[int, int, int], second: Inputs) -> str:
    number_of, low, high = devices
    more = " or more" if number_of >= MAX_DEVICES else ""  # the search ends there
    counted = best.ensemble.communication
    how = "modelled without communication"
    if counted is not None:
        how = f"modelled with the communication measured on {counted.devices} devices"
    span = f" ({count(low)} to {count(high)})" if (low, high) != (number_of, number_of) else ""
    if number_of > 1 and low == 1:
        worth = f"may work at {number(EFFICIENCY, 1)} of their worth or better"
        return f"Up to {count(number_of)} devices{span} {worth}, {how}."
    if number_of > 1:
        worth = f"work at {number(EFFICIENCY, 1)} of their worth or better"
        return f"Up to {count(number_of)}{more} devices{span} {worth}, {how}."
    if not second:
        worth = "may work" if high > 1 else "works"
        return f"A second device {worth} at less than {number(EFFICIENCY, 1)} of its worth, {how}."
    if float(second["time_factor"] or 0.0) > _NO_LESS:
        return f"A second device would save next to no time, {how}."
    return (
        f"A second device would bring {_times(second['time_factor'])} the time at "
        f"{_times(second['cost_factor'])} the device-seconds, {how}."
    )


def bounds(
    critical: Critical,
    capacity: Capacity | None,
    wall: Wall | None,
    limit: Limit,
    span: tuple[int | None, int | None],
    bound: Bound | None,
    unmeasured: str | None = None,
    fewest: str | None = None,
) -> Answer:
    """Where no batch is advised: what is known, and what would help.

    Args:
        critical, capacity, wall, limit: as in `advice`.
        span: the least and the largest batch worth using, as far as known.
        bound: what keeps the least one from being larger; None where nothing does.
        unmeasured: why a sweep that was made has no critical batch.
        fewest: "examples" or "steps", where time is least where these are fewest within the span.
    """
    fit = capacity.model if capacity is not None else None
    known, rest = _said(critical), (*_disagreement(critical), *_known(critical))
    if fit is not None and fit.half_batch is None and span != (None, None):
        rises = (
            "Step times do not rise with the batch beyond their scatter"
            if fit.ceiling is None
            else f"Step time {grows(fit.rms_log_error)} the batch"
        )
        if fewest is not None:
            because = f"{rises}: time is least where {fewest} are fewest, and a sweep measured them."
            return Answer(f"{_distrust(fit)}{_bounded(span, bound)}", because, rest)
        falls = fit.ceiling is None and span[1] is not None
        beyond = f"past batch {count(span[1])} fewer examples are done a second" if falls else _open(fit, bound)
        because = f"{rises}{f' up to batch {count(span[0])}' if falls else ''}: {beyond}."
        return Answer(f"{_distrust(fit)}{_bounded(span, bound)}", because, rest)
    if fit is None:
        lack = _untimed(capacity)
        nothing = critical.value is None and critical.low is None and critical.high is None
        if unmeasured is not None:
            instead = () if nothing else (f"By other evidence it is {known}, which these runs do not confirm.",)
            return Answer(
                "The critical batch cannot be told from these runs.",
                unmeasured,
                (*instead, f"{lack}: no batch is advised."),
            )
        if nothing:
            return Answer("No batch can be advised.", f"{lack}, and the critical batch is not known: {_why(critical)}.")
        told = (*_disagreement(critical), *([critical.checkpoint] if critical.checkpoint else ()), _far(critical))
        return Answer(f"The critical batch is {known}.", " ".join(told), (f"{lack}: no batch is advised.",))
    if fit.half_batch is None:
        scatter = number(100 * fit.rms_log_error, 2)
        because = f"Step times scatter by {scatter} % and show no trend: measure again on a quiet machine."
        return Answer("No batch can be advised yet.", because, rest)
    device = f"The device is at half its ceiling at batch {batch_size(fit.half_batch)}"
    if wall is not None:
        device += f", and its {wall.name} is {batch_size(wall.value)}"
    if span != (None, None):
        beside = {"hardware": ", above the device's half batch", "noise": ", below the device's half batch"}
        because = f"The critical batch is {known}{beside.get(limit, '')}."
        rest = (*_disagreement(critical), f"{device}.", _more(critical))
        return Answer(f"{_distrust(fit)}{_bounded(span, bound)}", because, rest)
    because = f"The critical batch is not known: {_why(critical)}."
    return Answer(f"{_distrust(fit)}No batch can be advised yet.", because, (f"{device}.", _more(critical)))


def _untimed(capacity: Capacity | None) -> str:
    """What keeps a batch from being advised where there is no fit of step times, with the first cause there is."""
    if capacity is None:
        return "Capacity was not measured"
    causes = [(point.batch, point.reason) for point in capacity.batches if point.status != "ok" and point.reason]
    cause = ""
    if causes:
        n, why = min(causes)
        late = why.startswith("the time budget")
        cause = " before the time budget ended" if late else f" (batch {count(n)}: {why.rstrip('.')})"
    return f"Too few batch sizes were timed{cause}"


def _disagreement(critical: Critical) -> tuple[str, ...]:
    return () if critical.disagreement is None else (critical.disagreement,)


def _far(critical: Critical) -> str:
    """What a critical batch means for batch sizes on either side of it."""
    if critical.shape is not None and critical.shape.model == "power-law":
        return "At it twice the fewest examples are needed; steps fall on and on as a power of the batch."
    curve = critical.curve
    if critical.source == "sweep" and curve is not None and curve.b_min is not None and curve.b_min_low is not None:
        least = (
            f"Examples are fewest at batch {batch_size(curve.b_min)}: smaller ones take more steps and more examples;"
        )
        return f"{least} far above the critical batch larger ones save almost no steps."
    return "Far below it more examples per step save almost as many steps, far above it almost none."


def _known(critical: Critical) -> tuple[str, ...]:
    return (f"The critical batch is {_said(critical)}.",) if critical.source is not None else ()


def _why(critical: Critical) -> str:
    return critical.reason.text.rstrip(".")


def _open(fit: ThroughputFit, bound: Bound | None) -> str:
    """What follows from step times without a half batch."""
    if bound is not None:
        return "a larger one would take no longer"
    if fit.ceiling is not None:
        return "a larger one only costs examples"
    return "a larger one takes no longer. Time larger ones to find where the device's ceiling is"


def _bounded(span: tuple[int | None, int | None], bound: Bound | None) -> str:
    """The first line. One end alone is no advice: any batch beyond it may be the best."""
    low, high = span
    if bound is not None:
        return f"Use batch {count(low)}, the largest that {bound.name} allows."
    if low is None and high != 1:
        return f"The best batch is not known yet; it is at most {count(high)}."
    if high is None:
        return f"The best batch is not known yet; it is at least {count(low)}."
    return f"Use batch {count(high)}." if low in (None, high) else f"Use batch {count(low)} to {count(high)}."


def _distrust(fit: ThroughputFit | None) -> str:
    """A sentence to go first where the throughput fit misses so much that nothing can stand on it."""
    if fit is None or fit.rms_log_error <= DISTURBED:
        return ""
    return (
        f"Measure again before trusting this: step times miss any smooth curve by {number(100 * fit.rms_log_error, 2)} "
        "%, as on a machine busy with something else. "
    )


def _said(critical: Critical) -> str:
    """The critical batch in words, with its interval and its source."""
    weighed = critical.weighed.readings if critical.weighed is not None else ()
    source = said_by(weighed, critical.source)
    if critical.bounded and critical.value is not None:
        source += " within the sweep's bound"
    if critical.value is None:
        ends = (("at least", critical.low), ("at most", critical.high))
        return " and ".join(f"{side} {batch_size(end)}" for side, end in ends if end is not None) + f" ({source})"
    if critical.low is None and critical.high is None:
        span = "interval not known"
    elif critical.low is None:
        span = f"at most {batch_size(critical.high)}"
    elif critical.high is None:
        span = f"at least {batch_size(critical.low)}"
    else:
        span = f"{batch_size(critical.low)} to {batch_size(critical.high)}"
    return f"{batch_size(critical.value)} ({span}, {source})"


def _times(factor: float | str | None) -> str:
    return f"{number(float(factor or 0.0), 2)} times"


def _more(critical: Critical) -> str:
    if critical.source in ("branch", "sweep"):
        which = "smaller" if critical.low is None else "larger"
        runs = "Branches" if critical.source == "branch" else "A sweep"
        return f"{runs} with {which} batches would close the interval."
    if critical.source is None and not critical.reason.inputs:
        return "Measure the noise scale as well."
    if "misled" in critical.reason.inputs:
        return "A sweep measures it for any loss."
    return "More steps narrow the noise scale: a longer --time-budget of bench, a longer run under watch."
