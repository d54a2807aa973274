"""Critical batch against capacity: the batch to use, what going further costs, how many devices are worth it.

Pure: records in, Verdict out. `tradeoff` has the model, `advice` the words.
"""

from __future__ import annotations

import math

from pybatch.advice import advise
from pybatch.frontier import doubling, frontier
from pybatch.numerals import number
from pybatch.records import (
    BatchPoint,
    Capacity,
    Convergence,
    Curve,
    Distributed,
    Evidence,
    FrontierPoint,
    Limit,
    NoiseScale,
    Note,
    Reason,
    StepsFit,
    ThroughputFit,
    Verdict,
)
from pybatch.scaling import SEARCHED
from pybatch.tradeoff import DISTURBED, EFFICIENCY, Best, Bound, Critical, Inputs, TimeModel, Wall, shaped

NOTICEABLE = 1.1  # a batch surely measured 10 % faster to the loss overrules the model: above the drift between runs
MULTIPLE = 8  # a batch bounded by memory is rounded down to a multiple of this, which suits every device
MISFIT = 0.1  # rms of ln(measured / fitted) from which the throughput model's error is worth telling


def compare(
    capacity: Capacity | None,
    noise: NoiseScale | None = None,
    steps: Convergence | None = None,
    distributed: Distributed | None = None,
) -> Verdict:
    """What batch to use, why, and what going further costs.

    Args:
        capacity: throughput against batch size on one device.
        noise: the gradient noise scale, taken for the critical batch where `steps` says nothing of it.
        steps: measured steps to target, or branches; a critical batch fitted to them, or a bound of it, goes before
            the noise scale.
        distributed: steps on several devices; without it, communication is not counted.

    Any of them may be None or unresolved: what then cannot be said is None, and the text and the notes say why.
    """
    critical = critical_of(noise, steps)
    fit = capacity.model if capacity is not None else None
    wall = _wall(capacity)
    limit, why = _limit(critical, wall)
    best = (
        _best(critical, capacity, distributed)
        if critical.value is not None and capacity is not None and fit is not None
        else None
    )
    reasons, notes = [critical.reason], list(_capacity_notes(capacity))
    if capacity is not None and capacity.saturation_batch is not None:
        reasons.append(_saturation_reason(capacity))

    low = high = devices = bound = None
    points: tuple[FrontierPoint, ...] = ()
    if best is not None:
        low, high, devices = best.low, best.high, best.model.useful_devices()
        reasons += [best.reason, _devices_reason(best.model, devices)]
        assert capacity is not None  # there is a best batch
        points = frontier(best.model, devices, capacity.batches)
        if twice := doubling(best, capacity.batches):
            text = f"{best.model.law} times the modelled step time, at twice the best batch and at it"
            reasons.append(Reason("doubling", text, "modelled", twice))
    elif capacity is not None and fit is not None:
        law = "sqrt(critical batch x half batch) at the"
        if critical.low is not None:
            low = max(1, math.floor(_model(fit, critical.low, capacity).optimum()))
            most = _bound(capacity)
            bound = most if low + 1 > most.value else None
            text = f"{law} lower bound of the critical batch: use at least this"
            inputs: Inputs = {"critical_low": critical.low, "half_batch": fit.half_batch}
            reasons.append(Reason("best_low", text, "modelled", inputs))
        if critical.high is not None:
            high = math.ceil(_model(fit, critical.high, capacity).optimum())
            text = f"{law} upper bound of the critical batch: use at most this"
            inputs = {"critical_high": critical.high, "half_batch": fit.half_batch}
            reasons.append(Reason("best_high", text, "modelled", inputs))
    further = _further(best, wall)
    reasons.append(Reason("limit", why, "modelled", further | ({wall.name: wall.value} if wall else {})))
    seconds, seconds_reason = _time_to_target(critical.curve, best, capacity)
    reasons += [seconds_reason] if seconds_reason else []

    absent = _unknown(capacity)
    for name, value in (("critical_batch", critical.value), ("best_batch", best), ("useful_devices", devices)):
        if value is None:
            notes.append(Note(f"verdict.{name}", critical.reason.text if name == "critical_batch" else absent))
    if seconds is None:
        lack = absent if critical.curve else "steps to a target were not measured, only what a step takes"
        notes.append(Note("verdict.time_to_target", lack))
    return Verdict(
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
        text=advise(critical, capacity, wall, limit, best, (low, high), bound, devices, further),
        reasons=tuple(reasons),
        notes=tuple(notes),
        frontier=points,
    )


def critical_of(noise: NoiseScale | None, steps: Convergence | None) -> Critical:
    """The critical batch by the best evidence there is: a sweep, then branches, then the noise scale.

    A bound that was measured goes before a value that is modelled.
    """
    return _from_steps(steps) or _from_branches(steps) or _from_noise(noise)


def time_model(
    capacity: Capacity, noise: NoiseScale | None, steps: Convergence | None, distributed: Distributed | None = None
) -> TimeModel | None:
    """The model of time to the loss that `compare` weighs; None where a side of it is not known."""
    critical = critical_of(noise, steps)
    if critical.value is None or capacity.model is None:
        return None
    return _model(capacity.model, critical.value, capacity, distributed, critical.shape)


def _from_steps(steps: Convergence | None) -> Critical | None:
    """The critical batch of the best-tuned curve that has one, on the training loss if there is a choice.

    Where no tuned curve bends within the batches tested, the bound that this gives: it says more of the problem than
    the value of a rule whose rate fails at large batches.
    """
    curves = steps.curves if steps else ()
    known = [c for c in curves if not (c.critical_batch is None and c.low is None and c.high is None)]
    if not known:
        return None
    curve = min(known, key=lambda c: (c.rule != SEARCHED, c.critical_batch is None, c.split != "train"))
    what = f"measured steps to the {curve.split} loss target, learning-rate rule {curve.rule!r}"
    text = f"fitted to {what}"
    if curve.critical_batch is None:
        text = f"{what}, show no bend between the smallest and the largest batch tested, which bounds it"
    inputs: Inputs = {"target": curve.target, "s_min": curve.s_min, "points": len(curve.points)}
    if curve.fit is not None:
        inputs["model"] = curve.fit.model
    reason = Reason("critical_batch", text, "measured", inputs)
    return Critical(curve.critical_batch, curve.low, curve.high, "sweep", reason, curve, shaped(curve.fit))


def _from_branches(steps: Convergence | None) -> Critical | None:
    """The critical batch at the last checkpoint that has one: it grows along training, and most of a run lies there."""
    known = [b for b in steps.branches if b.fit and (b.fit.critical_batch or b.fit.low or b.fit.high)] if steps else []
    if not known:
        return None
    last = known[-1]
    assert last.fit is not None
    text = f"fitted to the steps that branches from step {last.step} take to a common loss"
    inputs: Inputs = {"step": last.step, "level": last.level, "window": last.window, "points": len(last.points)}
    reason = Reason("critical_batch", text, "measured", inputs)
    fit = last.fit
    return Critical(fit.critical_batch, fit.low, fit.high, "branch", reason, shape=shaped(fit))


def _from_noise(noise: NoiseScale | None) -> Critical:
    if noise is None:
        reason = Reason("critical_batch", "neither the noise scale nor steps to a target were measured", "measured")
        return Critical(None, None, None, None, reason)
    inputs: Inputs = {
        "grad_sq": noise.grad_sq,
        "trace": noise.trace,
        "pairs": noise.steps,
        "warmup_steps": noise.warmup_steps,
    }
    if noise.unit is not None:
        text = f"the noise scale is in {noise.unit}, batch sizes are not. Give noise.in_examples(mean per example)"
        return Critical(None, None, None, None, Reason("critical_batch", text, "measured", inputs))
    if noise.counted is not None:
        inputs[f"{noise.counted.unit} per example"] = noise.counted.per_example
    if noise.status == "resolved" and noise.b_simple is not None:
        # The identification is the model; across McCandlish's tasks the ratio of the two runs from 0.05 to 8.
        text = (
            "the gradient noise scale tr(Sigma) / |G|^2, taken for the critical batch; on published tasks the two "
            "differed by up to 20 times"
        )
        return Critical(
            noise.b_simple, noise.low, noise.high, "noise", Reason("critical_batch", text, "modelled", inputs)
        )
    why = next((n.text for n in noise.notes if n.figure == "noise.b_simple"), "the noise scale is not resolved")
    reason = Reason("critical_batch", why, "measured", inputs)
    bound = noise.low if noise.status == "lower_bound" else None
    return Critical(None, bound, None, "noise" if bound is not None else None, reason)


def _wall(capacity: Capacity | None) -> Wall | None:
    if capacity is None or capacity.model is None:
        return None
    fit, most = capacity.model, capacity.max_batch
    if most is not None and most < fit.saturation_low:
        return Wall("largest batch that fits", most, most, most)
    largest = max((p.batch for p in capacity.batches if p.status == "ok"), default=math.inf)
    beyond = fit.saturation_batch > largest
    high = fit.saturation_high if fit.saturation_high is not None else math.inf
    return Wall("saturation batch", fit.saturation_batch, fit.saturation_low, high, beyond)


def _limit(critical: Critical, wall: Wall | None) -> tuple[Limit, str]:
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


def _model(
    fit: ThroughputFit,
    critical: float,
    capacity: Capacity,
    distributed: Distributed | None = None,
    shape: StepsFit | None = None,
) -> TimeModel:
    memory, data = _bounds(capacity)
    return TimeModel(fit, critical, memory.value, data.value, distributed.fit if distributed else None, shape)


def _bounds(capacity: Capacity) -> tuple[Bound, Bound]:
    """The largest batch on one device, and the largest at all."""
    examples = capacity.workload.examples if capacity.workload else None
    memory = Bound(float(capacity.max_batch), "memory") if capacity.max_batch is not None else Bound(math.inf, None)
    data = Bound(float(examples), "the data set") if examples is not None else Bound(math.inf, None)
    return memory, data


def _bound(capacity: Capacity) -> Bound:
    return min(_bounds(capacity), key=lambda bound: bound.value)


def _best(critical: Critical, capacity: Capacity, distributed: Distributed | None) -> Best:
    """B*, within memory and data, rounded to a batch people use, and checked against the measured step times."""
    fit, value, bound = capacity.model, critical.value, _bound(capacity)
    assert fit is not None  # the caller has looked
    assert value is not None
    model = _model(fit, value, capacity, distributed, critical.shape)
    optimum = float(model.optimum())
    measured = [p for p in capacity.batches if p.status == "ok" and p.step_ms and p.batch <= bound.value]
    largest = max((p.batch for p in capacity.batches if p.status == "ok"), default=None)
    at_knee = optimum == model.knee and optimum < bound.value
    law = "sqrt(critical batch x half batch)" if model.shape is None else f"the least time with {model.law}"
    if at_knee:
        law = "the end of the floor in step time, below which batches take the same time"
    near = [p.batch for p in measured if 1 / math.sqrt(2) <= p.batch / optimum <= math.sqrt(2)]
    if optimum >= bound.value:
        whole = int(bound.value)
        batch = whole - whole % MULTIPLE if bound.name == "memory" and whole > MULTIPLE else whole
        text = f"bounded by {bound.name}, below {law}"
    elif near:
        batch = min(near, key=lambda b: abs(math.log(b / optimum)))
        text = f"{law}, rounded to the nearest measured batch"
    else:
        batch = 2 ** round(math.log2(optimum))
        batch = batch if batch <= bound.value else 2 ** math.floor(math.log2(bound.value))
        text = f"{law}, rounded to the nearest power of two"
    inputs: Inputs = {"optimum": optimum, "critical_batch": value, "half_batch": fit.half_batch}
    inputs["largest_measured"] = largest
    evidence: Evidence = "modelled"
    faster = _surely_faster(batch, model, measured) if fit.rms_log_error <= DISTURBED else None
    if faster is not None:
        inputs["modelled_batch"] = batch
        batch, evidence = faster, "measured"
        text = "least modelled steps times measured step time; the throughput model misses the measured times here"
    low, high = _interval(critical, capacity, model, at_knee)
    inputs |= {"optimum_low": low, "optimum_high": high if math.isfinite(high) else None}
    reason = Reason("best_batch", text, evidence, inputs)
    upper = math.ceil(high) if math.isfinite(high) else None
    return Best(batch, optimum, max(1, math.floor(low)), upper, batch > (largest or 0), model, reason)


def _interval(critical: Critical, capacity: Capacity, model: TimeModel, at_knee: bool) -> tuple[float, float]:
    """95 % interval of the optimum.

    Errors of critical and half batch are independent: in logarithms B* carries half of each, added in quadrature. At
    a floor's knee the half batch is half the knee, whose error the optimum carries whole. An open end of either opens
    the optimum's.
    """
    fit, optimum, most = model.fit, float(model.optimum()), _bound(capacity).value
    ends = []
    for sign, end, half in ((-1, critical.low, fit.half_low), (1, critical.high, fit.half_high)):
        noise = math.inf
        if end is not None:
            noise = math.log(float(_model(fit, end, capacity, shape=model.shape).optimum()) / optimum)
        open_end = half is None or half == 0.0
        device = math.inf if open_end else (1.0 if at_knee else 0.5) * math.log((half or 0.0) / fit.half_batch)
        ends.append(min(optimum * math.exp(sign * math.hypot(noise, device)), most))
    return ends[0], ends[1]


def _surely_faster(batch: int, model: TimeModel, measured: list[BatchPoint]) -> int | None:
    """A measured batch that reaches the loss NOTICEABLE sooner than this one, beyond the error of both times."""

    def time(p: BatchPoint, milliseconds: float | None) -> float:
        return float(model.steps(p.batch)) * milliseconds if milliseconds is not None else math.nan

    own = next((time(p, p.step_ms_low) for p in measured if p.batch == batch), math.nan)
    surely = {p.batch: time(p, p.step_ms_high) for p in measured}
    faster = {b: t for b, t in surely.items() if own > NOTICEABLE * t}
    return min(faster, key=lambda b: faster[b]) if faster else None


def _further(best: Best | None, wall: Wall | None) -> Inputs:
    """What going from the best batch to what the device can take costs, as factors; empty where it is no further."""
    if best is None or wall is None:
        return {}
    model, to = best.model, wall.value
    if not NOTICEABLE * best.batch <= to <= min(model.most, model.most_global):
        return {}
    if model.time(to) < model.time(best.batch):  # where measured times overruled the model, it can't tell the cost
        return {}
    return {
        "examples_factor": float(model.examples(to) / model.examples(best.batch)),
        "time_factor": float(model.time(to) / model.time(best.batch)),
        "throughput_factor": (to / model.fit.step_s(to)) / (best.batch / model.fit.step_s(best.batch)),
    }


def _time_to_target(
    curve: Curve | None, best: Best | None, capacity: Capacity | None
) -> tuple[float | None, Reason | None]:
    if curve is None or curve.s_min is None or best is None or capacity is None:
        return None, None
    steps = curve.s_min * float(best.model.steps(best.batch))
    timed = next((p.step_ms for p in capacity.batches if p.batch == best.batch and p.step_ms), None)
    step_s = timed / 1e3 if timed else best.model.fit.step_s(best.batch)
    text = f"fitted steps to the {curve.split} loss target times the {'measured' if timed else 'modelled'} step time"
    return steps * step_s, Reason("time_to_target", text, "modelled", {"steps": steps, "step_s": step_s})


def _saturation_reason(capacity: Capacity) -> Reason:
    fit = capacity.model
    largest = max((p.batch for p in capacity.batches if p.status == "ok"), default=None)
    text = "the batch from which on doubling it gains less than 5 % throughput, by the throughput fit"
    wall = _wall(capacity)
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


def _devices_reason(model: TimeModel, devices: int) -> Reason:
    counted = model.communication
    how = (
        "an upper bound, as communication is not counted"
        if counted is None
        else f"with communication as fitted to steps on up to {counted.devices} devices"
    )
    text = (
        f"most devices with a parallel efficiency of {EFFICIENCY:g} or better, each number at its own best batch; {how}"
    )
    inputs: Inputs = {"efficiency": EFFICIENCY, "batch": float(model.optimum(float(devices)))}
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
    return "it needs the critical batch, which is not known"


def _capacity_notes(capacity: Capacity | None) -> list[Note]:
    notes = []
    if capacity is None or capacity.saturation_batch is None:
        notes.append(Note("verdict.saturation_batch", _unknown(capacity)))
    if capacity is not None and capacity.model is not None and capacity.model.rms_log_error > MISFIT:
        error = number(100 * capacity.model.rms_log_error, 2)
        text = f"the throughput model misses the measured step times by {error} % (rms): read the batches' own rows too"
        notes.append(Note("verdict.saturation_batch", text))
    return notes
