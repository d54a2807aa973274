"""The record of an experiment, from the trials of a store and from what its sweeps were asked for. No torch here.

A tuned curve takes every rate that was tried at a batch size, whichever search or rule tried it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pybatch.base.errors import UsageError
from pybatch.records import Convergence, ConvergencePoint, Curve, Environment, Note, Run
from pybatch.scaling import SEARCHED, Base, Scaled, scale
from pybatch.sweep.budget import Budget, with_losses
from pybatch.sweep.search import best_rate
from pybatch.sweep.store import Cell
from pybatch.sweep.summary import bare_reason, curve, point, unanswered
from pybatch.training.trajectory import SPLITS, Split
from pybatch.training.trial import VERSION, Outcome, Race, Trial


@dataclass
class Row:
    """A trial of a store; `environment` is the number of where it ran."""

    outcome: Outcome
    environment: int
    created: str


@dataclass(frozen=True)
class Asked:
    """What one sweep was to run, and how far it came."""

    seeds: int
    rules: frozenset[str]
    splits: frozenset[str]
    batches: frozenset[int]
    begun: str | None  # when, for the last time; None: by a pybatch that did not note it
    over: frozenset[Cell]
    gap_epochs: float | None = None


@dataclass
class Experiment:
    """What is to be summarized together: one workload, optimizer, precision, device, first seed and set of targets."""

    workload: str
    optimizer: str
    group: dict[str, Any]  # hyper-parameters but the rate
    dtype: str
    device: str
    targets: dict[str, float]
    head: Convergence  # what the record says beside its curves
    base_batch: int
    base_rate: float | None = None
    rules: list[str] = field(default_factory=list)
    batches: set[int] = field(default_factory=set)
    seed: int = 0
    version: int = VERSION  # of its trials
    asked: list[Asked] = field(default_factory=list)

    def joins(self, other: Experiment) -> bool:
        """Whether both are of the same experiment: a sweep that was resumed with more batches, rules or seeds."""
        return all(getattr(self, name) == getattr(other, name) for name in _IDENTITY)

    @property
    def budget(self) -> Budget | None:
        """The largest one asked for, over all batch sizes."""
        epochs = max((a.gap_epochs for a in self.asked if a.gap_epochs is not None), default=None)
        examples = self.head.workload.examples if self.head.workload is not None else None
        return Budget.of(epochs, examples, sorted(self.batches)) if epochs is not None and examples else None

    def goes_on(self, rule: str, batch: int) -> bool:
        """Whether the runs of a batch size were to spend the budget; other targets may choose runs that were not."""
        if self.budget is None or self.targets != {curve.split: curve.target for curve in self.head.curves}:
            return False
        epochs = self.budget.epochs
        return any(a.gap_epochs == epochs and rule in a.rules and batch in a.batches for a in self.asked)

    def cut(self, rule: str, split: Split, batch: int, seeds: int) -> bool:
        """Whether the sweep that was last to run so many seeds at a batch size did not end there.

        A race that was killed may have run each seed at some rate; only the sweep itself knows that it was over.
        """
        own = [a for a in self.asked if a.seeds == seeds and rule in a.rules and batch in a.batches]
        last = max((a for a in own if a.begun is not None), key=lambda a: a.begun or "", default=None)
        if last is None:
            return False
        splits = last.splits & {split} or last.splits  # a target of another split is read from the same trials
        return not any((rule, each, batch) in last.over for each in splits)


_IDENTITY = (
    "workload",
    "optimizer",
    "group",
    "dtype",
    "device",
    "targets",
    "base_batch",
    "base_rate",
    "seed",
    "version",
)


def is_plain(trial: Trial) -> bool:
    """Whether its rate alone was chosen, as a search does."""
    return trial.scaled.warmup_steps == 0 and trial.scaled.gain_batch is None


def hyper(trial: Trial) -> dict[str, Any]:
    """A trial's hyper-parameters but the rate."""
    return {name: value for name, value in trial.scaled.group.items() if name != "lr"}


def assemble(sweep: Experiment, rows: Mapping[str, Row], environments: Mapping[int, Environment]) -> Run:
    """The record of an experiment.

    Args:
        sweep: what was measured, and what of it was asked for.
        rows: all trials of the store, by key.
        environments: where they ran, by number.
    """
    own = {
        key: row
        for key, row in rows.items()
        if (t := row.outcome.trial).workload == sweep.workload
        and (t.optimizer, t.dtype, t.device) == (sweep.optimizer, sweep.dtype, sweep.device)
        and t.version == sweep.version
    }
    alike = {
        key: row.outcome
        for key, row in own.items()
        if is_plain(row.outcome.trial) and hyper(row.outcome.trial) == sweep.group
    }
    # Those asked for, of which some may not have run yet; a sweep of other targets may have run more.
    count = sweep.head.seeds
    seeds = (
        tuple(range(sweep.seed, sweep.seed + count))
        if count
        else tuple(sorted({found.trial.seed for found in alike.values()}))
    )
    by_key = {key: row.outcome for key, row in own.items()}
    searched: dict[int, list[Outcome]] = {}
    for outcome in alike.values():
        if outcome.trial.seed in seeds:
            searched.setdefault(outcome.trial.batch, []).append(outcome)
    splits: list[Split] = [split for split in SPLITS if split in sweep.targets]
    missing: dict[str, bool] = {}  # what has no point or not all seeds -> whether it can still be run
    used = set(map(id, _start(sweep, searched)))  # outcomes that the record stands on
    curves = tuple(
        _curve(sweep, rule, split, seeds, searched, by_key, missing, used) for rule in sweep.rules for split in splits
    )
    notes = list(sweep.head.notes)
    if open_ := [name for name, can_run in missing.items() if can_run]:
        text = f"trials are missing of {', '.join(open_[:8])}{' and more' if len(open_) > 8 else ''}"
        notes.append(Note("curves", text))
    if sweep.version != VERSION:
        text = (
            f"trained by the rules of version {sweep.version}; this pybatch trains by those of {VERSION}, so a sweep "
            "resumed with it runs its trials anew"
        )
        notes.append(Note("trials", text))
    steps = dataclasses.replace(
        sweep.head, curves=curves, notes=tuple(notes), seeds=len(seeds), trials=len(used), complete=not missing
    )
    if (budget := sweep.budget) is not None:
        steps = dataclasses.replace(steps, gap_epochs=budget.epochs, gap_steps=budget.steps)
    if steps.workload is not None:
        steps = dataclasses.replace(steps, workload=dataclasses.replace(steps.workload, target=dict(sweep.targets)))
    last = max((row for row in own.values() if id(row.outcome) in used), key=lambda row: row.created, default=None)
    where = environments.get(last.environment) if last is not None else None
    return Run(last.created if last is not None else "", where, convergence=steps, complete=not missing)


def _curve(
    sweep: Experiment,
    rule: str,
    split: Split,
    seeds: tuple[int, ...],
    searched: Mapping[int, list[Outcome]],
    by_key: Mapping[str, Outcome],
    missing: dict[str, bool],
    used: set[int],
) -> Curve:
    """One curve; `missing` and `used` (by `id`) are added to."""
    points: list[ConvergencePoint] = []
    caps: dict[int, float] = {}
    failed: dict[str, list[int]] = {}
    base = _base(sweep, split, seeds, searched) if rule != SEARCHED else None
    compared = next(each for each in SPLITS if each in sweep.targets)
    budget = sweep.budget if split == compared else None
    targets: dict[str, float] = dict(sweep.targets) if rule == SEARCHED else {split: sweep.targets[split]}
    for batch in sorted(sweep.batches):
        if rule == SEARCHED:
            outcomes = searched.get(batch, [])
        else:
            try:
                trials = _trials(sweep, rule, batch, seeds, base)
            except UsageError as error:  # as in the sweep: the rule has no answer for this batch size
                failed.setdefault(bare_reason(batch, error), []).append(batch)
                missing[f"batch {batch} {rule}"] = False
                continue
            outcomes = [by_key[trial.key] for trial in trials if trial.key in by_key]
        used.update(map(id, outcomes))
        ran = _ran(seeds, outcomes)
        if len(ran) < len(seeds) or sweep.cut(rule, split, batch, len(seeds)):
            missing[f"batch {batch} {rule}"] = True
        if not outcomes:
            continue
        race = _race(targets, ran, outcomes, rule == SEARCHED)
        found = _widened(point(batch, split, race, outcomes), ran, seeds)
        if budget is not None:
            behind = [outcome for outcome in outcomes if outcome.trial.lr == found.learning_rate]
            if sweep.goes_on(rule, batch) and not all(map(budget.spent, behind)):
                missing[f"batch {batch} {rule} to {budget.epochs:g} epochs"] = True
            found = with_losses(found, outcomes, seeds, budget)
        points.append(found)
        caps[batch] = race.limit(split)
    return curve(rule, split, sweep.targets[split], points, caps, None, unanswered(failed))


def _ran(seeds: Sequence[int], outcomes: Sequence[Outcome]) -> tuple[int, ...]:
    """The seeds that have run: one that has not is no run that failed."""
    found = {outcome.trial.seed for outcome in outcomes}
    return tuple(seed for seed in seeds if seed in found)


def _widened(found: ConvergencePoint, ran: Sequence[int], seeds: Sequence[int]) -> ConvergencePoint:
    """A point of the seeds that ran, its table with a column for each seed of the curve."""
    rates = []
    for rate in found.rates:
        steps, statuses = dict(zip(ran, rate.steps, strict=True)), dict(zip(ran, rate.statuses, strict=True))
        rates.append(
            dataclasses.replace(
                rate,
                steps=tuple(steps.get(seed) for seed in seeds),
                statuses=tuple(statuses.get(seed, "not_run") for seed in seeds),
            )
        )
    other = dict(zip(ran, found.other_losses, strict=False))
    losses = tuple(other.get(seed) for seed in seeds) if found.other_losses else ()
    return dataclasses.replace(found, rates=tuple(rates), other_losses=losses)


def _race(targets: Mapping[str, float], seeds: Sequence[int], outcomes: Sequence[Outcome], search: bool) -> Race:
    """The contest as its outcomes stand; a trial was given up after the steps it ran."""
    race = Race(dict(targets), seeds, max(outcome.steps for outcome in outcomes), search)
    for outcome in outcomes:
        race.take(outcome)
    return race


def _start(sweep: Experiment, searched: Mapping[int, list[Outcome]]) -> list[Outcome]:
    """The runs at the base batch that rules go by: of all rates, or of the one that was given."""
    given = sweep.base_rate
    return [o for o in searched.get(sweep.base_batch, []) if given is None or o.trial.lr == given]


def _base(
    sweep: Experiment, split: Split, seeds: Sequence[int], searched: Mapping[int, list[Outcome]]
) -> tuple[float, float | None] | None:
    """The base batch's rate for a split's target, and its median steps; None where none is known."""
    outcomes = _start(sweep, searched)
    if (given := sweep.base_rate) is not None:
        steps = _race(sweep.targets, seeds, outcomes, search=False).median(split, given) if outcomes else math.inf
        return given, steps if math.isfinite(steps) else None
    if not outcomes:
        return None
    race = _race(sweep.targets, _ran(seeds, outcomes), outcomes, search=True)
    lr = best_rate(race, split, sorted({outcome.trial.lr for outcome in outcomes}))
    return (lr, race.median(split, lr)) if lr is not None else None


def _trials(
    sweep: Experiment, rule: str, batch: int, seeds: Sequence[int], base: tuple[float, float | None] | None
) -> list[Trial]:
    """The trials a rule makes of the base batch's rate."""
    if base is None:
        raise UsageError(f"no rate reached the target at the base batch {sweep.base_batch}")
    lr, steps = base
    scaled: Scaled = scale(rule, sweep.group | {"lr": lr}, batch, Base(sweep.base_batch, steps))
    same = (sweep.dtype, sweep.device, sweep.version)
    return [Trial(sweep.workload, sweep.optimizer, scaled, batch, seed, *same) for seed in seeds]
