"""What a reader of a fit of steps to target must know, as notes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pybatch.base.numerals import count, counted, number, share
from pybatch.fits.solver import Array
from pybatch.fits.steps_data import Choice, Table
from pybatch.records import Note

REACH = 32  # times below the smallest batch from where on an end of an interval bounds nothing
LEAST_ON_GRID = 5  # runs that show a grid of evaluations
COARSE = 0.03  # of the fewest steps: a finer grid is worth a word only beside what the seeds' mean is known by
FINE = 0.002  # of the fewest steps: a finer grid is not
CHANCE = 1e-3  # that steps of no grid have so large a common divisor
FEW_STEPS = 10.0  # S_min below which a step is too coarse a unit: the models fail there
MORE = "Raise the cap on steps, or ease the target"  # where too few batch sizes reached it


def of_data(table: Table, picked: Array, chosen: Choice, capped: bool) -> list[Note]:
    """On the runs that went into a fit: which did not reach, diverged, or had their best rate at the edge.

    Args:
        table: all runs.
        picked: [n, seeds] steps at the chosen rates.
        chosen: the rates.
        capped: whether the cap is known.
    """
    notes, size = [], table.size
    made = (~np.isnan(picked)).sum(-1)
    if made.min() < made.max():
        text = f"batch sizes have from {made.min()} to {made.max()} runs: each is judged on its own"
        notes.append(Note("points.steps", text))
    lost = np.isneginf(picked)
    if lost.any():
        text = f"runs that diverged are left out: {_counted(size, lost, made)}. A smaller learning rate may reach"
        notes.append(Note("points.steps", text))
    missed = np.isposinf(picked)
    if missed.any():
        known = "" if capped else ", the cap taken as the largest number of steps given"
        text = (
            f"runs that did not reach the target count as longer than their cap{known}: {_counted(size, missed, made)}"
        )
        notes.append(Note("points.steps", text))
    if chosen.edge.any():
        text = (
            f"the best learning rate is at the edge of those tried at batch {_listed(size[chosen.edge])}: a better one "
            "may lie beyond. Extend the grid"
        )
        notes.append(Note("points.learning_rate", text))
    return notes


def of_one_seed(met: int, unknowns: int, least: int) -> Note:
    """What the interval of one seed at `met` batch sizes rests on, or why there is none."""
    if met - unknowns >= least:
        text = "one seed: the interval rests on how far single batch sizes miss the curve, or one of another bend"
        return Note("seeds", text)
    at = f"one seed at {counted(met, 'batch size')} for {unknowns} unknowns"
    text = f"{at}: too little to tell an error from, so no interval"
    return Note("low", f"{text}. Measure more batch sizes, or more seeds")


def of_grid(steps: Array) -> Note | None:
    """On steps that are all multiples of one number, as where the loss is evaluated every so many; None where chance
    could make them so, or where that number is too small to matter: beside the fewest steps, and what seeds scatter."""
    found = steps[np.isfinite(steps)]
    if len(found) < LEAST_ON_GRID or not (found == np.round(found)).all():
        return None
    every = math.gcd(*found.astype(int).tolist())
    late = every / 2 / found.min()  # in the mean, of the batch size with the fewest
    worth = every >= COARSE * found.min() or (every >= FINE * found.min() and late > _error(steps) / 2)
    if not worth or every ** (len(found) - 1) < 1 / CHANCE:
        return None
    text = (
        f"steps are all multiples of {every}, as where the loss is evaluated every {every} steps: they are then late "
    )
    return Note("low", f"{text}by up to as many, which the interval does not know. Give before=, the evaluation above")


def _error(steps: Array) -> float:
    """Standard error of a batch size's mean log steps by what its seeds scatter; infinite where none has two."""
    logs = np.log(np.where(np.isfinite(steps), steps, np.nan))
    runs = (~np.isnan(logs)).sum(-1)
    several = logs[runs > 1]
    if not len(several):
        return math.inf
    squares = np.nansum((several - np.nanmean(several, -1, keepdims=True)) ** 2)
    return float(np.sqrt(squares / (runs[runs > 1] - 1).sum() / runs.max()))


def of_stuck(size: Array, kind: NDArray[np.int8], ordinary: Array) -> list[Note]:
    """On runs that are so late among those of their batch size, or with it, that they hardly count: [n, seeds] codes
    and shares."""
    out = (kind > 0) & (ordinary < 0.5)
    if not out.any():
        return []
    runs = _counted(size, out, (kind > 0).sum(-1))
    text = f"stuck, or far later than others of the batch size or of those beside it: {runs}. Such runs bend nothing"
    return [Note("points.steps", f"{text} here")]


def of_misfit(around: float, own: float, bounded: bool) -> Note:
    """On batch sizes that miss the curve by more than their runs' own spread, both in log steps.

    Args:
        around, own: how far the batch sizes miss it, and what their runs explain.
        bounded: whether an interval is given.
    """
    text = f"batch sizes lie {share(math.expm1(around))} from the curve (rms), their runs' own spread explains "
    widened = ", and the interval is widened for it" if bounded else ""
    return Note("low", f"{text}{share(math.expm1(own))}: no model here follows them{widened}")


def of_rival(model: str, instead: str, better: float | None, critical: float) -> Note:
    """On a model that is about as good as the one taken, and the critical batch it would give; or that follows runs too
    few to tell, where by how much it is better means little (None)."""
    gives = f"gives a critical batch of {number(critical)}" if np.isfinite(critical) else "gives none"
    text = f"the {model} model is about as good as the {instead} (AICc lower by {number(better, 2)}) and {gives}"
    if better is None:
        text = f"the {model} model is nearer to the runs than the {instead} and {gives}; so few runs do not tell"
        return Note("critical_batch", f"{text}. Measure more batch sizes, or more seeds")
    return Note("critical_batch", f"{text}. More seeds would tell them apart")


def of_nothing(table: Table, picked: Array, reached: int, least: int) -> Note:
    """Why there is no fit, and what to change."""
    if np.isnan(picked).all():
        return Note("critical_batch", "no run was made. Give steps to the target")
    if not reached and (np.isnan(picked) | np.isneginf(picked)).all():
        return Note("critical_batch", "every run diverged. Lower the learning rates")
    if not reached:
        return Note("critical_batch", f"no batch size reached the target. {MORE}")
    of = f"{reached} of {counted(len(table.size), 'batch size')} reached the target in most of their seeds"
    change = "Measure more batch sizes" if reached == len(table.size) else MORE
    return Note("critical_batch", f"{of}, a fit needs {least}. {change}")


def of_open_ends(open_: NDArray[np.bool_]) -> list[Note]:
    """On intervals of B_20, B_50 and B_stag, of which those in `open_` [3] have no lower end."""
    text = (
        f"not bounded below: the data allow less than 1/{REACH} of the smallest batch. Test smaller ones, or more seeds"
    )
    return [Note(name, text) for name, is_open in zip(("b20_low", "low", "b_stag_low"), open_, strict=True) if is_open]


def of_turn(batch: float, largest: float, missed: Array) -> Note:
    """On steps that fall up to a batch size and then rise, or are not reached, further than any model here follows; or
    whose target most runs `missed` at batch sizes on the way."""
    text = f"no model fits: steps fall up to batch {count(batch)}, "
    if len(missed):
        text += f"but most runs at batch {_listed(missed)} do not reach the target. Leave those out, or tune their rate"
        return Note("critical_batch", text)
    if batch < largest:
        text += "and past it they rise or the target is not reached. Leave larger batches out to fit the fall, or tune "
        return Note("critical_batch", text + "their rate")
    text += "the largest tested, but scatter too much to tell where they bend. Test more seeds, or more batch sizes"
    return Note("critical_batch", text)


def of_fit(
    model: str, point: Array, size: Array, exponent: float | None, low: float, high: float, whole: bool
) -> list[Note]:
    """On the model that won.

    Args:
        model: its name.
        point: [4] S_min, B_20, B_50, B_stag.
        size: [n] batch sizes tested, ascending.
        exponent: of the power model.
        low: lower end of B_50's interval; nan where there is none.
        high: its upper end.
        whole: whether most steps are whole numbers; logged in thousands they are not.
    """
    smallest, largest = count(float(size.min())), count(float(size.max()))
    if model in ("inverse", "faster") and not low >= size.max():
        bound = f"is above {number(low)}" if low >= size.min() / REACH else "may be anywhere"
        text = f"no bend stands out of the scatter: the critical batch {bound}. Test larger ones, or more seeds"
        return [Note("critical_batch", text)]
    if model == "inverse":
        text = f"steps fall as 1 / batch throughout: the critical batch is above {largest}, the largest tested"
        return [Note("critical_batch", text)]
    if model == "faster":
        text = (
            f"steps fall faster than 1 / batch throughout (as batch^-{number(exponent)}): examples fall up to {largest}"
        )
        return [Note("critical_batch", f"{text}, the largest tested, and the critical batch is above it")]
    if model == "flat":
        text = f"more batch saves no steps: the critical batch is below {smallest}, the smallest tested"
        if high > size.min():
            bound = f"is below {number(high)}" if math.isfinite(high) else "may be anywhere"
            text = f"no bend stands out of the scatter: the critical batch {bound}. Test smaller ones, or more seeds"
        return [Note("critical_batch", text)]
    notes = []
    for name, value in (("critical_batch", point[2]), ("b20", point[1]), ("b_stag", point[3])):
        if np.isfinite(value) and value > 0 and not size.min() <= value <= size.max():
            side = f"above {largest}, the largest" if value > size.max() else f"below {smallest}, the smallest"
            notes.append(Note(name, f"extrapolated: {number(float(value))} is {side} batch tested"))
    if model == "power-law":
        text = f"steps fall as batch^-{number(exponent)} throughout, without a bend: the fewest examples are those of "
        notes.append(Note("critical_batch", f"{text}batch {smallest}, the smallest tested, and B_50 takes twice those"))
        notes.append(Note("s_min", "none: steps fall without end as batches grow, as far as tested"))
        every = "every doubling saves more" if np.isinf(point[3]) else "no doubling saves as much"
        notes.append(Note("b_stag", f"none: {every} than 10 % of the steps"))
        return notes
    if whole and point[0] < FEW_STEPS:
        text = f"only {number(float(point[0]))} steps: so few are too coarse for a fit. Take a harder target"
        notes.append(Note("s_min", text))
    if exponent is not None and exponent < 1:
        text = f"with this model examples fall without end as batches do: the fewest are taken at batch {smallest}"
        notes.append(Note("critical_batch", text))
    return notes


def _counted(size: Array, marked: NDArray[np.bool_], made: NDArray[np.int_]) -> str:
    counts = zip(size, marked.sum(1), made, strict=True)
    return ", ".join(f"{c} of {of} at batch {b:g}" for b, c, of in counts if c)


def _listed(size: Array) -> str:
    return ", ".join(f"{b:g}" for b in size)
