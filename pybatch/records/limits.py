"""What a record that was read must be beyond its types: figures within their range, lists of one length.

A file may have been cut, changed by hand or written by another program. What is no possible measurement is refused
where it is read, so that whoever works with a record may divide by its step times and take logarithms of its batches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from pybatch.base.plain import said
from pybatch.records.capacity import QUANTILES, Anchor, BatchPoint
from pybatch.records.convergence import BranchPoint, Convergence, ConvergencePoint, Curve, RateSteps

# By the name of the field, in every record. All others are at least 0.
# fmt: off
_SIGNED = frozenset(
    (
        "loss", "losses", "level", "target", "trace", "grad_sq", "drift", "alpha_s", "candidates", "inputs",
        "options", "launch_overhead_ms", "other_losses", "steps_saved", "steps_saved_low", "steps_saved_high",
        "test_losses_at_epochs", "test_losses_at_steps",
        "train_losses_at_epochs", "train_losses_at_steps",
    )
)
_FROM_ONE = frozenset(
    (
        "accumulation", "base_batch", "base_steps", "batch", "best_batch", "cores", "devices", "examples",
        "global_batch", "kept_batch", "largest", "max_batch", "micro_batch", "reference_batch", "saturation_measured",
        "threads", "useful_devices", "wave", "window",
    )
)
_ABOVE_ZERO = frozenset(
    (
        "base_rate", "blocks_ms", "ceiling", "ceiling_high", "ceiling_low",
        "ceiling_samples_per_s", "compute_ms", "cost_factor", "end_ms", "gain", "gamma", "learning_rate",
        "one_worker_per_s", "per_example", "samples_per_s", "start_ms", "step_ms", "step_ms_high", "step_ms_low",
        "step_ms_quantiles", "time_factor", "tolerance", "with_step_ms",
    )
)
# fmt: on


def wrong(record: Any) -> str | None:
    """What is no possible value of a record, as ".step_ms is -1.0: it must be above 0"; None where all may be."""
    for field in dataclasses.fields(record):
        for where, value in _numbers(getattr(record, field.name)):
            if (must := _must(field.name, value, where)) is not None:
                return f".{field.name}{where} is {said(value)}: it must be {must}"
    check = _LENGTHS.get(type(record))
    return check(record) if check is not None else None


def _numbers(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a field and where in it they stand; records within it are looked at by themselves."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield where, value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _numbers(item, f"{where}[{i}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{where}.{key}")


def _must(name: str, value: float, where: str) -> str | None:
    if not math.isfinite(value):
        return "finite"
    if name in _SIGNED or where.startswith("."):  # a dict's values are of any kind
        return None
    if name in _FROM_ONE:
        return "at least 1" if value < 1 else None
    if name in _ABOVE_ZERO:
        return "above 0" if value <= 0 else None
    return "at least 0" if value < 0 else None


def _batch_point(point: BatchPoint) -> str | None:
    if point.block_rounds and len(point.block_rounds) != len(point.blocks_ms):
        return f".block_rounds has {len(point.block_rounds)} entries: it must have those of blocks_ms, or none"
    return _quantiles(point.step_ms_quantiles, "step_ms_quantiles") if point.step_ms_quantiles else None


def _quantiles(values: tuple[float, ...], name: str) -> str | None:
    if len(values) == len(QUANTILES):
        return None
    return f".{name} has {len(values)} entries: it must have {len(QUANTILES)}"


def _anchor(anchor: Anchor) -> str | None:
    return _quantiles(anchor.start_ms, "start_ms") or _quantiles(anchor.end_ms, "end_ms")


def _rate_steps(rate: RateSteps) -> str | None:
    if len(rate.steps) != len(rate.statuses):
        return f".steps has {len(rate.steps)} entries: it must have one for each of the {len(rate.statuses)} statuses"
    for i, (steps, status) in enumerate(zip(rate.steps, rate.statuses, strict=True)):
        if (steps is None) == (status == "reached"):
            return f".steps[{i}] is {said(steps)} with status {status}: it must be null where, and only where, none is"
    return None


def _convergence_point(point: ConvergencePoint) -> str | None:
    seeds = max([point.seeds, *(len(rate.steps) for rate in point.rates[:1])])  # those that did not run among them
    for i, rate in enumerate(point.rates):
        if len(rate.steps) != seeds:
            return f".rates[{i}].steps has {len(rate.steps)} entries: it must have one for each of {seeds} seeds"
    if point.reached > point.runs:
        return f".reached is {point.reached}: it must be at most the {point.runs} runs"
    if (point.steps is None) == (point.status == "reached"):
        return f".steps is {said(point.steps)} with status {point.status}: it must be null where none is reached"
    return None


def _branch_point(point: BranchPoint) -> str | None:
    if len(point.losses) == len(point.steps):
        return None
    return f".steps has {len(point.steps)} entries: it must have those of losses"


def _curve(curve: Curve) -> str | None:
    batches = [point.batch for point in curve.points]
    return None if len(set(batches)) == len(batches) else ".points has a batch size twice: each must have one point"


def _convergence(convergence: Convergence) -> str | None:
    return time_wrong(convergence.changed, "changed") if convergence.changed is not None else None


def time_wrong(text: str, name: str) -> str | None:
    """What is wrong with a time of a record, as `wrong` says it; it has a zone, so that times can be compared."""
    try:
        zone = datetime.fromisoformat(text).tzinfo
    except ValueError:
        zone = None
    return None if zone is not None else f".{name} is {said(text)}: it must be a time as 2026-01-02T03:04:05+00:00"


_LENGTHS: Mapping[type, Callable[[Any], str | None]] = {
    BatchPoint: _batch_point,
    Anchor: _anchor,
    RateSteps: _rate_steps,
    ConvergencePoint: _convergence_point,
    BranchPoint: _branch_point,
    Curve: _curve,
    Convergence: _convergence,
}
