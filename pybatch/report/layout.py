"""What a report is made of: titled sections of rows and lines, for every format; heads and forms are the record's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pybatch.base import numerals as n
from pybatch.records import Capacity, Convergence, Note
from pybatch.records.figure import Figure, figure_of, figures, written
from pybatch.records.run import told

Words = Callable[[str], str]


@dataclass(frozen=True)
class Table:
    """Column heads and rows of finished cells, numbers already formatted."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """One part of the report: a title, maybe a table, then labelled lines, then notes; details on demand."""

    title: str
    table: Table | None = None
    lines: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    notes: tuple[str, ...] = ()  # that change what a reader would do
    details: tuple[str, ...] = ()  # the other ones


def examples_of(*measured: Capacity | Convergence | None) -> str:
    """What an example of a batch is called, by the first of these that says."""
    return next((part.workload.unit for part in measured if part is not None and part.workload), "examples")


def table(
    kind: type,
    records: Sequence[Any],
    whole: Any = None,
    examples: str = "examples",
    names: Sequence[str] = (),
    wholes: Sequence[Any] = (),
) -> Table:
    """A row a record: its shown figures in their order, or those named here.

    Args:
        kind: of the records, of which there may be none.
        records: one a row.
        whole: the record that holds them all, which some figures are taken over; or `wholes`, one a row.
        examples: what one example of a batch is called.
        names: fields, for a table other than the record's own; what stands beside them is then left out.
    """
    rows = list(zip(records, wholes or [whole] * len(records), strict=True))
    chosen = [column for name in names or _own(kind) for column in _columns(kind, name, beside=not names)]
    standing = [c for c in chosen if not c.figure.sparse or any(c.value(*row) is not None for row in rows)]
    return Table(tuple(c.head(examples) for c in standing), tuple(_cells(standing, *row) for row in rows))


def columns(found: Mapping[str, Sequence[str]] | Sequence[tuple[str, Sequence[str]]]) -> Table:
    """A table of finished cells, by column: of figures that no record holds. As pairs, heads may recur."""
    pairs = list(found.items()) if isinstance(found, Mapping) else list(found)
    return Table(tuple(head for head, _ in pairs), tuple(zip(*(cells for _, cells in pairs), strict=True)))


def lines(record: Any, words: Mapping[str, Words] | None = None, examples: str = "examples") -> list[tuple[str, str]]:
    """A line for each shown figure of the record that is known.

    Args:
        record: whose figures.
        words: by field: what makes the line's text of the written figure; an empty one leaves the line out.
        examples: what one example of a batch is called.
    """
    made = []
    for name in _own(type(record)):
        text, said = written(record, name, examples), (words or {}).get(name)
        if text and said is not None:
            text = said(text)
        if text:
            made.append((figure_of(type(record), name).label, text))
    return made


# Figures whose notes change what a reader would do: what is missing from the answer, and what it may be wrong for.
_DECISIVE = frozenset(
    ("run", "capacity", "noise", "branches", "batches.status", "noise.b_simple", "noise.loss", "noise.source", "curves",
     "points", "critical_batch", "low", "b_min", "stages", "verdict.best_batch", "verdict.critical_source")
)  # fmt: skip

_CALLED = {"low": "interval"}  # of a critical batch


def notes_of(notes: Sequence[Note], before: str = "") -> tuple[str, ...]:
    """Those that change what a reader would do."""
    return tuple(_line(note, before) for note in notes if told(note) and note.figure in _DECISIVE)


def details_of(notes: Sequence[Note], before: str = "") -> tuple[str, ...]:
    """The others; notes on figures that have no place here are left to the record."""
    return tuple(_line(note, before) for note in notes if told(note) and note.figure not in _DECISIVE)


def _line(note: Note, before: str) -> str:
    return f"{before}{_CALLED.get(note.figure, note.figure)}: {note.text}"


def _own(kind: type) -> list[str]:
    return [name for name, figure in figures(kind).items() if figure.shown and figure.within is None]


@dataclass(frozen=True)
class _Column:
    """A figure of a field, or one that is worked out from it."""

    field: str
    figure: Figure

    def head(self, examples: str) -> str:
        return f"{self.figure.label} {self.figure.unit}".strip().format(examples=examples)

    def value(self, record: Any, whole: Any) -> Any:
        of = self.figure.of
        return getattr(record, self.field) if of is None else of(record, whole)


def _columns(kind: type, name: str, beside: bool) -> list[_Column]:
    """A figure's own column; beside it the half width of its interval, and what is worked out from it."""
    own = figure_of(kind, name)
    if not beside:
        return [_Column(name, own)]
    spread = [Figure("±", form=n.one_digit, of=_half_width(own.interval))] if own.interval else []
    return [_Column(name, figure) for figure in (*own.before, own, *spread, *own.beside)]


def _half_width(interval: tuple[str, str]) -> Callable[[Any, Any], float | None]:
    def of(record: Any, _: Any) -> float | None:
        low, high = (getattr(record, name) for name in interval)
        return (high - low) / 2 if low is not None and high is not None else None

    return of


def _cells(columns: Sequence[_Column], record: Any, whole: Any) -> tuple[str, ...]:
    """The cells of a row; of one without figures, its words in the cell they are meant for, and blanks."""
    lost = next((text for c in columns if c.figure.instead and (text := c.figure.instead(record))), None)
    cells = []
    for column in columns:
        value = column.value(record, whole)
        blank = lost if column.figure.instead and lost else ""
        cells.append(blank if lost and value is None else column.figure.form(value))
    return tuple(cells)
