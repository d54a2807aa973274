"""Critical batch against capacity: the batch to use, what going further costs, how many devices are worth it.

Pure: records in, Verdict out. Time to a loss is T(B) = S(B) t(B), with S(B) = S_min (1 + B_c / B) optimizer steps
(McCandlish et al. 2018, eq. 2.11) and t(B) seconds per step. For t = alpha + beta B it is least at
B* = sqrt(B_c alpha / beta), the geometric mean of critical batch and half batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pybatch.numerals import count, number
from pybatch.records import (
    Capacity,
    Convergence,
    Curve,
    Evidence,
    Limit,
    NoiseScale,
    Note,
    Reason,
    ThroughputFit,
    Verdict,
)

EFFICIENCY = 0.8  # parallel efficiency below which a further device is not called worth it
MAX_DEVICES = 65_536  # the search for devices ends here
NOTICEABLE = 1.1  # a batch measured 10 % faster to the loss overrules the model: above the drift between two runs
MISFIT = 0.1  # rms of ln(measured / fitted) from which the throughput model's error is worth telling
DISTURBED = 0.3  # rms from which no advice stands on it: caches and tiles bend curves by less

Inputs = dict[str, float | str | None]


@dataclass(frozen=True)
class TimeModel:
    """Modelled time to a loss: steps 1 + critical / B times t(B / K) on K devices, communication not counted."""

    fit: ThroughputFit
    critical: float
    most: float = math.inf  # largest batch on one device

    def optimum(self, devices: Any = 1.0) -> Any:
        """Global batch of least time: sqrt(B_c K alpha / beta), not below the floor's knee, within memory, >= 1."""
        fit = self.fit
        knee = (fit.t0_s - fit.alpha_s) / fit.beta_s if fit.model == "floor" else 0.0
        free = np.maximum(np.sqrt(self.critical * devices * fit.alpha_s / fit.beta_s), devices * knee)
        return np.maximum(np.minimum(free, devices * self.most), 1.0)

    def time(self, batch: Any, devices: Any = 1.0) -> Any:
        """Time to the loss at this global batch, in seconds per S_min: only ratios mean something."""
        floor = self.fit.t0_s if self.fit.model == "floor" else 0.0
        step = np.maximum(self.fit.alpha_s + self.fit.beta_s * batch / devices, floor)
        return (1 + self.critical / batch) * step

    def useful_devices(self) -> int:
        """Most devices K with T(1) / (K T(K)) >= EFFICIENCY all the way up to K, each K at its own best batch."""
        k = np.arange(1.0, MAX_DEVICES + 1)
        time = self.time(self.optimum(k), k)
        poor = np.flatnonzero(time[0] / (k * time) < EFFICIENCY)
        return int(poor[0]) if len(poor) else MAX_DEVICES


@dataclass(frozen=True)
class _Critical:
    """The critical batch with the evidence it stands on."""

    value: float | None
    low: float | None
    high: float | None
    source: str | None
    reason: Reason
    curve: Curve | None = None  # steps to target, where they were measured


@dataclass(frozen=True)
class _Wall:
    """What one device can take: its saturation batch, or the largest batch that fits where that is smaller."""

    name: str
    value: float
    low: float
    high: float
    extrapolated: bool = False  # past the largest batch measured


@dataclass(frozen=True)
class _Best:
    batch: int
    low: int
    high: int
    model: TimeModel
    reason: Reason


def compare(capacity: Capacity | None, noise: NoiseScale | None = None, steps: Convergence | None = None) -> Verdict:
    """What batch to use, why, and what going further costs.

    Args:
        capacity: throughput against batch size on one device.
        noise: the gradient noise scale, taken for the critical batch where `steps` is None.
        steps: measured steps to target; its fitted critical batch goes before the noise scale.

    Any of them may be None or unresolved: what then cannot be said is None, and the text and the notes say why.
    """
    critical = _from_steps(steps) or _from_noise(noise)
    fit = capacity.model if capacity is not None else None
    wall = _wall(capacity)
    limit, why = _limit(critical, wall)
    best = (
        _best(critical, capacity) if critical.value is not None and capacity is not None and fit is not None else None
    )
    reasons, notes = [critical.reason], list(_capacity_notes(capacity))
    if capacity is not None and capacity.saturation_batch is not None:
        reasons.append(_saturation_reason(capacity))

    low = high = devices = None
    if best is not None:
        low, high, devices = best.low, best.high, best.model.useful_devices()
        reasons += [best.reason, _devices_reason(best.model, devices)]
    elif critical.low is not None and capacity is not None and fit is not None:
        low = max(1, math.floor(_model(fit, critical.low, capacity).optimum()))
        text = "sqrt(critical batch x half batch) at the lower bound of the critical batch: use at least this"
        inputs: Inputs = {"critical_low": critical.low, "half_batch": fit.half_batch}
        reasons.append(Reason("best_low", text, "modelled", inputs))
    further = _further(best, wall)
    reasons.append(Reason("limit", why, "modelled", further | ({wall.name: wall.value} if wall else {})))
    seconds, seconds_reason = _time_to_target(critical.curve, best, capacity)
    reasons += [seconds_reason] if seconds_reason else []

    absent = _unknown(capacity)
    for name, value in (("critical_batch", critical.value), ("best_batch", best), ("useful_devices", devices)):
        if value is None:
            notes.append(Note(f"verdict.{name}", critical.reason.text if name == "critical_batch" else absent))
    if seconds is None:
        notes.append(Note("verdict.time_to_target", "steps to a target were not measured, only what a step takes"))
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
        text=_text(critical, capacity, wall, limit, best, low, devices, further),
        reasons=tuple(reasons),
        notes=tuple(notes),
    )


def _from_steps(steps: Convergence | None) -> _Critical | None:
    """The critical batch of the best-tuned curve that has one, on the training loss if there is a choice."""
    fitted = [c for c in steps.curves if c.critical_batch is not None] if steps else []
    if not fitted:
        return None
    curve = min(fitted, key=lambda c: (c.rule != "tuned", c.split != "train"))
    text = f"fitted to measured steps to the {curve.split} loss target, learning-rate rule {curve.rule!r}"
    inputs: Inputs = {"target": curve.target, "s_min": curve.s_min, "points": len(curve.points)}
    reason = Reason("critical_batch", text, "measured", inputs)
    return _Critical(curve.critical_batch, curve.low, curve.high, "sweep", reason, curve)


def _from_noise(noise: NoiseScale | None) -> _Critical:
    if noise is None:
        reason = Reason("critical_batch", "neither the noise scale nor steps to a target were measured", "measured")
        return _Critical(None, None, None, None, reason)
    inputs: Inputs = {
        "grad_sq": noise.grad_sq,
        "trace": noise.trace,
        "pairs": noise.steps,
        "warmup_steps": noise.warmup_steps,
    }
    if noise.status == "resolved" and noise.b_simple is not None:
        # The identification is the model; across McCandlish's tasks the ratio of the two runs from 0.05 to 8.
        text = (
            "the gradient noise scale tr(Sigma) / |G|^2, taken for the critical batch: right within a factor of several"
        )
        return _Critical(
            noise.b_simple, noise.low, noise.high, "noise", Reason("critical_batch", text, "modelled", inputs)
        )
    why = next((n.text for n in noise.notes if n.figure == "noise.b_simple"), "the noise scale is not resolved")
    reason = Reason("critical_batch", why, "measured", inputs)
    bound = noise.low if noise.status == "lower_bound" else None
    return _Critical(None, bound, None, "noise" if bound is not None else None, reason)


def _wall(capacity: Capacity | None) -> _Wall | None:
    if capacity is None or capacity.model is None:
        return None
    fit, most = capacity.model, capacity.max_batch
    if most is not None and most < fit.saturation_low:
        return _Wall("largest batch that fits", most, most, most)
    largest = max((p.batch for p in capacity.batches if p.status == "ok"), default=math.inf)
    beyond = fit.saturation_batch > largest
    return _Wall("saturation batch", fit.saturation_batch, fit.saturation_low, fit.saturation_high, beyond)


def _limit(critical: _Critical, wall: _Wall | None) -> tuple[Limit, str]:
    """Which of the two is smaller beyond the error of both."""
    if wall is None:
        return "unresolved", "the throughput of this device has no fit to compare with"
    low = critical.low if critical.low is not None else critical.value
    high = critical.high if critical.high is not None else critical.value
    if low is not None and low > wall.high:
        return "hardware", f"the critical batch lies above the {wall.name} beyond the error of both"
    if critical.value is None or low is None or high is None:
        return "unresolved", f"the critical batch is not known well enough to compare it with the {wall.name}"
    if high < wall.low:
        return "noise", f"the critical batch lies below the {wall.name} beyond the error of both"
    return "balanced", f"the critical batch and the {wall.name} agree within their errors"


def _model(fit: ThroughputFit, critical: float, capacity: Capacity) -> TimeModel:
    return TimeModel(fit, critical, _most(capacity)[0])


def _most(capacity: Capacity) -> tuple[float, str]:
    """The largest sensible batch on one device, and what sets it."""
    examples = capacity.workload.examples if capacity.workload else None
    bounds = [(capacity.max_batch, "memory"), (examples, "the data set's size")]
    return min(((float(b), name) for b, name in bounds if b is not None), default=(math.inf, "nothing"))


def _best(critical: _Critical, capacity: Capacity) -> _Best:
    """B*, within memory and data, rounded to a batch people use, and checked against the measured step times."""
    fit, value = capacity.model, critical.value
    assert fit is not None  # the caller has looked
    assert value is not None
    model = _model(fit, value, capacity)
    optimum = float(model.optimum())
    most, bound = _most(capacity)
    measured = {p.batch: p.step_ms for p in capacity.batches if p.status == "ok" and p.step_ms and p.batch <= most}
    near = [b for b in measured if 1 / math.sqrt(2) <= b / optimum <= math.sqrt(2)]
    if near:
        batch, rounding = min(near, key=lambda b: abs(math.log(b / optimum))), "nearest measured batch"
    else:
        batch, rounding = 2 ** round(math.log2(optimum)), "nearest power of two"
        batch = batch if batch <= most else 2 ** math.floor(math.log2(most))
    text = f"sqrt(critical batch x half batch), rounded to the {rounding}"
    evidence: Evidence = "modelled"
    if optimum >= most:
        text = f"bounded by {bound}, below sqrt(critical batch x half batch); rounded to the {rounding}"
    inputs: Inputs = {"optimum": optimum, "critical_batch": value, "half_batch": fit.half_batch}
    time = {b: (1 + value / b) * ms for b, ms in measured.items()}
    if batch in time:
        fastest = min(time, key=lambda b: time[b])
        inputs |= {"measured_time_over_least": time[batch] / time[fastest], "fastest_measured": fastest}
        if time[batch] > NOTICEABLE * time[fastest]:
            batch, evidence = fastest, "measured"
            text = "least modelled steps times measured step time; the throughput model misses the measured times here"
    ends = [
        float(_model(fit, c if c is not None else value, capacity).optimum()) for c in (critical.low, critical.high)
    ]
    # Errors of critical and half batch are independent: in logarithms B* carries half of each, added in quadrature.
    for side, half in enumerate((fit.half_low, fit.half_high)):
        apart = math.hypot(math.log(ends[side] / optimum), 0.5 * math.log(half / fit.half_batch))
        ends[side] = min(optimum * math.exp(apart if side else -apart), most)
    low, high = max(1, math.floor(min(ends[0], batch))), math.ceil(max(ends[1], batch))
    inputs |= {"optimum_low": ends[0], "optimum_high": ends[1]}
    return _Best(batch, low, high, model, Reason("best_batch", text, evidence, inputs))


def _further(best: _Best | None, wall: _Wall | None) -> Inputs:
    """What going from the best batch to what the device can take costs, as factors; empty where it is no further."""
    if best is None or wall is None or not NOTICEABLE * best.batch <= wall.value <= best.model.most:
        return {}
    model, to = best.model, wall.value
    return {
        "examples_factor": (to + model.critical) / (best.batch + model.critical),
        "time_factor": float(model.time(to) / model.time(best.batch)),
        "throughput_factor": (to / model.fit.step_s(to)) / (best.batch / model.fit.step_s(best.batch)),
    }


def _time_to_target(
    curve: Curve | None, best: _Best | None, capacity: Capacity | None
) -> tuple[float | None, Reason | None]:
    if curve is None or curve.s_min is None or best is None or capacity is None:
        return None, None
    steps = curve.s_min * (1 + best.model.critical / best.batch)
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
    text = (
        f"most devices with a parallel efficiency of at least {EFFICIENCY:g}, each number at its own best batch; "
        "an upper bound, as communication is not counted"
    )
    inputs: Inputs = {"efficiency": EFFICIENCY, "batch": float(model.optimum(float(devices)))}
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


def _text(
    critical: _Critical,
    capacity: Capacity | None,
    wall: _Wall | None,
    limit: Limit,
    best: _Best | None,
    low: int | None,
    devices: int | None,
    further: Inputs,
) -> str:
    """Two to five sentences a practitioner can act on; every number in them is a field's or a reason's."""
    fit = capacity.model if capacity else None
    if best is not None and wall is not None:
        return _distrust(fit) + " ".join(_advice(critical, wall, limit, best, devices, further))
    known = _said(critical)
    if wall is None:
        lack = "Capacity was not measured" if capacity is None else "Too few batch sizes were timed"
        if critical.value is None and critical.low is None:
            return f"{lack}, and the critical batch is not known ({critical.reason.text}): no batch can be advised."
        return (
            f"The critical batch is {known}: far below it more examples per step save almost as many steps, far "
            f"above it almost none. {lack}, so what batch this device wants is not known."
        )
    assert fit is not None  # there is a wall
    device = (
        f"The device reaches half its ceiling at batch {count(math.ceil(fit.half_batch))} and its {wall.name} is "
        f"{_size(wall.value)}"
    )
    if low is not None:
        above = ", above what the device can use" if limit == "hardware" else ""
        advice = f"Use batch {count(low)} or larger: the critical batch is {known}{above}."
        return f"{_distrust(fit)}{advice} {device}. {_more(critical)}"
    return _distrust(fit) + (
        f"No batch can be advised yet: {critical.reason.text}. {device}; below the former it is poorly used, "
        f"past the latter it gains next to nothing. {_more(critical)}"
    )


def _distrust(fit: ThroughputFit | None) -> str:
    """A sentence to go first where the throughput fit misses so much that nothing can stand on it."""
    if fit is None or fit.rms_log_error <= DISTURBED:
        return ""
    return (
        f"Measure again before trusting this: step times miss any smooth curve by {number(100 * fit.rms_log_error, 2)} "
        "%, as on a machine busy with something else. "
    )


def _advice(
    critical: _Critical,
    wall: _Wall,
    limit: Limit,
    best: _Best,
    devices: int | None,
    further: Inputs,
) -> list[str]:
    size = _size(wall.value)
    two = f"the critical batch is {_said(critical)}, the {wall.name} {size}{' by extrapolation' * wall.extrapolated}"
    because = {
        "noise": f"Gradient noise sets the limit, not the device: {two}.",
        "hardware": f"The device sets the limit, not gradient noise: {two}.",
        "balanced": f"Gradient noise and device are balanced: {two}, and their errors overlap.",
        "unresolved": f"Which of the two sets the limit is not known: {two}.",
    }
    said = [
        f"Use batch {count(best.batch)} (95 % interval {count(best.low)} to {count(best.high)}).",
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
        said.append(f"{worth}, modelled without communication.")
    if critical.source == "noise":
        said.append(_trial(best.batch))
    return said


def _said(critical: _Critical) -> str:
    """The critical batch in words, with its interval and its source."""
    source = "fitted to steps" if critical.source == "sweep" else "from gradient noise"
    if critical.value is None:
        return f"at least {_size(critical.low)} ({source})"
    if critical.low is None or critical.high is None:
        return f"{_size(critical.value)} ({source})"
    return f"{_size(critical.value)} ({_size(critical.low)} to {_size(critical.high)}, {source})"


def _size(batch: float | None) -> str:
    """A modelled batch size: three digits at most, whole from 10 on."""
    if batch is None or batch < 9.95:
        return number(batch, 2)
    return count(batch) if batch < 99.5 else number(batch)


def _times(factor: float | str | None) -> str:
    return f"{number(float(factor or 0.0), 2)} times"


def _trial(batch: int) -> str:
    return (
        "Gradient noise predicts the critical batch within a factor of several only: before a long run, train briefly "
        f"at half and at double batch {count(batch)} as well."
    )


def _more(critical: _Critical) -> str:
    if critical.source is None and not critical.reason.inputs:
        return "Measure the noise scale as well."
    return "A longer --time-budget narrows the noise scale."
