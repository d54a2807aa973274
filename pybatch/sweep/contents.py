"""What a store holds, read at once: trials, where they ran, and its sweeps with how far each of them came."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field

from pybatch.base.codec import decode, parse
from pybatch.records import Device, Environment, NoiseScale, Note, WorkloadInfo
from pybatch.records.limits import wrong
from pybatch.sweep.options import SweepOptions
from pybatch.training.trajectory import Trajectory
from pybatch.training.trial import Outcome, Trial

# Rule, part and batch size: what a sweep goes through. The part is WHOLE for a search, which is for all targets, the
# split of its target for another rule, and LONGER for runs past their target, to a budget of epochs.
CellName = tuple[str, str, int]
WHOLE, LONGER = "", "epochs"
NOISE = "noise"  # the cause of a remark on why the noise scale could not be measured
GIVEN = "given"  # in place of a rule: the base batch at the rate that was given


@dataclass(frozen=True)
class Row:
    """A stored trial; `environment` is the number of where it ran."""

    outcome: Outcome
    environment: int
    created: str


@dataclass(frozen=True)
class Subject:
    """What a sweep trained and where, as its record says it."""

    fingerprint: str  # of the workload: the trials' own
    workload: WorkloadInfo
    device: Device
    smoothing: str
    notes: tuple[Note, ...] = ()  # on the model


@dataclass(frozen=True)
class StoredSweep:
    """A sweep as it stands in its store."""

    number: int
    subject: Subject
    options: SweepOptions  # settled
    created: str  # when it was begun for the first time
    begun: str  # and for the last
    noise: NoiseScale | None = None
    measured: str | None = None  # when that was
    ended: Mapping[CellName, str] = field(default_factory=dict)  # when, of cells whose trials have all run
    failed: Mapping[CellName, str] = field(default_factory=dict)  # why, of cells whose trials could not all run
    sought: Mapping[int, frozenset[str]] = field(default_factory=dict)  # by batch size: keys its search asked for
    remarks: Mapping[str, str] = field(default_factory=dict)  # on how trials ran, by cause


@dataclass(frozen=True)
class Contents:
    """All that is in a store."""

    name: str  # of the store: no other has it, but for copies
    rows: Mapping[str, Row]  # by the trial's key
    environments: Mapping[int, Environment]
    sweeps: tuple[StoredSweep, ...]  # in the order in which they were first begun


def read_contents(db: sqlite3.Connection) -> Contents:
    """Everything in an open store.

    Raises:
        sqlite3.Error: it cannot be read.
        ValueError, KeyError, TypeError: what is in it is not what was written (UsageError is a ValueError).
    """
    db.execute("BEGIN")  # one state of it, whoever else writes meanwhile
    try:
        return _read(db)
    finally:
        db.rollback()


def _read(db: sqlite3.Connection) -> Contents:
    [name] = db.execute("SELECT name FROM store").fetchone()
    rows = {}
    for key, spec, end, seconds, how, *losses, environment, created in db.execute(
        "SELECT key, spec, end, seconds, how, steps, train, test, environment, created FROM trial"
    ):
        outcome = Outcome(Trial.from_spec(spec), end, Trajectory.decompressed(*losses), seconds, how)
        rows[key] = Row(outcome, environment, created)
    environments = {
        number: decode(Environment, parse(text), "environment", wrong)
        for number, text in db.execute("SELECT number, json FROM environment")
    }
    known = db.execute("SELECT number, json, created, begun, noise, measured FROM sweep ORDER BY number").fetchall()
    return Contents(name, rows, environments, tuple(_sweep(db, *row) for row in known))


def _sweep(
    db: sqlite3.Connection, number: int, text: str, created: str, begun: str, noise: str | None, measured: str | None
) -> StoredSweep:
    data = parse(text)
    cells = db.execute("SELECT rule, part, batch, ended, failed FROM cell WHERE sweep = ?", (number,)).fetchall()
    sought: dict[int, set[str]] = {}
    for batch, key in db.execute("SELECT batch, trial FROM sought WHERE sweep = ?", (number,)):
        sought.setdefault(batch, set()).add(key)
    return StoredSweep(
        number,
        decode(Subject, data["subject"], "subject", wrong),
        SweepOptions.stored(data["options"]),
        created,
        begun,
        decode(NoiseScale, parse(noise), "noise", wrong) if noise is not None else None,
        measured,
        {(rule, part, batch): ended for rule, part, batch, ended, failed in cells if failed is None},
        {(rule, part, batch): failed for rule, part, batch, _, failed in cells if failed is not None},
        {batch: frozenset(keys) for batch, keys in sought.items()},
        dict(db.execute("SELECT cause, text FROM remark WHERE sweep = ? ORDER BY cause", (number,))),
    )
