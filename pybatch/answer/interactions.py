"""Whether a dial's effect on the critical batch hangs on another dial, and which matters most. Pure.

Both are about differences, so "undetermined" is an answer: an interaction is one where its interval leaves out 1, and a
dial ranks above another where the intervals of their sizes do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from scipy.special import ndtri

from pybatch.answer.factors import Cell, Effect, Level, cells_of, effects, ordered
from pybatch.records import Run

# What the dials of the shipped workloads stand for; any other stands for itself.
_KINDS = {
    "model": "architecture",
    "width": "architecture",
    "size": "architecture",
    "subset": "data size",
    "label_noise": "data complexity",
    "resolution": "data complexity",
    "vocabulary": "data complexity",
    "length": "data complexity",
}


@dataclass(frozen=True)
class Interaction:
    """By how much one dial's effect is another one at the other level of a second dial: a ratio of ratios."""

    dials: tuple[str, str]
    old: tuple[Level, Level]
    new: tuple[Level, Level]
    split: str
    target: float
    ratio: float
    low: float | None  # 95 %; None: open
    high: float | None
    squares: int  # of four sweeps each

    @property
    def determined(self) -> bool:
        """Whether the interval lies on one side of no interaction."""
        return (self.low is not None and self.low > 1) or (self.high is not None and self.high < 1)


@dataclass(frozen=True)
class Ranked:
    """One dial with the size of its effect: the factor, up or down, of the levels furthest apart."""

    dial: str
    kind: str  # architecture, data complexity, data size, or the dial itself
    effect: Effect
    size: float  # ≥ 1
    low: float  # 95 %; 1 where the effect may be none
    high: float  # infinite where open


@dataclass(frozen=True)
class Ranking:
    """Dials of one split and target by the size of their effects, largest first."""

    split: str
    target: float
    dials: tuple[Ranked, ...]
    above: tuple[tuple[str, str], ...]  # pairs of which the first surely moves the critical batch more

    @property
    def determined(self) -> bool:
        """Whether the whole order is known: every dial surely above the next."""
        order = [ranked.dial for ranked in self.dials]
        return all(pair in self.above for pair in pairwise(order))


def kind_of(dial: str) -> str:
    """What a dial stands for: architecture, data complexity, data size; a dial of the user's for itself."""
    return _KINDS.get(dial, dial)


def interactions(runs: Sequence[Run]) -> tuple[Interaction, ...]:
    """Of every two dials for which four sweeps make a square, all else alike.

    Args:
        runs: as for `effects`.
    """
    cells = {(c.split, c.target, c.alike, tuple(sorted(c.dials.items()))): c for c in cells_of(runs)}
    found: dict[tuple[object, ...], list[tuple[Cell, Cell, Cell, Cell]]] = {}
    for one, other in combinations(cells.values(), 2):
        if (one.split, one.target, one.alike) != (other.split, other.target, other.alike):
            continue
        if one.dials.keys() != other.dials.keys():
            continue
        differing = sorted(name for name in one.dials if one.dials[name] != other.dials[name])
        if len(differing) != 2:
            continue
        a, b = differing
        lows, highs = (
            {name: end(one.dials[name], other.dials[name], key=ordered) for name in differing} for end in (min, max)
        )
        square = []
        for at in ((lows[a], lows[b]), (highs[a], lows[b]), (lows[a], highs[b]), (highs[a], highs[b])):
            dials = {**one.dials, a: at[0], b: at[1]}
            cell = cells.get((one.split, one.target, one.alike, tuple(sorted(dials.items()))))
            if cell is not None:
                square.append(cell)
        # Either diagonal finds the square: the one that holds its lowest corner counts.
        if len(square) == 4 and (square[0] is one or square[0] is other):
            key = (a, b, lows[a], lows[b], highs[a], highs[b], one.split, one.target, one.alike)
            found.setdefault(key, []).append((square[0], square[1], square[2], square[3]))
    return tuple(_interaction(squares) for squares in found.values())


def _interaction(squares: Sequence[tuple[Cell, Cell, Cell, Cell]]) -> Interaction:
    first, _, _, last = squares[0]
    a, b = sorted(name for name in first.dials if first.dials[name] != last.dials[name])
    signs = (1, -1, -1, 1)
    mean = sum(sign * math.log(c.value) for square in squares for sign, c in zip(signs, square, strict=True))
    mean /= len(squares)
    pairs = [(sign, c) for square in squares for sign, c in zip(signs, square, strict=True)]
    below = math.hypot(*(c.below if sign > 0 else c.above for sign, c in pairs)) / len(squares)
    above = math.hypot(*(c.above if sign > 0 else c.below for sign, c in pairs)) / len(squares)
    return Interaction(
        (a, b),
        (first.dials[a], first.dials[b]),
        (last.dials[a], last.dials[b]),
        first.split,
        first.target,
        math.exp(mean),
        math.exp(mean - below) if math.isfinite(below) else None,
        math.exp(mean + above) if math.isfinite(above) else None,
        len(squares),
    )


def rankings(runs: Sequence[Run]) -> tuple[Ranking, ...]:
    """Dials by how far they move the critical batch, for each split and target where two or more were turned.

    Of a dial with more than two levels, numbers count from the lowest to the highest; of names, the two that differ
    most, with the interval widened for having been chosen so.
    """
    found: dict[tuple[str, float, object], dict[str, list[Effect]]] = {}
    for effect in effects(runs):
        found.setdefault((effect.split, effect.target, effect.alike), {}).setdefault(effect.dial, []).append(effect)
    made = []
    for (split, target, _), by_dial in found.items():
        if len(by_dial) < 2:
            continue
        ranked = sorted((_ranked(dial, of) for dial, of in by_dial.items()), key=lambda r: -r.size)
        above = tuple((a.dial, b.dial) for a in ranked for b in ranked if a is not b and a.low > b.high)
        made.append(Ranking(split, target, tuple(ranked), above))
    return tuple(made)


def _ranked(dial: str, found: Sequence[Effect]) -> Ranked:
    if all(not isinstance(e.old, str) and not isinstance(e.new, str) for e in found):
        effect, wider = max(found, key=lambda e: float(e.new) - float(e.old)), 1.0
    else:
        effect = max(found, key=lambda e: abs(math.log(e.ratio)))
        wider = _bonferroni(len(found))
    log = math.log(effect.ratio)
    low = log - wider * (log - math.log(effect.low)) if effect.low else -math.inf
    high = log + wider * (math.log(effect.high) - log) if effect.high else math.inf
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    most = max(abs(low), abs(high))
    return Ranked(
        dial,
        kind_of(dial),
        effect,
        math.exp(abs(log)),
        math.exp(least),
        math.exp(most) if most < 700 else math.inf,
    )


def _bonferroni(count: int) -> float:
    """By how much a normal interval is wider where the largest of so many is taken."""
    return float(ndtri(1 - 0.025 / count) / ndtri(0.975))
