"""A store read back as records, without torch and without the workload: `pybatch report runs.db`.

A store holds the losses of every training run, so any target can be asked of it; what its sweeps were asked for and how
far they came stands beside them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from pybatch.base.errors import UsageError
from pybatch.records import Run
from pybatch.sweep.contents import Contents, read_contents
from pybatch.sweep.pooling import records
from pybatch.sweep.schema import APPLICATION, HEADER, SCHEMA, other_schema


def is_store(path: Path) -> bool:
    """Whether a file is a SQLite one, by its first bytes; an empty one is none."""
    try:
        with path.open("rb") as file:
            return file.read(len(HEADER)) == HEADER
    except OSError:
        return False


def read_store(path: Path, targets: Mapping[str, float] | None = None) -> list[Run]:
    """The record of every experiment in a store, the latest last; the file is only read.

    Args:
        path: of the store.
        targets: losses to report at, by split; None: those that each sweep was run for.

    Raises:
        UsageError: the file is no store, is damaged, has another schema, or holds no sweep.
    """
    contents = _contents(path)
    if not contents.sweeps:
        raise UsageError(f"store '{path}' holds no sweep. Run 'pybatch sweep --store {path}' first.")
    return sorted(records(contents, targets), key=lambda run: run.created)


def _contents(path: Path) -> Contents:
    def refused(why: str, remedy: str = "Give a file written by 'pybatch sweep --store'.") -> UsageError:
        return UsageError(f"store '{path}' {why}. {remedy}")

    # Without a log nobody writes, and a read-only folder, where SQLite could put no lock, will do.
    mode = "mode=ro" if path.with_name(path.name + "-wal").exists() else "mode=ro&immutable=1"
    uri = f"file:{quote(str(path.resolve()))}?{mode}"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as db:
            owner, version, state = (_pragma(db, name) for name in ("application_id", "user_version", "quick_check(1)"))
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise refused(f"cannot be read: {error}") from None
    if owner != APPLICATION:
        raise refused("is a SQLite file of another program")
    if version != SCHEMA:
        raise refused(f"has schema {version}, this pybatch reads {SCHEMA}", other_schema(version))
    if state != "ok":
        raise refused(f"is damaged: {state}")
    try:
        with closing(sqlite3.connect(uri, uri=True)) as db:
            return read_contents(db)
    except sqlite3.Error as error:
        raise refused(f"cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise refused(f"is damaged: {str(error).removesuffix('.')}") from None


def _pragma(db: sqlite3.Connection, name: str) -> int | str:
    value: int | str = db.execute(f"PRAGMA {name}").fetchone()[0]
    return value
