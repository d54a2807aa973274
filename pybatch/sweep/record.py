"""The record of an experiment, from what its store holds: of a sweep on its way, and of a file read later. No torch.

Which trials a curve stands on. A **tuned** point takes the rates that its batch size's own search asked for, and no
other: best-of-n falls with n, so a curve of tuned steps compares batch sizes only where each had an equal search
(Shallue et al. 2019). A rate that another rule, a given base rate or another sweep's search happened to train there is
left out, though it may be better: it was tried at some batch sizes and not at others. For the same reason the base rate
of the other rules comes from the base batch's own search. At other targets than the sweep's the choice is made again,
among the same trials. A point of any **other rule** is the trials that the rule makes of the base rate. Every trial
counts with all the steps it ran, whoever asked for them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pybatch.base.errors import UsageError
from pybatch.records import Convergence, ConvergencePoint, Curve, Note, Run
from pybatch.scaling import SEARCHED, Base, Scaled, followed, scale
from pybatch.sweep.budget import with_losses
from pybatch.sweep.contents import GIVEN, LONGER, NOISE, WHOLE, Contents, Row
from pybatch.sweep.experiment import Experiment, changed, experiments
from pybatch.sweep.options import SweepOptions
from pybatch.sweep.search import best_rate
from pybatch.sweep.summary import Ran, bare_reason, beyond, curve, nearest, point, steps_of, unanswered
from pybatch.training.schedules import CONSTANT
from pybatch.training.trajectory import Split
from pybatch.training.trial import Outcome, Study, Trial
from pybatch.workloads.running.choice import is_plain, told

NAMED = 8  # parts of a sweep that a note lists


def record_of(contents: Contents, sweep: int) -> Run:
    """The record of the experiment that the sweep of this number belongs to."""
    [own] = [each for each in experiments(contents) if any(s.number == sweep for s in each.sweeps)]
    return Assembly(own, contents).run()


def trial_of(
    options: SweepOptions, fingerprint: str, device: str, scaled: Scaled, batch: int, seed: int, rate: float = 1.0
) -> Trial:
    """A trial of a sweep, whose rate is `rate` times that of the base batch."""
    group = followed(scaled.group, batch, options.start_batch, options.beta2_rule, options.decay_rule, rate=rate)
    scaled = dataclasses.replace(scaled, group=group)
    schedule = options.schedule or CONSTANT
    return Trial(fingerprint, options.trained_by, scaled, batch, seed, options.dtype, device, schedule)


def ruled_trials(
    options: SweepOptions,
    fingerprint: str,
    device: str,
    rule: str,
    batch: int,
    base: tuple[float, float | None],
    seeds: Sequence[int],
) -> list[Trial]:
    """The trials that a rule makes at a batch size, of the base batch's rate and its median steps.

    Raises:
        UsageError: the rule has no answer for the batch size.
    """
    lr, steps = base
    scaled = scale(rule, {**options.options, "lr": lr}, batch, Base(options.start_batch, steps))
    factor = scaled.group["lr"] / lr
    return [trial_of(options, fingerprint, device, scaled, batch, seed, factor) for seed in seeds]


@dataclass
class _Found:
    """What is to be said beside the curves."""

    open: dict[str, None] = field(default_factory=dict)  # what can still be run, in order
    failed: bool = False  # whether something could not be run
    fewer: bool = False  # whether some of it was never asked for with all the seeds
    notes: list[Note] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # keys of the trials that the record stands on


class Assembly:
    """The record of one experiment, as it is put together."""

    def __init__(self, experiment: Experiment, contents: Contents) -> None:
        self.experiment, self.rows = experiment, contents.rows
        self.environments = contents.environments
        self.options, self.subject = experiment.first.options, experiment.first.subject
        self.seeds = experiment.seeds
        self.found = _Found()
        self.stood: dict[tuple[str, Split], dict[int, list[Outcome]]] = {}  # outcomes that each point stands on
        self.unanswered: dict[tuple[str, Split], list[Note]] = {}  # why batch sizes have no point
        self.start = self._start()
        self.bases = {split: self._base(split) for split in experiment.splits}

    def run(self) -> Run:
        """The whole record."""
        own, found = self.experiment, self.found
        found.used.update(outcome.trial.key for outcome in self.start)
        self._judge_start()
        curves = tuple(self._curve(rule, split) for rule in own.rules for split in own.splits)
        complete = not found.open and not found.failed and not own.noise_failed
        used = [self.rows[key] for key in found.used]
        budget = own.budget
        steps = Convergence(
            curves,
            tuple(self._notes()),
            optimizer=self.options.trained_by.rpartition(":")[2],
            optimizer_options={key: told(value) for key, value in self.options.options.items() if is_plain(value)},
            schedule=self.options.schedule,
            following=self.options.following,
            seeds=len(self.seeds),
            trials=len(used),
            base_batch=self.options.start_batch,
            base_rate=self.options.base_rate,
            smoothing=self.subject.smoothing,
            complete=complete,
            device=self.subject.device,
            workload=dataclasses.replace(self.subject.workload, target=dict(own.targets)),
            gap_epochs=None if budget is None else budget.epochs,
            gap_steps=None if budget is None else budget.steps,
            experiment=own.name,
            changed=changed(own.sweeps, [row.created for row in used]),
        )
        last = max(used, key=lambda row: (row.created, row.environment), default=None)
        where = self.environments.get(last.environment) if last is not None else None
        created = last.created if last is not None else ""
        return Run(created, where, noise=own.noise, convergence=steps, complete=complete)

    def _curve(self, rule: str, split: Split) -> Curve:
        points: list[ConvergencePoint] = []
        caps: dict[int, float] = {}
        ran: dict[int, Ran] = {}
        failed: dict[str, list[int]] = {}
        near: list[Outcome] = []
        for batch in self.experiment.batches:
            try:
                trials = self._trials(rule, split, batch)
            except UsageError as error:  # the rule has no answer for this batch size
                failed.setdefault(bare_reason(batch, error), []).append(batch)
                self.found.failed = True
                continue
            if (reason := self._judge(rule, split, batch, trials)) is not None:
                failed.setdefault(reason, []).append(batch)
                continue
            rows = self._stored(trials or (), None if rule == SEARCHED else split)
            if not rows or (rule == SEARCHED and not self._over(rule, batch, split)):
                continue  # the best of half a search compares with nothing
            outcomes = [row.outcome for row in rows]
            self.found.used.update(outcome.trial.key for outcome in outcomes)
            self.stood.setdefault((rule, split), {})[batch] = outcomes
            found, caps[batch] = point_of(self.experiment.targets, rule, split, batch, self.seeds, outcomes)
            ran[batch] = steps_of(outcomes, self.seeds)
            points.append(self._lengthened(rule, split, found, outcomes))
            near += outcomes
        notes = unanswered(failed)
        self.unanswered[rule, split] = list(notes)
        rates = None
        if points and all(p.steps is None for p in points) and (text := nearest(split, near)) is not None:
            notes.append(Note("points", text))
            rates = beyond(split, near) if rule == SEARCHED else None
        target = self.experiment.targets[split]
        higher = any(outcome.trajectory.sign(split) < 0 for outcome in near)
        return curve(rule, split, target, points, caps, self.experiment.noise, notes, rates, higher, ran)

    def _trials(self, rule: str, split: Split, batch: int) -> list[str] | None:
        """Keys of the trials that a point stands on; None where they are not known yet.

        Raises:
            UsageError: the rule has no answer for this batch size.
        """
        if rule == SEARCHED:
            return sorted(self.experiment.sought(batch))
        base = self.bases[split]
        if base is None:
            if not self._over(SEARCHED, self.options.start_batch, split):
                return None
            raise UsageError(f"no rate reached the target at the base batch {self.options.start_batch}")
        return [trial.key for trial in self._ruled(rule, batch, base)]

    def _judge(self, rule: str, split: Split, batch: int, keys: list[str] | None) -> str | None:
        """Note whether trials are missing of a point; returns why they could not be run, where that is known."""
        sweep, cells = self.experiment.cells(rule, batch, split)
        reason = next((sweep.failed[cell] for cell in cells if cell in sweep.failed), None) if sweep else None
        if reason is not None:
            self.found.failed = True
            return reason
        rows = self._stored(keys or (), None if rule == SEARCHED else split)
        over = sweep is None or self._over(rule, batch, split)  # no sweep of so many seeds: its trials say it alone
        whole = keys is not None and len(rows) == len(keys) and over
        if not whole or len(_ran(self.seeds, [row.outcome for row in rows])) < len(self.seeds):
            self.found.open[f"batch {batch} {rule}"] = None
            self.found.fewer |= sweep is None or sweep.options.seeds < len(self.seeds)
        return None

    def _judge_start(self) -> None:
        """Note why the runs that rules go by could not be made, where no curve shows it."""
        batch, rule = self.options.start_batch, SEARCHED if self.options.base_rate is None else GIVEN
        if rule in self.experiment.rules and batch in self.experiment.batches:
            return
        last = max(self.experiment.sweeps, key=lambda sweep: sweep.begun)
        if (reason := last.failed.get((rule, WHOLE, batch))) is not None:
            self.found.failed = True
            self.found.notes.append(Note("curves.points", f"base batch {batch}: {reason}"))

    def _over(self, rule: str, batch: int, split: Split) -> bool:
        sweep, cells = self.experiment.cells(rule, batch, split)
        return sweep is not None and any(cell in sweep.ended for cell in cells)

    def _lengthened(
        self, rule: str, split: Split, found: ConvergencePoint, outcomes: Sequence[Outcome]
    ) -> ConvergencePoint:
        """A point of the split compared, with the test losses of its runs at equal budgets."""
        budget = self.experiment.budget
        if budget is None or split != self.experiment.splits[0]:
            return found
        spender, name = self.experiment.spender(rule, found.batch), f"batch {found.batch} {rule}"
        behind = [outcome for outcome in outcomes if outcome.trial.lr == found.learning_rate]
        if spender is not None and not all(map(budget.spent, behind)):
            cell = (rule, LONGER, found.batch)
            if cell in spender.failed:
                self.found.failed = True
                text = f"{name} to {budget.epochs:g} epochs: {spender.failed[cell]}"
                self.found.notes.append(Note("curves.points", text))
            elif cell in spender.ended:
                text = (
                    f"{name}: test losses after {budget.epochs:g} epochs are missing of runs that were chosen later. "
                    f"Go on with gap epochs {budget.epochs:g} to have them"
                )
                self.found.notes.append(Note("curves.points", text))
            else:
                self.found.open[f"{name} to {budget.epochs:g} epochs"] = None
        return with_losses(found, outcomes, self.seeds, budget)

    def _notes(self) -> list[Note]:
        own, notes = self.experiment, list(self.found.notes)
        if open_ := list(self.found.open):
            text = f"trials are missing of {', '.join(open_[:NAMED])}{' and more' if len(open_) > NAMED else ''}"
            if self.found.fewer:
                text += f". Another sweep here has {len(self.seeds)} seeds: go on with as many for these, too"
            notes.append(Note("curves", text))
        for epochs in own.epochs[1:]:
            where = ", ".join(map(str, own.spending(epochs)))
            text = f"test losses after {epochs:g} epochs, asked for at batch {where}, are not shown: those after "
            text += f"{own.epochs[0]:g} epochs compare {'more' if own.epochs[0] < epochs else 'as many'} batch sizes"
            notes.append(Note("curves.points", text))
        remarks = {cause: text for sweep in reversed(own.sweeps) for cause, text in sweep.remarks.items()}
        notes += [Note("noise" if cause == NOISE else "trials", text) for cause, text in remarks.items()]
        notes += self.subject.notes
        if self.options.optimizer == "muon":
            text = "muon: every matrix is updated by Muon, embeddings and an output layer too, often left to AdamW"
            notes.append(Note("curves", text))
        examples = self.subject.workload.examples
        if over := [str(batch) for batch in own.batches if examples is not None and batch > examples]:
            text = f"batch {', '.join(over)} is larger than the data set of {examples} examples: batches are drawn "
            notes.append(Note("curves.points", text + "with replacement, so examples repeat within one"))
        return notes

    def _stored(self, keys: Sequence[str], split: Split | None = None) -> list[Row]:
        rows = (self.rows[key] for key in keys if key in self.rows)
        own = [row for row in rows if row.outcome.trial.seed in self.seeds]
        # One that was run for other targets kept no metric: it is missing.
        wanted = self.experiment.targets if split is None else (split,)
        return [row for row in own if all(map(row.outcome.trajectory.has, wanted))]

    def _ruled(self, rule: str, batch: int, base: tuple[float, float | None]) -> list[Trial]:
        device = self.subject.device.kind
        return ruled_trials(self.options, self.subject.fingerprint, device, rule, batch, base, self.seeds)

    def _start(self) -> list[Outcome]:
        """The runs at the base batch that rules go by: those of its search, or at the rate that was given."""
        batch, given = self.options.start_batch, self.options.base_rate
        if given is None:
            keys = sorted(self.experiment.sought(batch))
        else:
            device, scaled = self.subject.device.kind, Scaled({**self.options.options, "lr": given})
            keys = [
                trial_of(self.options, self.subject.fingerprint, device, scaled, batch, seed).key for seed in self.seeds
            ]
        return [row.outcome for row in self._stored(keys)]

    def _base(self, split: Split) -> tuple[float, float | None] | None:
        """The base batch's rate for a split's target, and its median steps; None where no rate is known.

        Of runs at a given rate that could not all be made rules take no steps, in the sweep and so here.
        """
        outcomes, given = self.start, self.options.base_rate
        cell = (GIVEN, WHOLE, self.options.start_batch)
        own = [sweep for sweep in self.experiment.sweeps if sweep.options.seeds == len(self.seeds)]
        if not outcomes or (given is not None and not any(cell in sweep.ended for sweep in own)):
            return None if given is None else (given, None)
        ran = self.seeds if given is not None else _ran(self.seeds, outcomes)
        study = _study(self.experiment.targets, ran, outcomes, search=given is None)
        return base_of(study, split, given)


def base_of(study: Study, split: str, given: float | None) -> tuple[float, float | None] | None:
    """The base batch's rate for a split's target, given or the best, and its median steps where it reached.

    None where no rate was given and none reached the target.
    """
    lr = given if given is not None else best_rate(study, split, sorted({lr for lr, _ in study.ended}))
    if lr is None:
        return None
    steps = study.median(split, lr)
    return lr, steps if math.isfinite(steps) else None


def point_of(
    targets: Mapping[str, float],
    rule: str,
    split: Split,
    batch: int,
    seeds: Sequence[int],
    outcomes: Sequence[Outcome],
) -> tuple[ConvergencePoint, float]:
    """A point of a curve over these seeds, where they have run, and the steps after which one was given up."""
    ran = _ran(seeds, outcomes)
    own = targets if rule == SEARCHED else {str(split): targets[split]}
    study = _study(own, ran, outcomes, rule == SEARCHED)
    return _widened(point(batch, split, study, outcomes), ran, seeds), study.limit(split)


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


def _study(targets: Mapping[str, float], seeds: Sequence[int], outcomes: Sequence[Outcome], search: bool) -> Study:
    """How the trials of a point stand; one was given up after the steps it ran."""
    study = Study(dict(targets), seeds, max(outcome.steps for outcome in outcomes), search)
    for outcome in outcomes:
        study.take(outcome)
    return study
