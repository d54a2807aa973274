"""Shapes that step times may have beside the one fitted: waves that the batch sizes cannot show, a cliff, a floor.

A device that works in waves of w examples takes a whole wave's time for a begun one (tile quantization); past some
batch size caches overflow, and steps take longer than the line through the smaller ones says. Measured at powers of
two, either looks like a floor, or like another slope. Each shape counts in the intervals by how well the data support
it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pybatch.fits.solver import Array, aicc
from pybatch.fits.throughput_model import (
    SOFT,
    Model,
    cost,
    figures,
    limits,
    log_time,
    polish,
    solve,
    solve_each,
    starts,
)
from pybatch.fits.throughput_resampling import resample

FINE = 256  # wave sizes up to here are tried one by one, larger ones in eights
LARGEST_WAVE = 1 << 17  # no device takes so many examples at once
WAVE_LEAST = 3  # batch sizes that share a wave with another, past the first wave: fewer show no steps
FLOOR_LEAST = 6  # AICc of four unknowns (alpha, beta, floor and the error) is defined from six batch sizes on
HIDDEN = 4  # waves that the batch sizes cannot show but may have: so many of the best
CLIFF_LEAST = 5  # batch sizes up to a cliff
FAR = 4  # times the largest batch fitted: a half batch past it lets times rise by a quarter at most up to there
CLIFF = 0.05  # log time: past a cliff steps take longer than the line says by this, all of them


@dataclass(frozen=True)
class Shape:
    """A curve of step times, and its fit."""

    model: Model
    p: Array
    score: float  # AICc
    size: Array  # [n] batch sizes as the device takes them
    kept: NDArray[np.bool_]  # [n] those fitted
    wave: int | None = None
    shown: bool = True  # whether the batch sizes could show it; else it counts in the intervals alone


def shapes(size: Array, data: Array) -> list[Shape]:
    """All shapes of ln step times [n] that so many batch sizes may tell."""
    n, every = len(size), np.ones(len(size), dtype=bool)
    names: list[Model] = ["affine", "floor"] if len(np.unique(size)) >= FLOOR_LEAST else ["affine"]
    found = []
    for name in names:
        p, least = solve(starts(name, size, data), size, data)
        found.append(Shape(name, p, _score(least, n, len(p)), size, every))
    if n >= FLOOR_LEAST:
        found += [*_waves(size, data), *_cliffs(size, data)]
    return found


def spread(
    found: Sequence[Shape],
    gain: float,
    data: Array,
    samples: list[Array],
    rounds: Sequence[Sequence[int]] | None,
    resamples: int,
    rng: np.random.Generator,
) -> Array:
    """Ceiling, half batch and saturation batch [resamples, 3], each of a shape drawn by its Akaike weight."""
    counts = rng.multinomial(resamples, weights_of(found))
    alike: dict[tuple[int, int], list[tuple[Array, Array, Array]]] = defaultdict(list)  # are polished together
    for shape, count in zip(found, counts.tolist(), strict=True):
        if not count:
            continue
        own = np.flatnonzero(shape.kept).tolist()
        entries = [samples[i] for i in own]
        turns = [rounds[i] for i in own] if rounds is not None else None
        size = shape.size[own]
        again = resample(shape.p, size, data[own], entries, turns, count, rng)
        p, sizes = (np.broadcast_to(row, (count, len(row))) for row in (shape.p, size))
        alike[len(shape.p), len(own)].append((p, sizes, again))
    drawn = [polish(*map(np.concatenate, zip(*each, strict=True)))[0] for each in alike.values()]
    result: Array = np.concatenate([figures(p, gain) for p in drawn])
    return result


def weights_of(found: Sequence[Shape]) -> Array:
    """Akaike weights [n], which add up to 1."""
    scores = np.array([shape.score for shape in found])
    weights = np.exp(-(scores - scores.min()) / 2) if np.isfinite(scores.min()) else np.ones(len(found))
    result: Array = weights / weights.sum()
    return result


def _score(least: float, n: int, unknowns: int) -> float:
    return float(aicc(n * np.log(least / n), n, unknowns))


def _waves(size: Array, data: Array) -> list[Shape]:
    """The best wave size that the batch sizes show, and the best of those that they cannot."""
    waves, hidden = _partings(tuple(np.unique(size).tolist()))
    whole = waves[:, None] * np.ceil(size / waves[:, None])
    order = np.argsort(_relative_misfit(whole, data), kind="stable")
    chosen = [order[hidden[order] == kind][:most] for kind, most in ((False, 1), (True, HIDDEN))]
    tried = np.concatenate(chosen)
    if not len(tried):
        return []
    near = [_near(_line(row, data), row, data) for row in whole[tried]]
    every, made = np.ones(len(size), dtype=bool), []
    for i, (p, least) in zip(tried, solve_each(near, whole[tried], data), strict=True):
        # The best of many: what choosing among them explains of pure noise is not evidence of waves.
        least *= int(np.sum(hidden == hidden[i])) ** (2 / len(size))
        score = _score(least, len(size), 3)
        made.append(Shape("wave", p, score, whole[i], every, int(waves[i]), not hidden[i]))
    return made


@lru_cache(maxsize=16)
def _partings(distinct: tuple[float, ...]) -> tuple[Array, NDArray[np.bool_]]:
    """Wave sizes [W], one of all that part these batch sizes alike, and which of them they cannot show.

    Waves that part the sizes alike fit alike: it is the one whose multiples are most often among them.
    """
    most = min(int(distinct[-1] / 2), LARGEST_WAVE)
    waves = np.concatenate([np.arange(2.0, min(most, FINE) + 1), np.arange(FINE + 8.0, most + 1, 8)])
    sizes = np.array(distinct)
    begun = np.ceil(sizes / waves[:, None])
    ends = np.sum(sizes % waves[:, None] == 0, axis=1)
    later = begun > 1
    shared = later.sum(axis=1) - np.sum(later & (np.diff(begun, axis=1, prepend=0) > 0), axis=1)
    alike: dict[bytes, int] = {}
    for i, row in enumerate(begun):
        key = row.tobytes()
        if key not in alike or ends[i] > ends[alike[key]]:
            alike[key] = i
    own = sorted(alike.values(), key=lambda i: (-ends[i], i))
    return waves[own], shared[own] < WAVE_LEAST


def _cliffs(size: Array, data: Array) -> list[Shape]:
    """Lines up to a batch size past which every step takes longer than they say; each such step is an unknown more.

    Past a line that hardly rises they must lie one jump above it: times that go on rising have left a floor."""
    made = []
    for edge in np.unique(size)[:-1]:
        kept = size <= edge
        if len(np.unique(size[kept])) < CLIFF_LEAST:
            continue
        rough = _line(size[kept], data[kept])
        if (data[~kept] - np.log(np.maximum(rough[0] + rough[1] * size[~kept], np.exp(-700))) < CLIFF / 2).any():
            continue
        p, _ = solve(_near(rough, size[kept], data[kept]), size[kept], data[kept])
        residual = data - log_time(p, size)[0]
        past = residual[~kept]
        if (past < CLIFF).any() or (p[1] > np.log(FAR * edge) and np.ptp(past) > CLIFF):
            continue
        least = float(cost(np.where(kept, residual, 0.0)))
        made.append(Shape("affine", p, _score(least, len(size), 2 + int((~kept).sum())), size, kept, None, False))
    return made


def _line(size: Array, data: Array) -> Array:
    """Seconds at batch 0 and per example [..., 2] of the line with the least squares of relative errors."""
    seconds = np.exp(data)
    weights = seconds**-2
    weights = weights / weights.sum()
    batch, second = size @ weights, weights @ seconds
    apart = size - batch[..., None]
    slope = (apart @ (weights * (seconds - second))) / (apart**2 @ weights)
    return np.stack([second - slope * batch, slope], axis=-1)


def _near(line: Array, size: Array, data: Array) -> Array:
    """Starting points [S, P] of the affine model: the line itself, where it rises and starts above 0."""
    if (line <= 0).any():
        return starts("affine", size, data)
    half = np.clip(np.log(line[0] / line[1]), *limits(size))
    return np.array([[np.log(line[1]), half]])


def _relative_misfit(size: Array, data: Array) -> Array:
    """Sum of squared relative errors [...] of the best affine curve, which is linear in its unknowns: for screening."""
    line = _line(size, data)
    residual = (line[..., :1] + line[..., 1:] * size) / np.exp(data) - 1
    misfit: Array = np.sum(np.minimum(residual**2, SOFT**2), axis=-1)
    return misfit
