"""What a device does with a workload: throughput at each batch size, its ceiling, the largest batch that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from pybatch.base.arguments import typed
from pybatch.base.errors import Interrupted, UsageError
from pybatch.base.numerals import counted
from pybatch.base.progress import line_of, told
from pybatch.capacity import largest
from pybatch.capacity.burst import Settling
from pybatch.capacity.energy import EnergyWindows
from pybatch.capacity.exploration import FITTABLE, Explorer, explore_doubling, explore_given
from pybatch.capacity.findings import Findings
from pybatch.capacity.input import measure_input
from pybatch.capacity.modes import EAGER, GraphedStep, Mode
from pybatch.capacity.step import TrainingStep
from pybatch.capacity.stopping import StoppingRule
from pybatch.capacity.timing import WARM_UP, Rounds, Series
from pybatch.device.ceilings import measure_ceilings
from pybatch.device.clock import Clock, clock_for
from pybatch.device.counters import Region
from pybatch.device.disturbance import Disturbance, threads_left
from pybatch.device.identity import resolve
from pybatch.device.memory import PeakMemory
from pybatch.records import BatchPoint, Capacity, Note
from pybatch.workloads.base import Progress, Workload, checked
from pybatch.workloads.running.session import Session

_CEILINGS = 0.07  # of the time budget
# Of what is then left of it:
_EXPLORE = 0.30
_EXPLORE_GIVEN = 0.60  # batches that were asked for, and the fewest a fit needs, come before precision
_BURSTS = _WARM_UP = 0.08  # each, of the time for timing
_INPUT = 0.12  # of the time budget, for a workload that brings a loader
_LOST = 0.01  # of the steps: from so many left out on it is said
_STEP = 1 / 60  # of the time budget; a step that takes more of it leaves no room for ten at every batch size
_NOT_ASKED = Note("capacity.max_batch", "not asked for")
_NONE_RAN = Note("capacity.max_batch", "no batch size ran, so that nothing is known of memory")


@told
@typed
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
    coarse: bool = False,
    earlier: Capacity | None = None,
    on_partial: Callable[[Capacity], None] | None = None,
) -> Capacity:
    """Measure throughput against batch size, fit its ceiling, and find the largest batch that fits in memory.

    A step is forward, backward and the update of the workload's optimizer, else of pybatch's AdamW, on a batch drawn
    beforehand: the input pipeline is not part of it. Each batch size is timed in several visits in random order until
    its median is steady.

    Args:
        workload: what to run.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        dtype: "fp32", or "bf16" or "fp16" for autocast.
        batches: batch sizes to measure; None doubles from 1 on until throughput no longer grows.
        coarse: None quadruples, for a time budget that would not do for twice as many sizes.
        time_budget: seconds for everything, ceilings and largest batch included.
        seed: of the model, the batches and the order of measurement.
        progress: called with (what is being done, share done); None: a line on stderr, on a terminal or in a notebook.
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
    checked(workload)
    if batches is not None and (not len(batches) or any(n < 1 for n in batches)):
        raise UsageError(f"batches {list(batches)!r}: give at least one, each 1 or more.")
    batches = [int(n) for n in batches] if batches is not None else None  # a tensor's are no keys to look up
    if not time_budget > 0:
        raise UsageError(f"time budget {time_budget!r} s: give more than 0.")
    place, mode = resolve(device), Mode(compile, graph)
    mode.check(place, dtype)
    with short_collections(), threads_left(place) as fewer:
        run = _Measurement(
            workload, place, dtype, batches, time_budget, seed, clock_for(place), progress, on_point, mode
        )
        run.on_partial, run.coarse = on_partial, coarse
        if earlier is not None:
            run.take_over(earlier)
        if fewer is not None:
            run.found.disturbed += (fewer,)
        try:
            run.measure(find_max_batch)
        except KeyboardInterrupt:
            run.found.untimed = "interrupted before it was timed"
            run.found.notes.append(Note("capacity", "interrupted; what was measured until then stands"))
            raise Interrupted(replace(run.found.capacity(), complete=False)) from None
    return run.found.capacity()


@contextmanager
def short_collections() -> Iterator[None]:
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
        self.on_partial: Callable[[Capacity], None] | None = None
        self.coarse = False
        self.first_round = 0
        self.settled = False  # an earlier run found the range of batch sizes
        self.runs = 1  # a batch size that does
        self.limit = largest.memory_limit(device)
        self.region = Region(device)
        memory = PeakMemory(device)
        self.session = Session(workload, device, dtype, seed)
        step = TrainingStep(self.session, compile=mode.compile, capturable=mode.graph)
        self.explorer = Explorer(step, clock, memory, self.limit)
        self.mode, self.graphed = mode, GraphedStep(step) if mode.graph else None
        self.found = Findings(self.session, self.explorer, self.region, mode.name, seed, batches)

    def take_over(self, earlier: Capacity) -> None:
        """Let what stands of an earlier run count as measured."""
        self.first_round, self.settled = self.found.take_over(earlier)

    def measure(self, find_max_batch: bool) -> None:
        """All stages, in order."""
        self._tell("first step")
        self.runs = self.explorer.sanity(self.session.workload.reference_batch)
        if self.graphed is not None:  # what cannot be captured is said before time is spent
            self.graphed.load(self.runs)
            self.graphed()
            self.graphed.check()
            self.graphed.clear()
        if self.found.ceilings is None:
            self._tell("ceilings of the device")
            self.found.ceilings = measure_ceilings(self.device, self.dtype, min(3.0, _CEILINGS * self.budget))
        self._tell("looking for the range of batch sizes")
        self._explore()
        self._hand_out()
        end, reserve = self.started + self.budget, 0.0
        plan: largest.Prediction | largest.Largest = largest.Largest(
            None, None, (_NONE_RAN if find_max_batch else _NOT_ASKED,)
        )
        if self.found.largest.verified:
            plan = self.found.largest
        elif find_max_batch and self.explorer.working:
            plan = largest.predict_largest(self.explorer, self.limit, end)
            if isinstance(plan, largest.Prediction):
                reserve = largest.reserve_s(self.explorer, plan, self.limit, end - self.clock.now())
        loads = self.session.workload.brings("loader") and self.found.pipeline is None
        loading = _INPUT * self.budget if loads else 0.0
        self._time(end - reserve - loading)
        if loads:
            self._tell("input pipeline")
            self._load(loading)
        if isinstance(plan, largest.Prediction):
            self._tell("largest batch that fits")
            plan = largest.verify_largest(self.explorer, plan, self.limit, end)
        self.found.largest = plan

    def _hand_out(self) -> None:
        """Give what there is to a caller who keeps it in case this process ends."""
        if self.on_partial is not None:
            self.on_partial(self.found.partial())

    def _explore(self) -> None:
        limit = _STEP * self.budget
        if self.batches is None and self.settled:
            return
        if self.batches is None:
            share = _EXPLORE_GIVEN if self.mode.compile else _EXPLORE  # compiling takes its time
            at_a_go = 2 if self.mode.compile or self.coarse else 1
            last = self._until(_EXPLORE_GIVEN)
            ended = explore_doubling(self.explorer, self._until(share), limit, last, at_a_go, self.runs)
            self.found.notes.append(Note("batches", f"{'quadrupled' if at_a_go > 1 else 'doubled'} from 1 on; {ended}"))
            if (run := len(self.explorer.working)) < FITTABLE:
                few = f"{counted(run, 'batch size')} of the {FITTABLE} that a fit needs: {ended}"
                few += ". Take a smaller model" if "fit in memory" in ended else ". Raise the time budget"
                line_of(self.progress)(few)
        else:
            explore_given(self.explorer, self.batches, self._until(_EXPLORE_GIVEN), limit, self.started + self.budget)

    def _time(self, deadline: float) -> None:
        step, explorer, found = self.explorer.step, self.explorer, self.found
        wanted = {look.batch: look.step_s for look in explorer.working if look.step_s is not None}
        if self.batches is not None:
            wanted = {n: seconds for n, seconds in wanted.items() if n in self.batches}
        standing = sorted(n for n, p in found.kept.items() if p.status == "ok")
        control = standing[len(standing) // 2] if standing else None
        wanted = {n: seconds for n, seconds in wanted.items() if n not in found.kept}
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
        disturbance = Disturbance()
        rounds = found.rounds = Rounds(
            timed.load,
            timed,
            timed.check,
            self.clock,
            self.region,
            rule,
            self.seed,
            eager=step if self.graphed is not None else None,
        )
        rounds.turn = self.first_round
        rounds.run(wanted, deadline, self._visited)
        self._tell("energy")
        medians = {s.batch: s.median.value for s in rounds.series.values() if s.seconds and s.batch not in found.kept}
        for n, window in energy.measure(medians, end).items():
            rounds.series[n].energy = window
        timed.clear()
        if self.device.type == "cpu":
            found.disturbed += disturbance.told()
            if self.clock.left_out > _LOST:
                found.disturbed += (f"{self.clock.left_out:.0%} of the steps lost their core and were left out",)
        if control is not None:
            self._compare(rounds.series.pop(control))
        for series in rounds.series.values():
            if series.seconds:
                explorer.timed(series.batch, series.median.value)
            if series.seconds and series.stopped is None and self.on_point is not None:
                self.on_point(found.point(series.batch))

    def _load(self, seconds: float) -> None:
        """The rate of the workload's loader, where one is brought."""
        found = measure_input(self.session, self.explorer.step, self.found.points(), seconds)
        if isinstance(found, Note):
            self.found.notes.append(found)
        else:
            self.found.pipeline = found

    def _settle(self, settling: Settling, wanted: dict[int, float], deadline: float) -> None:
        """Bursts after rests, then warm clocks: all times that follow are sustained ones."""
        self._tell("first steps after a rest")
        left = deadline - self.clock.now()
        settling.measure(wanted, self.clock.now() + _BURSTS * left)
        self._tell("warming up")
        settling.warm_up(wanted, self.clock.now() + _WARM_UP * left)
        self.found.bursts = settling.bursts
        if not settling.settled:
            what = "step times had not settled" if settling.settled is False else "no time was left for a warm-up"
            self.found.notes.append(Note("batches.step_ms", f"{what} when timing began: sustained times may be longer"))

    def _compare(self, again: Series) -> None:
        """Say how a kept batch size, timed again, compares with what an earlier run found."""
        before = self.found.kept[again.batch].step_ms
        if again.seconds and before is not None:
            change = 1e3 * again.median.value / before - 1
            text = f"batch {again.batch}, which an earlier run had timed, was timed again: {change:+.1%}"
            self.found.notes.append(Note("batches.step_ms", text))

    def _visited(self, series: Series) -> None:
        assert self.found.rounds is not None
        if series.stopped is not None:
            self._hand_out()
        every = self.found.rounds.series.values()
        done = sum(s.stopped is not None for s in every)
        self._tell(f"batch {series.batch}: {done} of {counted(len(every), 'batch size')} steady")
        if series.stopped is not None and self.on_point is not None:
            self.on_point(self.found.point(series.batch))

    def _until(self, share: float) -> float:
        """The clock's time when this share of what is left of the budget will have gone."""
        now = self.clock.now()
        return now + share * (self.started + self.budget - now)

    def _tell(self, text: str) -> None:
        self.progress(text, min(1.0, (self.clock.now() - self.started) / self.budget))
