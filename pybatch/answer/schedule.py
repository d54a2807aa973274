"""A batch-size schedule from what was measured along a run: stages in doublings, and what they save.

With critical batch B_c, a step at batch B makes 1 / (1 + B_c / B) of the progress of a step at a very large batch
(McCandlish et al. 2018, eq. 2.7). B_c grows along a run, so that one batch for all of it is too large at first and too
small at the end. Fewest steps at given examples have B proportional to sqrt(B_c) (their appendix D); here B is a
doubling of the run's own batch, chosen stretch by stretch to the same end, and never above B_c.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pybatch.answer.course import MOST, Array, Course
from pybatch.answer.evidence import FACTORS
from pybatch.answer.plan import plan_accumulation
from pybatch.base import numerals as n
from pybatch.base.errors import UsageError
from pybatch.base.plain import said
from pybatch.records import Note, Run
from pybatch.records.schedule import Schedule, ScheduleSource, Stage
from pybatch.scaling import Base, scale

COST = 0.2  # examples above the fewest, as a share of these
CELLS = 2000  # stretches of the run that batches are chosen for
WORTH = 0.02  # share of the steps that a schedule saves at least, to be worth its switches
SHORTEST = 0.02  # share of all steps: a shorter stage is not worth a switch
RATES = ("constant", "linear", "sqrt")  # rules of `pybatch.scaling` that need a rate and nothing else
_PAST = 1.25  # critical batches: a run's batch that is larger, on average, is said to be past it
_WIDEST = 1024.0  # times the critical batch: what lies beyond is an open end
_LOOKS = 60  # halvings in the search for the price of an example
_FACTORS: dict[ScheduleSource, float] = {"noise": FACTORS["noise"], "branches": FACTORS["branch"], "law": 1.0}


def plan_schedule(
    course: Course,
    *,
    steps: float | None = None,
    examples: float | None = None,
    cost: float = COST,
    least: int | None = None,
    most: int | None = None,
    fits: int | None = None,
    devices: int = 1,
    rate_rule: str = "sqrt",
) -> Schedule:
    """The schedule of fewest steps to the loss that a run of so many steps at its own batch reaches.

    Args:
        course: the critical batch along that run.
        steps: of that run at its own batch; or `examples` of it.
        cost: examples above the fewest, as a share: 0.2 is what a batch of a fifth of B_c takes.
        least, most: bounds of the batch; None: the run's own batch over 2^10, and B_c.
        fits: examples that one device holds in a pass; more are several passes.
        devices: that share the batch.
        rate_rule: of `pybatch.scaling`, for the learning rate at each batch.

    Raises:
        UsageError: an argument out of range, or a run too short for a stage.
    """
    total = _total(course.batch, steps, examples)
    if not 0 < cost <= 4:
        raise UsageError(f"cost {said(cost)}: give the examples above the fewest as a share, above 0 and up to 4.")
    if rate_rule not in RATES:
        raise UsageError(f"rate rule {said(rate_rule)}: use constant, linear or sqrt.")
    batches = _doublings(course, least, most, fits, devices)
    seen = (np.arange(CELLS) + 0.5) * total / CELLS
    critical = course.at(seen)
    progress = total / CELLS / (course.batch + critical)  # in steps of a very large batch
    chosen = _without_short(batches[_cheapest(batches, critical, progress, cost)], critical, progress)
    if _against_fixed(chosen, critical, progress)[1] < WORTH:
        kept = batches[batches * progress.sum() <= 1.001 * cost * float(progress @ critical)]
        chosen = np.full(CELLS, kept[-1] if len(kept) else batches[0])
    stages = _stages(course, chosen, critical, progress, seen[-1], rate_rule, fits, devices)
    taken, used = sum(s.steps for s in stages), sum(s.examples for s in stages)
    fixed, saved = _against_fixed(chosen, critical, progress)
    factor = _FACTORS[course.source]
    truths = [critical / factor, critical * factor]
    for end in (course.low, course.high):
        known = np.where(np.isfinite(end), end, course.critical)
        near = np.clip(known, course.critical / _WIDEST, course.critical * _WIDEST)
        truths.append(course.at(seen, near))
    outcomes = [saved, *(_against_fixed(chosen, t, total / CELLS / (course.batch + t))[1] for t in truths)]
    found = Schedule(
        stages=tuple(stages),
        base_batch=course.batch,
        base_steps=max(1, round(total / course.batch)),
        cost=float(progress @ chosen) / float(progress @ critical),
        cost_asked=cost,
        base_cost=float(course.batch * progress.sum()) / float(progress @ critical),
        steps=taken,
        examples=used,
        fixed_batch=fixed,
        steps_saved=saved,
        steps_saved_low=min(outcomes) if course.source != "law" else None,
        steps_saved_high=max(outcomes) if course.source != "law" else None,
        source=course.source,
        rate_rule=rate_rule,
    )
    notes = (*course.notes, *_notes(course, total, found, critical, (least, most), fits, devices))
    answer, because = _words(found, course.advised)
    if course.doubt:
        remedy = {"noise": "Watch a longer run", "branches": "Branch with more seeds, or other factors"}[course.source]
        answer = "No schedule can be advised yet."
        because = f"{course.doubt[0].upper()}{course.doubt[1:]}. {remedy}; the table takes them as they are."
    found = replace(found, notes=notes)
    return replace(found, answer=answer, because=because)


def _total(batch: int, steps: float | None, examples: float | None) -> float:
    """Examples of the run at its own batch."""
    if (steps is None) == (examples is None):
        raise UsageError("a schedule needs the length of the run: give --steps N or --examples N, one of them.")
    name, given = ("steps", steps) if steps is not None else ("examples", examples)
    if given is None or not 1 <= given <= MOST:
        raise UsageError(f"{name} {said(given)} is out of range. Give a number from 1 to 2^40.")
    total = given * batch if steps is not None else given
    if total < 2 * batch:
        raise UsageError(
            f"{name} {said(given)}: the first stage alone takes more, as a step is of {n.count(batch)} examples. Give "
            "the length of the whole run."
        )
    return float(total)


def _doublings(course: Course, least: int | None, most: int | None, fits: int | None, devices: int) -> Array:
    """Batches to choose from, ascending: the run's own times powers of two, whole on every device and in its passes."""
    if devices < 1:
        raise UsageError(f"devices {devices}: give 1 or more.")
    top = float(most) if most is not None else max(float(course.critical.max()), course.batch, least or 0)
    low = float(least) if least is not None else max(devices, course.batch / 2**10)
    if not 1 <= low <= top:
        raise UsageError(f"batches from {low:g} to {top:g}: none is between. Give bounds the other way round.")
    sizes = [course.batch * 2.0**exponent for exponent in range(-60, 41)]
    found = [s for s in sizes if low <= s <= top and s == int(s) and _divides(int(s), devices, fits)]
    if not found and not any(s == int(s) and int(s) % devices == 0 for s in sizes):
        raise UsageError(
            f"batch {course.batch} times a power of two never divides over {n.counted(devices, 'device')}. Give "
            f"--batch, a multiple of {devices} times a power of two."
        )
    if not found:
        raise UsageError(
            f"no doubling of batch {course.batch} from {n.batch_size(low)} to {n.batch_size(top)} divides over "
            f"{n.counted(devices, 'device')}"
            + (f" into passes of {fits} at most" if fits else "")
            + ". Give other bounds."
        )
    return np.array(found)


def _divides(batch: int, devices: int, fits: int | None) -> bool:
    try:
        plan_accumulation(None, batch, devices, largest=fits or batch)
    except UsageError:
        return False
    return True


def _cheapest(batches: Array, critical: Array, progress: Array, cost: float) -> NDArray[np.intp]:
    """For every cell the batch of fewest steps at the price of an example that spends what may be spent."""
    steps = 1.0 + critical[:, None] / batches
    examples = batches + critical[:, None]
    allowed = batches <= np.maximum(critical, batches[0])[:, None]
    budget = (1.0 + cost) * float(progress @ critical)

    def at(price: float) -> NDArray[np.intp]:
        value = np.where(allowed, steps + price * examples, np.inf)
        return np.asarray(value.argmin(axis=1))

    low, high = -60.0, 60.0  # of the logarithm of the price
    for _ in range(_LOOKS):
        middle = (low + high) / 2
        spent = float(progress @ examples[np.arange(len(critical)), at(math.exp(middle))])
        low, high = (low, middle) if spent <= budget else (middle, high)
    return at(math.exp(high))


def _without_short(chosen: Array, critical: Array, progress: Array) -> Array:
    """Stages too short to be worth a switch join the one before them, or after them at the start."""
    chosen = chosen.copy()
    while True:
        steps = progress * (1.0 + critical / chosen)
        edges = np.flatnonzero(np.diff(chosen)) + 1
        starts, ends = np.append(0, edges), np.append(edges, len(chosen))
        lengths = np.add.reduceat(steps, starts)
        short = [i for i in range(len(starts)) if lengths[i] < SHORTEST * lengths.sum()]
        if not short or len(starts) == 1:
            return chosen
        i = min(short, key=lambda place: lengths[place])
        other = i - 1 if i else i + 1
        chosen[starts[i] : ends[i]] = chosen[starts[other]]


def _against_fixed(chosen: Array, critical: Array, progress: Array) -> tuple[float, float]:
    """The fixed batch that takes as many examples, and the share of its steps that is saved."""
    least, fewest = float(progress @ critical), float(progress.sum())
    fixed = float(progress @ chosen) / fewest
    return fixed, 1.0 - (fewest + float(progress @ (critical / chosen))) / (fewest + least / fixed)


def _stages(
    course: Course,
    chosen: Array,
    critical: Array,
    progress: Array,
    end: float,
    rate_rule: str,
    fits: int | None,
    devices: int,
) -> list[Stage]:
    """Whole steps, stage after stage."""
    taken = progress * (1.0 + critical / chosen)
    edges = np.flatnonzero(np.diff(chosen)) + 1
    found: list[Stage] = []
    step, examples = 1, 0
    for cells in np.split(np.arange(len(chosen)), edges):
        batch = int(chosen[cells[0]])
        steps = max(1, round(float(taken[cells].sum())))
        middle = float(np.exp(np.average(np.log(critical[cells]), weights=taken[cells])))
        factor = float(scale(rate_rule, {"lr": 1.0}, batch, Base(course.batch)).group["lr"])
        passes = plan_accumulation(None, batch, devices, largest=fits).accumulation if fits else 1
        found.append(Stage(batch, step, steps, examples, middle, factor, passes))
        step, examples = step + steps, examples + batch * steps
    return found


def _notes(
    course: Course,
    total: float,
    found: Schedule,
    critical: Array,
    bounds: tuple[int | None, int | None],
    fits: int | None,
    devices: int,
) -> list[Note]:
    notes, stages = [], found.stages
    first, last = float(course.examples[0]), float(course.examples[-1])
    if course.source != "law" and total > 1.05 * last:
        text = (
            f"the critical batch is known up to {n.count(round(last))} of {n.count(round(total))} examples, and held "
            "at its last value after them: it tends to grow, and more could be saved"
        )
        notes.append(Note("stages", text))
    if course.source != "law" and first > 0.2 * total:
        text = f"before {n.count(round(first))} examples the critical batch is not known; its first value is held"
        notes.append(Note("stages", text))
    if course.source == "noise":
        text = "the noise scale is taken for the critical batch: 95 % of measured ones are within 4 times it, both ways"
        notes.append(Note("steps_saved", text))
    if found.cost > 1.25 * found.cost_asked:
        text = (
            f"{n.share(found.cost_asked)} more examples than the fewest were asked for, and no batch that may be used "
            f"is small enough: it is {n.share(found.cost)}"
        )
        notes.append(Note("stages", text))
    past = [s for s in stages if s.passes > 1]
    if past and fits:
        text = (
            f"from batch {n.count(past[0].batch)} on memory holds {n.count(fits * devices)} at a time: a step is "
            f"several passes (accumulation), {n.count(max(s.passes for s in past))} at most"
        )
        notes.append(Note("stages", text))
    if len(stages) == 1:
        flat = float(critical.max()) < 2.0 * float(critical.min())
        why = f"doublings along it save less than {n.share(WORTH)}"
        if flat:
            why = "the critical batch does not rise twofold along it"
        elif any(bound is not None for bound in bounds):
            why = f"no other between the bounds saves {n.share(WORTH)} or more"
        notes.append(Note("stages", f"one batch for the whole run: {why}"))
    return notes


def _words(found: Schedule, advised: int | None) -> tuple[str, str]:
    """The first line, and why."""
    sizes = " → ".join(n.count(stage.batch) for stage in found.stages)
    reaches = f"By the model it takes {n.count(found.steps)} steps to the same loss"
    if len(found.stages) == 1:
        [only], untimed = found.stages, ""
        if only.batch == found.base_batch:
            verb, other, trade = "Keep", "", ""
        else:
            verb, other = "Use", f", and batch {n.count(found.base_batch)} {n.count(found.base_steps)}"
            trade = f": {_trade(found, only.batch)}"
            if only.batch < found.base_batch:
                timed = "fewer examples may take longer" if advised is None else f"with them {_verdict(advised)}"
                untimed = f" Step times play no part in this: {timed}."
        past = ""
        if found.base_cost > _PAST:
            own, mean = n.count(found.base_batch), n.batch_size(found.base_batch / found.base_cost)
            past = f"batch {own} is above the critical batch along the run, {mean} on average, and "
        return (
            f"{verb} batch {sizes} for the whole run{trade}.",
            f"{reaches}{other}; {past}no change along the run saves more.{untimed}",
        )
    span = n.interval(found.steps_saved_low, found.steps_saved_high, n.share)
    saved = f"{n.share(found.steps_saved)} {span}".strip()
    return (
        f"Use batch {sizes}.",
        f"{reaches}, {saved} fewer than batch {n.batch_size(found.fixed_batch)} throughout, which takes as many "
        "examples.",
    )


def _verdict(advised: int) -> str:
    return f"the record's verdict is batch {n.count(advised)}, of least time to the loss"


def _trade(found: Schedule, batch: int) -> str:
    """What one batch throughout gives and takes against the run's own."""
    steps = found.steps / found.base_steps
    examples = steps * batch / found.base_batch
    of = f"the steps of batch {n.count(found.base_batch)}"
    if steps > 1:
        return f"{n.share(1 - examples)} fewer examples for {n.number(steps)} times {of}"
    return f"{n.number(steps)} times {of} for {n.share(examples - 1)} more examples"


def rate_rule_of(run: Run) -> str:
    """Linear for plain SGD below its critical batch (Goyal et al. 2017), else the square root (Malladi et al. 2022)."""
    optimizer = (run.convergence.optimizer if run.convergence is not None else None) or ""
    optimizer = optimizer or (run.training.optimizer if run.training is not None else "")
    for part in (run.convergence, run.capacity):
        work = part.workload if part is not None else None
        optimizer = optimizer or (work.optimizer if work is not None else None) or ""
    return "linear" if optimizer.lower() == "sgd" else "sqrt"
