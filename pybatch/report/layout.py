"""What a report is made of: titled sections of rows and lines, for every format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Column heads and rows of finished cells, numbers already formatted."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """One part of the report: a title, maybe a table, then labelled lines, then notes."""

    title: str
    table: Table | None = None
    lines: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    notes: tuple[str, ...] = ()
