"""What a device does with a workload: throughput at each batch size, its ceiling, the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pybatch.capacity import largest, summary
from pybatch.capacity.exploration import OUT_OF_TIME, Explorer, explore_doubling, explore_given
from pybatch.capacity.step import TrainingStep
from pybatch.capacity.stopping import StoppingRule
from pybatch.capacity.timing import Rounds, Series, unfinished
from pybatch.device.ceilings import measure_ceilings
from pybatch.device.clock import Clock, clock_for
from pybatch.device.counters import Region
from pybatch.device.counters_cpu import OtherLoad
from pybatch.device.identity import describe, resolve, usable_cores
from pybatch.device.memory import PeakMemory
from pybatch.errors import Interrupted, UsageError
from pybatch.records import BatchPoint, Capacity, Ceilings, Note
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.session import Session

_CEILINGS = 0.07  # of the time budget
# Of what is then left of it:
_EXPLORE = 0.30
_EXPLORE_GIVEN = 0.60  # batches that were asked for, and the fewest a fit needs, come before precision
_LARGEST = 0.50  # at most, for the largest batch
_STEP = 1 / 60  # of the time budget; a step that takes more of it leaves no room for ten at every batch size
_SPARE = 1.2  # the largest batch is estimated from small ones
_DISTURBED = 0.1  # of the usable cores, kept busy by others, that a reader should hear of
_NOT_ASKED = Note("capacity.max_batch", "not asked for")


def measure_capacity(
    workload: Workload,
    *,
    device: str | torch.device | None = None,
    dtype: str = "fp32",
    batches: Sequence[int] | None = None,
    time_budget: float = 45.0,
    seed: int = 0,
    progress: Progress | None = None,
    on_point: Callable[[BatchPoint], None] | None = None,
    find_max_batch: bool = True,
) -> Capacity:
    """Measure throughput against batch size, fit its ceiling, and find the largest batch that fits in memory.

    A step is forward, backward and the update of pybatch's AdamW, on a batch drawn beforehand: the input pipeline is
    not part of it. Each batch size is timed in several visits in random order until its median is steady.

    Args:
        workload: what to run.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        dtype: "fp32", or "bf16" for autocast.
        batches: batch sizes to measure; None doubles from 1 on until throughput no longer grows.
        time_budget: seconds for everything, ceilings and largest batch included.
        seed: of the model, the batches and the order of measurement.
        progress: called with what is being done and the share done, 0..1.
        on_point: called with every batch size as soon as it is measured.
        find_max_batch: whether to look for the largest batch that fits, in a fresh process.

    Raises:
        UsageError: batches or time budget that cannot work.
        DeviceError: no such device.
        WorkloadError: a method of the workload failed at every small batch; names the method.
        Interrupted: Ctrl-C; `partial` is the Capacity measured so far.
    """
    if batches is not None and (not batches or any(n < 1 for n in batches)):
        raise UsageError(f"batches {list(batches)!r}: give at least one, each 1 or more.")
    if not time_budget > 0:
        raise UsageError(f"time budget {time_budget!r} s: give more than 0.")
    place = resolve(device)
    run = _Measurement(workload, place, dtype, batches, time_budget, seed, clock_for(place), progress, on_point)
    try:
        run.measure(find_max_batch)
    except KeyboardInterrupt:
        run.untimed = "interrupted before it was timed"
        run.notes.append(Note("capacity", "interrupted; what was measured until then stands"))
        raise Interrupted(replace(run.capacity(), complete=False)) from None
    return run.capacity()


class _Measurement:
    """One run of `measure_capacity`: its stages, and what they have found so far."""

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        dtype: str,
        batches: Sequence[int] | None,
        time_budget: float,
        seed: int,
        clock: Clock,
        progress: Progress | None = None,
        on_point: Callable[[BatchPoint], None] | None = None,
    ) -> None:
        self.device, self.dtype, self.batches = device, dtype, batches
        self.budget, self.seed, self.clock = time_budget, seed, clock
        self.progress, self.on_point = progress or (lambda text, share: None), on_point
        self.started = clock.now()
        self.notes: list[Note] = []
        self.untimed = OUT_OF_TIME  # why a batch size that runs has no times
        self.ceilings: Ceilings | None = None
        self.largest = largest.Largest(None, None)
        self.rounds: Rounds | None = None
        self.limit = largest.memory_limit(device)
        self.region = Region(device)
        memory = PeakMemory(device)
        self.session = Session(workload, device, dtype, seed)
        self.explorer = Explorer(TrainingStep(self.session), clock, memory, self.limit)

    def measure(self, find_max_batch: bool) -> None:
        """All stages, in order."""
        self._tell("first step")
        self.explorer.sanity(self.session.workload.reference_batch)
        self._tell("ceilings of the device")
        self.ceilings = measure_ceilings(self.device, self.dtype, min(3.0, _CEILINGS * self.budget))
        self._tell("looking for the range of batch sizes")
        self._explore()
        end, reserve = self.started + self.budget, 0.0
        plan: largest.Plan | largest.Largest = largest.Largest(None, None, (_NOT_ASKED,))
        if find_max_batch and self.explorer.working:
            plan = largest.plan_largest(self.explorer, self.limit, end)
            if isinstance(plan, largest.Plan):
                needed = largest.needed_s(self.explorer, plan.candidate, self.limit) * _SPARE
                # Time that would not suffice for the largest batch is better spent on the others.
                reserve = needed if needed <= _LARGEST * (end - self.clock.now()) else 0.0
        self._time(end - reserve)
        if isinstance(plan, largest.Plan):
            self._tell("largest batch that fits")
            plan = largest.verify_largest(self.explorer, plan, self.limit, end)
        self.largest = plan

    def capacity(self) -> Capacity:
        """The record of what has been found so far."""
        looks = self.explorer.looks
        wanted = sorted(set(looks if self.batches is None else self.batches))
        points = [self._point(n) for n in wanted]
        series = list(self.rounds.series.values()) if self.rounds is not None else []
        notes = [*self.notes, *self.largest.notes]
        partial = unfinished(series)
        if partial:
            notes.append(
                Note(
                    "batches.step_ms", f"the time budget ended before these were steady: {', '.join(map(str, partial))}"
                )
            )
        notes += summary.counter_notes(self.region, points, self.ceilings, self.explorer)
        return summary.summarize(
            points,
            {s.batch: s.blocks for s in series if s.seconds},
            notes,
            device=describe(self.device),
            ceilings=self.ceilings,
            workload=self.session.info,
            largest=self.largest,
            drift=self.rounds.drift if self.rounds is not None else None,
            anchor=self.rounds.anchor if self.rounds is not None else None,
            complete=not any(p.reason == OUT_OF_TIME or (p.batch in looks and looks[p.batch].late) for p in points),
            seed=self.seed,
        )

    def _explore(self) -> None:
        limit = _STEP * self.budget
        if self.batches is None:
            ended = explore_doubling(self.explorer, self._until(_EXPLORE), limit, self._until(_EXPLORE_GIVEN))
            self.notes.append(Note("batches", f"doubled from 1 on; {ended}"))
        else:
            explore_given(self.explorer, self.batches, self._until(_EXPLORE_GIVEN), limit)

    def _time(self, deadline: float) -> None:
        step, explorer = self.explorer.step, self.explorer
        wanted = {look.batch: look.step_s for look in explorer.working if look.step_s is not None}
        if self.batches is not None:
            wanted = {n: seconds for n, seconds in wanted.items() if n in self.batches}
        if not wanted:
            return
        share = max(1.0, 1.5 * (deadline - self.clock.now()) / len(wanted))
        rule = StoppingRule(max_seconds=share)
        others = OtherLoad()
        self.rounds = Rounds(step.load, step, step.check, self.clock, self.region, rule, self.seed)
        self.rounds.run(wanted, deadline, self._visited)
        step.clear()
        if (busy := others.cores()) is not None and self.device.type == "cpu" and busy > _DISTURBED * usable_cores():
            text = f"other processes kept {busy:.1f} cores busy meanwhile: times are those of a disturbed machine"
            self.notes.append(Note("batches.step_ms", text))
        for series in self.rounds.series.values():
            if series.seconds:
                explorer.timed(series.batch, series.median.value)
            if series.seconds and series.stopped is None and self.on_point is not None:
                self.on_point(self._point(series.batch))

    def _visited(self, series: Series) -> None:
        assert self.rounds is not None
        every = self.rounds.series.values()
        done = sum(s.stopped is not None for s in every)
        self._tell(f"batch {series.batch}: {done} of {len(every)} batch sizes steady")
        if series.stopped is not None and self.on_point is not None:
            self.on_point(self._point(series.batch))

    def _point(self, n: int) -> BatchPoint:
        series = self.rounds.series.get(n) if self.rounds is not None else None
        return summary.point(self.explorer.looks.get(n), n, series, self.ceilings, self.untimed)

    def _until(self, share: float) -> float:
        """The clock's time when this share of what is left of the budget will have gone."""
        now = self.clock.now()
        return now + share * (self.started + self.budget - now)

    def _tell(self, text: str) -> None:
        self.progress(text, min(1.0, (self.clock.now() - self.started) / self.budget))
