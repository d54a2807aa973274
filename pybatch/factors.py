"""What moves the critical batch: sweeps that differ in dials of the workload, as a factorial experiment. Pure.

For each dial, pairs of sweeps alike in everything else; the effect is the mean of their differences in ln(critical
batch). Errors of separate sweeps are independent: their intervals, in the logarithm, are added in quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pybatch.records import Curve, Run
from pybatch.scaling import SEARCHED

Level = int | float | str
_ALIKE = ("workload", "optimizer", "split", "target", "dtype", "source")


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

    @property
    def determined(self) -> bool:
        """Whether the interval lies on one side of no change."""
        return (self.low is not None and self.low > 1) or (self.high is not None and self.high < 1)


@dataclass(frozen=True)
class _Cell:
    """The critical batch of one sweep at one target, with the logarithmic distances of its interval's ends."""

    alike: tuple[object, ...]
    dials: Mapping[str, Level]
    value: float
    below: float
    above: float


def effects(runs: Sequence[Run]) -> tuple[Effect, ...]:
    """Effects of every dial in which two of these sweeps differ while all others are the same.

    Args:
        runs: records with tuned sweeps; others are passed over. Of two with the same dials the later one counts.
    """
    named = {(cell.alike, tuple(sorted(cell.dials.items()))): cell for run in runs for cell in _cells(run)}
    cells = list(named.values())
    found: dict[tuple[object, ...], list[tuple[_Cell, _Cell]]] = {}
    for i, one in enumerate(cells):
        for other in cells[i + 1 :]:
            if one.alike != other.alike or (dial := _only_difference(one.dials, other.dials)) is None:
                continue
            a, b = sorted((one, other), key=lambda cell, dial=dial: _order(cell.dials[dial]))  # type: ignore[misc]
            found.setdefault((dial, a.dials[dial], b.dials[dial], *a.alike), []).append((a, b))
    return tuple(_effect(pairs) for pairs in found.values())


def _cells(run: Run) -> Iterator[_Cell]:
    steps = run.convergence
    if steps is None or steps.workload is None:
        return
    dials: dict[str, Level] = dict(steps.workload.options)
    if steps.workload.model is not None:
        dials["model"] = steps.workload.model
    for curve in steps.curves:
        if curve.rule == SEARCHED and curve.critical_batch:
            info = steps.workload
            alike = (info.name, steps.optimizer, curve.split, curve.target, info.dtype, info.source)
            yield _Cell(alike, dials, curve.critical_batch, *_distances(curve))


def _distances(curve: Curve) -> tuple[float, float]:
    assert curve.critical_batch
    below = math.log(curve.critical_batch / curve.low) if curve.low else math.inf
    return below, math.log(curve.high / curve.critical_batch) if curve.high else math.inf


def _only_difference(one: Mapping[str, Level], other: Mapping[str, Level]) -> str | None:
    if one.keys() != other.keys():
        return None
    differing = [name for name in one if one[name] != other[name]]
    return differing[0] if len(differing) == 1 else None


def _order(level: Level) -> tuple[bool, float, str]:
    """Numbers ascending, then words."""
    return (True, 0.0, level) if isinstance(level, str) else (False, float(level), "")


def _effect(pairs: Sequence[tuple[_Cell, _Cell]]) -> Effect:
    first, second = pairs[0]
    dial = _only_difference(first.dials, second.dials)
    assert dial is not None
    split, target = first.alike[_ALIKE.index("split")], first.alike[_ALIKE.index("target")]
    assert isinstance(split, str)
    assert isinstance(target, float)
    mean = sum(math.log(b.value / a.value) for a, b in pairs) / len(pairs)
    below = math.hypot(*(d for a, b in pairs for d in (b.below, a.above))) / len(pairs)
    above = math.hypot(*(d for a, b in pairs for d in (b.above, a.below))) / len(pairs)
    return Effect(
        dial,
        first.dials[dial],
        second.dials[dial],
        split,
        target,
        math.exp(mean),
        math.exp(mean - below) if math.isfinite(below) else None,
        math.exp(mean + above) if math.isfinite(above) else None,
        len(pairs),
    )
