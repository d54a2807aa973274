"""Critical batch against capacity: the batch to use, what going further costs, how many devices are worth it.

Pure: records in, Verdict out. `evidence` weighs what is known of the critical batch (`critical`), `ensemble` has the
time to a loss with all that is not known of it, `best` chooses the batch, `limit` says which side ends first,
`frontier` what more devices buy, `confidence` how much to stake on it, `rate` the learning rate there, and `sentences`
has the words.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from pybatch.answer.best import Best, Bound, best_of, bound_of, ensemble_between
from pybatch.answer.confidence import confidence_of
from pybatch.answer.critical import PAST, Critical, critical_of, curve_of, passed_over, unmeasured
from pybatch.answer.ensemble import EFFICIENCY, Ensemble, Turn, turn_of
from pybatch.answer.frontier import doubling, frontier
from pybatch.answer.input import with_loader
from pybatch.answer.limit import Wall, before_fall, further_on, limit_of, wall_of
from pybatch.answer.rate import far_from_tuned, rate_of
from pybatch.answer.sentences import advice, bounds
from pybatch.base.arguments import typed
from pybatch.base.errors import UsageError
from pybatch.base.numerals import batch_size, number
from pybatch.fits.throughput import MISFIT, grows
from pybatch.records import (
    Capacity,
    Confidence,
    Convergence,
    Distributed,
    FrontierPoint,
    Inputs,
    NoiseScale,
    Note,
    Reason,
    ThroughputFit,
    Verdict,
    aim_of,
)


@typed
def advise(
    capacity: Capacity | None,
    noise: NoiseScale | None = None,
    steps: Convergence | None = None,
    distributed: Distributed | None = None,
) -> Verdict:
    """What batch to use, why, and what going further costs.

    Args:
        capacity: throughput against batch size on one device.
        noise: the gradient noise scale, which predicts the critical batch within a factor.
        steps: measured steps to target, or branches: the critical batch fitted to them, or a bound of it.
        distributed: steps on several devices; without it, communication is not counted.

    Any of them may be None or unresolved: what then cannot be said is None, and the text and the notes say why.
    """
    _check(capacity, noise, steps, distributed)
    critical = critical_of(noise, steps, _target(capacity, steps))
    far = far_from_tuned(capacity, noise, steps, critical.value or 0.0)
    if far is not None and (alone := critical_of(None, steps, _target(capacity, steps))).value is not None:
        critical, far = alone, f"{far}; it is left out here"
    fit = capacity.model if capacity is not None else None
    best = None
    if critical.value is not None and capacity is not None and fit is not None and fit.half_batch is not None:
        best = best_of(critical, capacity, distributed)
    limit, why = limit_of(critical, capacity)
    wall = wall_of(capacity)
    further = further_on(best, wall)
    reasons, notes = [critical.reason], list(_capacity_notes(capacity))
    if capacity is not None and capacity.saturation_batch is not None:
        reasons.append(_saturation_reason(capacity))

    low = high = devices = rate = None
    ends: tuple[int | None, int | None] = (None, None)
    points: tuple[FrontierPoint, ...] = ()
    confidence: Confidence | None = None
    if best is not None and capacity is not None:
        low, high = best.low, best.high
        useful = best.ensemble.useful_devices()
        devices, ends = useful[0], useful[1:]
        reasons += [best.reason, _devices_reason(best.ensemble, useful)]
        points = frontier(best.ensemble, devices, capacity.batches)
        if twice := doubling(best, capacity.batches):
            text = f"steps at twice the best batch and at it, times the {twice['step_times']} step times"
            measured = best.ensemble.absolute and twice["step_times"] == "measured"
            reasons.append(Reason("doubling", text, "measured" if measured else "modelled", twice))
        second: Inputs = {}
        if len(points) > 1:
            second = {"time_factor": points[1].time_factor, "cost_factor": points[1].cost_factor}
            reasons.append(Reason("second_device", "two devices at their best batch over one", "modelled", second))
        rate, rate_reason = rate_of(best.batch, critical.value or 0.0, capacity, steps)
        reasons += [rate_reason] if rate_reason is not None else []
        confidence = confidence_of(critical, best, capacity)
        assert confidence is not None
        bound = bound_of(capacity)
        said = advice(critical, capacity, limit, best, bound, confidence, useful, wall, further, second)
    else:
        low, high, kept, found = _bounded(critical, capacity, fit)
        reasons += found
        missing = unmeasured(steps, critical.source)
        fewest = next((str(r.inputs["fewest"]) for r in found if "fewest" in r.inputs), None)
        said = bounds(critical, capacity, wall, limit, (low, high), kept, missing, fewest)
    reasons.append(Reason("limit", why, "modelled", further | _sides(critical, capacity, wall)))
    seconds, seconds_reason = _time_to_target(critical, best, capacity)
    reasons += [seconds_reason] if seconds_reason else []

    if noise is not None or critical.source is not None:  # else the reason says it
        notes += passed_over(steps, critical.source, critical.bounded)
    notes += [Note("noise.b_simple", far)] if far is not None else []
    notes += _of_easier_target(capacity, critical)
    notes += _of_past_target(critical)
    absent = _unknown(capacity)
    for name, value in (("critical_batch", critical.value), ("best_batch", best), ("useful_devices", devices)):
        if value is None:
            notes.append(Note(f"verdict.{name}", critical.reason.text if name == "critical_batch" else absent))
    if rate is None:
        lack = absent if best is None else "no rate is known at any batch size"
        notes.append(Note("verdict.learning_rate", lack))
    if seconds is None:
        swept = steps is not None and steps.curves
        lack = absent if swept else "steps to a target were not measured, only what a step takes"
        if swept and best is not None:
            lack = "the steps measured have no fit with a critical batch, so how many the batch advised takes is open"
        notes.append(Note("verdict.time_to_target", lack))
    weighed = critical.weighed
    verdict = Verdict(
        critical_batch=critical.value,
        critical_low=critical.low,
        critical_high=critical.high,
        critical_source=critical.source,
        saturation_batch=capacity.saturation_batch if capacity is not None else None,
        best_batch=best.batch if best else None,
        best_low=low,
        best_high=high,
        limit=limit,
        useful_devices=devices,
        time_to_target=seconds,
        text=said.text,
        reasons=tuple(reasons),
        notes=tuple(notes),
        frontier=points,
        useful_devices_low=ends[0],
        useful_devices_high=ends[1],
        learning_rate=rate,
        confidence=confidence,
        evidence=(*weighed.readings, *(replace(r, aside=True) for r in weighed.aside)) if weighed is not None else (),
        answer=said.answer,
        because=said.because,
    )
    return with_loader(verdict, capacity)


def ensemble(
    capacity: Capacity, noise: NoiseScale | None, steps: Convergence | None, distributed: Distributed | None = None
) -> Ensemble | None:
    """The times to the loss that `advise` weighs; None where a side of them is not known."""
    critical = critical_of(noise, steps, _target(capacity, steps))
    if critical.value is None or capacity.model is None or capacity.model.half_batch is None:
        return None
    return ensemble_between(critical, capacity, distributed)


def _target(capacity: Capacity | None, steps: Convergence | None) -> float | None:
    """The train loss that is to be reached: that of the steps that count, or the workload's.

    Branches by themselves, made without one, are to reach none.
    """
    curve = curve_of(steps)
    if curve is not None and curve.split == "train" and curve.target is not None:
        return curve.target
    if steps is not None and steps.target is not None:
        return steps.target
    if capacity is None and steps is not None and not steps.curves:
        return None
    return _declared(capacity) or _declared(steps)


def _declared(part: Capacity | Convergence | None) -> float | None:
    """The workload's own."""
    work = part.workload if part is not None else None
    return work.target.get("train") if work is not None else None


def _of_easier_target(capacity: Capacity | None, critical: Critical) -> list[Note]:
    """On steps to a loss that the workload's training goes far past."""
    curve, aim = critical.curve, _declared(capacity)
    if critical.source != "sweep" or curve is None or curve.split != "train" or curve.target is None or aim is None:
        return []
    if aim >= PAST * curve.target:
        return []
    text = f"steps were measured to train loss {number(curve.target)}, the workload's target is {number(aim)}"
    return [Note("verdict.critical_source", f"{text}: up to there the critical batch grows. Sweep to that target")]


def _of_past_target(critical: Critical) -> list[Note]:
    """On evidence that was read at a loss below the target, and counts as it would be there."""
    readings = critical.weighed.readings if critical.weighed is not None else ()
    past = [r for r in readings if r.kind in ("noise past target", "branch past target")]
    text = "counts as {}, as at the target: critical batches grow along a run"
    return [Note("critical_batch", f"{r.words.rstrip(',')}, {text.format(batch_size(r.value))}") for r in past]


_KINDS = {"capacity": Capacity, "noise": NoiseScale, "steps": Convergence, "distributed": Distributed}


def _check(*given: object) -> None:
    """UsageError for what is no record of its kind: a run, a class, a figure."""
    for (name, kind), value in zip(_KINDS.items(), given, strict=True):
        if value is not None and not isinstance(value, kind):
            what = value.__name__ if isinstance(value, type) else type(value).__name__
            raise UsageError(
                f"advise(): {name} is {'the class ' * isinstance(value, type)}{what}. Give a {kind.__name__}, such as "
                f"a run's .{'convergence' if name == 'steps' else name}, or None."
            )


def _bounded(
    critical: Critical, capacity: Capacity | None, fit: ThroughputFit | None
) -> tuple[int | None, int | None, Bound | None, list[Reason]]:
    """The least and the largest batch worth using where none is advised, what bounds the least one, and why."""
    if capacity is None or fit is None:
        return None, None, None, []
    timed = [p.batch for p in capacity.batches if p.status == "ok"]
    # No trend is seen for the scatter.
    if fit.half_batch is None and fit.ceiling is None and fit.rms_log_error > MISFIT:
        return None, None, None, []
    proportional = fit.ceiling is not None
    if fit.half_batch is None and (turn := turn_of(critical.curve, proportional)) is not None:
        return _at_turn(turn, fit, critical, bound_of(capacity))
    if fit.half_batch is None and proportional:
        text = f"step time {grows(fit.rms_log_error)} the batch: no batch takes less time than the smallest timed"
        least = int(min(*timed, bound_of(capacity).value))
        return None, least, None, [Reason("best_high", text, "measured", {"smallest_measured": least})]
    if fit.half_batch is None:
        text = "step times do not rise with the batch: none takes less time than the largest timed, within what fits"
        rising = before_fall([p for p in capacity.batches if p.status == "ok"])[-1].batch
        largest = int(min(rising, bound_of(capacity).value))
        high, most = None, bound_of(capacity)
        if rising < max(timed):  # what was timed beyond shows that it is not open upwards
            high, text = largest, f"{text}, up to batch {rising}, past which throughput falls"
        kept = most if high is None and largest + 1 > most.value else None
        return largest, high, kept, [Reason("best_low", text, "measured", {"largest_measured": rising})]
    most, found = bound_of(capacity), []
    low = high = kept = None
    law = "sqrt(critical batch x half batch) at the"
    if critical.low is not None:
        root = min(math.sqrt(critical.low * fit.half_batch), most.value)
        low = max(1, math.floor(root))
        kept = most if low + 1 > most.value else None
        inputs: Inputs = {"critical_low": critical.low, "half_batch": fit.half_batch}
        text = f"{law} lower bound of the critical batch: use at least this"
        found.append(Reason("best_low", text, "modelled", inputs))
    if critical.high is not None:
        root = min(math.sqrt(critical.high * fit.half_batch), most.value)
        high = max(1, math.ceil(root))
        inputs = {"critical_high": critical.high, "half_batch": fit.half_batch}
        text = f"{law} upper bound of the critical batch: use at most this"
        found.append(Reason("best_high", text, "modelled", inputs))
    return low, high, kept, found


def _at_turn(
    turn: Turn, fit: ThroughputFit, critical: Critical, most: Bound
) -> tuple[int | None, int | None, Bound | None, list[Reason]]:
    """As `_bounded`, where the least time is that of the fewest examples, or steps, which a sweep has measured."""
    proportional = fit.ceiling is not None
    what = "examples" if proportional else "steps"
    low = int(min(turn.low, most.value))
    high = None if turn.high is None else int(min(turn.high, most.value))
    if high is None and not proportional:  # larger ones take no longer, but for what was seen of their steps
        high = critical.reached
    times = (
        f"step time {grows(fit.rms_log_error)} the batch" if proportional else "step times do not rise with the batch"
    )
    text = f"{times}: time is least where {what} are fewest, of the batch sizes tested at {turn.batch}"
    inputs: Inputs = {"fewest": what, "batch": turn.batch, "more_at": turn.against}
    kept = most if high is None and low + 1 > most.value else None
    return low, high, kept, [Reason("best_low", text, "measured", inputs)]


def _sides(critical: Critical, capacity: Capacity | None, wall: Wall | None) -> Inputs:
    """What the limit compares, and the wall that sentences name."""
    fit = capacity.model if capacity is not None else None
    found: Inputs = {} if wall is None else {wall.name: wall.value}
    if fit is not None:
        found |= {"critical_batch": critical.value, "half_batch": fit.half_batch}
        found |= {"half_low": fit.half_low, "half_high": fit.half_high}
    if capacity is not None and capacity.max_batch is not None:
        found["max_batch"] = capacity.max_batch
    return found


def _time_to_target(
    critical: Critical, best: Best | None, capacity: Capacity | None
) -> tuple[float | None, Reason | None]:
    curve = critical.curve
    if curve is None or best is None or capacity is None or not (best.ensemble.absolute or curve.s_min):
        return None, None
    found = best.ensemble.steps(best.batch, members=True) * (1.0 if best.ensemble.absolute else curve.s_min or math.nan)
    steps = float(np.exp(np.log(found).mean()))
    timed = next((p.step_ms for p in capacity.batches if p.batch == best.batch and p.step_ms), None)
    step_s = timed / 1e3 if timed else float(best.ensemble.step_s(best.batch))
    text = f"fitted steps to the {aim_of(curve.split)} target times the {'measured' if timed else 'modelled'} step time"
    inputs: Inputs = {"steps": steps, "step_s": step_s}
    inputs |= {"steps_low": float(np.quantile(found, 0.025)), "steps_high": float(np.quantile(found, 0.975))}
    return steps * step_s, Reason("time_to_target", text, "modelled", inputs)


def _saturation_reason(capacity: Capacity) -> Reason:
    fit = capacity.model
    largest = max((p.batch for p in capacity.batches if p.status == "ok"), default=None)
    text = "the batch from which on doubling it gains less than 5 % throughput, by the throughput fit"
    wall = wall_of(capacity)
    if wall is not None and wall.extrapolated:
        text += "; extrapolated past the largest batch measured"
    inputs: Inputs = {
        "low": capacity.saturation_low,
        "high": capacity.saturation_high,
        "half_batch": capacity.half_batch,
        "ceiling_samples_per_s": capacity.ceiling_samples_per_s,
        "largest_measured": largest,
        "misfit_percent": 100 * fit.rms_log_error if fit else None,
    }
    return Reason("saturation_batch", text, "modelled", inputs)


def _devices_reason(model: Ensemble, useful: tuple[int, int, int]) -> Reason:
    counted = model.communication
    how = (
        "an upper bound, as communication is not counted"
        if counted is None
        else f"with communication as fitted to steps on up to {counted.devices} devices"
    )
    text = (
        f"most devices with a parallel efficiency of {EFFICIENCY:g} or better, each number at its own best batch; {how}"
    )
    inputs: Inputs = {"efficiency": EFFICIENCY, "batch": model.optimum(float(useful[0]))}
    inputs |= {"low": useful[1], "high": useful[2]}
    if counted is not None:
        inputs |= {"gamma": counted.gamma, "bandwidth_bytes_per_s": counted.bandwidth_bytes_per_s}
        inputs |= {"latency_s": counted.latency_s, "measured_devices": counted.devices}
    return Reason("useful_devices", text, "modelled", inputs)


def _unknown(capacity: Capacity | None) -> str:
    """Why figures of the device, or of both sides together, are missing."""
    if capacity is None:
        return "capacity was not measured"
    if capacity.model is None:
        return "too few batch sizes were timed for a throughput fit"
    if capacity.model.ceiling is None and capacity.model.rms_log_error > MISFIT:
        return f"step times scatter by {number(100 * capacity.model.rms_log_error, 2)} % and show no trend"
    if capacity.model.ceiling is None:
        return "step times do not rise with the batch: no ceiling is in sight"
    if capacity.model.half_batch is None:
        return f"step time {grows(capacity.model.rms_log_error)} the batch from the smallest timed on"
    return "it needs the critical batch, which is not known"


def _capacity_notes(capacity: Capacity | None) -> list[Note]:
    notes = []
    if capacity is None or capacity.saturation_batch is None:
        fit = capacity.model if capacity is not None else None
        own = (note.text for note in (fit.notes if fit is not None else ()) if note.figure == "saturation_batch")
        notes.append(Note("verdict.saturation_batch", next(own, _unknown(capacity))))
    if capacity is not None and capacity.model is not None and capacity.model.rms_log_error > MISFIT:
        error = number(100 * capacity.model.rms_log_error, 2)
        text = f"the throughput model misses the measured step times by {error} % (rms): read the batches' own rows too"
        notes.append(Note("verdict.saturation_batch", text))
    return notes
