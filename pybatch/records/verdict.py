"""Records of the answer and of how each of its figures came about."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from pybatch.base.codec import encode
from pybatch.base.display import Shown
from pybatch.base.errors import UsageError
from pybatch.records.subject import Note

Limit = Literal["noise", "hardware", "balanced", "unresolved"]
Evidence = Literal["measured", "modelled", "assumed"]


@dataclass(frozen=True)
class Reason:
    """How a figure of the verdict came about."""

    figure: str
    text: str  # one sentence
    evidence: Evidence
    inputs: dict[str, float | str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class FrontierPoint:
    """One number of devices at its best batch, against one device at its own: modelled."""

    devices: int
    batch: int  # examples per update, over all devices
    time_factor: float
    cost_factor: float  # device-seconds
    energy_factor: float | None = None  # None: energy was not measured at these batches


@dataclass(frozen=True)
class AccumulationPlan:
    """How a global batch is put together: devices x accumulation x micro_batch."""

    global_batch: int
    devices: int
    micro_batch: int  # examples in one pass on one device
    accumulation: int  # passes before an update
    step_s: float | None  # modelled seconds per update, without communication; None: no throughput fit


@dataclass(frozen=True)
class Verdict(Shown):
    """The answer. Every number in `text` stands in a field, and `why(field)` says how it came about."""

    critical_batch: float | None
    critical_low: float | None
    critical_high: float | None
    critical_source: str | None  # "noise" < "branch" < "sweep": the evidence it stands on
    saturation_batch: float | None
    best_batch: int | None
    best_low: float | None
    best_high: float | None
    limit: Limit
    useful_devices: int | None
    time_to_target: float | None  # seconds on this device at best_batch
    text: str
    reasons: tuple[Reason, ...] = ()
    notes: tuple[Note, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()  # 1, 2, 4, ... devices

    def __str__(self) -> str:
        return self.text

    def why(self, figure: str) -> Reason:
        """The sentence and the figures behind one field of the verdict."""
        for reason in self.reasons:
            if reason.figure == figure:
                return reason
        known = ", ".join(reason.figure for reason in self.reasons)
        raise UsageError(f"no figure {figure!r} in this verdict. Ask for one of: {known}.")

    def to_json(self) -> str:
        """This verdict alone as JSON; the whole run is `Run.to_json`."""
        return json.dumps(encode(self), indent=2)
