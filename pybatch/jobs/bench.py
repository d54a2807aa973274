"""The main job: capacity, then noise, branches where asked for, then the verdict, as one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch

from pybatch.answer.best import LOOKS, closer
from pybatch.answer.input import with_input_bounds
from pybatch.answer.merge import check_sweep, with_sweep
from pybatch.answer.verdict import advise
from pybatch.base.errors import Interrupted, PybatchError, carry
from pybatch.base.numerals import count
from pybatch.base.progress import line_of
from pybatch.branch.measurement import measure_branches
from pybatch.capacity.exploration import first_line
from pybatch.capacity.measurement import measure_capacity
from pybatch.capacity.modes import Mode
from pybatch.device.disturbance import threads_left
from pybatch.device.environment import capture
from pybatch.device.identity import describe, resolve
from pybatch.fits.noise import MIN_BLOCKS
from pybatch.jobs import resume as continuation
from pybatch.jobs.options import BenchOptions
from pybatch.noise.measurement import measure_noise
from pybatch.records import BatchPoint, Capacity, Convergence, Environment, NoiseScale, Note, Run
from pybatch.records.noise import unmeasured
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.running.optimizers import adjusted
from pybatch.workloads.running.session import Session, is_out_of_memory

_SHARES = (0.7, 0.2)  # of the time budget: capacity, noise; a closer look gets what is left
_LOOK, _LEAST_LOOK = 0.05, 1.0  # share of the time budget, and seconds, below which no closer look is begun
_APART = 0.2  # log ratio of two times of one batch size, past which what was timed beside it is of another machine
_THOROUGH_SHARES = (0.4, 0.15)  # the branches get what is left
_STEPS = 2  # of the noise scale, at least: a step of its training before, and a micro-batch
INTERRUPTED = "interrupted by Ctrl-C: what was measured until then is kept"


def run_bench(
    workload: Workload,
    options: BenchOptions,
    *,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    earlier: Run | None = None,
    on_partial: Callable[[Run], None] | None = None,
    sweep: Run | None = None,
) -> Run:
    """Measure capacity and noise of a workload on a device, and give the verdict on both.

    Args:
        workload: what to measure.
        options: how.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        progress: called with (what is being done, share done).
        earlier: a record of the same run that was cut: what stands of it is not measured again. Its steps on several
            devices are kept as they are.
        on_partial: called with the record so far whenever it has grown, for a caller who keeps it.
        sweep: steps to target of this workload on this device: the verdict stands on them.

    Returns:
        The whole record. `complete` is False where a part is missing; a note says why.

    Raises:
        UsageError: `earlier` is of another workload, device, dtype, seed or version, or `sweep` of another workload,
            device or dtype.
        Interrupted: on Ctrl-C, with the run so far in `.partial`; KeyboardInterrupt where nothing is measured yet.
        WorkloadError: where the workload fails before anything was measured.
    """
    start = time.monotonic()
    place, workload = resolve(device), adjusted(workload, options.optimizer, options.reference_batch)
    with threads_left(place, earlier.environment.threads if earlier is not None and earlier.environment else None):
        found = _Found.begun(workload, place, options, earlier, sweep)
        interrupted = Note("run", INTERRUPTED)
        try:
            lacking = _measure(workload, place, options, start, found, progress, on_partial)
            return found.run(*lacking)
        except Interrupted as stop:
            found.take(stop.partial)
            raise Interrupted(found.run(interrupted)) from None
        except KeyboardInterrupt:
            if found.capacity is None:
                raise
            raise Interrupted(found.run(interrupted)) from None
        except PybatchError as error:
            if not found.anything:
                raise
            return found.run(Note(found.stage, str(error)))
        except Exception as error:
            if not found.anything:
                raise
            if not is_out_of_memory(error):
                carry(error, found.run(Note(found.stage, f"cut by a fault of pybatch: {first_line(error)}")))
                raise
            text = f"memory ran out: {first_line(error)}"
            if found.stage == "noise":
                n = workload.reference_batch
                text = f"memory ran out in steps of batch {n}, the workload's reference_batch: make that or the model "
                text += "smaller"
            return found.run(Note(found.stage, text))


def _measure(
    workload: Workload,
    place: torch.device,
    options: BenchOptions,
    start: float,
    found: _Found,
    progress: Progress | None,
    on_partial: Callable[[Run], None] | None,
) -> tuple[Note, ...]:
    """Measure into `found`, each part within its share of the time; what was not even begun has a note."""
    capacity_share, noise_share = _THOROUGH_SHARES if options.thorough else _SHARES
    branches_from = capacity_share + noise_share

    def left() -> float:
        return options.time_budget - (time.monotonic() - start)

    def save(capacity: Capacity) -> None:
        found.partial = capacity
        if on_partial is not None:
            on_partial(found.cut(capacity))

    found.capacity = measure_capacity(
        workload,
        device=place,
        dtype=options.dtype,
        batches=options.batches,
        time_budget=capacity_share * options.time_budget,
        seed=options.seed,
        compile=options.compile,
        graph=options.graph,
        coarse=options.coarse,
        progress=_staged(progress, "capacity", 0.0, capacity_share),
        earlier=found.earlier.capacity if found.earlier is not None else None,
        on_partial=save,
    )
    save(found.capacity)
    if left() <= 0:
        return ()
    if found.noise is None:
        if (why := _beyond(found.capacity, workload.reference_batch, left())) is not None:
            return (Note("noise", why),)
        found.noise = measure_noise(
            workload,
            device=place,
            dtype=options.dtype,
            seed=options.seed,
            time_budget=left() * noise_share / (1 - capacity_share),
            layers=True,
            progress=_staged(progress, "noise", capacity_share, branches_from),
        )
        save(found.capacity)
    look_s = max(_LEAST_LOOK, _LOOK * options.time_budget)
    if options.thorough and found.steps is None and left() > look_s:
        found.steps = measure_branches(
            workload,
            device=place,
            dtype=options.dtype,
            checkpoints=[found.noise.warmup_steps or 1],
            target=workload.target.get("train"),
            seed=options.seed,
            time_budget=left() - look_s,
            progress=_staged(progress, "branches", branches_from, 1.0),
        )
    for look in range(LOOKS):
        if left() < look_s:
            break
        timed = found.capacity.batches
        advised = _staged(progress, "advised batch", branches_from, 1.0)
        found.capacity = _closer(workload, place, options, found, left(), advised, again=look == 0)
        if found.capacity.batches == timed:
            break
    return ()


def _closer(
    workload: Workload,
    place: torch.device,
    options: BenchOptions,
    found: _Found,
    seconds: float,
    progress: Progress | None,
    again: bool = True,
) -> Capacity:
    """The capacity with the advised batch timed, where it was not, else with what is beside it; on a disturbed machine
    also `again` with those within an octave.

    The fit stays that of the batch sizes it was made of; the verdict asks all that were timed.
    """
    capacity = found.capacity
    assert capacity is not None
    verdict = found.run().verdict
    batch = verdict.best_batch if verdict is not None else None
    if batch is None or options.batches is not None:
        return capacity
    timed = {p.batch: p for p in capacity.batches if p.status == "ok"}
    near = [n for n in timed if 0.5 <= n / batch <= 2.0] if capacity.disturbed and again else []
    new = closer(capacity, batch)
    if not new and not near:
        return capacity
    # One that was timed before is timed beside them: what a machine does now may not be what it did then.
    anchor = min(timed, key=lambda n: abs(math.log(n / batch)), default=None)
    asked = sorted({*new, *near} | ({anchor} if anchor is not None else set()))
    try:
        seen = measure_capacity(
            workload,
            device=place,
            dtype=options.dtype,
            batches=asked,
            time_budget=seconds,
            seed=options.seed,
            find_max_batch=False,
            compile=options.compile,
            graph=options.graph,
            progress=progress,
            earlier=replace(capacity, batches=(), complete=False, max_batch_verified=None),
        )
    except Interrupted:  # what was measured before stands
        raise KeyboardInterrupt from None
    except PybatchError as error:
        text = f"batch {_told(asked)} was not timed after the verdict advised {count(batch)}: {error}"
        note = Note("batches", text)
        return replace(capacity, notes=(*capacity.notes, note))
    longer = {p.batch: p for p in seen.batches if p.status == "ok"}
    # What a step takes of memory shows in a process's first steps only: an earlier figure stands.
    kept = {
        n: replace(p, memory_bytes=timed[n].memory_bytes if n in timed else None)
        for n, p in longer.items()
        if n not in timed or p.samples >= timed[n].samples
    }
    disturbed = tuple(dict.fromkeys((*capacity.disturbed, *seen.disturbed)))
    if new and anchor in longer and abs(moved := _moved(timed[anchor], longer[anchor])) > _APART:
        kept = {n: p for n, p in kept.items() if n in timed}
        text = f"batch {_told(new)}, timed after the verdict advised {count(batch)}, is left out: beside it batch "
        text += f"{count(anchor)} took {math.exp(moved):.2g} times as long as before"
        capacity = replace(capacity, notes=(*capacity.notes, Note("batches", text)), disturbed=disturbed)
    if not kept:
        return capacity
    text = f"batch {_told(sorted(kept))} timed after the verdict advised {count(batch)}; memory is not measured then"
    note = Note("batches", text)
    points = timed | kept | {p.batch: p for p in capacity.batches if p.status != "ok"}
    return replace(
        capacity,
        batches=tuple(with_input_bounds([points[n] for n in sorted(points)], capacity.input)),
        disturbed=disturbed,
        notes=(*capacity.notes, note),
    )


def _moved(before: BatchPoint, now: BatchPoint) -> float:
    """Log ratio of the step times of one batch size."""
    return math.log(now.step_ms / before.step_ms) if before.step_ms and now.step_ms else 0.0


def _told(batches: Sequence[int]) -> str:
    return ", ".join(map(count, batches))


@dataclass
class _Found:
    """What a run has so far, and how it becomes a record."""

    options: BenchOptions
    created: str
    environment: Environment
    past: tuple[Note, ...]  # of the cut run that goes on
    earlier: Run | None
    sweep: Run | None = None  # beside it
    capacity: Capacity | None = None
    noise: NoiseScale | None = None
    steps: Convergence | None = None
    cut_short: bool = False  # capacity is such a part
    partial: Capacity | None = None  # what there is of a measurement on its way

    @staticmethod
    def begun(
        workload: Workload, place: torch.device, options: BenchOptions, earlier: Run | None, sweep: Run | None = None
    ) -> _Found:
        """With what stands of an earlier run; raises UsageError where that, or the sweep, is of something else."""
        environment = capture(seed=options.seed, command=options.command)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        if earlier is None and sweep is None:
            return _Found(options, now, environment, (), None)
        info = Session(workload, place, options.dtype, options.seed).info
        if sweep is not None:
            check_sweep(sweep, info, describe(place))
        if earlier is None:
            return _Found(options, now, environment, (), None, sweep)
        continuation.check_same(earlier, info, describe(place), environment, Mode(options.compile, options.graph).name)
        earlier = continuation.own(earlier)
        past = continuation.notes(earlier, now)
        found = _Found(options, earlier.created, environment, past, earlier, sweep)
        found.noise, found.steps = continuation.standing_noise(earlier), continuation.standing_branches(earlier)
        return found

    @property
    def anything(self) -> bool:
        """Whether there is something to keep: capacity, or figures of it, which then stand for it."""
        if self.capacity is None and self.partial is not None and any(p.step_ms for p in self.partial.batches):
            self.capacity, self.cut_short = self.partial, True
        return self.capacity is not None

    @property
    def stage(self) -> str:
        """The part that is being measured."""
        if self.cut_short:
            return "capacity"
        return "noise" if self.noise is None else "branches"

    def take(self, partial: Capacity | NoiseScale | Convergence) -> None:
        """What a measurement had when it was interrupted; KeyboardInterrupt where that is nothing."""
        if isinstance(partial, Capacity):
            if partial.ceilings is None:  # the first figures: a record without any must not replace an earlier one
                raise KeyboardInterrupt from None
            self.capacity = partial
        elif isinstance(partial, Convergence):
            self.steps = partial
        else:
            self.noise = partial

    def cut(self, capacity: Capacity) -> Run:
        """The record for the case that the run ends here."""
        cut = Note("run", "cut: this is what was saved while it ran")
        return self._record(capacity, (*self.past, cut), complete=False)

    def run(self, *notes: Note) -> Run:
        """The record, with a note for each part that is missing where nothing else is said of it."""
        lacking = notes or self._lacking()
        return self._record(self.capacity, (*self.past, *lacking), complete=not lacking, judged=True)

    def _record(self, capacity: Capacity | None, notes: tuple[Note, ...], complete: bool, judged: bool = False) -> Run:
        # What a cut run had of the parts that are measured again is kept until there is something better.
        noise, steps, together = self.noise, self.steps, None
        if self.earlier is not None:
            noise, steps = noise or self.earlier.noise, steps or self.earlier.convergence
            together = self.earlier.distributed
        known = noise or unmeasured(notes)
        verdict = advise(capacity, known, steps, together) if judged and capacity is not None else None
        made = Run(self.created, self.environment, capacity, noise, steps, verdict, complete, notes, together)
        if verdict is None or self.sweep is None:
            return made
        return with_sweep(made, replace(self.sweep, noise=None))  # this run's noise scale is what it measures

    def _lacking(self) -> tuple[Note, ...]:
        """A note for each part that is missing, with what may help."""
        budget, capacity = f"the time budget of {self.options.time_budget:g} s", self.capacity
        remedy = f"{budget} did not suffice; raise --time-budget"
        maybe = f"within {budget}; raise --time-budget, unless a note above gives another cause"
        found = []
        refused = next((note for note in capacity.notes if note.figure == "batches.status"), None) if capacity else None
        if refused is not None:
            found.append(Note("batches", refused.text))
        elif capacity is None or not capacity.complete:
            found.append(Note("batches", remedy))
        elif capacity.model is None and self.options.batches is None:
            found.append(Note("capacity.model", f"too few batch sizes ran for a fit {maybe}"))
        if not continuation.enough(self.noise):
            found.append(Note("noise", f"under {MIN_BLOCKS} pairs of gradient norms were measured {maybe}"))
        steps = self.steps or (self.earlier.convergence if self.earlier is not None else None)
        if self.options.thorough and not (steps is not None and steps.complete):
            found.append(Note("branches", f"cut short by {budget}; raise --time-budget"))
        return tuple(found)


def _beyond(capacity: Capacity, n: int, left: float) -> str | None:
    """Why steps of n examples, of which the noise scale takes many, cannot be run in so many seconds; else None."""
    steps = f"not measured: it takes steps of batch {n}, the workload's reference_batch, and"
    if capacity.max_batch is not None and n > capacity.max_batch:
        return f"{steps} the largest that fits is {capacity.max_batch}. Make reference_batch or the model smaller"
    seconds = [n / p.batch * p.step_ms / 1e3 for p in capacity.batches if p.step_ms is not None and p.batch <= n]
    step_s = capacity.model.step_s(n) if capacity.model is not None else min(seconds, default=0.0)
    if _STEPS * step_s > left:
        return f"{steps} one takes about {step_s:.2g} s, of {left:.2g} s that are left; raise --time-budget"
    return None


def _staged(progress: Progress | None, stage: str, begin: float, end: float) -> Progress | None:
    """Progress of one stage as progress of the whole."""
    return _Stage(progress, stage, begin, end) if progress is not None else None


@dataclass(frozen=True)
class _Stage:
    """One stage's part of the progress of all."""

    whole: Progress
    name: str
    begin: float
    end: float

    def __call__(self, text: str, share: float) -> None:
        self.whole(f"{self.name}: {text}", self.begin + (self.end - self.begin) * share)

    def line(self, text: str) -> None:
        """A line that stays, where the whole has those."""
        line_of(self.whole)(f"{self.name}: {text}")
