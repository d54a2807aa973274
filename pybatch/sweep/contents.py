"""What a store holds, read at once: trials, where they ran, and its sweeps with how far each of them came."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pybatch.base.codec import decode, parse
from pybatch.base.plain import said
from pybatch.records import Device, Environment, NoiseScale, Note, WorkloadInfo
from pybatch.records.limits import time_wrong, wrong
from pybatch.sweep.options import SweepOptions
from pybatch.training.trajectory import Trajectory
from pybatch.training.trial import End, Outcome, Trial

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
    named = db.execute("SELECT name FROM store").fetchall()
    if len(named) != 1 or not isinstance(named[0][0], str):
        raise ValueError("table store must have one row, the store's name")
    rows = {}
    for row in db.execute(
        "SELECT key, spec, end, seconds, how, steps, train, test, environment, created, metrics FROM trial"
    ):
        with _named(f"trial {row[0]!r:.20}"):
            rows[row[0]] = _trial(*row)
    environments = {}
    for number, text in db.execute("SELECT number, json FROM environment"):
        with _named(f"environment {number}"):
            environments[number] = decode(Environment, parse(text), "environment", wrong)
    for key, row in rows.items():
        if row.environment not in environments:
            raise ValueError(f"trial {key!r:.20}: there is no environment {row.environment!r}")
    known = db.execute("SELECT number, json, created, begun, noise, measured FROM sweep ORDER BY number").fetchall()
    sweeps = []
    for found in known:
        with _named(f"sweep {found[0]}"):
            sweeps.append(_sweep(db, *found))
    return Contents(named[0][0], rows, environments, tuple(sweeps))


@contextlib.contextmanager
def _named(row: str) -> Iterator[None]:
    """What is wrong with a row, with its name before it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{row}: {what}") from None


def _trial(
    key: Any,
    spec: str,
    end: Any,
    seconds: Any,
    how: Any,
    steps: bytes,
    train: bytes,
    test: bytes,
    environment: int,
    created: Any,
    metrics: bytes,
) -> Row:
    trial = Trial.from_spec(spec)
    if trial.key != key:
        raise ValueError("its key is not that of what it says of itself")
    if end not in get_args(End):
        raise ValueError(f"it ended as {said(end)}: it must be one of {', '.join(get_args(End))}")
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ValueError(f"it took {said(seconds)} s: it must be a number, at least 0")
    if not isinstance(how, str):
        raise ValueError(f"it ran {said(how)}: it must be text")
    if late := time_wrong(created, "created") if isinstance(created, str) else f" was created {said(created)}":
        raise ValueError(f"it{late}")
    return Row(
        Outcome(trial, end, Trajectory.decompressed(steps, train, test, metrics), float(seconds), how),
        environment,
        created,
    )


def _sweep(
    db: sqlite3.Connection, number: int, text: str, created: str, begun: str, noise: str | None, measured: str | None
) -> StoredSweep:
    data = parse(text)
    for time in (created, begun, *([measured] if measured is not None else [])):
        if not isinstance(time, str) or (late := time_wrong(time, "time")) is not None:
            raise ValueError(late.lstrip(".") if isinstance(time, str) and late else f"time is {said(time)}")
    cells = db.execute("SELECT rule, part, batch, ended, failed FROM cell WHERE sweep = ?", (number,)).fetchall()
    sought: dict[int, set[str]] = {}
    for rule, part, batch, ended, failed in cells:
        kinds = (rule, str), (part, str), (batch, int), (ended, str), (failed, str | None)
        if not all(isinstance(value, kind) for value, kind in kinds):
            raise ValueError(f"a cell of it is {said((rule, part, batch, ended, failed))}")
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
