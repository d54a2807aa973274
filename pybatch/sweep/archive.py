"""A store read back as records, without torch and without the workload: `pybatch report runs.db`.

A store holds the losses of every training run, so any target can be asked of it. What a sweep was asked for stands
beside its trials, and which of its batch sizes are over; `assembly` puts its record together.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pybatch.base.codec import decode
from pybatch.base.errors import UsageError
from pybatch.records import Convergence, Environment, Note, Run, to_dict
from pybatch.scaling import SEARCHED
from pybatch.sweep.assembly import Asked, Experiment, Row, assemble, hyper, is_plain
from pybatch.sweep.schema import APPLICATION, HEADER, OTHER_SCHEMA, SCHEMA
from pybatch.sweep.store import BEGUN, Mark, sweep_key
from pybatch.training.trajectory import SMOOTHING, Trajectory
from pybatch.training.trial import VERSION, Outcome, Trial

_NO_RUN = Run("", None)


def describe_sweep(
    workload: str,
    group: Mapping[str, Any],
    batches: Sequence[int],
    head: Convergence,
    *,
    seed: int = 0,
    search: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a store keeps of a sweep, as plain JSON types.

    Args:
        workload: its fingerprint.
        group: the optimizer's hyper-parameters.
        batches: batch sizes, in examples.
        head: the record before anything ran: its curves name rules, splits and targets.
        seed: of the first training run; the others count up from it.
        search: how rates are tried and for how long: with another one it is another sweep, with its own end.
    """
    record = to_dict(dataclasses.replace(_NO_RUN, convergence=head))
    return {
        "workload": workload,
        "group": dict(group),
        "batches": list(batches),
        "record": record,
        "seed": seed,
        "search": dict(search or {}),
        "version": VERSION,
    }


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
    runs = [assemble(sweep, rows, environments) for sweep in found]
    return sorted(runs, key=lambda run: run.created)


def _load(path: Path) -> tuple[dict[str, Row], dict[int, Environment], list[Experiment]]:
    def refused(why: str, remedy: str = "Give a file written by 'pybatch sweep --store'.") -> UsageError:
        return UsageError(f"store '{path}' {why}. {remedy}")

    # Without a log nobody writes, and a read-only folder, where SQLite could put no lock, will do.
    mode = "mode=ro" if path.with_name(path.name + "-wal").exists() else "mode=ro&immutable=1"
    uri = f"file:{quote(str(path.resolve()))}?{mode}"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as db:
            owner, version, state = (_pragma(db, name) for name in ("application_id", "user_version", "quick_check(1)"))
    except sqlite3.Error as error:
        raise refused(f"cannot be read: {error}") from None
    if owner != APPLICATION:
        raise refused("is a SQLite file of another program")
    if version != SCHEMA:
        raise refused(f"has schema {version}, this pybatch reads {SCHEMA}", OTHER_SCHEMA)
    if state != "ok":
        raise refused(f"is damaged: {state}")
    try:
        with closing(sqlite3.connect(uri, uri=True)) as db:
            rows = {}
            columns = "key, spec, end, seconds, how, steps, train, test, environment, created"
            for key, spec, end, seconds, how, *losses, environment, created in db.execute(
                f"SELECT {columns} FROM trial"
            ):
                outcome = Outcome(Trial.from_spec(spec), end, Trajectory.decompressed(*losses), seconds, how)
                rows[key] = Row(outcome, environment, created)
            places = {
                number: decode(Environment, json.loads(text), "environment")
                for number, text in db.execute("SELECT id, json FROM environment")
            }
            marks: dict[str, list[Mark]] = {}
            for sweep, *mark in _optional(db, "mark", "sweep, rule, split, batch, created"):
                marks.setdefault(sweep, []).append(Mark(*mark))
            sweeps = [_experiment(t, marks.get(sweep_key(t), ())) for (t,) in _optional(db, "sweep", "json")]
    except sqlite3.Error as error:
        raise refused(f"cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise refused(f"is damaged: {str(error).removesuffix('.')}") from None
    return rows, places, sweeps


def _pragma(db: sqlite3.Connection, name: str) -> int | str:
    value: int | str = db.execute(f"PRAGMA {name}").fetchone()[0]
    return value


def _optional(db: sqlite3.Connection, table: str, columns: str) -> list[tuple[Any, ...]]:
    """The rows of a table that stores of old lack."""
    named = db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    return db.execute(f"SELECT {columns} FROM {table}").fetchall() if named else []


def _experiment(text: str, marks: Sequence[Mark]) -> Experiment:
    data = json.loads(text)
    head = Run.from_json(json.dumps(data["record"])).convergence
    if head is None or head.workload is None or head.device is None or head.base_batch is None:
        raise ValueError("a sweep in it says not what it measured")
    rules = list(dict.fromkeys(c.rule for c in head.curves))
    targets: dict[str, float] = {c.split: c.target for c in head.curves if c.target is not None}
    batches = set(data["batches"])
    asked = Asked(
        seeds=head.seeds or 0,
        rules=frozenset(rules),
        splits=frozenset(targets),
        batches=frozenset(batches),
        begun=max((mark.created for mark in marks if mark.cell == BEGUN), default=None),
        over=frozenset(mark.cell for mark in marks),
        gap_epochs=head.gap_epochs,
    )
    return Experiment(
        workload=data["workload"],
        optimizer=head.optimizer or "",
        group={k: v for k, v in data["group"].items() if k != "lr"},
        dtype=head.workload.dtype,
        device=head.device.kind,
        targets=targets,
        head=head,
        base_batch=head.base_batch,
        base_rate=head.base_rate,
        rules=rules,
        batches=batches,
        seed=data.get("seed", 0),
        version=data.get("version", 1),
        asked=[asked],
    )


def _merged(sweeps: Iterable[Experiment], targets: Mapping[str, float] | None) -> list[Experiment]:
    found: list[Experiment] = []
    for sweep in sweeps:
        if targets is not None:
            sweep.targets = dict(targets)
        same = next((other for other in found if other.joins(sweep)), None)
        if same is None:
            found.append(sweep)
            continue
        same.rules = list(dict.fromkeys([*same.rules, *sweep.rules]))
        same.batches |= sweep.batches
        same.asked += sweep.asked
        same.head = dataclasses.replace(same.head, seeds=max(same.head.seeds or 0, sweep.head.seeds or 0))
    return found


def _unnamed(
    rows: Mapping[str, Row], found: Sequence[Experiment], targets: Mapping[str, float] | None
) -> list[Experiment]:
    """Trials of a store from before sweeps were kept in it, by experiment."""
    known = {(s.workload, s.optimizer, s.dtype, s.device, s.version) for s in found}
    made: list[Experiment] = []
    for row in rows.values():
        trial = row.outcome.trial
        kind = (trial.workload, trial.optimizer, trial.dtype, trial.device, trial.version)
        if kind in known or not is_plain(trial):
            continue
        names = json.loads(trial.workload)
        text = f"{names.get('name')} ({names.get('model')}): the store does not say more of the workload"
        head = Convergence((), (Note("workload", text),), optimizer=trial.optimizer, smoothing=SMOOTHING)
        sweep = Experiment(
            trial.workload,
            trial.optimizer,
            hyper(trial),
            trial.dtype,
            trial.device,
            dict(targets or {}),
            head,
            base_batch=0,
            version=trial.version,
        )
        same = next((other for other in made if other.joins(sweep)), None)
        if same is None:
            made.append(same := sweep)
            sweep.rules = [SEARCHED]
        same.batches.add(trial.batch)
    return made
