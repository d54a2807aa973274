"""Curves fitted to measurements, with intervals: step time against batch size. No torch here.

Fits are made in log time (a step time's error is a share of it) with log-parameters (all are positive) and a soft-L1
loss, so that one disturbed batch size does not bend the curve. One batched solver fits the measurement and all
bootstrap resamples at once. Steps to target against batch size are fitted in `steps_fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pybatch.base.arguments import typed
from pybatch.base.errors import UsageError
from pybatch.base.numerals import count, number
from pybatch.base.plain import given
from pybatch.fits.solver import Array, aicc
from pybatch.fits.throughput_beyond import beyond
from pybatch.fits.throughput_model import cost, figures, limits, log_time
from pybatch.fits.throughput_shapes import FAR, FLOOR_LEAST, shapes, spread
from pybatch.records import Note, ThroughputFit

MOST = 1e18  # examples: far past it the arithmetic overflows
TINY = 16  # times below the smallest batch: a half batch there, from which nothing keeps it apart from 0, is none
MISFIT = 0.1  # rms of ln(measured / fitted) from which the fit's error is worth telling


@typed
def fit_throughput(
    batches: Sequence[int] | NDArray[Any],
    seconds: Sequence[float] | Sequence[Sequence[float]] | NDArray[Any],
    *,
    gain: float = 0.05,
    seed: int = 0,
    resamples: int = 400,
    rounds: Sequence[Sequence[int]] | None = None,
) -> ThroughputFit:
    """Fit seconds per step against batch size by AICc: affine, floor or wave.

    affine  alpha + beta B
    floor   max(floor, alpha + beta B)
    wave    alpha + beta w ceil(B / w): the device works in waves of w examples, and a begun wave takes a whole one's
            time (tile quantization). Considered where batch sizes between multiples of w were measured.

    Args:
        batches: [n] batch sizes, at least 3 distinct ones, in any order.
        seconds: [n] seconds per step, or n sequences of samples (ragged), whose medians are fitted.
        gain: the saturation batch is the smallest from which on doubling raises throughput by less than this share;
            (alpha / beta) (1 - gain) / (2 gain) for the affine model, 9.5 half batches at 5 %.
        seed: of the bootstrap.
        resamples: bootstrap resamples behind the 95 % intervals.
        rounds: for each sample, which round over the batch sizes it was taken in. A machine that is slower for a while
            is so for all of a round: rounds are then drawn anew as wholes, the same ones for all batch sizes.

    The bootstrap draws the samples of each batch size anew, and adds what the model misses beyond their spread as an
    independent error of each batch size, Student-distributed with the fit's degrees of freedom; with one value per
    batch size that misfit is all there is.

    Waves that the batch sizes cannot show, and a cliff past which steps take longer than the line through the smaller
    ones says, are in the intervals by their Akaike weights (see `throughput_shapes`), and not in the figures: a caller
    should look at `rms_log_error`. Where the largest batch runs faster than the ceiling of the curve, by its error, the
    curve's figures have no upper end, and no saturation batch is given where doublings past it still gain. Where caches
    overflow at large batches, throughput falls again, no model here follows, and the ceiling is that of a compromise.
    Raises UsageError for values that cannot be fitted.
    """
    size, samples = _checked(batches, seconds, gain, resamples)
    if rounds is not None and [len(entry) for entry in rounds] != [len(sample) for sample in samples]:
        raise UsageError("rounds do not fit the step times. Give one round for each of them.")
    data = np.log([np.median(s) for s in samples])
    found = shapes(size, data)
    shape = min((each for each in found if each.shown), key=lambda each: each.score)
    best, whole, n = shape.p, shape.size, len(size)
    model, wave = shape.model, shape.wave
    point = figures(best, gain)
    drawn = spread(found, gain, data, samples, rounds, resamples, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    low, high = np.minimum(low, point), np.maximum(high, point)  # the estimate itself is always compatible
    low, high = _opened(low, high, size)
    error = float(np.sqrt(np.mean((data - log_time(best, whole)[0]) ** 2)))
    beta, alpha = float(np.exp(best[0])), float(np.exp(best[0] + best[1]))
    floor = float(np.exp(best[2])) if model == "floor" else alpha
    points: list[float | None] = point.tolist()
    notes: tuple[Note, ...]
    level = float(cost(data - np.median(data)))  # of the same time at every batch size
    still = n >= FLOOR_LEAST and bool(aicc(n * np.log(level / n), n, 1) < shape.score)
    if still or _flat(point[1], high[1], size):
        floor = alpha = float(np.exp(np.median(data)))
        model, wave, beta, points = "affine", None, 0.0, [None] * 3
        low, high = _bounds(low, float(size.max()), alpha, gain), np.full(3, np.inf)
        notes = (_no_ceiling(low, size),)
    elif low[1] == 0.0 and point[1] < max(1.05 * np.exp(limits(size)[0]), size.min() / TINY):
        points, notes = [points[0], None, None], (_no_half(high, size, error),)
        if error > MISFIT:
            rates = np.exp(np.log(size) - data)  # the ceiling is one of them, or between
            low[0], high[0] = min(low[0], rates.min()), max(high[0], rates.max())
            notes = (*notes, _misfit(error))
        floor = alpha = 0.0
    else:
        notes = (_misfit(error),) if error > MISFIT else ()
        past = beyond(size, data, float(point[0]), high, gain)
        if past is not None:
            notes = (*notes, past.note(gain))
            high[:2], high[2] = np.inf, np.inf if past.gained > gain else high[2]
            if past.since is not None and past.surely > gain:
                points[2], low[2] = None, max(low[2], past.since)
    return ThroughputFit(
        model=model,
        t0_s=floor,
        alpha_s=alpha,
        beta_s=beta,
        ceiling=points[0],
        ceiling_low=float(low[0]),
        ceiling_high=_finite(high[0]),
        half_batch=points[1],
        half_low=float(low[1]),
        half_high=_finite(high[1]),
        saturation_batch=points[2],
        saturation_low=float(low[2]),
        saturation_high=_finite(high[2]),
        gain=gain,
        rms_log_error=error,
        batches=len(size),
        wave=wave,
        notes=notes,
    )


def grows(error: float) -> str:
    """How step time goes with the batch where half of the ceiling is reached before the smallest: "is proportional to".

    Args:
        error: root mean square of ln(measured / fitted).
    """
    return "is proportional to" if error <= MISFIT else "rises about in proportion to, or faster than,"


def _misfit(error: float) -> Note:
    text = (
        f"step times lie {number(100 * error, 2)} % off the curve (rms), by scatter or by a shape that no model here "
    )
    return Note("rms_log_error", f"{text}follows. Read the batch sizes' own times too, or measure again")


def _flat(half: float, half_high: float, size: Array) -> bool:
    """Whether times show no rise: the half batch is the search's limit, or far off and no larger one is excluded."""
    limit = np.exp(limits(size)[1]) / 1.05
    return bool(half > limit or (np.isinf(half_high) and half > FAR * size.max()))


def _bounds(low: Array, largest: float, seconds: float, gain: float) -> Array:
    """What the figures are at least, of times that do not rise. However small their error, they say nothing of batches
    far larger; and a ceiling is never below what was measured."""
    half = min(float(low[1]), FAR * largest)
    rate = float(np.clip(low[0], largest / seconds, (1 + FAR) * largest / seconds))
    return np.array([rate, half, min(float(low[2]), FAR * largest * (1 - gain) / (2 * gain))])


def _no_ceiling(low: Array, size: Array) -> Note:
    largest = count(float(size.max()))
    text = f"step times do not rise with the batch beyond their error, up to {largest}: no ceiling is in sight (it is "
    return Note("ceiling", f"{text}at least {number(float(low[0]))}/s). Measure larger batches")


def _no_half(high: Array, size: Array, error: float) -> Note:
    smallest = count(float(size.min()))
    below = f" (below {number(float(high[1]))})" if np.isfinite(high[1]) else ""
    how = "is proportional to" if error <= MISFIT else "rises about in proportion to, or faster than,"
    text = (
        f"step time {how} the batch from {smallest}, the smallest measured, on: half of the ceiling is reached before "
    )
    return Note("half_batch", f"{text}it{below}")


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _opened(low: Array, high: Array, size: Array) -> tuple[Array, Array]:
    """Ends of the interval that are those of the search, not of the data: 0 and infinity.

    A half batch without a lower end is a saturation batch without one. One without an upper end has shown no ceiling.
    """
    least, most = np.exp(limits(size))
    if low[1] < 1.05 * least:
        low = np.array([low[0], 0.0, 0.0])
    if high[1] > most / 1.05:
        high = np.full(3, np.inf)
    return low, high


def _numbers(name: str, value: Any) -> Array:
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor that requires a gradient
        found = np.empty((0, 0))
    if found.ndim > 1:
        raise UsageError(f"{name} holds {given(value)}. Give numbers.")
    return found


def _checked(batches: Any, seconds: Any, gain: float, resamples: int) -> tuple[Array, list[Array]]:
    """Batch sizes [n] and their samples, or a UsageError that says what is wrong with which value."""
    if not 0 < gain < 1:
        raise UsageError(f"gain {gain} is not a share. Give a number between 0 and 1, such as 0.05.")
    if resamples < 20:
        raise UsageError(f"resamples {resamples} cannot show a 95 % interval. Give 200 or more.")
    size = np.atleast_1d(_numbers("batches", batches))
    entries = [seconds] if np.ndim(batches) == 0 else seconds
    if isinstance(entries, str) or not hasattr(entries, "__len__"):
        raise UsageError(f"seconds is {given(seconds)}. Give a list, with one entry per batch.")
    if len(size) != len(entries):
        raise UsageError(f"{len(size)} batches but {len(entries)} step times. Give one entry of seconds per batch.")
    samples = [np.atleast_1d(_numbers("seconds", entry)) for entry in entries]
    for value, sample in zip(size.tolist(), samples, strict=True):
        if not 0 < value <= MOST:
            raise UsageError(f"batch {value:.12g} is not a batch size. Give positive numbers up to {MOST:g}.")
        if not sample.size:
            raise UsageError(f"batch {value:.12g} has no step time. Leave the batch out.")
        if sample.ndim != 1 or not (np.isfinite(sample).all() and (sample > 0).all()):
            bad = next((v for v in sample.ravel().tolist() if not (np.isfinite(v) and v > 0)), sample.shape)
            raise UsageError(
                f"batch {value:.12g} has step time {bad}. Give finite, positive seconds; leave failures out."
            )
    if len(np.unique(size)) < 3:
        found = ", ".join(f"{v:g}" for v in np.unique(size)) or "none"
        raise UsageError(f"a throughput fit needs 3 distinct batch sizes, found {found}. Measure more batch sizes.")
    return size, samples
