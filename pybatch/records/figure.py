"""A figure's label, unit, form and whether it is shown, said once: at the field of the record that holds it.

Tables, lines and notes of every format derive from this, and so does what a notebook shows.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pybatch.base import numerals as n

_KEY = "figure"


@dataclasses.dataclass(frozen=True)
class Figure:
    """How one figure is read. In `label` and `unit`, "{examples}" is what one example of a batch is called."""

    label: str
    unit: str = ""
    form: Callable[[Any], str] = n.number
    shown: bool = True  # a column or line of its record; of hidden ones, notes are left to the record too
    full: str = ""  # its name where there is room, as in a plot's legend; empty: the label
    interval: tuple[str, str] | None = None  # where its 95 % interval stands, from the record it is a figure of
    within: str | None = None  # it has no column or line of its own: it stands in that figure's
    always: bool = False  # its line stands also where it is not known
    sparse: bool = False  # its column is left out where no row has it
    group: str | None = None  # such as "utilization": what one plot shows together
    of: Callable[[Any, Any], Any] | None = None  # from the row and the record that holds it; None: the field itself
    before: tuple[Figure, ...] = ()  # columns that are worked out from it, on its left
    beside: tuple[Figure, ...] = ()  # and on its right
    instead: Callable[[Any], str | None] | None = None  # words for a row without figures; its unknown cells stay empty

    @property
    def name(self) -> str:
        """The name where there is room."""
        return self.full or self.label


def figure(label: str, unit: str = "", form: Callable[[Any], str] = n.number, **more: Any) -> dict[str, Figure]:
    """Metadata for `dataclasses.field`: `step_ms: float = field(metadata=figure("step", "ms"))`. See `Figure`."""
    return {_KEY: Figure(label, unit, form, **more)}


def _figures(kind: Any) -> Mapping[str, Figure]:
    """The declared figures of a record by field, in its order."""
    return {f.name: f.metadata[_KEY] for f in dataclasses.fields(kind) if _KEY in f.metadata}


figures: Callable[[Any], Mapping[str, Figure]] = functools.cache(_figures)


def figure_of(kind: Any, name: str) -> Figure:
    """A field's figure; one that declares none is called by its field's name."""
    return figures(kind).get(name) or Figure(name.replace("_", " "), form=n.plain)


def value_of(record: Any, name: str, whole: Any = None) -> Any:
    """What a figure of this record is: worked out where it is declared so, else the field."""
    of = figure_of(type(record), name).of
    return getattr(record, name) if of is None else of(record, whole)


def written(record: Any, name: str, examples: str = "examples") -> str:
    """A figure with its unit and its interval: "40 [38 to 43] images/s"; empty where neither is known."""
    found, value = figure_of(type(record), name), value_of(record, name)
    span = interval_of(record, name)
    if value is None and not span and not found.always:
        return ""
    unit = found.unit.format(examples=examples) if value is not None else ""
    return " ".join(part for part in (found.form(value), span, unit) if part)


def interval_of(record: Any, name: str) -> str:
    """A figure's interval, its ends in their own form; empty where there is none."""
    ends = figure_of(type(record), name).interval
    if ends is None:
        return ""
    form = figure_of(type(record), ends[0]).form if ends[0] in figures(type(record)) else n.number
    return n.interval(_at(record, ends[0]), _at(record, ends[1]), form)


def _at(record: Any, path: str) -> Any:
    """The field at "model.half_low"; None where a part on the way was not measured."""
    for name in path.split("."):
        record = None if record is None else getattr(record, name)
    return record


@functools.cache
def hidden(kind: Any, path: str) -> bool:
    """Whether the figure at this path from a record, such as "batches.sm_active", is declared hidden."""
    for name in path.split("."):
        inner = _inner(kind)
        if not dataclasses.is_dataclass(inner) or name not in {f.name for f in dataclasses.fields(inner)}:
            return False
        found = figures(inner).get(name)
        if found is not None and not (found.shown if found.within is None else figures(inner)[found.within].shown):
            return True
        kind = typing.get_type_hints(inner)[name]
    return False


def _inner(kind: Any) -> Any:
    """The record in `Record | None` or `tuple[Record, ...]`."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not types.NoneType)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
