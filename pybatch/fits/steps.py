"""Fit of steps to target against batch size, with intervals: the critical batch from anybody's numbers. No torch here.

Log steps in log-parameters. Errors are normal in log steps, with tails that count linearly (soft-L1); a run that did
not reach the target within its cap T counts by its probability, 1 - Phi((ln T - mu) / sigma); a diverged run is a
label, never a value. Where the loss was evaluated now and then, steps lie between two evaluations: they count as the
mean of their logarithm over that interval, with its variance added to that of the runs. The soft tails stay, which the
probability of an interval under a normal would lose. The candidates of `steps_model` are compared by AICc.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from pybatch.fits import steps_model, steps_notes
from pybatch.fits.regimes import Regimes, of_doubling, of_model, unknown
from pybatch.fits.solver import Array, aicc, minimize
from pybatch.fits.steps_data import REACHED, Cells, Table, best_rate, cells, checked, choose_rates, falls_to
from pybatch.fits.steps_likelihood import RESOLUTION, SOFT, Fit, candidates, data_points, evaluator, fit_model, handicap
from pybatch.records import Note, StepsFit

TRUST = 3.0  # degrees of freedom at which a misfit below that of the evaluations' intervals is believed by half
LEAST = 3  # batch sizes that must reach the target for a fit
LEAST_FREE = 2  # degrees of freedom of a single seed's batch sizes: one alone can be met by chance, however few steps


def fit_steps(
    batches: Sequence[int] | ArrayLike,
    steps: ArrayLike,
    *,
    model: str | None = None,
    cap: ArrayLike | None = None,
    rates: ArrayLike | None = None,
    before: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = 400,
) -> StepsFit:
    """Critical batch sizes from steps to target at several batch sizes.

    Args:
        batches: [n] distinct batch sizes, in any order.
        steps: [n], or [n, seeds], or with `rates` [rates, n, seeds]: steps to the target; math.inf where it was not
            reached within the cap, math.nan where the run diverged or is missing.
        model: one of `steps_model.MODELS` ("hyperbola", ...); None: the best by AICc.
        cap: steps at which runs were given up, a number or [n]; None: the largest number in `steps`, which it cannot
            have been below.
        rates: [rates] or [rates, n] learning rates of the first axis, nan for a slot not used. Each batch size takes
            the rate of the least median, unreached counting as infinite, and takes it anew in each resample. Half of
            the seeds must reach; of an even number, a rate that just half reach comes after all that more reach.
        before: shaped as `steps`, where `steps` are the first evaluations at or below the target: the last evaluations
            above it, nan where unknown. Steps then lie anywhere between the two. None: steps are exact.
        seed: of the bootstrap.
        resamples: bootstrap resamples behind the 95 % intervals; whole seeds are drawn. What they cannot show (a
            single seed, a model's misfit) is added as independent errors, and the ends are widened as few seeds ask.
            One seed at hardly more batch sizes than the model has unknowns shows nothing: both ends are None.

    Returns:
        The fit, with notes on what a reader must know. Where under three batch sizes reach the target in most of
        their seeds, its figures are None and a note says what to change.

    Raises:
        UsageError: values that cannot be steps or batch sizes.
    """
    table = checked(batches, steps, model, cap, rates, resamples, before)
    chosen = choose_rates(table.steps, table.rates)
    taken = chosen.index[None, :, None]
    picked, variance = (np.take_along_axis(values, taken, 0)[0] for values in (table.steps, table.variance))
    notes = steps_notes.of_data(table, picked, chosen, cap is not None)
    reached = int(np.isfinite(chosen.median).sum())
    if reached < LEAST:
        notes.insert(0, steps_notes.of_nothing(table, picked, reached, LEAST))
        nothing = (None,) * 8
        return StepsFit(*nothing, batches=reached, seeds=picked.shape[1], notes=tuple(notes))

    data = cells(picked[None], variance[None], table.caps)
    models = [model] if model is not None else candidates(reached, int((data.kind > 0).sum()))
    fits = [fit_model(name, table.size, data) for name in models]
    best = fits[int(np.argmin([fit.score + handicap(fit.model) for fit in fits]))]
    least = float(table.size.min())
    point = steps_model.figures(best.model, best.p[None], least)[0]
    rivals = [fit for fit in fits if fit.score < best.score]
    notes += [_rival(fit.model, best.score - fit.score, fit.p, least) for fit in rivals]
    met, seeds = int((data.kind[0] == REACHED).any(-1).sum()), picked.shape[1]
    if seeds == 1:
        notes.append(steps_notes.of_one_seed(met, len(best.p), LEAST_FREE))
    if seeds == 1 and met - len(best.p) < LEAST_FREE:
        low, high = np.full((2, 4), np.nan)
        return _record(table, fits, best, point, low, high, (unknown(table.size),) * 2, data, notes)
    drawn, freedom = _resample(table, best, data, resamples, np.random.default_rng(seed))
    spread = _refit(fits, best.sigma, drawn, table.size, least)
    low, high = _interval(point, spread, freedom)
    medians = best_rate(np.where(drawn.kind == REACHED, np.exp(drawn.log), np.inf)[None])[1]
    regimes = of_model(table.size, spread[:, 1], spread[:, 3]), of_doubling(table.size, medians)
    return _record(table, fits, best, point, low, high, regimes, data, notes)


def _rival(model: str, better: float, p: Array, least: float) -> Note:
    """On a model of three unknowns whose AICc is lower by less than SUPPORT."""
    critical = float(steps_model.figures(model, p[None], least)[0][2])
    return steps_notes.of_rival(model, better, critical)


def _resample(table: Table, fit: Fit, data: Cells, resamples: int, rng: np.random.Generator) -> tuple[Cells, float]:
    """Cells [resamples, n, seeds] as another experiment could have given them, and the degrees of freedom behind.

    Whole seeds are drawn, and the rate is chosen anew. That understates the variance by the factor (m - 1) / m of m
    seeds; independent errors make up for it. A batch size's own misfit beyond the spread of its seeds is added too,
    and where seeds crossed between the same two evaluations, what their spread cannot show of that interval.
    """
    m = table.steps.shape[-1]
    index = rng.integers(0, m, (resamples, m))
    again, open_ = (np.moveaxis(v[..., index], 2, 1) for v in (table.steps, table.variance))  # [rates, R, n, seeds]
    taken = best_rate(again)[0][None, ..., None]
    drawn = cells(np.take_along_axis(again, taken, 0)[0], np.take_along_axis(open_, taken, 0)[0], table.caps)

    reached = data.kind[0] == REACHED
    counts = reached.sum(-1)
    value = steps_model.log_steps(fit.model, fit.p[None], table.size)[0][0]
    residual = np.where(reached, data.log[0] - value[:, None], 0.0)
    middle = residual.sum(-1) / np.maximum(counts, 1)
    within = np.where(reached, residual - middle[:, None], 0.0)
    inner = float(np.sum(within**2)) / max(int((counts - 1).clip(0).sum()), 1)
    shared = _shared(data)
    met = counts > 0
    free = max(int(met.sum()) - len(fit.p), 1)
    # Method of moments: the spread of the means beyond that of their seeds; an outlier counts as in the fit.
    total = fit.sigma**2 + shared
    excess = np.minimum(middle**2, SOFT**2 * total) * (met.sum() / free) - inner / np.maximum(counts, 1) - shared
    misfit = float(np.average(excess[met], weights=1 / total[met]))
    if misfit < 0 and shared.any():  # intervals overlap with the seeds' own spread: as far as the data can tell
        shared *= max(1 + misfit / float(np.average(shared[met], weights=1 / total[met])) * free / (free + TRUST), 0.0)
    noise = math.sqrt(inner / m) * rng.standard_normal(drawn.log.shape)
    noise += np.sqrt(max(misfit, RESOLUTION**2) + shared)[:, None] * rng.standard_normal((*drawn.log.shape[:2], 1))
    log = np.where(drawn.kind == REACHED, drawn.log + noise, drawn.log)
    drawn = Cells(log, drawn.kind, drawn.variance)
    if m == 1:
        return drawn, float(free)
    pooled = max(int(counts.sum()) - len(fit.p), 1)
    return drawn, m**2 / (m - 1 + 1 / pooled)  # Satterthwaite


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


def _refit(fits: list[Fit], sigma: float, drawn: Cells, size: Array, least: float) -> Array:
    """Figures [R, 4] of the best model of each resample."""
    count = data_points((drawn.kind > 0).sum((-2, -1)))
    scores, found = [], []
    for fit in fits:
        low, high = steps_model.limits(fit.model, size)
        inside = np.clip(fit.p, low + 1.0, high - 1.0) if len(fit.p) > 1 else fit.p  # no slope at the very limits
        start = np.repeat(np.where(np.isfinite(low), inside, fit.p)[None], len(count), axis=0)
        p, cost = minimize(start, evaluator(fit.model, size, drawn, sigma), low, high, rounds=30)
        scores.append(aicc(2 * cost, count, p.shape[-1]) + handicap(fit.model))
        found.append(steps_model.figures(fit.model, p, least))
    best = np.argmin(scores, axis=0)
    spread: Array = np.stack(found)[best, np.arange(len(count))]
    return spread


def _interval(point: Array, spread: Array, freedom: float) -> tuple[Array, Array]:
    """95 % intervals [4] around the figures [4]: percentiles, widened as Student's t is for few degrees of freedom."""
    low = np.quantile(spread, 0.025, axis=0, method="lower")
    high = np.quantile(spread, 0.975, axis=0, method="higher")
    wider = float(stdtrit(freedom, 0.975)) / 1.96
    inside = np.isfinite(point) & (point > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        down = np.where(inside & (low > 0), point * (np.minimum(low, point) / point) ** wider, low)
        up = np.where(inside & np.isfinite(high), point * (np.maximum(high, point) / point) ** wider, high)
    return np.minimum(down, point), np.maximum(up, point)


def _record(
    table: Table,
    fits: list[Fit],
    best: Fit,
    point: Array,
    low: Array,
    high: Array,
    regimes: tuple[Regimes, Regimes],
    data: Cells,
    notes: list[Note],
) -> StepsFit:
    size, unknowns = table.size, steps_model.NAMES[best.model]
    parameters = dict(zip(unknowns, np.exp(best.p).tolist(), strict=True))
    residual = data.log[0] - steps_model.log_steps(best.model, best.p[None], size)[0][0][:, None]
    bend, reach = parameters.get("b_c"), 0.95 * steps_model.REACH
    # A bend at the end of the search is the search's, not the data's.
    inverse = best.model == "inverse" or (bend is not None and bend > size.max() * reach)
    flat = best.model == "flat" or (bend is not None and bend < size.min() / reach)
    turn = falls_to(data) if flat else None
    if turn is not None:  # batch sizes past it outweigh those that fall, and flat lies between both
        point, low, high = np.full((3, 4), np.nan)
        regimes, parameters = (unknown(size), regimes[1]), {}
        notes = [*notes, steps_notes.of_turn(float(size[turn]), float(size.max()))]
    else:
        shape = "inverse" if inverse else "flat" if flat else best.model
        notes = [*notes, *steps_notes.of_fit(shape, point, size, parameters.get("alpha"), float(high[2]))]
        if inverse:
            point, low, high = _unbounded(point, np.minimum(low, size.max()), np.full_like(high, np.inf))
        elif flat:
            ends = np.concatenate([high[:1], np.maximum(high[1:], size.min())])
            point, low, high = _unbounded(point, np.concatenate([low[:1], np.zeros(3)]), ends)
    s_min, b20, b50, b_stag = (_known(v) for v in point)
    open_ = np.append(False, low[1:] < size.min() / steps_notes.REACH)  # so far below, an end bounds nothing
    notes += steps_notes.of_open_ends(open_[1:] & np.isfinite(point[1:]))
    low = np.where(open_, np.nan, low)
    lows, highs = [_known(v) for v in low], [_known(v) for v in high]
    return StepsFit(
        model=best.model if turn is None else None,
        s_min=s_min,
        critical_batch=b50,
        low=lows[2],
        high=highs[2],
        b20=b20,
        b50=b50,
        b_stag=b_stag,
        s_min_low=lows[0],
        s_min_high=highs[0],
        b20_low=lows[1],
        b20_high=highs[1],
        b_stag_low=lows[3],
        b_stag_high=highs[3],
        regimes=regimes[0],
        measured_regimes=regimes[1],
        parameters=parameters,
        candidates={fit.model: fit.score - min(fit.score for fit in fits) for fit in fits},
        rms_log_error=float(np.sqrt(np.mean(residual[data.kind[0] == REACHED] ** 2))),
        batches=int((data.kind[0] == REACHED).any(-1).sum()),
        seeds=table.steps.shape[-1],
        notes=tuple(notes),
    )


def _unbounded(point: Array, low: Array, high: Array) -> tuple[Array, Array, Array]:
    """The figures without their critical batches, whose intervals are bounds."""
    return np.concatenate([point[:1], np.full(3, np.nan)]), low, high


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) and value > 0 else None
