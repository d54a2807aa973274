"""Speeds measured beyond the ceiling of the curve fitted: those that rise on, as of times that go as a power of the
batch, which no curve of `throughput_model` follows. Where the curve saturates, the device then does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from pybatch.base.numerals import count, number, share
from pybatch.fits.solver import Array
from pybatch.records import Note

SURE = 0.99  # of Student's t, one-sided: 3.9 standard errors where 11 batch sizes show them
ORDER = 3  # of the differences that show the error: of a smooth curve's bend hardly anything is left in them


@dataclass(frozen=True)
class Beyond:
    """What the largest batch measured shows of a ceiling that it passes, and doublings of a saturation batch."""

    largest: float
    excess: float  # share by which its rate is above the ceiling of the curve
    since: float | None  # a batch measured past the saturation batch's interval, and at least a doubling below
    gained: float  # by each doubling from there on, in the mean; infinite without one
    surely: float  # of that beyond its error; `since` is the largest batch at which it is more than the gain asked

    def note(self, gain: float) -> Note:
        text = f"batch {count(self.largest)} runs {share(self.excess)} faster than the ceiling of the curve fitted"
        if self.since is None or self.surely <= gain:
            text += ", beyond its error: figures of the curve have no upper end. Measure larger batches"
            return Note("ceiling", text)
        each = f"each doubling from {count(self.since)} on still gains {share(self.gained)}"
        text += f", and {each}: saturation was not seen (it is above {number(self.since)}). Measure larger batches"
        return Note("saturation_batch", text)


def beyond(size: Array, data: Array, ceiling: float, high: Array, gain: float) -> Beyond | None:
    """What rows of ln seconds [n] tell where the largest batch runs faster than a ceiling's upper end, by its error.

    Args:
        size: [n] batch sizes.
        data: [n] ln seconds.
        ceiling: of the curve fitted, examples/s.
        high: [3] upper ends of the ceiling, the half batch and the saturation batch.
        gain: by which doubling the saturation batch raises the speed.
    """
    distinct, index = np.unique(size, return_inverse=True)
    speed = np.log(distinct) - np.bincount(index, data) / np.bincount(index)
    if len(distinct) <= ORDER:
        return None
    error, freedom = _error(np.log(distinct), speed)
    error *= float(stdtrit(freedom, SURE))
    if not speed[-1] - math.log(high[0]) > error:
        return None
    largest = float(distinct[-1])
    excess = math.expm1(speed[-1] - math.log(ceiling))
    found = Beyond(largest, excess, None, math.inf, -math.inf)
    for first in np.flatnonzero((distinct >= high[2]) & (2 * distinct <= largest)):
        doublings = math.log2(largest / distinct[first])
        rise = speed[-1] - speed[first]
        mean, least = (math.expm1(value / doublings) for value in (rise, rise - math.sqrt(2) * error))
        if found.since is None or least > gain:
            found = Beyond(largest, excess, float(distinct[first]), mean, least)
    return found


def _error(place: Array, value: Array) -> tuple[float, float]:
    """Standard error of values [n] around any curve that is smooth over these places, ascending, and its degrees of
    freedom: of divided differences, each of weights whose squares add up to 1, hardly anything but the values' own
    errors is left. They share values, so that they are fewer than they seem (Satterthwaite)."""
    weights = np.zeros((len(place) - ORDER, len(place)))
    for first, row in enumerate(weights):
        own = slice(first, first + ORDER + 1)
        apart = place[own, None] - place[own]
        np.fill_diagonal(apart, 1.0)
        row[own] = 1 / apart.prod(axis=1)
        row /= np.linalg.norm(row)
    freedom = len(weights) ** 2 / float(np.sum((weights @ weights.T) ** 2))
    return float(np.sqrt(np.mean((weights @ value) ** 2))), freedom
