"""Curves fitted to measurements, with intervals: step time against batch size. No torch here.

Fits are made in log time (a step time's error is a share of it) with log-parameters (all are positive) and a soft-L1
loss, so that one disturbed batch size does not bend the curve. One batched solver fits the measurement and all
bootstrap resamples at once. Steps to target against batch size are fitted in `steps_fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pybatch.base.errors import UsageError
from pybatch.base.numerals import count, number
from pybatch.fits.solver import Array, aicc, minimize
from pybatch.records import Note, ThroughputFit

Model = Literal["affine", "floor", "wave"]

SOFT = 0.05  # log time: residuals past 5 % count linearly; repeats of a steady step agree within that
_FINE = 256  # wave sizes up to here are tried one by one, larger ones in eights
RESOLUTION = 1e-5  # log time: smaller residuals are rounding, and a perfect fit must not drive AICc to minus infinity
FAR = 4  # times the largest batch: a half batch past it lets times rise by a quarter at most over all that was measured
REACH = 1e3  # half batch is sought within this factor of the batches measured; beyond, they say nothing about it
WAVE_LEAST = 3  # batch sizes that share a wave with another, past the first wave: fewer show no steps
FLOOR_LEAST = 6  # AICc of four unknowns (alpha, beta, floor and the error) is defined from six batch sizes on


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

    A caller should look at `rms_log_error`: where caches overflow at large batches, throughput falls again, neither
    model can follow, and the ceiling is that of a compromise. Raises UsageError for values that cannot be fitted.
    """
    size, samples = _checked(batches, seconds, gain, resamples)
    if rounds is not None and [len(entry) for entry in rounds] != [len(sample) for sample in samples]:
        raise UsageError("rounds do not fit the step times. Give one round for each of them.")
    data = np.log([np.median(s) for s in samples])
    models: list[Model] = ["affine", "floor"] if len(np.unique(size)) >= FLOOR_LEAST else ["affine"]
    fits = {model: _solve(_starts(model, size, data), size, data) for model in models}
    n, unknowns = len(size), {"affine": 2, "floor": 3, "wave": 3}
    waves = _waves(size, data) if n >= FLOOR_LEAST else None
    if waves is not None:
        models.append("wave")
        fits["wave"] = waves[1:]
    scores = {m: float(aicc(n * np.log(fits[m][1] / n), n, unknowns[m])) for m in models}
    model = min(models, key=scores.__getitem__)
    best = fits[model][0]
    wave = waves[0] if waves is not None and model == "wave" else None
    if wave is not None:
        size = wave * np.ceil(size / wave)  # on whole waves the curve is affine

    figures = _figures(best, gain)
    drawn = _resample(best, size, data, samples, rounds, resamples, np.random.default_rng(seed))
    spread = _figures(_polish(np.repeat(best[None], resamples, axis=0), size, drawn)[0], gain)
    low, high = np.quantile(spread, [0.025, 0.975], axis=0)
    low, high = np.minimum(low, figures), np.maximum(high, figures)  # the estimate itself is always compatible
    low, high = _opened(low, high, size)
    error = float(np.sqrt(np.mean((data - _log_time(best, size)[0]) ** 2)))
    beta, alpha = float(np.exp(best[0])), float(np.exp(best[0] + best[1]))
    floor = float(np.exp(best[2])) if model == "floor" else alpha
    points: list[float | None] = figures.tolist()
    notes: tuple[Note, ...] = ()
    level = float(_cost(data - np.median(data)))  # of the same time at every batch size
    still = n >= FLOOR_LEAST and bool(aicc(n * np.log(level / n), n, 1) < scores[model])
    if still or _flat(figures[1], high[1], size):
        floor = alpha = float(np.exp(np.median(data)))
        model, wave, beta, points = "affine", None, 0.0, [None] * 3
        low, high = _bounds(low, float(size.max()), alpha, gain), np.full(3, np.inf)
        notes = (_no_ceiling(low, size),)
    elif low[1] == 0.0 and figures[1] < 1.05 * np.exp(_limits(size)[0]):
        points, notes = [points[0], None, None], (_no_half(high, size),)
        floor = alpha = 0.0
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


def _flat(half: float, half_high: float, size: Array) -> bool:
    """Whether times show no rise: the half batch is the search's limit, or far off and no larger one is excluded."""
    limit = np.exp(_limits(size)[1]) / 1.05
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


def _no_half(high: Array, size: Array) -> Note:
    smallest = count(float(size.min()))
    below = f" (below {number(float(high[1]))})" if np.isfinite(high[1]) else ""
    text = f"step time is proportional to the batch from {smallest}, the smallest measured, on: half of the ceiling is "
    return Note("half_batch", f"{text}reached before it{below}")


def _waves(size: Array, data: Array) -> tuple[int, Array, float] | None:
    """The best wave size with its affine fit over whole waves, and the cost; None where no size could show waves."""
    most, distinct = int(size.max() / 2), np.unique(size)
    found: dict[tuple[int, ...], tuple[float, int, int]] = {}  # by which sizes share a wave
    for wave in (w for w in range(2, most + 1) if w <= _FINE or w % 8 == 0):
        begun = np.ceil(distinct / wave)
        shared = int(np.sum(begun > 1)) - len(np.unique(begun[begun > 1]))
        if shared < WAVE_LEAST:
            continue
        # Waves that part the sizes alike fit alike: take the one whose multiples were measured.
        key = tuple(begun.astype(int))
        ends = int(np.sum(distinct % wave == 0))
        if key not in found or ends > -found[key][1]:
            found[key] = (_relative_misfit(wave * np.ceil(size / wave), data), -ends, wave)
    if not found:
        return None
    wave = min(found.values())[2]
    whole = wave * np.ceil(size / wave)
    p, cost = _solve(_starts("affine", whole, data), whole, data)
    # The best of many: what choosing among them explains of pure noise is not evidence of waves.
    return wave, p, cost * len(found) ** (2 / len(size))


def _relative_misfit(size: Array, data: Array) -> float:
    """Sum of squared relative errors of the best affine curve, which is linear in its unknowns: for screening."""
    rows = np.stack([np.ones_like(size), size], -1) / np.exp(data)[:, None]
    residual = rows @ np.linalg.lstsq(rows, np.ones(len(size)), rcond=None)[0] - 1
    return float(np.sum(np.minimum(residual**2, SOFT**2)))


# Parameters, last axis: ln beta, ln(alpha / beta), and ln floor for the floor model.


def _log_time(p: Array, size: Array) -> tuple[Array, Array]:
    """ln t [..., n] and its Jacobian [..., n, P] at parameters [..., P]."""
    half = np.exp(p[..., 1:2])
    value = p[..., 0:1] + np.log(half + size)
    columns = [np.ones_like(value), half / (half + size)]
    if p.shape[-1] == 3:
        flat = p[..., 2:3] > value
        value = np.where(flat, p[..., 2:3], value)
        columns = [np.where(flat, 0.0, c) for c in columns] + [np.where(flat, 1.0, 0.0)]
    return value, np.stack(columns, axis=-1)


def _figures(p: Array, gain: float) -> Array:
    """Ceiling, half batch and saturation batch [..., 3].

    Half batch solves t(B) = 2 beta B; saturation solves 2 t(B) = (1 + gain) t(2B). With t the larger of two pieces,
    each is the larger of the two pieces' solutions.
    """
    beta, half = np.exp(p[..., 0]), np.exp(p[..., 1])
    saturation = half * (1 - gain) / (2 * gain)
    if p.shape[-1] == 3:
        knee = np.exp(p[..., 2]) / beta  # examples the floor would pay for
        saturation = np.maximum(saturation, (2 * knee / (1 + gain) - half) / 2)
        half = np.maximum(half, knee / 2)
    figures: Array = np.stack([1 / beta, half, saturation], axis=-1)
    return figures


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _opened(low: Array, high: Array, size: Array) -> tuple[Array, Array]:
    """Ends of the interval that are those of the search, not of the data: 0 and infinity.

    A half batch without a lower end is a saturation batch without one. One without an upper end has shown no ceiling.
    """
    least, most = np.exp(_limits(size))
    if low[1] < 1.05 * least:
        low = np.array([low[0], 0.0, 0.0])
    if high[1] > most / 1.05:
        high = np.full(3, np.inf)
    return low, high


def _limits(size: Array) -> tuple[float, float]:
    return float(np.log(size.min() / REACH)), float(np.log(size.max() * REACH))


def _starts(model: Model, size: Array, data: Array) -> Array:
    """Starting points [S, P]: half batches over all decades; for a floor also each number of batch sizes on it."""
    grid = np.linspace(*_limits(size), 40)
    order = np.argsort(size)
    starts = []
    for flat in range(1) if model == "affine" else range(1, len(size) - 1):
        rest = order[flat:]
        level = [] if model == "affine" else [np.full_like(grid, data[order[:flat]].mean())]
        beta = np.median(data[rest] - np.log(np.exp(grid)[:, None] + size[rest]), axis=-1)
        starts.append(np.stack([beta, grid, *level], axis=-1))
    return np.concatenate(starts)


def _cost(residual: Array) -> Array:
    """Soft-L1: squares below SOFT, absolute values above; RESOLUTION keeps it from vanishing."""
    scaled = (residual / SOFT) ** 2
    total: Array = np.sum(2 * (np.sqrt(1 + scaled) - 1), axis=-1)
    total *= SOFT**2
    total += residual.shape[-1] * RESOLUTION**2
    return total


def _solve(starts: Array, size: Array, data: Array) -> tuple[Array, float]:
    """The best of all polished starts [P], and its cost."""
    p, cost = _polish(starts, size, np.broadcast_to(data, (len(starts), len(data))))
    best = int(np.argmin(cost))
    return p[best], float(cost[best])


def _polish(p: Array, size: Array, data: Array) -> tuple[Array, Array]:
    """All rows at once: parameters [R, P], ln seconds [R, n] -> parameters, cost [R]."""

    def evaluate(trial: Array) -> tuple[Array, Array, Array]:
        value, slope = _log_time(trial, size)
        residual = data - value
        scaled = slope / np.sqrt(1 + (residual / SOFT) ** 2)[..., None]
        normal = np.swapaxes(scaled, -1, -2) @ slope
        return _cost(residual), np.sum(scaled * residual[..., None], axis=-2), normal

    low, high = (np.full(p.shape[-1], end) for end in (-np.inf, np.inf))
    low[1], high[1] = _limits(size)
    return minimize(p, evaluate, low, high)


def _resample(
    best: Array,
    size: Array,
    data: Array,
    samples: list[Array],
    rounds: Sequence[Sequence[int]] | None,
    resamples: int,
    rng: np.random.Generator,
) -> Array:
    """ln seconds [resamples, n] as another measurement could have given them."""
    n, free = len(size), max(len(size) - len(best), 1)
    fitted = _log_time(best, size)[0]
    inner = np.zeros((resamples, n))
    drawn_rounds = _drawn_rounds(rounds, resamples, rng) if rounds is not None else None
    for j, sample in enumerate(samples):
        if len(sample) > 1 and rounds is not None and drawn_rounds is not None:
            weights = np.stack([drawn_rounds[r] for r in rounds[j]], axis=-1)
            inner[:, j] = np.log(_weighted_medians(sample, weights, rng)) - data[j]
        elif len(sample) > 1:
            again = rng.integers(0, len(sample), (resamples, len(sample)))
            inner[:, j] = np.log(np.median(sample[again], axis=1)) - data[j]
    # Misfit: what the residuals hold beyond the spread of the medians (method of moments). What moves all batch sizes
    # alike leaves no residual.
    own = inner if rounds is None else inner - inner.mean(axis=1, keepdims=True)
    misfit = max(float(np.sum((data - fitted) ** 2)) / free - float(np.mean(own.var(axis=0))), 0.0)
    student = rng.standard_normal((resamples, n)) * np.sqrt(free / rng.chisquare(free, (resamples, 1)))
    drawn: Array = fitted + inner + np.sqrt(misfit) * np.clip(student, -1e3, 1e3)
    return drawn


def _drawn_rounds(
    rounds: Sequence[Sequence[int]], resamples: int, rng: np.random.Generator
) -> dict[int, NDArray[np.int64]]:
    """How often each round is drawn in each resample, [resamples] by round."""
    every = sorted({r for entry in rounds for r in entry})
    counts = rng.multinomial(len(every), np.full(len(every), 1 / len(every)), size=resamples)
    return {r: counts[:, i] for i, r in enumerate(every)}


def _weighted_medians(sample: Array, weights: NDArray[np.int64], rng: np.random.Generator) -> Array:
    """Medians [resamples] of samples [m] drawn anew within rounds of these weights [resamples, m]."""
    order = np.argsort(sample)
    again = rng.multinomial(len(sample), np.full(len(sample), 1 / len(sample)), size=len(weights))
    both = (again * weights)[:, order]
    both = np.where(both.any(axis=1, keepdims=True), both, again[:, order])  # none of its rounds was drawn
    heap = np.cumsum(both, axis=1)
    half = heap[:, -1:] / 2
    low, high = np.argmax(heap >= half, axis=1), np.argmax(heap > half, axis=1)
    medians: Array = (sample[order][low] + sample[order][high]) / 2
    return medians


def _checked(batches: Any, seconds: Any, gain: float, resamples: int) -> tuple[Array, list[Array]]:
    """Batch sizes [n] and their samples, or a UsageError that says what is wrong with which value."""
    if not 0 < gain < 1:
        raise UsageError(f"gain {gain} is not a share. Give a number between 0 and 1, such as 0.05.")
    if resamples < 20:
        raise UsageError(f"resamples {resamples} cannot show a 95 % interval. Give 200 or more.")
    if len(batches) != len(seconds):
        raise UsageError(f"{len(batches)} batches but {len(seconds)} step times. Give one entry of seconds per batch.")
    size = np.asarray(batches, dtype=np.float64)
    samples = [np.atleast_1d(np.asarray(entry, dtype=np.float64)) for entry in seconds]
    for value, sample in zip(batches, samples, strict=True):
        if not (np.isfinite(value) and value > 0):
            raise UsageError(f"batch {value} is not a batch size. Give positive numbers.")
        if not sample.size:
            raise UsageError(f"batch {value} has no step time. Leave the batch out.")
        if sample.ndim != 1 or not (np.isfinite(sample).all() and (sample > 0).all()):
            bad = next((v for v in sample.ravel().tolist() if not (np.isfinite(v) and v > 0)), sample.shape)
            raise UsageError(f"batch {value} has step time {bad}. Give finite, positive seconds; leave failures out.")
    if len(np.unique(size)) < 3:
        found = ", ".join(f"{v:g}" for v in np.unique(size)) or "none"
        raise UsageError(f"a throughput fit needs 3 distinct batch sizes, found {found}. Measure more batch sizes.")
    return size, samples
