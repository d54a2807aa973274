"""The batch to use: the least modelled time to the loss, within what fits, and checked against measured step times."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pybatch.answer.critical import Critical
from pybatch.answer.time_model import DISTURBED, Inputs, TimeModel
from pybatch.records import BatchPoint, Capacity, Distributed, Evidence, Reason, StepsFit, ThroughputFit

# A batch measured 3 % faster to the loss, beyond the error of both times, overrules the model. Of 1.1, 1.05, 1.03 and 1
# this had the least regret at which advice moved as little from draw to draw as at 1.1 (bench/planted_regret.py).
NOTICEABLE = 1.03
MULTIPLE = 8  # a batch bounded by memory is rounded down to a multiple of this, which suits every device


@dataclass(frozen=True)
class Bound:
    """The largest batch that can be used, and what sets it."""

    value: float
    name: str | None  # "memory", "the data set"; None: unbounded


@dataclass(frozen=True)
class Best:
    """The batch to use, and the interval of the optimum it was rounded from."""

    batch: int
    optimum: float
    low: int  # 95 % interval of the optimum, in whole examples
    high: int | None  # None: open
    extrapolated: bool  # past the largest batch timed
    model: TimeModel
    reason: Reason


def best_of(critical: Critical, capacity: Capacity, distributed: Distributed | None) -> Best:
    """B*, within memory and data, rounded to a batch people use, and checked against the measured step times."""
    fit, value, bound = capacity.model, critical.value, bound_of(capacity)
    assert fit is not None  # the caller has looked
    assert value is not None
    assert fit.half_batch is not None
    model = model_of(fit, value, capacity, distributed, critical.shape)
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
    fit, optimum, most = model.fit, float(model.optimum()), bound_of(capacity).value
    assert fit.half_batch is not None
    ends = []
    for sign, end, half in ((-1, critical.low, fit.half_low), (1, critical.high, fit.half_high)):
        noise = math.inf
        if end is not None:
            noise = math.log(float(model_of(fit, end, capacity, shape=model.shape).optimum()) / optimum)
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


def model_of(
    fit: ThroughputFit,
    critical: float,
    capacity: Capacity,
    distributed: Distributed | None = None,
    shape: StepsFit | None = None,
) -> TimeModel:
    memory, data = _bounds(capacity)
    return TimeModel(fit, critical, memory.value, data.value, distributed.fit if distributed else None, shape)


def bound_of(capacity: Capacity) -> Bound:
    return min(_bounds(capacity), key=lambda bound: bound.value)


def _bounds(capacity: Capacity) -> tuple[Bound, Bound]:
    """The largest batch on one device, and the largest at all."""
    examples = capacity.workload.examples if capacity.workload else None
    memory = Bound(float(capacity.max_batch), "memory") if capacity.max_batch is not None else Bound(math.inf, None)
    data = Bound(float(examples), "the data set") if examples is not None else Bound(math.inf, None)
    return memory, data
