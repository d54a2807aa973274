"""Critical batch against capacity: the batch to use, what going further costs, how many devices are worth it.

Pure: records in, Verdict out. `critical` weighs the evidence, `time_model` has the time to a loss, `best` chooses the
batch, `limit` says which side is smaller, `frontier` what more devices buy, and `sentences` has the words.
"""

from __future__ import annotations

import math

from pybatch.answer.best import Best, best_of, bound_of, model_of
from pybatch.answer.critical import critical_of, passed_over
from pybatch.answer.frontier import doubling, frontier
from pybatch.answer.limit import further_on, limit_of, wall_of
from pybatch.answer.sentences import in_sentences
from pybatch.answer.time_model import EFFICIENCY, Inputs, TimeModel
from pybatch.base.numerals import number
from pybatch.records import (
    Capacity,
    Convergence,
    Curve,
    Distributed,
    FrontierPoint,
    NoiseScale,
    Note,
    Reason,
    ThroughputFit,
    Verdict,
)

MISFIT = 0.1  # rms of ln(measured / fitted) from which the throughput model's error is worth telling


def advise(
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
    wall = wall_of(capacity)
    limit, why = limit_of(critical, wall)
    best = (
        best_of(critical, capacity, distributed)
        if critical.value is not None and capacity is not None and fit is not None and fit.half_batch is not None
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
    elif capacity is not None and fit is not None and fit.half_batch is None:
        low, high, reason = _open(capacity, fit)
        reasons.append(reason)
    elif capacity is not None and fit is not None:
        law = "sqrt(critical batch x half batch) at the"
        if critical.low is not None:
            low = max(1, math.floor(model_of(fit, critical.low, capacity).optimum()))
            most = bound_of(capacity)
            bound = most if low + 1 > most.value else None
            text = f"{law} lower bound of the critical batch: use at least this"
            inputs: Inputs = {"critical_low": critical.low, "half_batch": fit.half_batch}
            reasons.append(Reason("best_low", text, "modelled", inputs))
        if critical.high is not None:
            high = math.ceil(model_of(fit, critical.high, capacity).optimum())
            text = f"{law} upper bound of the critical batch: use at most this"
            inputs = {"critical_high": critical.high, "half_batch": fit.half_batch}
            reasons.append(Reason("best_high", text, "modelled", inputs))
    further = further_on(best, wall)
    reasons.append(Reason("limit", why, "modelled", further | ({wall.name: wall.value} if wall else {})))
    seconds, seconds_reason = _time_to_target(critical.curve, best, capacity)
    reasons += [seconds_reason] if seconds_reason else []

    notes += passed_over(steps, critical.source)
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
        text=in_sentences(critical, capacity, wall, limit, best, (low, high), bound, devices, further),
        reasons=tuple(reasons),
        notes=tuple(notes),
        frontier=points,
    )


def _open(capacity: Capacity, fit: ThroughputFit) -> tuple[int | None, int | None, Reason]:
    """The least, or the largest, batch worth using where step times show no half batch, and why."""
    timed = [p.batch for p in capacity.batches if p.status == "ok"]
    if fit.ceiling is not None:
        text = "step time is proportional to the batch: no batch takes less time than the smallest timed"
        most = min(timed)
        return None, most, Reason("best_high", text, "measured", {"smallest_measured": most})
    text = "step times do not rise with the batch: none takes less time than the largest timed, within what fits"
    least = int(min(max(timed), bound_of(capacity).value))
    return least, None, Reason("best_low", text, "measured", {"largest_measured": max(timed)})


def time_model(
    capacity: Capacity, noise: NoiseScale | None, steps: Convergence | None, distributed: Distributed | None = None
) -> TimeModel | None:
    """The model of time to the loss that `advise` weighs; None where a side of it is not known."""
    critical = critical_of(noise, steps)
    if critical.value is None or capacity.model is None or capacity.model.half_batch is None:
        return None
    return model_of(capacity.model, critical.value, capacity, distributed, critical.shape)


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
    if capacity.model.ceiling is None:
        return "step times do not rise with the batch: no ceiling is in sight"
    if capacity.model.half_batch is None:
        return "step time is proportional to the batch from the smallest timed on"
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
