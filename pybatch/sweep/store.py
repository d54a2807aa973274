"""The store of a sweep: one SQLite file, a row for each trial, claims so that no two processes run the same one.

SQLite's write-ahead log makes every outcome whole or absent, whenever the process is killed. A claim ends with its
process: on the same machine it is looked whether that still runs; from another machine, when its count of heartbeats
stands still for LEASE seconds of the looker's own monotonic clock. No two wall clocks are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from pybatch.base.codec import encode
from pybatch.base.errors import StoreError, UsageError
from pybatch.records import Environment, NoiseScale
from pybatch.sweep.contents import NOISE, CellName, Contents, Subject, read_contents
from pybatch.sweep.options import SweepOptions
from pybatch.sweep.schema import APPLICATION, DAMAGED, HEADER, SCHEMA, TABLES, other_schema, remedy
from pybatch.training.trajectory import Trajectory
from pybatch.training.trial import Outcome, Trial

LEASE = 60.0  # s; four heartbeats
NEW = 2.0  # s in which another process that makes a store has written its first page
BUSY = 30.0  # s to wait for another process's write, each of which takes milliseconds


class Store:
    """Trials, their outcomes, and sweeps with how far they came, in one file; a context manager.

    Args:
        path: of the file, made where it does not exist; None keeps it in memory.
        environment: where the trials run; a row of its own, named by every trial it ran.
        lease: seconds without a heartbeat after which another machine's claim ends.

    Raises:
        UsageError: the file is no store of pybatch, is damaged, or has another schema.
        StoreError: later, from any method: it can no longer be read or written. What was put before is kept.
    """

    def __init__(self, path: Path | None, environment: Environment, lease: float = LEASE) -> None:
        self.path = path.absolute() if path is not None else None  # a workload may change the working directory
        self.lease, self.environment = lease, environment
        self.owner = f"{_here()}:{os.getpid()}:{_started(os.getpid())}:{uuid.uuid4().hex}"
        self._beats: dict[str, tuple[int, float]] = {}  # of other machines' owners, and when each was seen first
        self._name = ":memory:" if path is None else str(path)
        try:
            self._check_header()
            self._db = self._connect()
            self._file = self._identity()
            self._check()
            with self._write():
                text = json.dumps(encode(environment), sort_keys=True)
                self._db.execute("INSERT OR IGNORE INTO environment (json) VALUES (?)", (text,))
                [self._environment] = self._db.execute(
                    "SELECT number FROM environment WHERE json = ?", (text,)
                ).fetchone()
        except (StoreError, sqlite3.Error, UnicodeDecodeError) as error:
            cause = error.__cause__ or error
            raise self._refused(f"cannot be used: {cause}", remedy(cause)) from None
        except OSError as error:
            raise self._refused(f"cannot be opened: {error.strerror}") from None
        self._closing = threading.Event()
        # Its own connection, made here: opened later it would make a new file where this one has gone.
        pulse = self._connect() if path is not None else None
        self._heart = threading.Thread(target=self._beat, args=(pulse,), daemon=True)
        if pulse is not None:
            self._heart.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give claims back and close the file. Safe to call twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._heart.is_alive():
            self._heart.join()
        with contextlib.suppress(StoreError), self._write():  # claims end with this process in any case
            self._db.execute("DELETE FROM claim WHERE owner = ?", (self.owner,))
        with contextlib.suppress(sqlite3.Error):  # a log that cannot be folded in is folded in at the next opening
            self._db.close()

    def __len__(self) -> int:
        """Trials stored."""
        with self._named("read"):
            count: int = self._db.execute("SELECT count(*) FROM trial").fetchone()[0]
        return count

    def outcomes(self, trials: Iterable[Trial]) -> dict[str, Outcome]:
        """What is stored of these trials, by key."""
        found = {}
        for trial in trials:
            with self._named("read"):
                row = self._db.execute(
                    "SELECT end, seconds, how, steps, train, test, metrics FROM trial WHERE key = ?", (trial.key,)
                ).fetchone()
                if row is not None:
                    end, seconds, how, *columns = row
                    found[trial.key] = Outcome(trial, end, Trajectory.decompressed(*columns), seconds, how)
        return found

    def claim(self, keys: Iterable[str]) -> set[str]:
        """Claim all of these trials that no living process holds; returns those now held by this one."""
        wanted = list(keys)
        with self._write():
            held: Mapping[str, tuple[str, int]] = {
                key: (owner, beat) for key, owner, beat in self._db.execute("SELECT key, owner, beat FROM claim")
            }
            ended = {owner: self._ended(owner, beat) for owner, beat in set(held.values())}
            free = [key for key in wanted if key not in held or ended[held[key][0]]]
            self._db.executemany("INSERT OR REPLACE INTO claim VALUES (?, ?, 0)", [(key, self.owner) for key in free])
        return set(free)

    def release(self, keys: Iterable[str]) -> None:
        """Give claims of this process back."""
        with self._write():
            self._db.executemany("DELETE FROM claim WHERE key = ? AND owner = ?", [(key, self.owner) for key in keys])

    def put(self, outcome: Outcome) -> None:
        """Store an outcome and end its claim, in one transaction. A longer run of the same trial is kept.

        Not so where this one diverged, and one as long gives way: a trial runs again where what is kept does not answer
        what is asked, and sums in another order may find the answer earlier. Were it not taken, it would run for ever.
        """
        trial = outcome.trial
        key, steps = trial.key, outcome.steps
        with self._write():
            row = self._db.execute("SELECT steps, train, test, metrics FROM trial WHERE key = ?", (key,)).fetchone()
            kept = None if row is None else Trajectory.decompressed(*row)
            if kept is None or kept.steps[-1] <= steps or outcome.end == "diverged":
                created = datetime.now(UTC).isoformat(timespec="seconds")
                columns, metrics = outcome.trajectory.compressed(), outcome.trajectory.compressed_metrics()
                self._db.execute(
                    "INSERT OR REPLACE INTO trial VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        key,
                        trial.spec,
                        outcome.end,
                        outcome.seconds,
                        outcome.how,
                        *columns,
                        self._environment,
                        created,
                        metrics,
                    ),
                )
            self._db.execute("DELETE FROM claim WHERE key = ? AND owner = ?", (key, self.owner))

    def begin(self, subject: Subject, options: SweepOptions, noise: NoiseScale | None) -> int:
        """Note that a sweep begins, or goes on: what failed is tried again. Returns its number.

        Args:
            subject: what it trains, and where.
            options: settled.
            noise: the gradient noise scale measured with it; None keeps what an earlier beginning had.
        """
        text, now = json.dumps({"subject": encode(subject), "options": options.to_dict()}, sort_keys=True), _now()
        with self._write():
            self._db.execute("INSERT OR IGNORE INTO sweep (json, created, begun) VALUES (?, ?, '')", (text, now))
            [number] = self._db.execute("SELECT number FROM sweep WHERE json = ?", (text,)).fetchone()
            self._db.execute("UPDATE sweep SET begun = ? WHERE number = ?", (now, number))
            self._db.execute("DELETE FROM cell WHERE sweep = ? AND failed IS NOT NULL", (number,))
            self._db.execute("DELETE FROM remark WHERE sweep = ? AND cause = ?", (number, NOISE))
            if noise is not None:
                values = json.dumps(encode(noise)), now, number
                self._db.execute("UPDATE sweep SET noise = ?, measured = ? WHERE number = ?", values)
        return int(number)

    def seek(self, sweep: int, batch: int, trials: Iterable[Trial]) -> None:
        """Note the trials that a sweep's search asked for at a batch size: a tuned curve stands on these alone."""
        with self._write():
            self._db.executemany(
                "INSERT OR IGNORE INTO sought VALUES (?, ?, ?)", [(sweep, batch, trial.key) for trial in trials]
            )

    def end(self, sweep: int, cells: Iterable[CellName], failed: str | None = None) -> None:
        """Note that cells of a sweep are over, which trials alone do not show; or why they could not be run."""
        with self._write():
            self._db.executemany(
                "INSERT INTO cell VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET ended = excluded.ended, "
                "failed = excluded.failed WHERE failed IS NOT NULL",  # what has run, here or elsewhere, has run
                [(sweep, *cell, _now(), failed) for cell in cells],
            )

    def remark(self, sweep: int, cause: str, text: str) -> None:
        """Keep what is to be said of how trials ran: each cause once, in the words of the first."""
        with self._write():
            self._db.execute("INSERT OR IGNORE INTO remark VALUES (?, ?, ?)", (sweep, cause, text))

    def contents(self) -> Contents:
        """All that is stored."""
        with self._named("read"):
            try:
                return read_contents(self._db)
            except (ValueError, KeyError, TypeError) as error:  # another process wrote it meanwhile
                raise UsageError(str(error)) from error

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path or ":memory:", timeout=BUSY, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA synchronous = NORMAL")  # with a write-ahead log: a power cut may lose the last outcomes
        return db

    @contextlib.contextmanager
    def _write(self) -> Iterator[None]:
        """A write transaction: the lock is taken at its start, so what is read in it holds until its end."""
        with self._named("written"):
            if self._identity() != self._file:
                raise StoreError(
                    f"store '{self._name}' was removed or replaced while it was in use: what is stored from now on "
                    "would be lost. Put it back, or name another file, and run the same command with --resume."
                )
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk ends it by itself
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _named(self, done: str) -> Iterator[None]:
        """What SQLite raises, and a trajectory that cannot be unpacked, as a StoreError with cause and remedy."""
        try:
            yield
        except (sqlite3.Error, UsageError, UnicodeDecodeError) as error:
            cause = str(error).removesuffix(".")
            raise StoreError(f"store '{self._name}' cannot be {done}: {cause}. {remedy(error) or DAMAGED}") from error

    def _identity(self) -> tuple[int, int] | None:
        """Which file the path names: device and inode; a file that was replaced has others."""
        if self.path is None:
            return None
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return (0, 0)
        return found.st_dev, found.st_ino

    def _check_header(self) -> None:
        if self.path is None:
            return
        if not self.path.exists():
            if not self.path.parent.is_dir():
                raise self._refused(
                    f"cannot be made: there is no folder '{self.path.parent}'", "Make it, or name another file."
                )
            return
        if not self.path.is_file():
            raise self._refused("is no file")
        end = time.monotonic() + NEW  # for another process that makes it
        while not (head := _head(self.path)) and time.monotonic() < end:
            time.sleep(0.05)
        if not head:
            raise self._refused("is an empty file", "Delete it, or name another file.")
        if head != HEADER:
            raise self._refused("is no SQLite file")

    def _check(self) -> None:
        """Make the tables of a new store, or see that this is one, whole, and of this schema."""
        with self._write():  # two processes may open a new file at once
            if self._pragma("application_id") == 0 and not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in TABLES.split(";")[:-1]:
                    self._db.execute(statement)
                self._db.execute("INSERT INTO store VALUES (?)", (uuid.uuid4().hex,))
                self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {SCHEMA}")
        if self._pragma("application_id") != APPLICATION:
            raise self._refused("is a SQLite file of another program")
        if self._pragma("user_version") != SCHEMA:
            raise self._refused(
                f"has schema {self._pragma('user_version')}, this pybatch reads {SCHEMA}",
                other_schema(self._pragma("user_version")),
            )
        if (state := self._pragma("quick_check(1)")) != "ok":
            raise self._refused(f"is damaged: {state}")
        try:
            read_contents(self._db)  # now, not when the sweep is over and its record is read from here
        except (ValueError, KeyError, TypeError) as error:
            raise self._refused(f"is damaged: {str(error).removesuffix('.')}", DAMAGED) from None
        self._db.execute("PRAGMA journal_mode = WAL")  # only now: it would change another program's file

    def _pragma(self, name: str) -> int | str:
        value: int | str = self._db.execute(f"PRAGMA {name}").fetchone()[0]
        return value

    def _refused(self, why: str, advice: str | None = None) -> UsageError:
        return UsageError(f"store '{self._name}' {why}. {advice or 'It was left as it is; name another file.'}")

    def _ended(self, owner: str, beat: int) -> bool:
        """Whether nobody works any more for the claims of an owner."""
        if owner == self.owner:
            return False
        here, pid, started, _ = owner.rsplit(":", 3) if owner.count(":") >= 3 else ("", "", "", "")
        if here == _here() and pid.isdecimal() and len(pid) < 10:
            return _started(int(pid)) != started
        now = time.monotonic()
        if self._beats.get(owner, (-1, 0.0))[0] != beat:
            self._beats[owner] = beat, now
        return now - self._beats[owner][1] > self.lease

    def _beat(self, db: sqlite3.Connection) -> None:
        """Count the heartbeats of the claims until the store is closed."""
        while not self._closing.wait(self.lease / 4):
            with contextlib.suppress(sqlite3.Error):  # the next renewal makes up for it, or the next write says why not
                db.execute("UPDATE claim SET beat = beat + 1 WHERE owner = ?", (self.owner,))
        db.close()


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(HEADER))


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _here() -> str:
    """This machine since it was started, as far as process numbers mean the same."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid").strip("pid:[]"))
    return "/".join(parts)


def _started(pid: int) -> str:
    """When a process of this machine was started, by no clock that is ever set; empty where there is none."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in ("Z", "X") else fields[19]  # proc(5): starttime, in ticks since boot
    if psutil.LINUX:
        return ""
    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
