"""Fit of steps to target against batch size, with intervals: the critical batch from anybody's numbers. No torch here.

Log steps in log-parameters. Errors are normal in log steps, with tails that count linearly (soft-L1); a run that did
not reach the target within its cap T counts by its probability, 1 - Phi((ln T - mu) / sigma); a diverged run is a
label, never a value; a run that is late among its batch size's, and a batch size that is late among its neighbours, may
be stuck, and then bends nothing. Where the loss was evaluated now and then, steps lie between two evaluations: they
count as the mean of their logarithm over that interval, with its variance added to that of the runs. The soft tails
stay, which the probability of an interval under a normal would lose. The candidates of `steps_model` are compared as
`steps_likelihood.best_of` says.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from pybatch.base.arguments import typed
from pybatch.fits import steps_model, steps_notes
from pybatch.fits.regimes import Regimes, of_doubling, of_model, unknown
from pybatch.fits.solver import Array
from pybatch.fits.steps_checks import checked
from pybatch.fits.steps_data import REACHED, Cells, Table, best_rate, cells, choose_rates, falls_to, stuck
from pybatch.fits.steps_likelihood import FEW, Fit, best_of, candidates, fit_model, shares
from pybatch.fits.steps_resampling import Scatter, interval, refit, resample, scatter
from pybatch.records import Note, StepsFit

LEAST = 3  # batch sizes that must reach the target for a fit
LEAST_FREE = 2  # degrees of freedom of a single seed's batch sizes: one alone can be met by chance, however few steps
ASTRAY = math.log(2)  # rms of the batch sizes around the best curve, in log steps, from which no model follows them
BENDS = slice(1, 5)  # the critical batches among steps_model.FIGURES


@typed
def fit_steps(
    batches: Sequence[float] | ArrayLike,
    steps: ArrayLike,
    *,
    model: str | None = None,
    cap: ArrayLike | None = None,
    rates: ArrayLike | None = None,
    before: ArrayLike | None = None,
    seeds: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 400,
) -> StepsFit:
    """Critical batch sizes from steps to target at several batch sizes.

    Args:
        batches: [n] distinct batch sizes, in any order.
        steps: [n], or [n, seeds], or with `rates` [rates, n, seeds]: steps to the target; math.inf where it was not
            reached within the cap, -math.inf where the run diverged, math.nan where nobody made it. The last counts for
            nothing: batch sizes may have any numbers of runs.
        model: one of `steps_model.MODELS` ("hyperbola", ...); None: the best by AICc.
        cap: steps at which runs were given up, a number, or [n], or one a run; None: the largest number in `steps`,
            which it cannot have been below.
        rates: [rates] or [rates, n] learning rates of the first axis, nan for a slot not used. Each batch size takes
            the rate of the least median, each rate over its own runs, unreached and diverged counting as infinite, and
            takes it anew in each resample. Half of the runs must reach; of an even number, a rate that just half reach
            comes after all that more reach.
        before: shaped as `steps`, where `steps` are the first evaluations at or below the target: the last evaluations
            above it, nan where unknown. Steps then lie anywhere between the two. None: steps are exact.
        seeds: for the long form, in which all lists have one entry a run: which seed it is of, any name. Runs of one
            seed at several batch sizes are drawn together. `rates`, `cap` and `before` are then lists too, or None.
        seed: of the bootstrap.
        resamples: bootstrap resamples behind the 95 % intervals; whole seeds are drawn, of those that each batch size
            has. What they cannot show (a single seed, a model's misfit) is added as independent errors, and the ends
            are widened as few seeds ask. Where models are about as good, the intervals of figures that hang on the
            curve's shape (B_20, B_stag) hold those of each; of one seed all intervals do. One seed at hardly more batch
            sizes than the model has unknowns shows nothing: both ends are None.

    Returns:
        The fit, with notes on what a reader must know. Where under three batch sizes reach the target in most of
        their seeds, its figures are None and a note says what to change.

    Raises:
        UsageError: values that cannot be steps or batch sizes.
    """
    table = checked(batches, steps, model, cap, rates, resamples, before, seeds)
    chosen = choose_rates(table.steps, table.rates)
    taken = chosen.index[None, :, None]
    picked, variance, caps = (
        np.take_along_axis(values, taken, 0)[0] for values in (table.steps, table.variance, table.caps)
    )
    notes = steps_notes.of_data(table, picked, chosen, cap is not None)
    if before is None and (note := steps_notes.of_grid(picked)) is not None:
        notes.append(note)
    reached = int(np.isfinite(chosen.median).sum())
    most = int((~np.isnan(picked)).sum(-1).max())
    if reached < LEAST:
        notes.insert(0, steps_notes.of_nothing(table, picked, reached, LEAST))
        nothing = (None,) * 8
        return StepsFit(*nothing, batches=reached, seeds=most, notes=tuple(notes))

    data = cells(picked[None], variance[None], caps[None], stuck(picked)[None])
    models = [model] if model is not None else candidates(reached)
    fits = [fit_model(name, table.size, data) for name in models]
    best = best_of(fits, table.size, data)
    least, largest = float(table.size.min()), float(table.size.max())
    point = steps_model.figures(best.model, best.p[None], least, largest)[0]
    rivals = sorted((fit for fit in fits if fit.score < best.score), key=lambda fit: fit.score)
    few = int((data.kind > 0).sum()) <= FEW
    notes += [_rival(fit, best, least, largest, few) for fit in (rivals[:1] if few else rivals)]
    share = shares(best, table.size, data)
    notes += steps_notes.of_stuck(table.size, data.kind[0], share)
    met = int((data.kind[0] == REACHED).any(-1).sum())
    if most == 1:
        notes.append(steps_notes.of_one_seed(met, len(best.p), LEAST_FREE))
    if most == 1 and met - len(best.p) < LEAST_FREE:
        low, high = np.full((2, len(steps_model.FIGURES)), np.nan)
        return _record(table, fits, best, point, low, high, (unknown(table.size),) * 2, data, notes)
    found = scatter(best, table.size, data, share)
    drawn, freedom = resample(table, found, data, resamples, np.random.default_rng(seed))
    spread = refit(fits, best.sigma, drawn, table.size, np.random.default_rng(seed), most == 1)
    low, high = interval(point, spread[:, :-1], freedom)
    medians = best_rate(
        np.where(drawn.kind == REACHED, np.exp(drawn.log), np.where(drawn.kind > 0, np.inf, np.nan))[None]
    )
    regimes = of_model(table.size, spread[:, 1], spread[:, 3], spread[:, -1]), of_doubling(table.size, medians[1])
    return _record(table, fits, best, point, low, high, regimes, data, notes, found)


def _rival(fit: Fit, best: Fit, least: float, largest: float, few: bool) -> Note:
    """On a model that has a handicap, and whose AICc is lower by less than that."""
    critical = float(steps_model.figures(fit.model, fit.p[None], least, largest)[0][2])
    return steps_notes.of_rival(fit.model, best.model, None if few else best.score - fit.score, critical)


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
    found: Scatter | None = None,
) -> StepsFit:
    size, unknowns = table.size, steps_model.NAMES[best.model]
    parameters = dict(zip(unknowns, np.exp(best.p).tolist(), strict=True))
    residual = data.log[0] - steps_model.log_steps(best.model, best.p[None], size)[0][0][:, None]
    bend, reach = parameters.get("b_c"), 0.95 * steps_model.REACH
    # A bend at the end of the search is the search's, not the data's.
    inverse = best.model == "inverse" or (bend is not None and bend > size.max() * reach)
    flat = best.model == "flat" or (bend is not None and bend < size.min() / reach)
    exponent = parameters.get("alpha")
    faster = best.model == "power-law" and exponent is not None and exponent >= 1
    missed = found if found is not None and found.beyond else None
    turn = falls_to(data) if flat or (missed is not None and missed.around > ASTRAY) else None
    if missed is not None:
        notes = [*notes, steps_notes.of_misfit(missed.around, missed.own, turn is None)]
    if turn is not None:  # flat lies between batch sizes that fall and those past them, and no curve follows both
        point, low, high = np.full((3, len(steps_model.FIGURES)), np.nan)
        regimes, parameters = (unknown(size), regimes[1]), {}
        reached, made = (data.kind[0] == REACHED).sum(-1), (data.kind[0] > 0).sum(-1)
        between = (2 * reached < made) & (np.cumsum(2 * reached > made) > 0) & (size < size[turn])
        notes = [*notes, steps_notes.of_turn(float(size[turn]), float(size.max()), size[between])]
    else:
        shape = "inverse" if inverse else "flat" if flat else "faster" if faster else best.model
        made = table.steps[np.isfinite(table.steps)]
        whole = bool(np.mean(made == np.round(made)) > 0.5)
        notes = [*notes, *steps_notes.of_fit(shape, point, size, exponent, float(low[2]), float(high[2]), whole)]
        point, low, high = point.copy(), low.copy(), high.copy()
        if inverse or faster:
            point[BENDS], high[BENDS] = np.nan, np.inf
            low[BENDS] = np.minimum(low[BENDS], size.max())
        elif flat:
            point[BENDS], low[BENDS] = np.nan, 0.0
            high[BENDS] = np.maximum(high[BENDS], size.min())
    s_min, b20, b50, b_stag, zhang, b_min = (_known(v) for v in point)
    open_ = low[1:4] < size.min() / steps_notes.REACH  # so far below, an end bounds nothing
    notes += steps_notes.of_open_ends(open_ & np.isfinite(point[1:4]))
    low[1:4] = np.where(open_, np.nan, low[1:4])
    # The fewest examples are sought among the batch sizes tested: an end of those is no end.
    low[5] = low[5] if low[5] > size.min() else np.nan
    high[5] = high[5] if high[5] < size.max() else np.nan
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
        b20_zhang=zhang,
        b20_zhang_low=lows[4],
        b20_zhang_high=highs[4],
        b_min=b_min,
        b_min_low=lows[5],
        b_min_high=highs[5],
        regimes=regimes[0],
        measured_regimes=regimes[1],
        parameters=parameters,
        candidates={fit.model: fit.score - min(fit.score for fit in fits) for fit in fits},
        rms_log_error=float(np.sqrt(np.mean(residual[data.kind[0] == REACHED] ** 2))),
        batches=int((data.kind[0] == REACHED).any(-1).sum()),
        seeds=int((data.kind[0] > 0).sum(-1).max()),
        notes=tuple(notes),
    )


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) and value > 0 else None
