"""What the branches of one checkpoint say: the largest batch within a tolerance, and the critical batch. No torch."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pybatch.base.numerals import number
from pybatch.fits.solver import Array
from pybatch.fits.steps import fit_steps
from pybatch.fits.steps_data import DIVERGED
from pybatch.records import Branching, BranchPoint, Note

WINDOW = 16  # looks at the loss along a branch
LATE = 4  # times as many examples as the base branch needs: a branch that takes those is still seen
LEVEL_AT = WINDOW // LATE  # look at which the base branch defines the level, where there is no target
LAST = 4  # looks whose mean is the last loss
RESAMPLES = 400
_FINE = 100  # points between looks: 1 % of their distance, far below the spread of repeats

Losses = dict[int, list[Array]]  # by batch size, for each repeat: [WINDOW + 1] losses, nan from where it diverged


def summarize(
    step: int,
    base: int,
    window: int,
    rates: dict[int, float],
    losses: Losses,
    tolerance: float,
    target: float | None = None,
) -> Branching:
    """The record of one checkpoint's branches.

    Args:
        step: of the base run.
        base: batch size of the base run.
        window: examples each branch was trained on.
        rates: learning rate by batch size.
        losses: by batch size and repeat; only repeats that every batch size has are compared. Batch sizes that never
            ran are left out: the clock ended them, not their losses, so the others stand without them.
        tolerance: share of the base branch's last loss.
        target: train loss that the run is to reach: the level, where the base branch gets there between its first look
            and twice LEVEL_AT.
    """
    unrun = sorted(batch for batch, rows in losses.items() if not rows)
    losses = {batch: rows for batch, rows in losses.items() if rows}
    if base not in losses or len(losses) < 2:
        note = Note("critical_batch", "the time budget ended before the base branch and another had run. Raise it")
        return Branching(step, None, base, window, None, tolerance, (), None, None, None, None, (note,))
    batches = np.array(sorted(losses))
    own = int(np.flatnonzero(batches == base)[0])
    repeats = min(map(len, losses.values()))
    table = np.array([losses[b][:repeats] for b in batches])  # [batches, repeats, WINDOW + 1]
    smooth = _smoothed(table)
    last = smooth[..., -LAST:].mean(-1)
    initial = float(table[own, 0, 0])
    level = _level(smooth[own].mean(0), target)
    notes = []
    if target is not None and level != target and math.isfinite(level):
        far = "before the first look" if smooth[own].mean(0)[1] <= target else "not within half the window"
        text = f"steps are counted to loss {number(level)}: the base branch is at the target of {number(target)} {far}"
        notes.append(Note("level", text))
    if unrun:
        text = f"the time budget ended before batch {', '.join(map(str, unrun))} had run once. Raise it"
        notes.append(Note("points", text))
    steps, fit = np.full(last.shape, np.nan), None
    if not math.isfinite(level):
        notes.append(Note("critical_batch", "the base branch diverged. Lower the learning rate"))
    elif not level < initial:
        text = "the base branch's loss does not fall within the window: take a longer one, or an earlier checkpoint"
        notes.append(Note("critical_batch", text))
    else:
        steps = _steps_to(level, smooth, window / batches)
        fit = fit_steps(batches, steps, cap=window / batches, resamples=RESAMPLES)
        # Steps to a level are interpolated, so a few of them are no fault here.
        fit = dataclasses.replace(fit, notes=tuple(note for note in fit.notes if note.figure != "s_min"))
    largest, low, high = _largest(batches[own:], last[own:], tolerance)
    if repeats == 1:
        notes.append(Note("largest_low", "one repeat: no interval. Give --seeds 3, and time for them"))
    if largest is not None and largest == batches[-1]:
        every = f"every batch tested is within {number(100 * tolerance)} % of the base branch"
        text = f"{every if largest > base else 'no batch above the base one was run'}: the bound is above it"
        notes.append(Note("largest", text))
    points = tuple(
        BranchPoint(int(b), rates[int(b)], _nullable(last[i]), _nullable(steps[i])) for i, b in enumerate(batches)
    )
    finite = level if math.isfinite(level) else None
    return Branching(step, initial, base, window, finite, tolerance, points, largest, low, high, fit, tuple(notes))


def _level(base: Array, target: float | None) -> float:
    """The loss to which steps are counted, by those of the base branch [WINDOW + 1]."""
    if target is not None and base[1] > target >= np.min(base[: 2 * LEVEL_AT + 1]):
        return target
    return float(base[LEVEL_AT])


def _smoothed(losses: Array) -> Array:
    """Each look by a parabola through it and its four nearest (Savitzky and Golay 1964).

    A mean would lift a falling curve, and most where it bends. The first look is the checkpoint and stands for itself.
    A branch that diverged has no smoothed loss.
    """
    from scipy.signal import savgol_filter  # takes as long to import as torch, which nothing else needs

    sound = np.isfinite(losses).all(-1)
    smooth = np.full_like(losses, np.nan)
    if sound.any():
        smooth[sound] = savgol_filter(losses[sound], 5, 2, axis=-1)
    smooth[..., 0] = losses[..., 0]
    return smooth


def _steps_to(level: float, smooth: Array, window_steps: Array) -> Array:
    """Steps [batches, repeats] at which the loss first is at the level, between looks by a monotone cubic.

    Infinite where it is not in the window, DIVERGED where the branch diverged first.
    """
    from scipy.interpolate import PchipInterpolator  # likewise

    found = np.where(np.isnan(smooth).any(-1), DIVERGED, np.inf)  # [batches, repeats]
    between = np.linspace(0, WINDOW, WINDOW * _FINE + 1)
    for index in zip(*np.nonzero(np.isposinf(found)), strict=True):
        fine = PchipInterpolator(np.arange(WINDOW + 1), smooth[index])(between)
        met = np.flatnonzero(fine <= level)
        if len(met):
            found[index] = between[met[0]] / WINDOW * window_steps[index[0]]
    return found


def _largest(batches: Array, last: Array, tolerance: float) -> tuple[int | None, int | None, int | None]:
    """The largest batch up to which all are within the tolerance, with the ends of its 95 % interval over repeats.

    The first row is the base branch.
    """
    gap = np.where(np.isnan(last), np.inf, last) / last[0] - 1  # paired: a repeat has the same batches for every k
    repeats = last.shape[1]

    def within(columns: Array) -> int:
        fails = np.flatnonzero(~(columns.mean(-1) <= tolerance))
        return int(fails[0]) - 1 if len(fails) else len(batches) - 1

    point = within(gap)
    if point < 0:
        return None, None, None
    if repeats == 1:
        return int(batches[point]), None, None
    rng = np.random.default_rng(0)
    # Independent errors make up for the few seeds that are drawn from, as in the fit of steps.
    spread = np.where(np.isfinite(gap), gap, 0.0).std(-1, ddof=1) / math.sqrt(repeats)
    drawn = []
    for _ in range(RESAMPLES):
        again = gap[:, rng.integers(0, repeats, repeats)]
        drawn.append(within(again + (spread * rng.standard_normal(len(spread)))[:, None]))
    low, high = (int(np.quantile(drawn, q, method="nearest")) for q in (0.025, 0.975))
    top = int(batches[high]) if high < len(batches) - 1 else None
    return int(batches[point]), int(batches[max(low, 0)]), top


def _nullable(values: Array) -> tuple[float | None, ...]:
    return tuple(float(v) if np.isfinite(v) else None for v in values)
