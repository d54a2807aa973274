"""A curve drawn around its fit, as what was measured leaves it possible: universal kriging (Cressie 1993, 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pybatch.fits.solver import Array

VAGUE = 3.0  # prior standard deviation of the models' log-parameters: the data decide


def kriged(
    count: int,
    size: Array,
    curve: Callable[[Array], Array],
    middle: Array,
    slopes: Array,
    start: Array,
    prior: Array,
    length: float,
    least: float,
    share: float,
    x: Array,
    y: Array,
    variance: Array,
    rng: np.random.Generator,
    unknowns_beside: int = 0,
    error_share: float | None = None,
) -> Array:
    """Members [n, g] of a curve and a residual, given y at the batch sizes x.

    The curve's unknowns follow from its slopes at the fit; the curve itself is then drawn as it is, and the residual
    conditioned on what it leaves of the data. Where the curve is linear in them this is universal kriging exactly.

    Args:
        count: n.
        size: [g] batch sizes, which hold x.
        curve: its unknowns [n, p] to values [n, g].
        middle, slopes: [p], [g, p]: the fitted unknowns, and d curve / d unknowns there.
        start, prior: [p]: mean and standard deviation of the unknowns before the data.
        length, least: of the residual, an Ornstein-Uhlenbeck process in ln B: as rough as waves and cliffs are.
        share: of the misfit that the residual is taken to have; the rest is error of single measurements.
        x, y, variance: [o] what was measured, with its variance.
        rng: of the draws.
        unknowns_beside: those that the curve has taken from the data and holds fixed.
        error_share: of the misfit that each measurement is taken to be off by; None: what `share` leaves.
    """
    log, at = np.log(size), np.searchsorted(size, x)
    fitted = curve(middle[None])[0]
    missed = y - fitted[at]
    free = max(len(x) - len(middle) - unknowns_beside, 1)
    misfit = max(float(np.sum(missed**2) / free - variance.mean()), 0.0) if len(x) else 0.0
    own = max(share * misfit, least**2)
    variance = variance + (error_share if error_share is not None else 1 - share) * misfit
    decay = np.exp(-np.diff(log) / length)
    rough = rng.standard_normal((count, len(size))) * math.sqrt(own)
    for i in range(1, len(size)):
        rough[:, i] = decay[i - 1] * rough[:, i - 1] + math.sqrt(1 - decay[i - 1] ** 2) * rough[:, i]
    unknowns = start + prior * rng.standard_normal((count, len(prior)))
    if not len(x):
        return curve(unknowns) + rough
    told = y + np.sqrt(variance) * rng.standard_normal((count, len(x)))
    within = own * np.exp(-np.abs(log[:, None] - log[at]) / length)
    inner = within[at] + np.diag(variance)
    linear = (slopes[at] * prior**2) @ slopes[at].T
    gap = told - fitted[at] - (unknowns - middle) @ slopes[at].T - rough[:, at]
    unknowns = unknowns + np.linalg.solve(inner + linear, gap.T).T @ (slopes[at] * prior**2)
    drawn = curve(unknowns) + rough
    result: Array = drawn + np.linalg.solve(inner, (told - drawn[:, at]).T).T @ within.T  # Matheron's rule
    return result
