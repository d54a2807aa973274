"""What moves the critical batch: sweeps that differ in dials of the workload, as a factorial experiment. Pure.

For each dial, pairs of sweeps alike in everything else; the effect is the mean of their differences in ln(critical
batch). Errors of separate sweeps are independent: their intervals, in the logarithm, are added in quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pybatch.records import Curve, Run
from pybatch.scaling import SEARCHED

Level = int | float | str
_Key = tuple[str, Level, Level, str, float, tuple[object, ...]]  # dial, its levels, split, target, what is alike


@dataclass(frozen=True)
class Effect:
    """The effect of one dial on the critical batch, from one level of it to another."""

    dial: str  # "model", or an option of the workload
    old: Level
    new: Level
    split: str
    target: float
    ratio: float  # of the critical batches, new over old: a geometric mean over the pairs
    low: float | None  # 95 %; None: open, as an end of a sweep's own interval is
    high: float | None
    pairs: int  # of sweeps that differ in this dial alone
    alike: tuple[object, ...] = field(default=(), repr=False)  # what else is the same in all of them
    ratios: tuple[float, ...] = ()  # of each pair

    @property
    def determined(self) -> bool:
        """Whether the interval lies on one side of no change."""
        return (self.low is not None and self.low > 1) or (self.high is not None and self.high < 1)


@dataclass(frozen=True)
class Cell:
    """The critical batch of one sweep at one target, with the logarithmic distances of its interval's ends."""

    split: str
    target: float
    alike: tuple[object, ...]  # what else must be the same
    dials: Mapping[str, Level]
    value: float
    below: float
    above: float


def effects(runs: Sequence[Run]) -> tuple[Effect, ...]:
    """Effects of every dial in which two of these sweeps differ while all others are the same.

    Args:
        runs: records with tuned sweeps; others are passed over. Of two with the same dials the later one counts.
    """
    cells = cells_of(runs)
    found: dict[_Key, list[tuple[Cell, Cell]]] = {}
    for i, one in enumerate(cells):
        for other in cells[i + 1 :]:
            dial = _only_difference(one, other)
            if dial is None:
                continue
            a, b = (one, other) if ordered(one.dials[dial]) <= ordered(other.dials[dial]) else (other, one)
            key = (dial, a.dials[dial], b.dials[dial], a.split, a.target, a.alike)
            found.setdefault(key, []).append((a, b))
    return tuple(_effect(dial, pairs) for (dial, *_), pairs in found.items())


def cells_of(runs: Sequence[Run]) -> list[Cell]:
    """The critical batch of every sweep at each target; of two with the same dials the later one."""
    named = {
        (cell.split, cell.target, cell.alike, tuple(sorted(cell.dials.items()))): cell
        for run in runs
        for cell in _cells(run)
    }
    return list(named.values())


def without_value(runs: Sequence[Run]) -> int:
    """Tuned sweeps at a target of which no critical batch is known, or a bound alone."""
    curves = [curve for run in runs if run.convergence is not None for curve in run.convergence.curves]
    return sum(c.rule == SEARCHED and c.target is not None and not c.critical_batch for c in curves)


def _cells(run: Run) -> Iterator[Cell]:
    steps = run.convergence
    if steps is None or steps.workload is None:
        return
    dials: dict[str, Level] = dict(steps.workload.options)
    if steps.workload.model is not None:
        dials["model"] = steps.workload.model
    info = steps.workload
    alike = (info.name, steps.optimizer, info.dtype, info.file_sha256)
    for curve in steps.curves:
        if curve.rule == SEARCHED and curve.critical_batch and curve.target is not None:
            yield Cell(curve.split, curve.target, alike, dials, curve.critical_batch, *_distances(curve))


def _distances(curve: Curve) -> tuple[float, float]:
    assert curve.critical_batch
    below = math.log(curve.critical_batch / curve.low) if curve.low else math.inf
    return below, math.log(curve.high / curve.critical_batch) if curve.high else math.inf


def _only_difference(one: Cell, other: Cell) -> str | None:
    """The dial in which two sweeps differ, where they are the same in everything else."""
    if (one.split, one.target, one.alike) != (other.split, other.target, other.alike):
        return None
    if one.dials.keys() != other.dials.keys():
        return None
    differing = [name for name in one.dials if one.dials[name] != other.dials[name]]
    return differing[0] if len(differing) == 1 else None


def ordered(level: Level) -> tuple[bool, float, str]:
    """Numbers ascending, then words."""
    return (True, 0.0, level) if isinstance(level, str) else (False, float(level), "")


def _effect(dial: str, pairs: Sequence[tuple[Cell, Cell]]) -> Effect:
    first, second = pairs[0]
    mean = sum(math.log(b.value / a.value) for a, b in pairs) / len(pairs)
    below = math.hypot(*(d for a, b in pairs for d in (b.below, a.above))) / len(pairs)
    above = math.hypot(*(d for a, b in pairs for d in (b.above, a.below))) / len(pairs)
    return Effect(
        dial,
        first.dials[dial],
        second.dials[dial],
        first.split,
        first.target,
        math.exp(mean),
        math.exp(mean - below) if math.isfinite(below) else None,
        math.exp(mean + above) if math.isfinite(above) else None,
        len(pairs),
        first.alike,
        tuple(b.value / a.value for a, b in pairs),
    )
