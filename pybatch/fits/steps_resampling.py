"""Intervals of the fit of steps: runs drawn anew, models fitted anew, and how far batch sizes miss the curve."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtri, stdtrit

from pybatch.fits import steps_model
from pybatch.fits.regimes import SUPERLINEAR
from pybatch.fits.solver import Array, aicc, minimize
from pybatch.fits.steps_data import REACHED, Cells, Table, best_rate, cells, stuck
from pybatch.fits.steps_likelihood import RESOLUTION, SOFT, Fit, data_points, evaluator, handicap

TRUST = 3.0  # degrees of freedom at which a misfit below that of the evaluations' intervals is believed by half
SURE = 0.99  # of the F distribution: a misfit beyond it is told
SHAPED = (1, 3, 4)  # of steps_model.FIGURES: what a sharper or softer bend moves though B_50 stays
_STREAM = 4  # times the seeds: draws from which each batch size takes those that it has


@dataclass(frozen=True)
class Scatter:
    """How far runs and batch sizes lie from the curve, in log steps."""

    inner: float  # variance of runs within their batch size
    misfit: float  # variance of batch sizes beyond that of their runs; below 0 where they lie nearer than those ask
    shared: Array  # [n] variance that all runs of a batch size have in common, of their evaluations' interval
    freedom: int  # batch sizes less unknowns
    pooled: int  # runs less unknowns
    around: float  # rms of the batch sizes' middles around the curve
    own: float  # what the runs' own spread would let it be
    beyond: bool  # the first is more than the second by chance


def scatter(fit: Fit, size: Array, data: Cells, share: Array) -> Scatter:
    """Of runs [n, seeds] that are not stuck with probability `share`."""
    weight = np.where(data.kind[0] == REACHED, share, 0.0)
    counts = weight.sum(-1)
    value = steps_model.log_steps(fit.model, fit.p[None], size)[0][0]
    residual = np.where(weight > 0, data.log[0] - value[:, None], 0.0)
    middle = (weight * residual).sum(-1) / np.maximum(counts, 1e-9)
    within = weight * (residual - middle[:, None]) ** 2
    spread = float((counts - 1).clip(0).sum())
    inner = float(within.sum()) / max(spread, 1.0)
    shared = _shared(data)
    met = counts > 0.5
    free = max(int(met.sum()) - len(fit.p), 1)
    # Method of moments: the spread of the means beyond that of their seeds; an outlier counts as in the fit.
    total = fit.sigma**2 + shared
    expected = inner / np.maximum(counts, 1) + shared
    square = np.minimum(middle**2, SOFT**2 * total)
    misfit = float(np.average((square * (met.sum() / free) - expected)[met], weights=1 / total[met]))
    ratio = float(np.mean((middle**2 / np.maximum(expected, RESOLUTION**2))[met])) * met.sum() / free
    around, own = (math.sqrt(float(np.mean(values[met]))) for values in (middle**2, expected))
    beyond = spread >= 2 and ratio > float(fdtri(free, max(spread, 1.0), SURE))
    pooled = max(round(float(counts.sum())) - len(fit.p), 1)
    return Scatter(inner, misfit, shared, free, pooled, around, own, beyond)


def resample(
    table: Table, found: Scatter, data: Cells, resamples: int, rng: np.random.Generator
) -> tuple[Cells, float]:
    """Cells [resamples, n, seeds] as another experiment could have given them, and the degrees of freedom behind.

    Whole seeds are drawn, and the rate is chosen anew. That understates the variance by the factor (m - 1) / m of m
    runs; independent errors make up for it. A batch size's own misfit beyond the spread of its runs is added too, and
    where seeds crossed between the same two evaluations, what their spread cannot show of that interval.
    """
    index = _drawn(np.asarray((~np.isnan(table.steps)).any(0)), resamples, rng)
    taking = data.kind[0] > 0
    whole = (data.late[0] == taking).all(-1) & taking.any(-1)  # all runs of a batch size, at its best rate, see `stuck`
    late = np.stack([stuck(steps) | whole[:, None] for steps in table.steps]).astype(np.float64)
    nobody = index < 0

    def drawing(values: Array) -> Array:  # [rates, R, n, seeds]
        return np.asarray(np.take_along_axis(values[:, None], np.where(nobody, 0, index)[None], -1))

    again = np.where(nobody, np.nan, drawing(table.steps))
    taken = best_rate(again)[0][None, ..., None]
    others = (drawing(values) for values in (table.variance, table.caps, late))
    steps, variance, caps, may = (np.take_along_axis(values, taken, 0)[0] for values in (again, *others))
    drawn = cells(steps, variance, caps, may.astype(bool))

    shared, misfit = found.shared, found.misfit
    met = (data.kind[0] == REACHED).any(-1)
    if misfit < 0 and shared.any():  # intervals overlap with the seeds' own spread: as far as the data can tell
        weight = 1 / (found.inner + shared[met] + RESOLUTION**2)
        trust = found.freedom / (found.freedom + TRUST)
        shared = shared * max(1 + misfit / float(np.average(shared[met], weights=weight)) * trust, 0.0)
    runs = np.maximum((data.kind[0] > 0).sum(-1), 1)  # [n]
    noise = np.sqrt(found.inner / runs)[:, None] * rng.standard_normal(drawn.log.shape)
    noise += np.sqrt(max(misfit, RESOLUTION**2) + shared)[:, None] * rng.standard_normal((*drawn.log.shape[:2], 1))
    drawn = Cells(np.where(drawn.kind == REACHED, drawn.log + noise, drawn.log), drawn.kind, drawn.variance, drawn.late)
    if runs.max() == 1:
        return drawn, float(found.freedom)
    m = float(1 / np.mean(1 / runs[met]))
    return drawn, m**2 / (m - 1 + 1 / found.pooled)  # Satterthwaite


def _drawn(made: NDArray[np.bool_], resamples: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Seeds [resamples, n, most] drawn for each batch size of those that it has [n, seeds], as many as it has; -1
    fills up. One stream of seeds serves all batch sizes, each of which takes the first that it has: where two have the
    same seeds they draw the same ones, and where they share some, often."""
    counts, seeds = made.sum(-1), made.shape[1]
    stream = rng.integers(0, seeds, (resamples, _STREAM * seeds))
    index = np.full((resamples, len(made), int(counts.max())), -1, dtype=np.intp)
    for own in np.unique(made, axis=0):
        columns = np.flatnonzero(own)
        if not len(columns):
            continue
        there = own[stream]
        first = np.argsort(~there, axis=1, kind="stable")[:, : len(columns)]
        fresh = columns[rng.integers(0, len(columns), first.shape)]
        taken = np.where(np.take_along_axis(there, first, 1), np.take_along_axis(stream, first, 1), fresh)
        index[:, (made == own).all(-1), : len(columns)] = taken[:, None]
    return index


def _shared(data: Cells) -> Array:
    """Variance [n] of log steps that all seeds of a batch size have in common: that of their interval, times the share
    of pairs of seeds that are in the same one. Pairs in different ones show it in their spread."""
    log, variance, reached = data.log[0], data.variance[0], data.kind[0] == REACHED
    count = reached.sum(-1)
    pair = reached[:, :, None] & reached[:, None, :] & ~np.eye(log.shape[-1], dtype=bool)
    same = (log[:, :, None] == log[:, None, :]) & pair
    pairs = pair.sum((-2, -1))
    share = np.where(count > 1, same.sum((-2, -1)) / np.maximum(pairs, 1), 1.0)
    result: Array = share * variance.sum(-1) / np.maximum(count, 1)
    return result


def refit(fits: list[Fit], sigma: float, drawn: Cells, size: Array, rng: np.random.Generator, shapeless: bool) -> Array:
    """Figures [R, 6] and beside them `steep` [R, 7] of each resample: of its best model, and where they hang on the
    shape of the curve, of a model drawn by how well each is supported by the data themselves (Akaike weights: Burnham
    and Anderson 2002).

    Where the data are `shapeless`, and nothing tells a bend of another shape from errors, all figures do, in every
    second resample.
    """
    runs = (drawn.kind > 0).sum((-2, -1))
    count = data_points(runs)
    least, most = float(size.min()), float(size.max())
    scores, found = [], []
    for fit in fits:
        low, high = steps_model.limits(fit.model, size)
        inside = np.clip(fit.p, low + 1.0, high - 1.0) if len(fit.p) > 1 else fit.p  # no slope at the very limits
        start = np.repeat(np.where(np.isfinite(low), inside, fit.p)[None], len(count), axis=0)
        p, cost = minimize(start, evaluator(fit.model, size, drawn, sigma), low, high, rounds=30)
        scores.append(aicc(2 * cost, count, p.shape[-1]) + handicap(fit.model, runs))
        steep = steps_model.steep(fit.model, p, SUPERLINEAR)
        found.append(np.column_stack([steps_model.figures(fit.model, p, least, most), steep]))
    rows = np.arange(len(count))
    every = np.stack(found)
    spread: Array = every[np.argmin(scores, axis=0), rows]
    own = np.array([fit.score for fit in fits])
    weights = np.exp(-(own - own.min()) / 2)
    supported = every[rng.choice(len(fits), len(count), p=weights / weights.sum()), rows]
    if shapeless:
        spread[::2] = supported[::2]
    else:
        spread[:, SHAPED] = supported[:, SHAPED]
    return spread


def interval(point: Array, spread: Array, freedom: float) -> tuple[Array, Array]:
    """95 % intervals [6] around the figures [6]: percentiles, widened as Student's t is for few degrees of freedom."""
    low = np.quantile(spread, 0.025, axis=0, method="lower")
    high = np.quantile(spread, 0.975, axis=0, method="higher")
    wider = float(stdtrit(freedom, 0.975)) / 1.96
    inside = np.isfinite(point) & (point > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        down = np.where(inside & (low > 0), point * (np.minimum(low, point) / point) ** wider, low)
        up = np.where(inside & np.isfinite(high), point * (np.maximum(high, point) / point) ** wider, high)
    return np.minimum(down, point), np.maximum(up, point)
