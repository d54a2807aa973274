"""Another measurement of step times, as the one made could have given it: samples, rounds and misfit drawn anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pybatch.fits.solver import Array
from pybatch.fits.throughput_model import log_time


def resample(
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
    fitted = log_time(best, size)[0]
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
