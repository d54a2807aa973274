"""What a store is on disk: SQLite's marks, the tables, and what its errors ask for."""

from __future__ import annotations

import sqlite3

HEADER = b"SQLite format 3\0"
APPLICATION = 0x70796261  # "pyba": SQLite's own mark of whose file it is
# Of the tables, and of what a trial does: raised with every change after which the same trial gives other losses.
SCHEMA = 4

TABLES = """
CREATE TABLE store (name TEXT NOT NULL);
CREATE TABLE environment (number INTEGER PRIMARY KEY, json TEXT NOT NULL UNIQUE);
CREATE TABLE trial (
    key TEXT PRIMARY KEY,
    spec TEXT NOT NULL,
    end TEXT NOT NULL CHECK (end IN ('met', 'capped', 'diverged')),
    seconds REAL NOT NULL,
    how TEXT NOT NULL,
    steps BLOB NOT NULL,
    train BLOB NOT NULL,
    test BLOB NOT NULL,
    environment INTEGER NOT NULL REFERENCES environment (number),
    created TEXT NOT NULL,
    metrics BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE claim (key TEXT PRIMARY KEY, owner TEXT NOT NULL, beat INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE sweep (
    number INTEGER PRIMARY KEY,
    json TEXT NOT NULL UNIQUE,
    created TEXT NOT NULL,
    begun TEXT NOT NULL,
    noise TEXT,
    measured TEXT
);
CREATE TABLE sought (
    sweep INTEGER NOT NULL REFERENCES sweep (number),
    batch INTEGER NOT NULL,
    trial TEXT NOT NULL,
    PRIMARY KEY (sweep, batch, trial)
) WITHOUT ROWID;
CREATE TABLE cell (
    sweep INTEGER NOT NULL REFERENCES sweep (number),
    rule TEXT NOT NULL,
    part TEXT NOT NULL,
    batch INTEGER NOT NULL,
    ended TEXT NOT NULL,
    failed TEXT,
    PRIMARY KEY (sweep, rule, part, batch)
) WITHOUT ROWID;
CREATE TABLE remark (
    sweep INTEGER NOT NULL REFERENCES sweep (number),
    cause TEXT NOT NULL,
    text TEXT NOT NULL,
    PRIMARY KEY (sweep, cause)
) WITHOUT ROWID;
"""

_GO_ON = "then run the same command with --resume: what is stored is kept."
DAMAGED = f"It is damaged: name another file, or restore it from a copy, {_GO_ON}"
_REMEDIES = (  # by SQLite's primary result code
    ((sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR), f"Free space on its disk, {_GO_ON}"),
    ((sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED), f"Another program holds it: end that one, {_GO_ON}"),
    (
        (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM),
        f"Make file and folder writable, {_GO_ON}",
    ),
)


def other_schema(found: object) -> str:
    """What to do about a store of another schema."""
    if isinstance(found, int) and found > SCHEMA:
        return "A later pybatch wrote it: use that one, or name another file."
    return "An earlier pybatch wrote it: name another file, or use that one."


def remedy(error: BaseException) -> str | None:
    """What to do about an error of SQLite's that says nothing against the file itself."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # extended codes have the primary one in their low byte
    return next((text for codes, text in _REMEDIES if code in codes), None)
