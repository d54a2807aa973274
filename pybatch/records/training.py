"""Record of a training that was watched: what it trains, and where the time of its steps goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pybatch.base import numerals as n
from pybatch.base.display import Shown
from pybatch.records.figure import figure
from pybatch.records.subject import Note


def _part(label: str) -> Any:
    return field(default=None, metadata=figure(label, form=n.share))


@dataclass(frozen=True)
class Training(Shown):
    """The steps of a user's own training, as they were made: the input pipeline and all else the script does included.

    `waiting` + `script` + `forward` + `backward` + `between` + `update` are shares of the time from one step's end to
    the next's, over the steps of the usual batch size with no evaluation pass before them.
    """

    name: str  # of the script or module
    model: str = field(metadata=figure("model", form=n.plain))
    optimizer: str = field(metadata=figure("optimizer", form=n.plain))
    wrapped: tuple[str, ...] = field(default=(), metadata=figure("found", form=n.plain))  # DDP, GradScaler, ...
    batch: int | None = field(default=None, metadata=figure("batch", form=n.count))  # of an update, all devices
    micro_batch: int | None = field(default=None, metadata=figure("of passes over", form=n.count))  # on one device
    accumulation: int | None = field(default=None, metadata=figure("passes a step", form=n.count))
    devices: int = 1
    steps: int = field(default=0, metadata=figure("steps watched", form=n.count))
    step_ms: float | None = field(default=None, metadata=figure("step", "ms", interval=("step_ms_low", "step_ms_high")))
    step_ms_low: float | None = field(default=None, metadata=figure("low", within="step_ms"))  # 95 % of the median
    step_ms_high: float | None = field(default=None, metadata=figure("high", within="step_ms"))
    samples_per_s: float | None = field(default=None, metadata=figure("throughput", "{examples}/s", n.rounded))
    waiting: float | None = _part("waiting for data")  # between a step, or a pass, and the next
    script: float | None = _part("the script between steps")  # what else it does there; None: not told from waiting
    forward: float | None = _part("forward and loss")
    backward: float | None = _part("backward")
    between: float | None = _part("between backward and step")  # clipping, unscaling, logging
    update: float | None = _part("update")
    workers: int | None = None  # of the DataLoader; None: none was used
    workers_needed: int | None = None  # so many would keep up with the device
    input_from: str | None = None  # what `waiting` was taken from
    cpu_active: float | None = field(default=None, metadata=figure("CPU active", form=n.share))
    joules_per_sample: float | None = field(default=None, metadata=figure("J per example"))
    memory_bytes: int | None = field(default=None, metadata=figure("memory of the process", form=n.memory))  # its peak
    notes: tuple[Note, ...] = ()
