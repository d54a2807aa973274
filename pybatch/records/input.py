"""Record of the input pipeline: what a workload's DataLoader gives, alone and with the training step."""

from __future__ import annotations

from dataclasses import dataclass, field

from pybatch.base import numerals as n
from pybatch.records.figure import figure


@dataclass(frozen=True)
class InputRate:
    """A DataLoader at one batch size."""

    batch: int = field(metadata=figure("batch", form=n.count))
    samples_per_s: float = field(metadata=figure("loaded alone", "{examples}/s", n.rounded))
    # A training step and all waiting for its batch, median; None: there was no time for it.
    with_step_ms: float | None = field(default=None, metadata=figure("with the step", "ms"))


@dataclass(frozen=True)
class InputPipeline:
    """What the training's own loader gives."""

    workers: int  # processes that load, as the training has them; 0: the training's own
    one_worker_per_s: float  # examples/s of each of them
    rates: tuple[InputRate, ...]  # by batch size, ascending
    kept_batch: int | None = None  # the largest batch size timed that it keeps up with; None: with none
