"""Steps to target as a table: the best learning rate of each batch size, and what each run tells a fit.

In every table here a number is the steps of a run, infinity one that did not reach the target within its cap, minus
infinity one that diverged, and nan a run that nobody made. The last is no run at all: it counts for nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pybatch.fits.solver import Array

DIVERGED = -math.inf  # in a table of steps
REACHED, CENSORED = 1, 2  # codes of a run; 0: diverged, or nobody made it
FALL = 1.5  # all seeds on either side of it: 4 standard errors where seeds differ by 30 %
FALL_OF_ONE = 2.0  # for a single seed, which errs more, in the largest of many differences
_HALF = 1e13  # above any number of steps: a rate that half of the runs reach and no more
_UNREACHED = 1e15  # above those: among rates that fail, the one that fails least is first
_UNMADE = 1e17  # above those: a rate without a run


@dataclass(frozen=True)
class Table:
    """Steps to target as the user gave them, batch sizes ascending."""

    size: Array  # [n]
    steps: Array  # [rates, n, seeds]
    caps: Array  # [rates, n, seeds] steps at which a run was given up
    rates: Array | None  # [rates, n]
    variance: Array  # [rates, n, seeds] of log steps between two evaluations; 0 where steps are exact


@dataclass(frozen=True)
class Choice:
    """The best rate of each batch size [n]."""

    index: NDArray[np.intp]
    median: Array  # steps; infinite where fewer than half of the runs reach the target
    edge: NDArray[np.bool_]  # the best rate is the lowest or the highest of several that were tried


@dataclass(frozen=True)
class Cells:
    """Log steps [R, n, seeds], the log cap where censored, the code of each run, and what evaluations leave open."""

    log: Array
    kind: NDArray[np.int8]
    variance: Array  # of log steps; 0 where they are exact or not reached
    late: NDArray[np.bool_]  # runs that may be stuck, see `stuck`


def choose_rates(steps: Array, rates: Array | None = None) -> Choice:
    """The rate of the least median steps for each batch size, each judged on its own runs.

    Args:
        steps: [rates, n, seeds].
        rates: [rates, n] learning rates, nan where none was tried; None: a single one.

    Where no rate has a finite median, the one that reaches the target most often is taken.
    """
    index, median = best_rate(steps)
    edge = np.zeros(steps.shape[1], dtype=bool)
    if rates is not None and len(rates) > 1:
        taken = np.take_along_axis(rates, index[None], 0)[0]
        least, most = np.nanmin(rates, 0), np.nanmax(rates, 0)
        edge = (least < most) & ((taken == least) | (taken == most)) & np.isfinite(median)
    return Choice(index, median, edge)


def best_rate(steps: Array) -> tuple[NDArray[np.intp], Array]:
    """Index and median [...] of the best rate, for steps [rates, ..., seeds].

    A diverged run counts as one that did not reach; one that nobody made does not count. Of an even number of runs,
    the lower middle one counts where the upper did not reach: half of them suffice. Such a rate is taken where no
    other is better: a run that never reaches must not serve a rate better than one that is late.
    """
    ordered = np.sort(np.where(np.isneginf(steps), np.inf, steps), axis=-1)  # nan goes last
    count = (~np.isnan(steps)).sum(-1)
    middles = (np.maximum(count - 1, 0) // 2, count // 2)
    lower, upper = (np.take_along_axis(ordered, at[..., None], -1)[..., 0] for at in middles)
    median: Array = np.where(np.isinf(upper), lower, (lower + upper) / 2)
    score = np.where(np.isfinite(upper), median, _HALF + lower)
    reached = np.isfinite(ordered).sum(-1) / np.maximum(count, 1)
    score = np.where(np.isfinite(median), score, _UNREACHED * (2 - reached))
    score = np.where(count > 0, score, _UNMADE)
    median = np.where(count > 0, median, np.inf)
    index = np.argmin(score, axis=0)
    return index, np.take_along_axis(median, index[None], 0)[0]


def cells(steps: Array, variance: Array, caps: Array, late: NDArray[np.bool_]) -> Cells:
    """What runs of steps [R, n, seeds] tell. A batch size at which most runs diverge tells nothing."""
    kind = np.where(np.isfinite(steps), REACHED, np.where(np.isposinf(steps), CENSORED, 0)).astype(np.int8)
    made = (~np.isnan(steps)).sum(-1, keepdims=True)
    kind *= (2 * (kind > 0).sum(-1, keepdims=True) >= made).astype(np.int8)
    log = np.log(np.where(kind == REACHED, steps, np.where(kind == CENSORED, caps, 1.0)))
    return Cells(log, kind, np.where(kind == REACHED, variance, 0.0), late & (kind > 0))


def stuck(steps: Array) -> NDArray[np.bool_]:
    """Which runs [n, seeds], batch sizes ascending, may be stuck.

    Those later than at least half of their batch size's runs; the only run of a batch size, where a smaller and a
    larger one take fewer steps; and all runs of one, where the next smaller and the next larger take FALL times fewer
    in the median: steps fall, or fall and then rise, but no problem rises for a single batch size. What most runs of
    the largest batch size share, or of two in a row, is how the problem is, however late they are.
    """
    value = np.where(np.isneginf(steps), np.nan, steps)
    made = (~np.isnan(value)).sum(-1)
    ranked = np.sort(value, axis=-1)
    earlier = np.stack([np.searchsorted(row[:m], own) for row, m, own in zip(ranked, made, value, strict=True)])
    found = (earlier > 0) & (2 * earlier >= made[:, None])
    median = best_rate(value[None])[1]
    smaller = np.minimum.accumulate(np.append(np.inf, median[:-1]))
    larger = np.minimum.accumulate(np.append(median[1:], np.inf)[::-1])[::-1]
    alone = (made == 1) & (smaller < median) & (larger < median)
    ran = (~np.isnan(steps)).any(-1)
    ends = np.pad(median[ran], 1, constant_values=np.inf)
    alone[ran] |= FALL * np.maximum(ends[:-2], ends[2:]) < median[ran]
    possible: NDArray[np.bool_] = (found | alone[:, None]) & ~np.isnan(value)
    return possible


def falls_to(data: Cells) -> int | None:
    """The batch size of the fewest steps, where at some smaller one every run took FALL times those of each run at it:
    steps that fall so far are not flat, whatever the larger batch sizes do. Else None."""
    log, made, reached = data.log[0], data.kind[0] > 0, data.kind[0] == REACHED
    whole = made.any(-1) & (reached == made).all(-1)
    if not whole.any():
        return None
    least, most = np.where(reached, log, np.inf).min(-1), np.where(reached, log, -np.inf).max(-1)
    middle = np.array([np.median(row[own]) if ok else np.inf for row, own, ok in zip(log, reached, whole, strict=True)])
    best = int(np.argmin(middle))
    fall = FALL if made.sum(-1).max() > 1 else FALL_OF_ONE
    return best if (whole[:best] & (least[:best] > most[best] + math.log(fall))).any() else None


def between(before: Array, at: Array) -> tuple[Array, Array]:
    """Steps that are somewhere in (before, at], each place alike: exp of the mean of their logarithm, its variance.

    For u uniform on (a, b]: E ln u = (b ln b - a ln a) / (b - a) - 1 and Var ln u = 1 - a b (ln(b/a) / (b - a))^2.
    """
    share = 1 - before / at  # of the interval in its upper end: both depend on it alone
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log1p(-share)
        mean = np.where(share < 1, -(1 - share) * log / share, 0.0) - 1
        variance = 1 - np.where(share < 1, (1 - share) * (log / share) ** 2, 0.0)
    narrow = share < 1e-3  # where the differences above cancel
    mean = np.where(narrow, -share / 2, mean)
    return at * np.exp(mean), np.where(narrow, share**2 / 12, variance)
