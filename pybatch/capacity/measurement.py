"""What a device does with a workload: throughput at each batch size, its ceiling, the largest batch that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from pybatch.capacity import largest, summary
from pybatch.capacity.bound import Place
from pybatch.capacity.burst import Settling
from pybatch.capacity.energy import EnergyWindows
from pybatch.capacity.exploration import OUT_OF_TIME, Explorer, Look, explore_doubling, explore_given
from pybatch.capacity.modes import EAGER, GraphedStep, Mode
from pybatch.capacity.step import TrainingStep
from pybatch.capacity.stopping import StoppingRule
from pybatch.capacity.timing import WARM_UP, Rounds, Series, unfinished
from pybatch.device.ceilings import measure_ceilings
from pybatch.device.clock import Clock, clock_for
from pybatch.device.counters import Region
from pybatch.device.counters_cpu import OtherLoad
from pybatch.device.identity import describe, last_level_cache_bytes, resolve, usable_cores
from pybatch.device.memory import PeakMemory
from pybatch.errors import Interrupted, UsageError
from pybatch.numerals import counted
from pybatch.records import BatchPoint, Capacity, Ceilings, Note
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.session import Session

_CEILINGS = 0.07  # of the time budget
# Of what is then left of it:
_EXPLORE = 0.30
_EXPLORE_GIVEN = 0.60  # batches that were asked for, and the fewest a fit needs, come before precision
_BURSTS = _WARM_UP = 0.08  # each, of the time for timing
_STEP = 1 / 60  # of the time budget; a step that takes more of it leaves no room for ten at every batch size
_DISTURBED = 0.1  # of the usable cores, kept busy by others, that a reader should hear of
_NOT_ASKED = Note("capacity.max_batch", "not asked for")
_NONE_RAN = Note("capacity.max_batch", "no batch size ran, so that nothing is known of memory")


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
    compile: bool = False,
    graph: bool = False,
    earlier: Capacity | None = None,
    on_partial: Callable[[Capacity], None] | None = None,
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
        find_max_batch: whether to look for the largest batch that fits, in a fresh process; its steps are eager.
        compile: time steps of the model under torch.compile; compiling is no part of them (`compile_s`).
        graph: time steps replayed as CUDA graphs, and eager ones beside them: `launch_overhead_ms` is the difference.
        earlier: of the same measurement, cut before its end: what stands of it is not measured again.
        on_partial: called with what has been found, without a fit, whenever a batch size has become steady.

    Raises:
        UsageError: batches or time budget that cannot work, a device without CUDA graphs.
        DeviceError: no such device.
        WorkloadError: a method of the workload failed at every small batch; names the method.
        Interrupted: Ctrl-C; `partial` is the Capacity measured so far.
    """
    if batches is not None and (not batches or any(n < 1 for n in batches)):
        raise UsageError(f"batches {list(batches)!r}: give at least one, each 1 or more.")
    if not time_budget > 0:
        raise UsageError(f"time budget {time_budget!r} s: give more than 0.")
    place, mode = resolve(device), Mode(compile, graph)
    mode.check(place)
    run = _Measurement(workload, place, dtype, batches, time_budget, seed, clock_for(place), progress, on_point, mode)
    run.on_partial = on_partial
    if earlier is not None:
        run.take_over(earlier)
    try:
        with _short_collections():
            run.measure(find_max_batch)
    except KeyboardInterrupt:
        run.untimed = "interrupted before it was timed"
        run.notes.append(Note("capacity", "interrupted; what was measured until then stands"))
        raise Interrupted(replace(run.capacity(), complete=False)) from None
    return run.capacity()


@contextmanager
def _short_collections() -> Iterator[None]:
    """In this context garbage collections pass over what exists now: all of torch's modules take a third of a second.

    There is one before each batch size, so that what memory it takes is its own.
    """
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


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
        mode: Mode = EAGER,
    ) -> None:
        self.device, self.dtype, self.batches = device, dtype, batches
        self.budget, self.seed, self.clock = time_budget, seed, clock
        self.progress, self.on_point = progress or (lambda text, share: None), on_point
        self.started = clock.now()
        self.notes: list[Note] = []
        self.untimed = OUT_OF_TIME  # why a batch size that runs has no times
        self.ceilings: Ceilings | None = None
        self.largest = largest.Largest(None, None)
        self.on_partial: Callable[[Capacity], None] | None = None
        self.kept: dict[int, BatchPoint] = {}  # of an earlier run
        self.first_round = 0
        self.settled = False  # an earlier run found the range of batch sizes
        self.rounds: Rounds | None = None
        self.runs = 1  # a batch size that does
        self.limit = largest.memory_limit(device)
        self.region = Region(device)
        memory = PeakMemory(device)
        self.session = Session(workload, device, dtype, seed)
        step = TrainingStep(self.session, compile=mode.compile, capturable=mode.graph)
        self.explorer = Explorer(step, clock, memory, self.limit)
        self.mode, self.graphed = mode, GraphedStep(step) if mode.graph else None
        self.bursts: dict[int, float] = {}

    def take_over(self, earlier: Capacity) -> None:
        """Let what stands of an earlier run count as measured."""
        self.kept = {p.batch: p for p in earlier.standing}
        self.first_round = 1 + max((r for p in earlier.standing for r in p.block_rounds), default=-1)
        found = [note for note in earlier.notes if note.figure == "batches"]  # how the range was found
        self.settled = earlier.complete and bool(found)
        if self.settled:
            self.notes += found
        self.ceilings = earlier.ceilings
        for n, p in self.kept.items():
            step_s = p.step_ms / 1e3 if p.step_ms is not None else None
            flops = None if p.model_flops is None else int(p.model_flops)
            self.explorer.looks[n] = Look(n, p.status, p.reason, step_s, p.memory_bytes, flops)
        if earlier.max_batch_verified:
            notes = tuple(note for note in earlier.notes if note.figure.startswith("capacity.max_batch"))
            self.largest = largest.Largest(earlier.max_batch, True, notes)

    def measure(self, find_max_batch: bool) -> None:
        """All stages, in order."""
        self._tell("first step")
        self.runs = self.explorer.sanity(self.session.workload.reference_batch)
        if self.graphed is not None:  # what cannot be captured is said before time is spent
            self.graphed.load(self.runs)
            self.graphed()
            self.graphed.check()
            self.graphed.clear()
        if self.ceilings is None:
            self._tell("ceilings of the device")
            self.ceilings = measure_ceilings(self.device, self.dtype, min(3.0, _CEILINGS * self.budget))
        self._tell("looking for the range of batch sizes")
        self._explore()
        self._save()
        end, reserve = self.started + self.budget, 0.0
        plan: largest.Plan | largest.Largest = largest.Largest(
            None, None, (_NONE_RAN if find_max_batch else _NOT_ASKED,)
        )
        if self.largest.verified:
            plan = self.largest
        elif find_max_batch and self.explorer.working:
            plan = largest.plan_largest(self.explorer, self.limit, end)
            if isinstance(plan, largest.Plan):
                reserve = largest.reserve_s(self.explorer, plan, self.limit, end - self.clock.now())
        self._time(end - reserve)
        if isinstance(plan, largest.Plan):
            self._tell("largest batch that fits")
            plan = largest.verify_largest(self.explorer, plan, self.limit, end)
        self.largest = plan

    def capacity(self) -> Capacity:
        """The record of what has been found so far."""
        looks, points = self.explorer.looks, self._points()
        series = list(self.rounds.series.values()) if self.rounds is not None else []
        notes = [*self.notes, *self.largest.notes]
        partial = unfinished(series)
        if partial:
            notes.append(
                Note(
                    "batches.step_ms", f"the time budget ended before these were steady: {', '.join(map(str, partial))}"
                )
            )
        late = {p.batch for p in points if p.reason == self.untimed or (p.batch in looks and looks[p.batch].late)}
        refused = summary.refused(points, late, given=self.batches is not None)
        if refused:
            sizes = ", ".join(map(str, refused))
            notes.append(Note("batches.status", f"the workload refuses batch {sizes}; each one's reason says how"))
        notes += summary.counter_notes(self.region, points, self.ceilings, self.explorer)
        return summary.summarize(
            points,
            {s.batch: s.blocks for s in series if s.seconds} | {n: _blocks(p) for n, p in self.kept.items()},
            notes,
            device=describe(self.device),
            ceilings=self.ceilings,
            workload=self.session.info,
            largest=self.largest,
            drift=self.rounds.drift if self.rounds is not None else None,
            anchor=self.rounds.anchor if self.rounds is not None else None,
            complete=not late and not refused,
            seed=self.seed,
            place=Place(
                "cuda" if self.device.type == "cuda" else "cpu", self.dtype, last_level_cache_bytes(self.device)
            ),
            mode=self.mode.name,
        )

    def _points(self) -> list[BatchPoint]:
        wanted = set(self.explorer.looks if self.batches is None else self.batches)
        return [self._point(n) for n in sorted(wanted | set(self.kept))]

    def _save(self) -> None:
        """Hand out what there is, for a caller who keeps it in case this process ends."""
        if self.on_partial is not None:
            self.on_partial(
                Capacity(
                    t0_ms=None,
                    ceiling_samples_per_s=None,
                    half_batch=None,
                    saturation_batch=None,
                    saturation_low=None,
                    saturation_high=None,
                    saturation_measured=None,
                    max_batch=self.largest.batch,
                    max_batch_verified=self.largest.verified,
                    model=None,
                    complete=False,
                    notes=tuple(self.notes),
                    device=describe(self.device),
                    ceilings=self.ceilings,
                    workload=self.session.info,
                    batches=tuple(self._points()),
                    mode=self.mode.name,
                )
            )

    def _explore(self) -> None:
        limit = _STEP * self.budget
        if self.batches is None and self.settled:
            return
        if self.batches is None:
            share, at_a_go = (_EXPLORE_GIVEN, 2) if self.mode.compile else (_EXPLORE, 1)  # compiling takes its time
            last = self._until(_EXPLORE_GIVEN)
            ended = explore_doubling(self.explorer, self._until(share), limit, last, at_a_go, self.runs)
            self.notes.append(Note("batches", f"{'quadrupled' if at_a_go > 1 else 'doubled'} from 1 on; {ended}"))
        else:
            explore_given(self.explorer, self.batches, self._until(_EXPLORE_GIVEN), limit)

    def _time(self, deadline: float) -> None:
        step, explorer = self.explorer.step, self.explorer
        wanted = {look.batch: look.step_s for look in explorer.working if look.step_s is not None}
        if self.batches is not None:
            wanted = {n: seconds for n, seconds in wanted.items() if n in self.batches}
        standing = sorted(n for n, p in self.kept.items() if p.status == "ok")
        control = standing[len(standing) // 2] if standing else None
        wanted = {n: seconds for n, seconds in wanted.items() if n not in self.kept}
        if not wanted:
            return
        if control is not None:
            wanted[control] = explorer.looks[control].step_s or 0.0
        timed: TrainingStep | GraphedStep = self.graphed or step
        self._settle(Settling(timed.load, timed, self.clock, WARM_UP[self.device.type]), wanted, deadline)
        energy = EnergyWindows(timed.load, timed, self.clock, self.region.meter)
        end, deadline = deadline, deadline - energy.reserve_s(wanted, deadline - self.clock.now())
        share = max(1.0, 1.5 * (deadline - self.clock.now()) / len(wanted))
        rule = StoppingRule(max_seconds=share)
        others = OtherLoad()
        self.rounds = Rounds(
            timed.load,
            timed,
            timed.check,
            self.clock,
            self.region,
            rule,
            self.seed,
            eager=step if self.graphed is not None else None,
        )
        self.rounds.turn = self.first_round
        self.rounds.run(wanted, deadline, self._visited)
        self._tell("energy")
        medians = {
            s.batch: s.median.value for s in self.rounds.series.values() if s.seconds and s.batch not in self.kept
        }
        for n, window in energy.measure(medians, end).items():
            self.rounds.series[n].energy = window
        timed.clear()
        if (busy := others.cores()) is not None and self.device.type == "cpu" and busy > _DISTURBED * usable_cores():
            text = f"other processes kept {busy:.1f} cores busy meanwhile: times are those of a disturbed machine"
            self.notes.append(Note("batches.step_ms", text))
        if control is not None:
            self._compare(self.rounds.series.pop(control))
        for series in self.rounds.series.values():
            if series.seconds:
                explorer.timed(series.batch, series.median.value)
            if series.seconds and series.stopped is None and self.on_point is not None:
                self.on_point(self._point(series.batch))

    def _settle(self, settling: Settling, wanted: dict[int, float], deadline: float) -> None:
        """Bursts after rests, then warm clocks: all times that follow are sustained ones."""
        self._tell("first steps after a rest")
        left = deadline - self.clock.now()
        settling.measure(wanted, self.clock.now() + _BURSTS * left)
        self._tell("warming up")
        settling.warm_up(wanted, self.clock.now() + _WARM_UP * left)
        self.bursts = settling.bursts
        if not settling.settled:
            what = "step times had not settled" if settling.settled is False else "no time was left for a warm-up"
            self.notes.append(Note("batches.step_ms", f"{what} when timing began: sustained times may be longer"))

    def _compare(self, again: Series) -> None:
        """Say how a kept batch size, timed again, compares with what an earlier run found."""
        before = self.kept[again.batch].step_ms
        if again.seconds and before is not None:
            change = 1e3 * again.median.value / before - 1
            text = f"batch {again.batch}, which an earlier run had timed, was timed again: {change:+.1%}"
            self.notes.append(Note("batches.step_ms", text))

    def _visited(self, series: Series) -> None:
        assert self.rounds is not None
        if series.stopped is not None:
            self._save()
        every = self.rounds.series.values()
        done = sum(s.stopped is not None for s in every)
        self._tell(f"batch {series.batch}: {done} of {counted(len(every), 'batch size')} steady")
        if series.stopped is not None and self.on_point is not None:
            self.on_point(self._point(series.batch))

    def _point(self, n: int) -> BatchPoint:
        if n in self.kept:
            return self.kept[n]
        series = self.rounds.series.get(n) if self.rounds is not None else None
        return summary.point(
            self.explorer.looks.get(n),
            n,
            series,
            self.ceilings,
            self.untimed,
            burst_s=self.bursts.get(n),
            compile_s=self.explorer.step.compile_s.get(n),
        )

    def _until(self, share: float) -> float:
        """The clock's time when this share of what is left of the budget will have gone."""
        now = self.clock.now()
        return now + share * (self.started + self.budget - now)

    def _tell(self, text: str) -> None:
        self.progress(text, min(1.0, (self.clock.now() - self.started) / self.budget))


def _blocks(point: BatchPoint) -> list[float]:
    """Seconds of a kept batch size that the fit resamples."""
    return [block / 1e3 for block in point.blocks_ms or (point.step_ms,) if block is not None]
