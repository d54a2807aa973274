"""Record of a batch-size schedule: its stages, what it saves and what that rests on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from pybatch.base import numerals as n
from pybatch.base.codec import encode
from pybatch.base.display import Shown
from pybatch.records.figure import figure
from pybatch.records.subject import Note

ScheduleSource = Literal["noise", "branches", "law"]


@dataclass(frozen=True)
class Stage:
    """A stretch of a run at one batch size."""

    batch: int = field(metadata=figure("batch", form=n.count))  # examples of an update, over all devices
    first_step: int = field(metadata=figure("from step", form=n.count))  # counted from 1
    steps: int = field(metadata=figure("steps", form=n.count))
    first_example: int = field(metadata=figure("from example", form=n.count))  # examples before it
    # Of the run that the schedule was made from, at its middle; None: not known there.
    critical_batch: float | None = field(metadata=figure("critical batch", form=n.batch_size))
    rate_factor: float = field(
        metadata=figure("rate", form=lambda value: f"×{n.number(value)}" if value is not None else n.number(None))
    )  # of the base batch's
    passes: int = field(default=1, metadata=figure("passes a step", form=n.count))  # of accumulation, on each device

    @property
    def examples(self) -> int:
        """Examples that it takes."""
        return self.batch * self.steps


@dataclass(frozen=True)
class Schedule(Shown):
    """Batch sizes by stages, in doublings of the batch of the run it was made from.

    Steps and examples are what the model of McCandlish et al. (2018, eq. 2.7 and D.5) says the same loss takes:
    with critical batch B_c, a step at batch B makes 1 / (1 + B_c / B) of the progress of one at a very large batch.
    """

    stages: tuple[Stage, ...]
    base_batch: int = field(metadata=figure("batch of the run", form=n.count))
    base_steps: int = field(metadata=figure("steps of the run", form=n.count))  # that reach the same loss
    cost: float = field(metadata=figure("examples above the fewest", form=n.share))  # of any batch, as it comes out
    cost_asked: float
    base_cost: float = field(metadata=figure("the same of the run's own batch", form=n.share))
    steps: int = field(metadata=figure("steps", form=n.count))
    examples: int = field(metadata=figure("examples", form=n.count))
    # The fixed batch that takes as many examples to the same loss, and what the schedule saves of its steps.
    fixed_batch: float = field(metadata=figure("fixed batch of as many examples", form=n.batch_size))
    steps_saved: float = field(
        metadata=figure("steps saved against it", form=n.share, interval=("steps_saved_low", "steps_saved_high"))
    )
    # None: of a law, whose errors are not known.
    steps_saved_low: float | None = field(metadata=figure("low", form=n.share, within="steps_saved"))
    steps_saved_high: float | None = field(metadata=figure("high", form=n.share, within="steps_saved"))
    source: ScheduleSource
    rate_rule: str = field(metadata=figure("rate rule", form=n.plain))
    answer: str = ""  # the first line: the batch sizes
    because: str = ""  # one sentence: what they save
    notes: tuple[Note, ...] = ()

    def __str__(self) -> str:
        return f"{self.answer} {self.because}"

    def batch_at(self, examples: int) -> int:
        """The batch size of the update after so many examples."""
        return next((s.batch for s in reversed(self.stages) if examples >= s.first_example), self.stages[0].batch)

    def to_json(self) -> str:
        """This schedule alone as JSON."""
        return json.dumps(encode(self), indent=2)
