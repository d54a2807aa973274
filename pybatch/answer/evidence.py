"""What is known of the critical batch: each piece of evidence with what it stands for, and all of them together.

A reading is log-normal with two errors: its own interval, and the factor by which such evidence is known to differ
from the critical batch of the run that it stands for. Readings are combined on the log scale by variance. What only
predicts (a noise scale, branches) and contradicts a measured sweep is set aside; predictions that contradict each other
have their errors scaled up until they agree (Birge's ratio). Either is told, as is a bound that contradicts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pybatch.base.numerals import batch_size
from pybatch.records import Kind, Reading

NORMAL = 1.959964  # 97.5 % point of the normal distribution
# 95 % of the ratios of such evidence to the critical batch of the run lie within this factor, both ways. B_simple over
# the critical batch runs from 0.05 to 8 over the tasks of McCandlish et al. 2018, mostly within 4. Branches see the
# rest of a run alone, along which the critical batch grows: over that of sweeps they gave 0.5 to 3.1 for the six
# networks of docs/study.md; from a rate that nobody tuned they were off by 6 to 16 on digits. A noise scale grows as
# the loss falls: one that was read past the target is taken back to it by LOSS_POWER, as critical batches of digits go
# (15 at loss 0.5, 55 at 0.05), and stands for less. So are branches that begin past it: from loss 2.24 of text they
# gave 184, where sweeps to 2.45 have 28 and 34.
FACTORS: dict[Kind, float] = {
    "sweep": 1.0,
    "rule": 2.0,
    "tuned branch": 4.0,
    "branch": 8.0,
    "branch past target": 8.0,
    "noise": 4.0,
    "noise past target": 8.0,
}
LOSS_POWER = 0.5
_OPEN = math.log(16.0)  # the error of a side whose end is open
_CLOSEST = 0.01  # standard deviation of ln: no interval is believed that is narrower, such as one that is a point
LEAST = 1 / 16  # examples: a critical batch below it is one that no batch can show


@dataclass(frozen=True)
class Weighed:
    """Readings put together: the critical batch and its log-normal errors, with what was found on the way."""

    value: float
    down: float  # standard deviation of ln, below and above
    up: float
    readings: tuple[Reading, ...]  # those that count
    aside: tuple[Reading, ...]
    disagreement: str | None  # in words, with the figures
    bound: Reading | None = None  # that contradicts them, with no value for the critical batch


def error(reading: Reading, side: int = 0) -> float:
    """Standard deviation of the logarithm with what it stands for: below (-1), above (1), or of both sides (0)."""
    if not side:
        return (error(reading, -1) + error(reading, 1)) / 2
    end, value = (reading.low if side < 0 else reading.high), max(reading.value, LEAST)
    own = abs(math.log(max(end, LEAST) / value)) if end is not None else _OPEN
    return max(_CLOSEST, math.hypot(own, math.log(reading.factor)) / NORMAL)


def combined(readings: Sequence[Reading]) -> Weighed | None:
    """All readings as one; None where there is none."""
    if not readings:
        return None
    clashes = [pair for pair in combinations(readings, 2) if _apart(*pair) > NORMAL]
    measured = [r for r in readings if r.kind == "sweep"]
    aside = [r for r in readings if measured and r not in measured and any(r in pair for pair in clashes)]
    used = [r for r in readings if r not in aside]
    weights = [error(r) ** -2 for r in used]
    log = sum(w * math.log(max(r.value, LEAST)) for w, r in zip(weights, used, strict=True)) / sum(weights)
    scale = 1.0
    if any(a in used and b in used for a, b in clashes):
        chi_square = sum(w * (math.log(max(r.value, LEAST)) - log) ** 2 for w, r in zip(weights, used, strict=True))
        scale = max(1.0, math.sqrt(chi_square / (len(used) - 1)))
    down, up = (scale * sum(error(r, side) ** -2 for r in used) ** -0.5 for side in (-1, 1))
    value = used[0].value if len(used) == 1 else math.exp(log)
    return Weighed(value, down, up, tuple(used), tuple(aside), _told(clashes, bool(aside)) if clashes else None)


def with_bound(weighed: Weighed, bound: Reading, side: int) -> Weighed:
    """The same beside evidence that gives a bound alone, at its `value`: above it (1) or below (-1). Where that, with
    what it stands for, contradicts them, it is told, and unless a sweep measured it the interval reaches to the bound.
    """
    distance = side * math.log(bound.value / max(weighed.value, LEAST))
    own = weighed.up if side > 0 else weighed.down
    if distance <= math.hypot(NORMAL * own, math.log(bound.factor)) or weighed.disagreement is not None:
        return weighed
    there = f"{bound.words} {'at least' if side > 0 else 'at most'} {batch_size(bound.value)}"
    figures = " and ".join([*(f"{r.words} {batch_size(r.value)}" for r in weighed.readings), there])
    measured = any(r.kind == "sweep" for r in weighed.readings)
    done = "the sweep, which measured it, stands" if measured else "a bound is no value, and the interval reaches to it"
    text = f"The evidence disagrees on the critical batch: {figures}; {done}."
    wide = own if measured else distance / NORMAL
    if side > 0:
        return replace(weighed, up=wide, disagreement=text, bound=bound)
    return replace(weighed, down=wide, disagreement=text, bound=bound)


def _apart(one: Reading, other: Reading) -> float:
    """Distance of two readings over its error."""
    ratio = max(one.value, LEAST) / max(other.value, LEAST)
    return abs(math.log(ratio)) / math.hypot(error(one), error(other))


def _told(clashes: Sequence[tuple[Reading, Reading]], aside: bool) -> str:
    there = list(dict.fromkeys(r for pair in clashes for r in pair))
    figures = " and ".join(f"{r.words} {batch_size(r.value)}" for r in there)
    done = (
        "the sweep, which measured it, stands"
        if aside
        else "both count, and between them least is lost if either holds"
    )
    return f"The evidence disagrees on the critical batch: {figures}; {done}."
