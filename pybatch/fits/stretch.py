"""Which stretch of a training run its noise scale is read from, whether it drifts there, and the run as a trajectory.

The noise scale grows as the loss falls (McCandlish et al. 2018, section 2.2), and |G|^2 of the first steps, a hundred
times that of later ones, stays in a mean over all: such a mean lags by a factor. So what is read is the newest stretch
that gives an interval. No torch here.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from pybatch.base import numerals as n
from pybatch.fits.noise import BLOCKS, MIN_BLOCKS, Rows, judge, regroup
from pybatch.records import NoisePoint, Note

SHARES = (0.25, 0.5, 0.75)  # of the run, looked at in this order: few looks, as stopping on one costs coverage
LEAST = BLOCKS  # rows of a stretch that is less than the whole run
CLEAR = 4.0  # times the low end is the high end of an interval at most, for which an older stretch is left out
POINTS = 16  # of a trajectory: a full ring then gives each as many rows as a stretch needs
DRIFT = 0.99  # confidence from which on a drift is said: a note that is false in one of a hundred


def newest(rows: ArrayLike, small_batch: float | None = None) -> int:
    """The first row of the newest stretch that gives an interval; 0: only the whole run does, or nothing.

    Args:
        rows: [m, 3], blocks of equally many steps in order of time, as for `judge`.
        small_batch: as for `judge`.
    """
    table = np.asarray(rows, dtype=np.float64)
    for share in SHARES:
        count = round(share * len(table))
        if count < LEAST:
            continue
        found = judge(table[-count:], small_batch)
        if found.status == "resolved" and found.low and found.high and found.high <= CLEAR * found.low:
            return len(table) - count
    return 0


def coarse(first: int, count: int) -> int:
    """The first of `count` rows for a stretch from row `first` on, earlier where it would have too few: of layers."""
    return max(0, min(first, count - MIN_BLOCKS))


def halves(rows: Rows) -> tuple[Rows, Rows]:
    """A stretch in two, of equally many rows."""
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def drifts(rows: Rows) -> bool:
    """Whether the noise scale of the two halves of a stretch differs by more than chance.

    Compared is trace - R grad_sq, which has the mean zero in both where R, the ratio of the whole, is that of each.
    """
    first, second = (regroup(half[half[:, 0] > 0]) for half in halves(rows))
    if min(len(first), len(second)) < MIN_BLOCKS:
        return False
    _, grad_sq, trace = (first.sum(0) + second.sum(0)).tolist()
    if not grad_sq > 0:
        return False
    means, variances = [], []
    for half in (first, second):
        count = half[:, 0]
        excess = half[:, 2] - trace / grad_sq * half[:, 1]
        mean = excess.sum() / count.sum()
        means.append(mean)
        variances.append(((excess - mean * count) ** 2).sum() * len(half) / (len(half) - 1) / count.sum() ** 2)
    error = math.sqrt(sum(variances))
    t = float(stdtrit(len(first) + len(second) - 2, 0.5 + DRIFT / 2))
    return bool(abs(means[1] - means[0]) > t * error > 0)


def drift_note(rows: Rows) -> tuple[Note, ...]:
    """What is said where a stretch of steps drifts."""
    if not drifts(rows):
        return ()
    before, after = (_said(half) for half in halves(rows))
    text = (
        f"it drifts along the steps it is of: {before} over their first half, {after} over their second; `trajectory` "
        "has the whole run"
    )
    return (Note("noise.b_simple", text),)


def _said(rows: Rows) -> str:
    found = judge(rows)
    if found.value is not None:
        return f"{n.number(found.value)} [{n.number(found.low)} to {n.number(found.high)}]"
    return f"at least {n.number(found.low)}" if found.low is not None else "unresolved"


def trajectory(rows: ArrayLike, length: int, steps: int) -> tuple[NoisePoint, ...]:
    """The whole run in at most POINTS stretches, the first as soon as there are MIN_BLOCKS rows.

    Args:
        rows: [m, 3] as for `newest`.
        length: steps a row holds; the last may hold fewer.
        steps: of all rows together.
    """
    table = np.asarray(rows, dtype=np.float64)
    if not len(table):
        return ()
    parts = np.array_split(np.arange(len(table)), min(max(len(table) // MIN_BLOCKS, 1), POINTS))
    found = []
    for part in parts:
        own = judge(table[part], missing="no pair of norms in these steps")
        found.append(
            NoisePoint(
                first_step=int(part[0]) * length + 1,
                last_step=min((int(part[-1]) + 1) * length, steps),
                b_simple=own.value,
                low=own.low,
                high=own.high,
                grad_sq=own.grad_sq,
                trace=own.trace,
                status=own.status,
                steps=own.pairs,
                reason=own.why,
            )
        )
    return tuple(found)
