"""Regimes of data parallelism (Golmant et al. 2018): linear, diminishing, stagnant, for each batch size tested; and
superlinear, where a smaller batch takes more steps *and* more examples, by as much as a larger one past linear.

A label stands where at least nine in ten resamples agree on it; otherwise it is "undetermined".
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pybatch.fits.solver import Array

LABELS = ("linear", "diminishing", "stagnant", "superlinear")
AGREED = 0.9  # share of the resamples behind a label
LINEAR = 7 / 12  # S(2B) / S(B) at B_20 on the hyperbola: up to it, a doubling is near to halving the steps
SUPERLINEAR = 0.5**2 / LINEAR  # S(2B) / S(B) as far below a half as LINEAR is above it
STAGNANT = 0.9  # S(2B) / S(B) at B_stag
DOUBLING = (1.4, 3.0)  # a batch this many times larger tells what a doubling does

Regimes = tuple[tuple[int, str], ...]


def unknown(size: Array) -> Regimes:
    """No label for any batch size [n]."""
    return _agreed(size, np.full((1, len(size)), -1))


def of_model(size: Array, b20: Array, b_stag: Array, steep: Array) -> Regimes:
    """Labels of batch sizes [n] from what was resampled [R]: linear up to B_20, stagnant from B_stag on, superlinear up
    to the batch whose doubling leaves SUPERLINEAR of the steps."""
    codes = np.where(size >= b_stag[:, None], 2, np.where(size <= b20[:, None], 0, 1))
    codes = np.where(size < steep[:, None], 3, codes)
    return _agreed(size, codes)


def of_doubling(size: Array, median: Array) -> Regimes:
    """Labels from the steps saved by doubling, without a model; the last batch size has none.

    Args:
        size: [n] batch sizes, ascending.
        median: [R, n] resampled median steps, infinite where the target was not reached.
    """
    codes = np.full((len(median), len(size)), -1)
    for i, small in enumerate(size[:-1]):
        ratio = size[i + 1 :] / small
        near = int(np.argmin(np.abs(np.log(ratio / 2))))
        if not DOUBLING[0] <= ratio[near] <= DOUBLING[1]:
            continue
        j = i + 1 + near
        known = np.isfinite(median[:, i]) & np.isfinite(median[:, j])
        saved = np.where(known, median[:, j], 1.0) / np.where(known, median[:, i], 1.0)
        saved **= math.log(2) / math.log(ratio[near])  # as a doubling would
        within = np.where(saved > STAGNANT, 2, np.where(saved > LINEAR, 1, np.where(saved < SUPERLINEAR, 3, 0)))
        codes[:, i] = np.where(known, within, -1)
    return _agreed(size, codes)


def _agreed(size: Array, codes: NDArray[np.int_]) -> Regimes:
    found = []
    for batch, column in zip(size, codes.T, strict=True):
        shares = [float(np.mean(column == code)) for code in range(len(LABELS))]
        best = int(np.argmax(shares))
        found.append((round(float(batch)), LABELS[best] if shares[best] >= AGREED else "undetermined"))
    return tuple(found)
