"""Shapes that step times may have beside the one fitted: waves that the batch sizes cannot show, a cliff, a floor.

A device that works in waves of w examples takes a whole wave's time for a begun one (tile quantization); past some
batch size caches overflow, and steps take longer than the line through the smaller ones says. Measured at powers of
two, either looks like a floor, or like another slope. Each shape counts in the intervals by how well the data support
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pybatch.fits.solver import Array, aicc
from pybatch.fits.throughput_model import SOFT, Model, cost, figures, limits, log_time, polish, solve, starts
from pybatch.fits.throughput_resampling import resample

FINE = 256  # wave sizes up to here are tried one by one, larger ones in eights
WAVE_LEAST = 3  # batch sizes that share a wave with another, past the first wave: fewer show no steps
FLOOR_LEAST = 6  # AICc of four unknowns (alpha, beta, floor and the error) is defined from six batch sizes on
HIDDEN = 4  # waves that the batch sizes cannot show but may have: so many of the best
CLIFF_LEAST = 5  # batch sizes up to a cliff
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
    scores = np.array([shape.score for shape in found])
    weights = np.exp(-(scores - scores.min()) / 2) if np.isfinite(scores.min()) else np.ones(len(found))
    counts = rng.multinomial(resamples, weights / weights.sum())
    drawn = []
    for shape, count in zip(found, counts.tolist(), strict=True):
        if not count:
            continue
        own = np.flatnonzero(shape.kept).tolist()
        entries = [samples[i] for i in own]
        turns = [rounds[i] for i in own] if rounds is not None else None
        size = shape.size[own]
        again = resample(shape.p, size, data[own], entries, turns, count, rng)
        drawn.append(figures(polish(np.repeat(shape.p[None], count, axis=0), size, again)[0], gain))
    result: Array = np.concatenate(drawn)
    return result


def _score(least: float, n: int, unknowns: int) -> float:
    return float(aicc(n * np.log(least / n), n, unknowns))


def _waves(size: Array, data: Array) -> list[Shape]:
    """The best wave size that the batch sizes show, and the best of those that they cannot."""
    most, distinct = int(size.max() / 2), np.unique(size)
    found: dict[tuple[int, ...], tuple[bool, float, int, int]] = {}  # by which sizes share a wave
    for wave in (w for w in range(2, most + 1) if w <= FINE or w % 8 == 0):
        begun = np.ceil(distinct / wave)
        shared = int(np.sum(begun > 1)) - len(np.unique(begun[begun > 1]))
        # Waves that part the sizes alike fit alike: take the one whose multiples were measured.
        key = tuple(begun.astype(int))
        ends = int(np.sum(distinct % wave == 0))
        if key not in found or ends > -found[key][2]:
            misfit = _relative_misfit(wave * np.ceil(size / wave), data)
            found[key] = (shared < WAVE_LEAST, misfit, -ends, wave)
    made = []
    for hidden, most_of in ((False, 1), (True, HIDDEN)):
        own = sorted(entry[1:] for entry in found.values() if entry[0] == hidden)
        for _, _, wave in own[:most_of]:
            whole = wave * np.ceil(size / wave)
            p, least = solve(_near(_line(whole, data), whole, data), whole, data)
            # The best of many: what choosing among them explains of pure noise is not evidence of waves.
            least *= len(own) ** (2 / len(size))
            every = np.ones(len(size), dtype=bool)
            made.append(Shape("wave", p, _score(least, len(size), 3), whole, every, wave, not hidden))
    return made


def _cliffs(size: Array, data: Array) -> list[Shape]:
    """Lines up to a batch size past which every step takes longer than they say; each such step is an unknown more."""
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
        if (residual[~kept] < CLIFF).any():
            continue
        least = float(cost(np.where(kept, residual, 0.0)))
        made.append(Shape("affine", p, _score(least, len(size), 2 + int((~kept).sum())), size, kept, None, False))
    return made


def _line(size: Array, data: Array) -> Array:
    """Seconds at batch 0 and per example of the line with the least squares of relative errors."""
    seconds = np.exp(data)
    weights = seconds**-2
    weights = weights / weights.sum()
    batch, second = weights @ size, weights @ seconds
    apart = size - batch
    slope = (weights * apart) @ (seconds - second) / ((weights * apart) @ apart)
    return np.array([second - slope * batch, slope])


def _near(line: Array, size: Array, data: Array) -> Array:
    """Starting points [S, P] of the affine model: the line itself, where it rises and starts above 0."""
    if (line <= 0).any():
        return starts("affine", size, data)
    half = np.clip(np.log(line[0] / line[1]), *limits(size))
    return np.array([[np.log(line[1]), half]])


def _relative_misfit(size: Array, data: Array) -> float:
    """Sum of squared relative errors of the best affine curve, which is linear in its unknowns: for screening."""
    line = _line(size, data)
    residual = (line[0] + line[1] * size) / np.exp(data) - 1
    return float(np.sum(np.minimum(residual**2, SOFT**2)))
