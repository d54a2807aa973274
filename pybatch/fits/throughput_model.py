"""Step time against batch size, affine or with a floor: the curve, what follows from it, and its best fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pybatch.fits.solver import Array, Rows, minimize

Model = Literal["affine", "floor", "wave"]

SOFT = 0.05  # log time: residuals past 5 % count linearly; repeats of a steady step agree within that
RESOLUTION = 1e-5  # log time: smaller residuals are rounding, and a perfect fit must not drive AICc to minus infinity
AROUND = (-4, -2, -1, 0, 1, 2, 4)  # places on the grid of starts beside a good one: a floor's cost has kinks
REACH = 1e3  # half batch is sought within this factor of the batches measured; beyond, they say nothing about it


# Parameters, last axis: ln beta, ln(alpha / beta), and ln floor for the floor model.


def log_time(p: Array, size: Array) -> tuple[Array, Array]:
    """ln t [..., n] and its Jacobian [..., n, P] at parameters [..., P]."""
    half = np.exp(p[..., 1:2])
    whole = half + size
    value = p[..., 0:1] + np.log(whole)
    slope = np.ones((*value.shape, p.shape[-1]))
    slope[..., 1] = half / whole
    if p.shape[-1] == 3:
        flat = p[..., 2:3] > value
        value = np.where(flat, p[..., 2:3], value)
        slope *= ~flat[..., None]
        slope[..., 2] = flat
    return value, slope


def figures(p: Array, gain: float) -> Array:
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


def limits(size: Array) -> tuple[float, float]:
    return float(np.log(size.min() / REACH)), float(np.log(size.max() * REACH))


def starts(model: Model, size: Array, data: Array) -> Array:
    """Starting points [S, P]: half batches over all decades; for a floor also each number of batch sizes on it.

    Of the half batches those about one that costs no more than its neighbours: the others lead there.
    """
    grid = np.linspace(*limits(size), 40)
    order = np.argsort(size)
    starts = []
    for flat in range(1) if model == "affine" else range(1, len(size) - 1):
        rest = order[flat:]
        level = [] if model == "affine" else [np.full_like(grid, data[order[:flat]].mean())]
        beta = np.median(data[rest] - np.log(np.exp(grid)[:, None] + size[rest]), axis=-1)
        tried = np.stack([beta, grid, *level], axis=-1)
        around = np.pad(cost(data - log_time(tried, size)[0]), 1, constant_values=np.inf)
        lowest = np.flatnonzero((around[1:-1] <= around[:-2]) & (around[1:-1] <= around[2:]))
        starts.append(tried[np.unique(np.clip(lowest[:, None] + AROUND, 0, len(grid) - 1))])
    return np.concatenate(starts)


def cost(residual: Array) -> Array:
    """Soft-L1: squares below SOFT, absolute values above; RESOLUTION keeps it from vanishing."""
    scaled = (residual / SOFT) ** 2
    total: Array = (2 * (np.sqrt(1 + scaled) - 1)).sum(axis=-1)
    total *= SOFT**2
    total += residual.shape[-1] * RESOLUTION**2
    return total


def solve(starts: Array, size: Array, data: Array) -> tuple[Array, float]:
    """The best of all polished starts [P], and its cost."""
    return solve_each([starts], size[None], data)[0]


def solve_each(starts: Sequence[Array], sizes: Array, data: Array) -> list[tuple[Array, float]]:
    """`solve` for each of several ways [W, n] to take the batch sizes, all at once."""
    owner = np.repeat(np.arange(len(starts)), [len(each) for each in starts])
    p, cost = polish(np.concatenate(starts), sizes[owner], np.broadcast_to(data, (len(owner), len(data))))
    best = [int(min(np.flatnonzero(owner == i), key=cost.__getitem__)) for i in range(len(starts))]
    return [(p[i], float(cost[i])) for i in best]


def polish(p: Array, size: Array, data: Array) -> tuple[Array, Array]:
    """All rows at once: parameters [R, P], batch sizes [n] or [R, n], ln seconds [R, n] -> parameters, cost [R]."""
    size = np.broadcast_to(size, data.shape)

    def evaluate(trial: Array, rows: Rows) -> tuple[Array, Array, Array]:
        value, slope = log_time(trial, size[rows])
        residual = data[rows] - value
        scaled = slope / np.sqrt(1 + (residual / SOFT) ** 2)[..., None]
        normal = scaled.swapaxes(-1, -2) @ slope
        return cost(residual), (scaled * residual[..., None]).sum(axis=-2), normal

    low, high = (np.full(p.shape, end) for end in (-np.inf, np.inf))
    low[:, 1], high[:, 1] = np.log(size.min(axis=1) / REACH), np.log(size.max(axis=1) * REACH)
    return minimize(p, evaluate, low, high)
