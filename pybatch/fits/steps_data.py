"""Steps to target as a table: checked, the best learning rate of each batch size, and what each run tells a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pybatch.base.errors import UsageError, unknown
from pybatch.fits import steps_model
from pybatch.fits.solver import Array

REACHED, CENSORED = 1, 2  # codes of a run; 0: diverged, not run, or left out
LEAST, MOST = 1e-9, 1e12  # of batch sizes and steps in any unit; ranks of rates lie above
FALL = 1.5  # all seeds on either side of it: 4 standard errors where seeds differ by 30 %
FALL_OF_ONE = 2.0  # for a single seed, which errs more, in the largest of many differences
_HALF = 1e13  # above any number of steps: a rate that half of the seeds reach and no more
_UNREACHED = 1e15  # above those: among rates that fail, the one that fails least is first


@dataclass(frozen=True)
class Table:
    """Steps to target as the user gave them, batch sizes ascending."""

    size: Array  # [n]
    steps: Array  # [rates, n, seeds]; infinite: not reached, nan: diverged
    caps: Array  # [n]
    rates: Array | None  # [rates, n]
    variance: Array  # [rates, n, seeds] of log steps between two evaluations; 0 where steps are exact


@dataclass(frozen=True)
class Choice:
    """The best rate of each batch size [n]."""

    index: NDArray[np.intp]
    median: Array  # steps; infinite where fewer than half of the seeds reach the target
    edge: NDArray[np.bool_]  # the best rate is the lowest or the highest of several that were tried


@dataclass(frozen=True)
class Cells:
    """Log steps [R, n, seeds], the log cap where censored, the code of each run, and what evaluations leave open."""

    log: Array
    kind: NDArray[np.int8]
    variance: Array  # of log steps; 0 where they are exact or not reached


def choose_rates(steps: Array, rates: Array | None = None) -> Choice:
    """The rate of the least median steps for each batch size.

    Args:
        steps: [rates, n, seeds], infinite or nan where the target was not reached.
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

    Of an even number of seeds, the lower middle one counts where the upper did not reach: half of them suffice. Such a
    rate is taken where no other is better: a run that never reaches must not serve a rate better than one that is late.
    """
    ordered = np.sort(np.where(np.isnan(steps), np.inf, steps), axis=-1)
    seeds = steps.shape[-1]
    lower, upper = ordered[..., (seeds - 1) // 2], ordered[..., seeds // 2]
    median: Array = np.where(np.isinf(upper), lower, (lower + upper) / 2)
    score = np.where(np.isfinite(upper), median, _HALF + lower)
    score = np.where(np.isfinite(median), score, _UNREACHED - np.isfinite(ordered).sum(-1))
    index = np.argmin(score, axis=0)
    return index, np.take_along_axis(median, index[None], 0)[0]


def cells(steps: Array, variance: Array, caps: Array) -> Cells:
    """What runs of steps [R, n, seeds] tell. A batch size at which most seeds diverge tells nothing."""
    kind = np.where(np.isfinite(steps), REACHED, np.where(np.isnan(steps), 0, CENSORED)).astype(np.int8)
    kind *= (2 * (kind > 0).sum(-1, keepdims=True) >= steps.shape[-1]).astype(np.int8)
    log = np.log(np.where(kind == REACHED, steps, caps[:, None]))
    return Cells(np.where(kind == 0, 0.0, log), kind, np.where(kind == REACHED, variance, 0.0))


def falls_to(data: Cells) -> int | None:
    """The batch size of the fewest steps, where at some smaller one every run took FALL times those of each run at it:
    steps that fall so far are not flat, whatever the larger batch sizes do. Else None."""
    log, whole = data.log[0], (data.kind[0] == REACHED).all(-1)
    if not whole.any():
        return None
    best = int(np.argmin(np.where(whole, np.median(log, -1), np.inf)))
    before = log[:best][whole[:best]]
    fall = FALL if log.shape[-1] > 1 else FALL_OF_ONE
    return best if (before.min(-1) > log[best].max() + math.log(fall)).any() else None


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


def checked(
    batches: Any, steps: Any, model: str | None, cap: Any, rates: Any, resamples: int, before: Any = None
) -> Table:
    """The arguments of `fit_steps` as a table, or a UsageError that says what is wrong with which value."""
    if model is not None and model not in steps_model.MODELS:
        raise unknown("model", model, steps_model.MODELS)
    if resamples < 20:
        raise UsageError(f"resamples {resamples} cannot show a 95 % interval. Give 200 or more.")
    size = _numbers("batches", batches)
    for value in size.ravel():
        if not LEAST <= value <= MOST:
            raise UsageError(f"batch {value:g} is not a batch size. Give numbers from {LEAST:g} to {MOST:g}.")
    if size.ndim != 1 or not len(size):
        raise UsageError(f"batches has shape {size.shape}. Give a list of batch sizes.")
    if len(np.unique(size)) < len(size):
        twice = next(v for v in size if (size == v).sum() > 1)
        raise UsageError(f"batch {twice:g} is given twice. Put its runs side by side: steps as batch x seed.")
    table = _numbers("steps", steps)
    wanted = 3 if rates is not None else (1, 2)
    if rates is None and table.ndim in (1, 2):
        table = table.reshape(1, len(table), -1) if table.size else table
    if table.ndim != 3 or table.shape[1] != len(size) or not table.size:
        shape = "[rates, batches, seeds]" if wanted == 3 else "[batches] or [batches, seeds]"
        raise UsageError(f"steps has shape {np.shape(steps)} for {len(size)} batches. Give {shape}.")
    bad = table[np.isfinite(table) & (table <= 0)]
    if bad.size or np.isneginf(table).any():
        first = bad[0] if bad.size else -np.inf
        raise UsageError(
            f"steps {first:g} cannot be: the target was met before training. Leave the target out, or give math.inf "
            "for a run that did not reach it and math.nan for one that diverged."
        )
    finite = table[np.isfinite(table)]
    if finite.size and not (finite.min() >= LEAST and finite.max() <= MOST):
        worst = finite.max() if finite.max() > MOST else finite.min()
        raise UsageError(f"steps {worst:g} are out of range: give {LEAST:g} to {MOST:g}, math.inf where not reached.")
    grid = _grid(rates, table.shape[0], len(size)) if rates is not None else None
    caps = _caps(cap, size, table)
    table, variance = _between(before, table, np.shape(steps), size)
    order = np.argsort(size)
    by_batch = grid[:, order] if grid is not None else None
    return Table(size[order], table[:, order], caps[order], by_batch, variance[:, order])


def _between(before: Any, table: Array, shape: tuple[int, ...], size: Array) -> tuple[Array, Array]:
    """Steps and the variance of their logarithm, for runs whose loss was last seen above the target at `before`."""
    if before is None:
        return table, np.zeros_like(table)
    last = _numbers("before", before)
    if last.shape != shape:
        raise UsageError(f"before has shape {last.shape}, steps has {shape}. Give one for each run, nan where unknown.")
    last = last.reshape(table.shape)
    known = np.isfinite(table) & ~np.isnan(last)
    wrong = known & ~((last >= 0) & (last < table))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise UsageError(
            f"before {last[where]:g} at batch {size[where[1]]:g} is not from 0 to below its steps of {table[where]:g}. "
            "Give the step of the last evaluation above the target, nan where unknown."
        )
    centre, variance = between(np.where(known, last, 0.0), np.where(known, table, 1.0))
    return np.where(known, centre, table), np.where(known, variance, 0.0)


def _grid(rates: Any, count: int, batches: int) -> Array:
    grid = _numbers("rates", rates)
    if grid.shape not in ((count,), (count, batches)):
        raise UsageError(
            f"rates has shape {grid.shape} for steps of {count} rates and {batches} batches. "
            "Give [rates], or [rates, batches] where batches differ."
        )
    if not (np.isnan(grid) | ((grid > 0) & np.isfinite(grid))).all():
        raise UsageError("rates must be positive, or nan for a slot not used.")
    grid = np.broadcast_to(grid[:, None] if grid.ndim == 1 else grid, (count, batches)).astype(np.float64)
    if np.isnan(grid).all(0).any():
        raise UsageError("rates has a batch size without any rate. Leave that batch size out.")
    return grid


def _caps(cap: Any, size: Array, table: Array) -> Array:
    finite = np.where(np.isfinite(table), table, 0.0)
    if cap is None:
        return np.full(len(size), max(float(finite.max()), 1.0))
    caps = _numbers("cap", cap)
    if caps.shape not in ((), size.shape) or not ((caps > 0) & np.isfinite(caps)).all():
        raise UsageError(f"cap {cap!r} is not a number of steps. Give one positive number, or one per batch size.")
    caps = np.broadcast_to(caps, size.shape).astype(np.float64)
    most = finite.max((0, 2))
    if (most > caps).any():
        i = int(np.argmax(most > caps))
        raise UsageError(f"steps {most[i]:g} at batch {size[i]:g} are above the cap of {caps[i]:g}. Give the true cap.")
    return caps


def _numbers(name: str, value: Any) -> Array:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise UsageError(
            f"{name} is not a table of numbers. Give lists of equal length: math.nan for a run that diverged or is "
            "missing, math.inf for one that did not reach the target."
        ) from None
