"""A store read back as records, without torch and without the workload: `pybatch report runs.db`.

A store holds the losses of every training run, so any target can be asked of it. What a sweep was asked for stands
beside its trials; a tuned curve takes every rate that was tried at a batch size, whichever search or rule tried it.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pybatch.codec import decode
from pybatch.convergence.search import best_rate
from pybatch.convergence.store import APPLICATION, SCHEMA
from pybatch.convergence.summary import curve, point
from pybatch.convergence.trajectory import SMOOTHING, SPLITS, Split, Trajectory
from pybatch.convergence.trial import Outcome, Race, Trial
from pybatch.errors import UsageError
from pybatch.records import Convergence, ConvergencePoint, Curve, Environment, Note, Run, to_dict
from pybatch.scaling import SEARCHED, Base, Scaled, scale

HEADER = b"SQLite format 3\0"
_NO_RUN = Run("", None)


@dataclass
class _Row:
    outcome: Outcome
    environment: int
    created: str


@dataclass
class _Sweep:
    """What is to be summarized together: one workload, optimizer, precision, device and set of targets."""

    workload: str
    optimizer: str
    group: dict[str, Any]  # hyper-parameters but the rate
    dtype: str
    device: str
    targets: dict[str, float]
    head: Convergence  # what the record says beside its curves
    base_batch: int
    rules: list[str] = field(default_factory=list)
    batches: set[int] = field(default_factory=set)

    def joins(self, other: _Sweep) -> bool:
        """Whether both are of the same experiment: a sweep that was resumed with more batches, rules or seeds."""
        return all(getattr(self, name) == getattr(other, name) for name in _IDENTITY)


_IDENTITY = ("workload", "optimizer", "group", "dtype", "device", "targets", "base_batch")


def describe_sweep(
    workload: str, group: Mapping[str, Any], batches: Sequence[int], head: Convergence
) -> dict[str, Any]:
    """What a store keeps of a sweep, as plain JSON types.

    Args:
        workload: its fingerprint.
        group: the optimizer's hyper-parameters.
        batches: batch sizes, in examples.
        head: the record before anything ran: its curves name rules, splits and targets.
    """
    record = to_dict(dataclasses.replace(_NO_RUN, convergence=head))
    return {"workload": workload, "group": dict(group), "batches": list(batches), "record": record}


def is_store(path: Path) -> bool:
    """Whether a file is a SQLite one, by its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(HEADER)) == HEADER
    except OSError:
        return False


def read_store(path: Path, targets: Mapping[str, float] | None = None) -> list[Run]:
    """The record of every sweep in a store, the latest last; the file is only read.

    Args:
        path: of the store.
        targets: losses to report at, by split; None: those that each sweep was run for.

    Raises:
        UsageError: the file is no store, is damaged or has another schema, or no target is known.
    """
    rows, environments, sweeps = _load(path)
    found = _merged(sweeps, targets)
    for sweep in _unnamed(rows, found, targets):
        if targets is None:
            raise UsageError(
                f"store '{path}' does not say which losses its trials were run for. Give them: --target train=0.1."
            )
        found.append(sweep)
    if not found:
        raise UsageError(f"store '{path}' holds no trials. Run 'pybatch sweep --store {path}' first.")
    runs = [_run(sweep, rows, environments) for sweep in found]
    return sorted(runs, key=lambda run: run.created)


def _load(path: Path) -> tuple[dict[str, _Row], dict[int, Environment], list[_Sweep]]:
    def refused(why: str) -> UsageError:
        return UsageError(f"store '{path}' {why}. Give a file written by 'pybatch sweep --store'.")

    # Without a log nobody writes, and a read-only folder, where SQLite could put no lock, will do.
    mode = "mode=ro" if path.with_name(path.name + "-wal").exists() else "mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?{mode}", uri=True)) as db:
            if _pragma(db, "application_id") != APPLICATION:
                raise refused("is a SQLite file of another program")
            if (version := _pragma(db, "user_version")) != SCHEMA:
                raise refused(f"has schema {version}, this pybatch reads {SCHEMA}")
            if (state := _pragma(db, "quick_check(1)")) != "ok":
                raise refused(f"is damaged: {state}")
            rows = {}
            columns = "key, spec, end, seconds, how, steps, train, test, environment, created"
            for key, spec, end, seconds, how, *losses, environment, created in db.execute(
                f"SELECT {columns} FROM trial"
            ):
                outcome = Outcome(Trial.from_spec(spec), end, Trajectory.decompressed(*losses), seconds, how)
                rows[key] = _Row(outcome, environment, created)
            places = {
                number: decode(Environment, json.loads(text), "environment")
                for number, text in db.execute("SELECT id, json FROM environment")
            }
            named = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'sweep'").fetchone()
            sweeps = [_asked(json.loads(t)) for (t,) in db.execute("SELECT json FROM sweep")] if named else []
    except sqlite3.Error as error:
        raise refused(f"cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise refused(f"is damaged: {error}") from None
    return rows, places, sweeps


def _pragma(db: sqlite3.Connection, name: str) -> int | str:
    value: int | str = db.execute(f"PRAGMA {name}").fetchone()[0]
    return value


def _asked(data: Mapping[str, Any]) -> _Sweep:
    head = Run.from_json(json.dumps(data["record"])).convergence
    if head is None or head.workload is None or head.device is None or head.base_batch is None:
        raise ValueError("a sweep in it says not what it measured")
    return _Sweep(
        workload=data["workload"],
        optimizer=head.optimizer or "",
        group={k: v for k, v in data["group"].items() if k != "lr"},
        dtype=head.workload.dtype,
        device=head.device.kind,
        targets={c.split: c.target for c in head.curves if c.target is not None},
        head=head,
        base_batch=head.base_batch,
        rules=list(dict.fromkeys(c.rule for c in head.curves)),
        batches=set(data["batches"]),
    )


def _merged(sweeps: Iterable[_Sweep], targets: Mapping[str, float] | None) -> list[_Sweep]:
    found: list[_Sweep] = []
    for sweep in sweeps:
        if targets is not None:
            sweep.targets = dict(targets)
        same = next((other for other in found if other.joins(sweep)), None)
        if same is None:
            found.append(sweep)
            continue
        same.rules = list(dict.fromkeys([*same.rules, *sweep.rules]))
        same.batches |= sweep.batches
        same.head = dataclasses.replace(same.head, seeds=max(same.head.seeds or 0, sweep.head.seeds or 0))
    return found


def _plain(trial: Trial) -> bool:
    """Whether its rate alone was chosen, as a search does."""
    return trial.scaled.warmup_steps == 0 and trial.scaled.gain_batch is None


def _hyper(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in trial.scaled.group.items() if name != "lr"}


def _unnamed(rows: Mapping[str, _Row], found: Sequence[_Sweep], targets: Mapping[str, float] | None) -> list[_Sweep]:
    """Trials of a store from before sweeps were kept in it, by experiment."""
    known = {(s.workload, s.optimizer, s.dtype, s.device) for s in found}
    made: list[_Sweep] = []
    for row in rows.values():
        trial = row.outcome.trial
        if (trial.workload, trial.optimizer, trial.dtype, trial.device) in known or not _plain(trial):
            continue
        names = json.loads(trial.workload)
        text = f"{names.get('name')} ({names.get('model')}): the store does not say more of the workload"
        head = Convergence((), (Note("workload", text),), optimizer=trial.optimizer, smoothing=SMOOTHING)
        sweep = _Sweep(
            trial.workload, trial.optimizer, _hyper(trial), trial.dtype, trial.device, dict(targets or {}), head, 0
        )
        same = next((other for other in made if other.joins(sweep)), None)
        if same is None:
            made.append(same := sweep)
            sweep.rules = [SEARCHED]
        same.batches.add(trial.batch)
    return made


def _run(sweep: _Sweep, rows: Mapping[str, _Row], environments: Mapping[int, Environment]) -> Run:
    own = {
        key: row
        for key, row in rows.items()
        if (t := row.outcome.trial).workload == sweep.workload
        and (t.optimizer, t.dtype, t.device) == (sweep.optimizer, sweep.dtype, sweep.device)
    }
    alike = {
        key: row.outcome
        for key, row in own.items()
        if _plain(row.outcome.trial) and _hyper(row.outcome.trial) == sweep.group
    }
    # Those asked for, of which some may not have run yet; a sweep of other targets may have run more.
    count = sweep.head.seeds
    seeds = tuple(range(count)) if count else tuple(sorted({found.trial.seed for found in alike.values()}))
    by_key = {key: row.outcome for key, row in own.items()}
    searched: dict[int, list[Outcome]] = {}
    for outcome in alike.values():
        if outcome.trial.seed in seeds:
            searched.setdefault(outcome.trial.batch, []).append(outcome)
    splits: list[Split] = [split for split in SPLITS if split in sweep.targets]
    missing: dict[str, bool] = {}  # what has no point or not all seeds -> whether it can still be run
    used = set(map(id, searched.get(sweep.base_batch, [])))  # outcomes that the record stands on
    curves = tuple(
        _curve(sweep, rule, split, seeds, searched, by_key, missing, used) for rule in sweep.rules for split in splits
    )
    notes = list(sweep.head.notes)
    if open_ := [name for name, can_run in missing.items() if can_run]:
        text = f"trials are missing of {', '.join(open_[:8])}{' and more' if len(open_) > 8 else ''}"
        notes.append(Note("curves", text))
    steps = dataclasses.replace(
        sweep.head, curves=curves, notes=tuple(notes), seeds=len(seeds), trials=len(used), complete=not missing
    )
    if steps.workload is not None:
        steps = dataclasses.replace(steps, workload=dataclasses.replace(steps.workload, target=dict(sweep.targets)))
    last = max((row for row in own.values() if id(row.outcome) in used), key=lambda row: row.created, default=None)
    where = environments.get(last.environment) if last is not None else None
    return Run(last.created if last is not None else "", where, convergence=steps, complete=not missing)


def _curve(
    sweep: _Sweep,
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
    notes: list[Note] = []
    base = _base(sweep, split, seeds, searched) if rule != SEARCHED else None
    targets: dict[str, float] = dict(sweep.targets) if rule == SEARCHED else {split: sweep.targets[split]}
    for batch in sorted(sweep.batches):
        if rule == SEARCHED:
            outcomes = searched.get(batch, [])
        else:
            try:
                trials = _trials(sweep, rule, batch, seeds, base)
            except UsageError as error:  # as in the sweep: the rule has no answer for this batch size
                notes.append(Note("points", f"batch {batch}: {error}"))
                missing[f"batch {batch} {rule}"] = False
                continue
            outcomes = [by_key[trial.key] for trial in trials if trial.key in by_key]
        used.update(map(id, outcomes))
        ran = _ran(seeds, outcomes)
        if len(ran) < len(seeds):
            missing[f"batch {batch} {rule}"] = True
        if not outcomes:
            continue
        race = _race(targets, ran, outcomes, rule == SEARCHED)
        points.append(_widened(point(batch, split, race, outcomes), ran, seeds))
        caps[batch] = race.limit(split)
    return curve(rule, split, sweep.targets[split], points, caps, None, notes)


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


def _base(
    sweep: _Sweep, split: Split, seeds: Sequence[int], searched: Mapping[int, list[Outcome]]
) -> tuple[float, float] | None:
    """The rate tuned at the base batch for a split's target, and its median steps; None where none reached it."""
    outcomes = searched.get(sweep.base_batch, [])
    if not outcomes:
        return None
    race = _race(sweep.targets, _ran(seeds, outcomes), outcomes, search=True)
    lr = best_rate(race, split, sorted({outcome.trial.lr for outcome in outcomes}))
    return (lr, race.median(split, lr)) if lr is not None else None


def _trials(
    sweep: _Sweep, rule: str, batch: int, seeds: Sequence[int], base: tuple[float, float] | None
) -> list[Trial]:
    """The trials a rule makes of the rate tuned at the base batch."""
    if base is None:
        raise UsageError(f"no rate reached the target at the base batch {sweep.base_batch}")
    lr, steps = base
    scaled: Scaled = scale(rule, sweep.group | {"lr": lr}, batch, Base(sweep.base_batch, steps))
    return [Trial(sweep.workload, sweep.optimizer, scaled, batch, s, sweep.dtype, sweep.device) for s in seeds]
