"""Outcomes of trials to the curves of the record: points, fits, and the ratio to the noise scale. No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from pybatch.answer.critical import with_noise_ratio
from pybatch.base import numerals as n
from pybatch.base.errors import UsageError
from pybatch.fits.steps import fit_steps
from pybatch.fits.steps_data import DIVERGED
from pybatch.fits.steps_notes import MORE
from pybatch.records import ConvergencePoint, Curve, NoiseScale, Note, PointStatus, RateSteps, aim_of
from pybatch.scaling import SEARCHED
from pybatch.sweep.search import at_edge, best_rate
from pybatch.training.trajectory import Split, loss_at, lowest, metric_of
from pybatch.training.trial import FACTOR, Outcome, Study, middle

# By how a trial without a crossing ended; met: it reached the target past the limit, or another split's alone.
_STATUS: dict[str | None, PointStatus] = {
    None: "not_run",
    "diverged": "diverged",
    "capped": "not_reached",
    "met": "not_reached",
}
_CODES = {"not_reached": math.inf, "diverged": DIVERGED, "not_run": math.nan}  # as the fit has them
_HARDER = {False: "lower", True: "higher"}  # to reach, of a figure of which higher is better
Ran = Mapping[float, Sequence[float]]  # by rate: the steps that each seed's trial ran, nan where it was not made
# In place of MORE under a rule, whose runs mostly end before the cap that a user gave.
_GIVEN_UP = (
    f"Under a rule, runs end at {FACTOR:g} times the steps of the base batch, or of tuned rates, or at --max-steps. "
    "Ease the target"
)
FEW_STEPS = 4  # a target met within so few steps says more of the first evaluations than of the batch size


def point(batch: int, split: str, study: Study, outcomes: Sequence[Outcome]) -> ConvergencePoint:
    """One batch size of a curve, from the outcomes of its study."""
    ends = {(outcome.trial.lr, outcome.trial.seed): outcome.end for outcome in outcomes}
    tried = sorted({lr for lr, _ in ends})
    rates = tuple(_rate(split, study, lr, ends) for lr in tried)
    best = best_rate(study, split, tried)
    chosen = next((r for r in rates if r.learning_rate == best), rates[0] if len(rates) == 1 else None)
    shown = rates if chosen is None else (chosen,)  # where no rate reaches, all of them are the answer
    statuses = [status for rate in shown for status in rate.statuses if status != "not_run"]
    before = [study.steps(split, best, seed) for seed in study.seeds] if best is not None else []
    return ConvergencePoint(
        batch=batch,
        steps=study.median(split, best) if best is not None else None,
        status="reached" if best is not None else _failure(statuses),
        seeds=len(study.seeds),
        learning_rate=chosen.learning_rate if chosen is not None else None,
        steps_before=middle(c.before if c is not None else math.inf for c in before) if best is not None else None,
        reached=statuses.count("reached"),
        diverged=statuses.count("diverged"),
        edge=study.search and at_edge(study, split, tried),
        rates=rates,
        other_losses=_other_losses(split, study, best, outcomes) if best is not None else (),
    )


def _other_losses(split: str, study: Study, lr: float, outcomes: Sequence[Outcome]) -> tuple[float | None, ...]:
    """The other split's loss where each seed's run met its target, at one rate."""
    other = "test" if split == "train" else "train"
    runs = {outcome.trial.seed: outcome.trajectory for outcome in outcomes if outcome.trial.lr == lr}
    crossings = {seed: study.steps(split, lr, seed) for seed in study.seeds}
    return tuple(
        loss_at(runs[seed], other, found.steps) if found is not None and seed in runs else None
        for seed, found in crossings.items()
    )


def _rate(split: str, study: Study, lr: float, ends: Mapping[tuple[float, int], str]) -> RateSteps:
    crossings = [study.steps(split, lr, seed) for seed in study.seeds]
    statuses: list[PointStatus] = [
        "reached" if c is not None else _STATUS[ends.get((lr, seed))]
        for seed, c in zip(study.seeds, crossings, strict=True)
    ]
    return RateSteps(lr, tuple(c.steps if c is not None else None for c in crossings), tuple(statuses))


def _failure(statuses: Sequence[PointStatus]) -> PointStatus:
    return "diverged" if statuses and 2 * statuses.count("diverged") >= len(statuses) else "not_reached"


def steps_of(outcomes: Sequence[Outcome], seeds: Sequence[int]) -> Ran:
    """The steps that the trials of a batch size ran."""
    ran = {(outcome.trial.lr, outcome.trial.seed): float(outcome.steps) for outcome in outcomes}
    return {lr: [ran.get((lr, seed), math.nan) for seed in seeds] for lr, _ in ran}


def curve(
    rule: str,
    split: Split,
    target: float,
    points: Sequence[ConvergencePoint],
    caps: Mapping[int, float],
    noise: NoiseScale | None,
    notes: Sequence[Note] = (),
    rates: str | None = None,
    higher: bool = False,
    ran: Mapping[int, Ran] | None = None,
) -> Curve:
    """The points of one rule and split with their fit.

    Args:
        rule, split, target: what the curve is of.
        points: of the batch sizes that were run, ascending.
        caps: steps up to which reaching counts, by batch size.
        noise: the gradient noise scale, for the ratio to it.
        notes: on batch sizes that have no point.
        rates: "higher" or "lower", where such may reach a target that none has.
        higher: of a metric, whether that is better.
        ran: by batch size, how far its trials ran: one of a rate that was behind was given up sooner, and is censored
            there. None: to `caps`.
    """
    found = [*notes, *_remarks(rule, points, caps, rates, higher)]
    bare = Curve(rule, split, tuple(points), None, None, None, None, target, higher=higher, notes=tuple(found))
    limits = {math.floor(caps[p.batch]) for p in points}
    cap = limits.pop() if len(limits) == 1 else None
    if not points:
        return dataclasses.replace(bare, notes=(*found, Note("points", "no batch size was measured")))
    if any(p.steps == 0 for p in points):
        text = f"the target {target:g} is met before the first step. Give a {_HARDER[higher]} one"
        return dataclasses.replace(bare, cap=cap, notes=(*found, Note("critical_batch", text)))
    # So few steps are too coarse a count to bend a curve, or to show that it does not.
    counted = [p for p in points if p.steps is None or p.steps > FEW_STEPS]
    if not counted:
        return dataclasses.replace(bare, cap=cap)
    table, grid, ends = _table(counted, ran or {})
    batches = [p.batch for p in counted]
    ceilings = np.array([max(caps[p.batch], *_reached(p), 1.0) for p in counted])
    ends = np.fmin(ends, ceilings[:, None])  # past it, reaching does not count
    try:
        if len(grid) == 1:
            fit = fit_steps(batches, table[0], cap=ends)
        else:
            fit = fit_steps(batches, table, cap=ends, rates=grid)
    except UsageError as error:
        return dataclasses.replace(bare, cap=cap, notes=(*found, Note("critical_batch", str(error))))
    # What the remarks have said already, with its remedy, need not be said again by the fit.
    told = len(points) == 1 or not any(p.status == "reached" for p in points)
    said = fit.notes
    if rule != SEARCHED:
        said = tuple(dataclasses.replace(note, text=note.text.replace(MORE, _GIVEN_UP)) for note in said)
    whole = dataclasses.replace(
        bare,
        s_min=fit.s_min,
        critical_batch=fit.critical_batch,
        low=fit.low,
        high=fit.high,
        b_min=fit.b_min,
        b_min_low=fit.b_min_low,
        b_min_high=fit.b_min_high,
        regimes=fit.regimes,
        fit=fit,
        cap=cap,
        notes=tuple(found) if told else (*found, *said),
    )
    return with_noise_ratio(whole, noise)


def bare_reason(batch: int, error: UsageError) -> str:
    """Why a rule has no answer for a batch size, in words that are the same for every batch size."""
    return str(error).removeprefix(f"batch {batch}: ")


def unanswered(failed: Mapping[str, Sequence[int]]) -> list[Note]:
    """A note for each reason why batch sizes have no point."""
    return [Note("points", f"batch {', '.join(map(str, batches))}: {reason}") for reason, batches in failed.items()]


def nearest(split: str, outcomes: Sequence[Outcome]) -> str | None:
    """How near a target came that no run has reached; None where no loss was finite."""
    found = _lowest(split, outcomes)
    if found is None:
        return None
    loss, batch, lr, step = found
    place = f"at batch {n.count(batch)}, rate {n.number(lr, 2)}, step {n.count(step)}"
    side = {"higher": ", the highest rate tried there", "lower": ", the lowest rate tried there"}
    what = f"lowest {split} loss was {n.number(loss)}"
    if metric_of(split):
        sign = min(outcome.trajectory.sign(split) for outcome in outcomes if outcome.trajectory.has(split))
        what = f"best {aim_of(split)} was {n.number(sign * loss)}"
    return f"the {what}, {place}{side.get(beyond(split, outcomes) or '', '')}"


def beyond(split: str, outcomes: Sequence[Outcome]) -> str | None:
    """Where rates may reach a target that none has: "higher" or "lower", where the lowest loss is at that end of the
    rates tried at its batch size."""
    found = _lowest(split, outcomes)
    if found is None:
        return None
    tried = sorted({outcome.trial.lr for outcome in outcomes if outcome.trial.batch == found[1]})
    ends = {tried[0]: "lower", tried[-1]: "higher"} if len(tried) > 1 else {}
    return ends.get(found[2])


def _lowest(split: str, outcomes: Sequence[Outcome]) -> tuple[float, int, float, int] | None:
    """The lowest loss, its batch size, rate and step."""
    found = []
    for outcome in outcomes:
        if not outcome.trajectory.has(split):
            continue
        loss, step = lowest(outcome.trajectory, split)
        if math.isfinite(loss):
            found.append((loss, outcome.trial.batch, outcome.trial.lr, step))
    return min(found, default=None)


def _reached(p: ConvergencePoint) -> list[float]:
    return [steps for rate in p.rates for steps in rate.steps if steps is not None] or [1.0]


def _table(points: Sequence[ConvergencePoint], ran: Mapping[int, Ran]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps [rates, batches, seeds], rates [rates, batches] and the steps that were run [rates, batches, seeds].

    All are nan where a batch has fewer rates, or a rate was not run with a seed.
    """
    most = max(len(p.rates) for p in points)
    seeds = max((len(rate.steps) for p in points for rate in p.rates), default=0)
    steps, rates = np.full((most, len(points), seeds), np.nan), np.full((most, len(points)), np.nan)
    ends = np.full_like(steps, np.nan)
    for j, p in enumerate(points):
        # Whole rates first: where none reaches, the fit takes the first one, and must find all seeds in it.
        for i, rate in enumerate(sorted(p.rates, key=lambda rate: rate.statuses.count("not_run"))):
            rates[i, j] = rate.learning_rate
            ends[i, j, : len(rate.steps)] = ran.get(p.batch, {}).get(rate.learning_rate, math.inf)
            for k, (value, status) in enumerate(zip(rate.steps, rate.statuses, strict=True)):
                steps[i, j, k] = value if value is not None else _CODES[status]
    return steps, rates, ends


def _remarks(
    rule: str, points: Sequence[ConvergencePoint], caps: Mapping[int, float], rates: str | None, higher: bool
) -> list[Note]:
    """What a reader must know of the points before any fit."""
    notes = []
    if points and all(p.status == "diverged" for p in points):
        notes.append(Note("points", "all trials diverged. Give lower learning rates, or a smaller base batch"))
    elif points and not any(p.status == "reached" for p in points):
        most = max(caps[p.batch] for p in points)
        text = f"no batch size reached the target in half of its seeds within {most:g} steps. "
        text += f"Try {rates} rates; or give" if rates is not None else "Give"
        text += f" a {_HARDER[not higher]} target, or more steps"
        notes.append(Note("points", text))
    if len(points) == 1:
        notes.append(Note("points", "one batch size shows no dependence on it. Give at least three"))
    early = [p.batch for p in points if p.steps is not None and 0 < p.steps <= FEW_STEPS]
    if early:
        text = (
            f"the target is met within {FEW_STEPS} steps at batch {', '.join(map(str, early))}, too coarse a count for "
        )
        text += f"the fit, which is without them. Give a {_HARDER[higher]} one"
        notes.append(Note("points", text))
    return notes
