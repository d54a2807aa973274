"""Two saved runs against each other: what changed, by how much, and whether it is beyond the error of both.

Changes are ratios new / old. Errors of the two runs are independent: their intervals, taken as symmetric in the
logarithm, are added in quadrature.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pybatch.answer.critical import critical_of
from pybatch.base.arguments import typed
from pybatch.base.errors import UsageError
from pybatch.base.numerals import interval, number
from pybatch.base.plain import said
from pybatch.records import BatchPoint, Run
from pybatch.records.figure import figure_of
from pybatch.scaling import SEARCHED

_MOST = 1e6  # per cent
_WORKLOAD = "workload name"  # a difference after which nothing was changed, but something else measured
Estimate = tuple[float | None, float | None, float | None]  # value, low, high


@dataclass(frozen=True)
class Change:
    """One figure in both runs. `low` and `high` bound the ratio at 95 %; None where a run gives no interval."""

    figure: str
    old: float
    new: float
    ratio: float
    low: float | None = None
    high: float | None = None
    batches: int | None = None  # batch sizes of which this is the geometric mean

    @property
    def significant(self) -> bool:
        """Whether the interval lies on one side of no change."""
        return self.low is not None and self.high is not None and not self.low <= 1.0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """Everything that two runs have in common, and what differs about how they were made."""

    changes: tuple[Change, ...]
    batches: tuple[tuple[int, Change], ...]  # throughput at each batch size measured in both
    differences: tuple[str, ...]  # such as another device: the ratios then compare more than the code


@dataclass(frozen=True)
class Condition:
    """`throughput:-3%`: a figure may not change by this much, upwards (+) or downwards (-)."""

    figure: str
    change: float  # -0.03

    def broken(self, change: Change) -> bool:
        """Whether the change goes past the limit, and lies beyond the error where one is known."""
        beyond = change.ratio - 1 < self.change if self.change < 0 else change.ratio - 1 > self.change
        return beyond and (change.low is None or change.significant)


@typed
def compare(old: Run, new: Run) -> Comparison:
    """What changed from one run to another.

    Raises:
        UsageError: the runs have no figure in common.
    """
    for which, run in (("old", old), ("new", new)):
        _check(which, run)
    found = [change for name, compared in FIGURES.items() if (change := compared.change(name, old, new)) is not None]
    if not found:
        raise UsageError("the two runs have no figure in common. Give two runs that measured the same kind of thing.")
    return Comparison(tuple(found), tuple(_batches("throughput", _speed, old, new)), _differences(old, new))


def _check(which: str, run: object) -> None:
    if not isinstance(run, Run):
        what = f"the class {run.__name__}" if isinstance(run, type) else f"{type(run).__name__} {str(run)[:40]!r}"
        raise UsageError(f"compare(): {which} is {what}. Give a Run: pybatch.Run.from_json(text).")


def parse_condition(text: str) -> Condition:
    """Read `FIGURE:-3%` or `FIGURE:+10%`; raises UsageError with what is allowed."""
    match = re.fullmatch(r"\s*([a-z_]+)\s*:\s*([+-]\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None:
        raise UsageError(f"fail-on {said(text)} is not FIGURE:CHANGE. Write 'throughput:-3%' or 'memory:+10%'.")
    name, percent = match[1], float(match[2])
    if name not in FIGURES:
        raise UsageError(f"fail-on {said(text)}: no figure {name!r}. Use one of: {', '.join(FIGURES)}.")
    if not -100 < percent <= _MOST:
        raise UsageError(
            f"fail-on {said(text)}: no figure falls by 100 %, nor is a limit above {_MOST:g} % one. Write "
            "'throughput:-3%'."
        )
    if percent == 0:
        raise UsageError(f"fail-on {said(text)}: any noise would break 0 %. Give the smallest change that matters.")
    return Condition(name, percent / 100)


def broken(conditions: Sequence[Condition], comparison: Comparison) -> list[str]:
    """A sentence for each condition that the comparison breaks, or that it can't decide."""
    other = next((text for text in comparison.differences if text.startswith(_WORKLOAD)), None)
    if other is not None and conditions:
        return [f"the runs are not of one workload ({other}), so no change can be checked. Give two runs of the same"]
    said = []
    known = {change.figure: change for change in comparison.changes}
    for condition in conditions:
        change = known.get(condition.figure)
        if change is None:
            said.append(f"{condition.figure} is not in both runs, so {100 * condition.change:+g} % can't be checked")
        elif condition.broken(change):
            said.append(
                f"{condition.figure} changed by {100 * (change.ratio - 1):+.1f} %, past the limit of "
                f"{100 * condition.change:+g} %"
            )
    return said


def _ratio(figure: str, old: Estimate, new: Estimate) -> Change | None:
    """From (value, low, high) of both runs; None where a value is missing."""
    (a, a_low, a_high), (b, b_low, b_high) = old, new
    if not a or not b or a <= 0 or b <= 0:
        return None
    ratio = b / a
    if a_low and a_high and b_low and b_high:
        # Each side on its own, as an interval may lean: the ratio is low where new is low and old is high.
        down = math.hypot(math.log(b / b_low), math.log(a_high / a))
        up = math.hypot(math.log(b_high / b), math.log(a / a_low))
        return Change(figure, a, b, ratio, ratio * math.exp(-down), ratio * math.exp(up))
    return Change(figure, a, b, ratio)


def _batches(figure: str, read: Callable[[BatchPoint], Estimate], old: Run, new: Run) -> list[tuple[int, Change]]:
    """The changes at each batch size measured in both."""
    before, after = _timed(old), _timed(new)
    shared = sorted(before.keys() & after.keys())
    changes = ((batch, _ratio(figure, read(before[batch]), read(after[batch]))) for batch in shared)
    return [(batch, change) for batch, change in changes if change is not None]


def _steps(old: Run, new: Run) -> list[Change]:
    """Steps to target at each batch size that reached it in both runs, on curves of one rule, split and target.

    Medians of a few seeds: no interval is claimed.
    """
    before, after = _reached(old), _reached(new)
    changes = (_ratio("steps", (before[key], None, None), (after[key], None, None)) for key in before if key in after)
    return [change for change in changes if change is not None]


def _reached(run: Run) -> dict[tuple[str, str, float | None, int], float]:
    curves = run.convergence.curves if run.convergence else ()
    return {
        (curve.rule, curve.split, curve.target, point.batch): point.steps
        for curve in curves
        for point in curve.points
        if point.status == "reached" and point.steps
    }


def _timed(run: Run) -> dict[int, BatchPoint]:
    return {p.batch: p for p in run.capacity.batches if p.status == "ok" and p.step_ms} if run.capacity else {}


def _speed(point: BatchPoint) -> Estimate:
    def rate(milliseconds: float | None) -> float | None:
        return 1e3 * point.batch / milliseconds if milliseconds else None

    return rate(point.step_ms), rate(point.step_ms_high), rate(point.step_ms_low)


def _mean(figure: str, changes: Sequence[Change]) -> Change:
    """The geometric mean of ratios.

    Its interval is that of the mean of independent errors, and no narrower than the spread of the ratios allows: runs
    drift by more than the error within one.
    """
    count = len(changes)
    logs = [math.log(change.ratio) for change in changes]
    center = sum(logs) / count
    old = math.exp(sum(math.log(change.old) for change in changes) / count)
    if any(change.low is None or change.high is None for change in changes):
        return Change(figure, old, old * math.exp(center), math.exp(center), batches=count)
    within = math.sqrt(sum(((math.log(c.high or 1) - math.log(c.low or 1)) / 2) ** 2 for c in changes)) / count
    between = 1.96 * math.sqrt(sum((x - center) ** 2 for x in logs) / max(1, count - 1) / count)
    half = max(within, between)
    return Change(
        figure, old, old * math.exp(center), math.exp(center), math.exp(center - half), math.exp(center + half), count
    )


@dataclass(frozen=True)
class Compared:
    """How a figure of two runs is compared, by the one of these that is given."""

    better: bool | None  # whether more is better; None: neither
    one: Callable[[Run], Estimate] | None = None  # one of a run
    batch: Callable[[BatchPoint], Estimate] | None = None  # one at each batch size; the mean of the ratios counts
    form: Callable[[float | None], str] = number

    def change(self, name: str, old: Run, new: Run) -> Change | None:
        """From the old run to the new one; None where one of them lacks it."""
        if self.one is not None:
            return _ratio(name, self.one(old), self.one(new))
        shared = [c for _, c in _batches(name, self.batch, old, new)] if self.batch is not None else _steps(old, new)
        return _mean(name, shared) if shared else None


def _of(part: str, value: str, low: str | None = None, high: str | None = None) -> Callable[[Run], Estimate]:
    """Reads a field of a part of a run, such as "capacity.model", with its interval's."""

    def read(run: Run) -> Estimate:
        found: Any = run
        for name in part.split("."):
            found = None if found is None else getattr(found, name)
        if found is None:
            return None, None, None
        return getattr(found, value), getattr(found, low) if low else None, getattr(found, high) if high else None

    return read


def _noise(run: Run) -> Estimate:
    resolved = run.noise is not None and run.noise.status == "resolved"
    return _of("noise", "b_simple", "low", "high")(run) if resolved else (None, None, None)


FIGURES = {
    "throughput": Compared(True, batch=_speed),
    "ceiling": Compared(True, _of("capacity.model", "ceiling", "ceiling_low", "ceiling_high")),
    "half_batch": Compared(None, _of("capacity.model", "half_batch", "half_low", "half_high")),
    "saturation_batch": Compared(None, _of("capacity", "saturation_batch", "saturation_low", "saturation_high")),
    "max_batch": Compared(True, _of("capacity", "max_batch")),
    "memory": Compared(
        False,
        batch=lambda point: (point.memory_bytes, None, None),
        form=figure_of(BatchPoint, "memory_bytes").form,
    ),
    "energy": Compared(False, batch=lambda point: (point.joules_per_sample, None, None)),
    "noise_scale": Compared(None, _noise),
    "critical_batch": Compared(None, lambda run: _critical(run)[0]),
    "steps": Compared(False),  # to target, at each batch size of curves alike
    "best_batch": Compared(None, _of("verdict", "best_batch", "best_low", "best_high")),
    "time_to_target": Compared(False, _of("verdict", "time_to_target")),
}


def _critical(run: Run) -> tuple[Estimate, str | None]:
    """The critical batch, and the evidence it stands on; a sweep has no verdict of its own."""
    if (said := run.verdict) is not None:
        return (said.critical_batch, said.critical_low, said.critical_high), said.critical_source
    found = critical_of(None, run.convergence)
    return (found.value, found.low, found.high), found.source


def _estimate(found: Estimate) -> str:
    value, low, high = found
    if value is not None or (low is None and high is None):
        return f"{number(value)} {interval(low, high)}".strip() if value is not None else "not known"
    ends = (("at least", low), ("at most", high))
    return " and ".join(f"{side} {number(end)}" for side, end in ends if end is not None)


def _rate(given: float | None) -> str:
    return f"{given:g}" if given is not None else "tuned"


def _differences(old: Run, new: Run) -> tuple[str, ...]:
    """What was not the same in both runs."""
    said = []

    def tell(what: str, before: object, after: object) -> None:
        if before != after:
            first, second = ("not given" if value is None else value for value in (before, after))
            said.append(f"{what}: {first} against {second}")

    if old.capacity and new.capacity:
        tell("steps", old.capacity.mode, new.capacity.mode)
    if old.convergence and new.convergence:
        tell("optimizer", old.convergence.optimizer, new.convergence.optimizer)
        if any(rule != SEARCHED for rule, *_ in _reached(old).keys() & _reached(new).keys()):
            tell("base batch", old.convergence.base_batch, new.convergence.base_batch)
            tell("base rate", *(_rate(run.convergence.base_rate) for run in (old, new) if run.convergence))
    (one, source), (other, another) = _critical(old), _critical(new)
    if one[0] and other[0]:
        tell("critical batch from", source, another)
    elif one != other:  # a bound is no figure, and yet it may be what changed
        tell("critical batch", _estimate(one), _estimate(other))
    if old.training and new.training:
        tell(_WORKLOAD, old.training.name, new.training.name)
        tell("model", old.training.model, new.training.model)
    before, after = old.capacity or old.convergence, new.capacity or new.convergence
    if before and after:
        if before.device and after.device:
            tell("device", before.device.name, after.device.name)
        if before.workload and after.workload:
            for name in ("name", "model", "dtype", "parameters", "examples", "options"):
                tell(
                    _WORKLOAD if name == "name" else name,
                    getattr(before.workload, name),
                    getattr(after.workload, name),
                )
    for which, run in (("old", old), ("new", new)):
        if run.capacity is not None and run.capacity.disturbed:
            said.append(f"machine disturbed in the {which} run: {'; '.join(run.capacity.disturbed)}")
    if old.environment and new.environment:
        for name in ("torch", "pybatch", "threads", "driver", "seed"):
            tell(name, getattr(old.environment, name), getattr(new.environment, name))
    return tuple(said)
