"""One saved run, and its JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from pybatch.base.codec import decode, encode, parse, stands_at_top
from pybatch.base.display import Shown
from pybatch.base.errors import UsageError
from pybatch.base.plain import given, said
from pybatch.records.capacity import Capacity, Distributed
from pybatch.records.convergence import Convergence
from pybatch.records.figure import hidden
from pybatch.records.limits import time_wrong, wrong
from pybatch.records.noise import NoiseScale, NoiseTrajectory
from pybatch.records.schedule import Schedule
from pybatch.records.subject import Environment, Note
from pybatch.records.training import Training
from pybatch.records.verdict import Verdict

SCHEMA = "pybatch/1"


@dataclass(frozen=True)
class Run(Shown):
    """One saved run: the whole record, as written by `pybatch bench -o`."""

    created: str  # ISO 8601, UTC; empty: put together from results that were not saved as a run
    environment: Environment | None  # None: put together from results that were not saved as a run
    capacity: Capacity | None = None
    noise: NoiseScale | None = None
    convergence: Convergence | None = None
    verdict: Verdict | None = None
    complete: bool = True
    notes: tuple[Note, ...] = ()
    distributed: Distributed | None = None
    trajectory: NoiseTrajectory | None = None  # of a training run, see pybatch.noise.Trajectory
    price: float | None = None  # of a device-hour, as the user gave it
    training: Training | None = None  # a script's own, see `pybatch watch`
    batch_schedule: Schedule | None = None  # see `pybatch schedule`

    def to_json(self) -> str:
        """The record as JSON text; non-finite numbers become null."""
        return json.dumps(to_dict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> Run:
        """Read a saved record back; raises UsageError on a foreign file or one of another version."""
        if not isinstance(text, str | bytes | bytearray):
            raise UsageError(f"Run.from_json(): text is {given(text)}. Give what a record's file holds.")
        try:
            data = parse(text)
        except ValueError as error:
            raise UsageError(
                f"not a pybatch record: {error}. Give a whole file that bench, sweep, watch or fit wrote by "
                "-o; of logs as CSV, use 'pybatch fit'."
            ) from None
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise UsageError(
                f"record has schema {said(found)}, this pybatch reads {SCHEMA!r}. Give a file written by 'pybatch "
                "bench -o' of this version: measure again, or use the pybatch that wrote it."
            )
        return _run_from_dict(data)


def told(note: Note) -> bool:
    """Whether a reader of the page is told: notes on figures that are not shown are left to the record."""
    return not any(hidden(kind, note.figure) for kind in (Run, Capacity))  # parts of the latter stand at the top


def _hoisted(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind) if stands_at_top(f))


_HOISTED = _hoisted(Capacity)
_HOISTED_BY = {"capacity": _HOISTED, "convergence": _hoisted(Convergence)}


def to_dict(record: Any) -> Any:
    """A record as plain JSON types, in the order of the schema."""
    if not isinstance(record, Run):
        return encode(record)
    body = encode(record)
    head = {"schema": SCHEMA, "created": body.pop("created"), "environment": body.pop("environment")}
    source = record.convergence if record.capacity is None else record.capacity
    return head | {name: encode(getattr(source, name, None)) for name in _HOISTED} | body


def _run_from_dict(data: dict[str, Any]) -> Run:
    for section, names in _HOISTED_BY.items():
        if isinstance(data.get(section), dict):
            data = data | {section: data[section] | {name: data[name] for name in names if name in data}}
            break  # the first one was written there
    run: Run = decode(Run, {k: v for k, v in data.items() if k != "schema" and k not in _HOISTED}, "record", wrong)
    if run.created and (late := time_wrong(run.created, "created")) is not None:
        raise UsageError(f"record{late}. The file is damaged, or no pybatch wrote it.")
    return run
