"""Records of the answer and of how each of its figures came about."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pybatch.base import numerals as n
from pybatch.base.codec import encode
from pybatch.base.display import Shown
from pybatch.base.errors import UsageError
from pybatch.records.figure import figure
from pybatch.records.subject import Note

_ENDS = re.compile("_(low|high)$")
# What stands or falls with another figure, and has no reason of its own, or none where that is not known.
_WITH = {
    "confidence": "best_batch",
    "doubling": "best_batch",
    "second_device": "best_batch",
    "frontier": "useful_devices",
    "critical_source": "critical_batch",
    "evidence": "critical_batch",
}

Limit = Literal["noise", "hardware", "balanced", "unresolved", "input"]
Evidence = Literal["measured", "modelled", "assumed"]
Kind = Literal["sweep", "rule", "tuned branch", "branch", "branch past target", "noise", "noise past target"]
Level = Literal["high", "medium", "low"]
Inputs = dict[str, float | str | None]  # figures behind one figure
_SOURCES = {"sweep": "measured steps", "branch": "branched runs", "noise": "gradient noise"}
_WORDS = {
    "sweep": "the sweep",
    "rule": "a sweep by one rule",
    "tuned branch": "branches",
    "branch": "branches at an untuned rate",
    "branch past target": "branches past the target loss",
    "noise": "the noise scale",
    "noise past target": "the noise scale, read past the target loss,",
}


@dataclass(frozen=True)
class Reason:
    """How a figure of the verdict came about."""

    figure: str
    text: str  # one sentence
    evidence: Evidence
    inputs: Inputs = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """One piece of evidence on the critical batch, and what it stands for."""

    source: Literal["sweep", "branch", "noise"]
    kind: Kind
    value: float
    low: float | None  # 95 %, of the measurement alone; None: open
    high: float | None
    factor: float  # 95 % of such evidence is within this factor of the run's critical batch, both ways
    aside: bool = False  # it contradicts what was measured, and does not count

    @property
    def words(self) -> str:
        """What it is called in a sentence."""
        return _WORDS[self.kind]


def said_by(evidence: Sequence[Reading], source: str | None) -> str:
    """What a critical batch stands on, in words: "by branched runs and gradient noise"; "" where there is none.

    Args:
        evidence: weighed for it.
        source: the strongest, which stands where a bound alone is known.
    """
    several: list[str] = list(dict.fromkeys(r.source for r in evidence if not r.aside)) or ([source] if source else [])
    return f"by {' and '.join(_SOURCES[name] for name in several)}" if several else ""


@dataclass(frozen=True)
class Confidence:
    """How much a reader may stake on the best batch."""

    level: Level
    reasons: tuple[str, ...]  # why it is no higher; of the highest, what it stands on


@dataclass(frozen=True)
class FrontierPoint:
    """One number of devices at its best batch, against one device at its own: modelled."""

    devices: int = field(metadata=figure("devices", form=n.count))
    batch: int = field(metadata=figure("batch", form=n.count))  # examples per update, over all devices
    time_factor: float = field(metadata=figure("time", form=n.share))
    cost_factor: float = field(metadata=figure("device-seconds", form=n.share))
    # None: energy was not measured at these batches.
    energy_factor: float | None = field(default=None, metadata=figure("energy", form=n.share, sparse=True))


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
    """The answer. Every number in `text` stands in a field, and `why(field)` says how it came about.

    `text` is `answer`, `because`, and what further there is to say.
    """

    critical_batch: float | None = field(
        metadata=figure("critical batch", interval=("critical_low", "critical_high"), always=True)
    )
    critical_low: float | None = field(metadata=figure("low", full="critical batch from", within="critical_batch"))
    critical_high: float | None = field(metadata=figure("high", full="critical batch to", within="critical_batch"))
    critical_source: str | None  # "noise" < "branch" < "sweep": the evidence it stands on
    saturation_batch: float | None = field(metadata=figure("saturation batch"))
    best_batch: int | None = field(metadata=figure("best batch", form=n.count, always=True))
    best_low: float | None = field(metadata=figure("low", form=n.count, full="best batch from", within="best_batch"))
    best_high: float | None = field(metadata=figure("high", form=n.count, full="best batch to", within="best_batch"))
    limit: Limit = field(metadata=figure("limited by", form=n.plain))
    useful_devices: int | None = field(
        metadata=figure("devices worth it", form=n.count, interval=("useful_devices_low", "useful_devices_high"))
    )
    time_to_target: float | None = field(metadata=figure("time to target", "s"))  # on this device at best_batch
    text: str
    reasons: tuple[Reason, ...] = ()
    notes: tuple[Note, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()  # 1, 2, 4, ... devices
    useful_devices_low: int | None = field(default=None, metadata=figure("low", form=n.count, within="useful_devices"))
    useful_devices_high: int | None = field(
        default=None, metadata=figure("high", form=n.count, within="useful_devices")
    )
    learning_rate: float | None = field(default=None, metadata=figure("learning rate there"))
    confidence: Confidence | None = None  # None: no batch is advised
    evidence: tuple[Reading, ...] = ()  # on the critical batch, those set aside among them
    answer: str = ""  # the first line: batch, interval, confidence
    because: str = ""  # one sentence why

    def __str__(self) -> str:
        return self.text

    def why(self, figure: str) -> Reason:
        """The sentence and the figures behind one field of the verdict; of one without a figure, why there is none."""
        if not isinstance(figure, str):
            raise UsageError(f"why(): {figure!r} is no figure. Give the name of a field, such as 'best_batch'.")
        given = {reason.figure: reason for reason in reversed(self.reasons)}
        lacking = {note.figure.removeprefix("verdict."): note.text for note in reversed(self.notes)}
        if figure == "confidence" and self.confidence is not None:
            text = f"{self.confidence.level}: {'; '.join(self.confidence.reasons)}"
            return Reason(figure, text, "modelled")
        whole = _ENDS.sub("", figure)  # an end of an interval stands with its figure
        for name in (figure, whole, f"{whole}_batch", _WITH.get(figure, figure)):
            if name in given:
                return given[name]
            if name in lacking:
                return Reason(name, f"not known: {lacking[name]}", "assumed")
        names = list(dict.fromkeys([*(reason.figure for reason in self.reasons), *lacking, *_WITH]))
        meant = [name for name in names if figure in name.split("_")]
        if len(meant) == 1:  # "devices" of useful_devices
            return self.why(meant[0])
        known = ", ".join(names)
        raise UsageError(f"no figure {figure!r} in this verdict. Ask for one of: {known}.")

    def to_json(self) -> str:
        """This verdict alone as JSON; the whole run is `Run.to_json`."""
        return json.dumps(encode(self), indent=2)
