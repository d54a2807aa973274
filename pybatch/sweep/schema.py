"""What a store is on disk: SQLite's marks, the tables, and what its errors ask for."""

from __future__ import annotations

import sqlite3

HEADER = b"SQLite format 3\0"
APPLICATION = 0x70796261  # "pyba": SQLite's own mark of whose file it is
SCHEMA = 1
OTHER_SCHEMA = "Use the pybatch that wrote it, or a later one."

TABLES = """
CREATE TABLE environment (id INTEGER PRIMARY KEY, json TEXT NOT NULL UNIQUE);
CREATE TABLE trial (
    key TEXT PRIMARY KEY,
    spec TEXT NOT NULL,
    end TEXT NOT NULL CHECK (end IN ('met', 'capped', 'diverged')),
    seconds REAL NOT NULL,
    how TEXT NOT NULL,
    steps BLOB NOT NULL,
    train BLOB NOT NULL,
    test BLOB NOT NULL,
    environment INTEGER NOT NULL REFERENCES environment (id),
    created TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE claim (key TEXT PRIMARY KEY, owner TEXT NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
"""
SWEEPS = (  # stores of old lack them
    "CREATE TABLE IF NOT EXISTS sweep (json TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS mark (sweep TEXT, rule TEXT, split TEXT, batch INTEGER, created TEXT NOT NULL, "
    "PRIMARY KEY (sweep, rule, split, batch)) WITHOUT ROWID",
)

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


def remedy(error: BaseException) -> str | None:
    """What to do about an error of SQLite's that says nothing against the file itself."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # extended codes have the primary one in their low byte
    return next((text for codes, text in _REMEDIES if code in codes), None)
