"""What a measurement of capacity has found so far, and the record of it: at its end, on its way, or when it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pybatch.capacity import summary
from pybatch.capacity.bound import Place
from pybatch.capacity.exploration import OUT_OF_TIME, Explorer, Look
from pybatch.capacity.largest import Largest
from pybatch.capacity.timing import Rounds, unfinished
from pybatch.device.counters import Region
from pybatch.device.identity import describe, last_level_cache_bytes
from pybatch.records import BatchPoint, Capacity, Ceilings, InputPipeline, Note, StepMode
from pybatch.workloads.running.session import Session


@dataclass
class Findings:
    """Where it was measured, and what has been found until now."""

    session: Session
    explorer: Explorer
    region: Region
    mode: StepMode
    seed: int
    batches: Sequence[int] | None  # those asked for
    notes: list[Note] = field(default_factory=list)
    untimed: str = OUT_OF_TIME  # why a batch size that runs has no times
    ceilings: Ceilings | None = None
    largest: Largest = field(default_factory=lambda: Largest(None, None))
    rounds: Rounds | None = None
    bursts: dict[int, float] = field(default_factory=dict)  # batch size -> seconds of a first step after a rest
    kept: dict[int, BatchPoint] = field(default_factory=dict)  # of an earlier run
    disturbed: tuple[str, ...] = ()  # what disturbed the timing from outside
    pipeline: InputPipeline | None = None

    def take_over(self, earlier: Capacity) -> tuple[int, bool]:
        """Let what stands of an earlier run count as found; returns the first round left, whether the range was."""
        self.kept = {p.batch: p for p in earlier.standing}
        first_round = 1 + max((r for p in earlier.standing for r in p.block_rounds), default=-1)
        said = [note for note in earlier.notes if note.figure == "batches"]  # how the range was found
        settled = earlier.complete and bool(said)
        if settled:
            self.notes += said
        self.ceilings = earlier.ceilings
        self.disturbed = earlier.disturbed
        self.pipeline = earlier.input
        for n, p in self.kept.items():
            step_s = p.step_ms / 1e3 if p.step_ms is not None else None
            flops = None if p.model_flops is None else int(p.model_flops)
            self.explorer.looks[n] = Look(n, p.status, p.reason, step_s, p.memory_bytes, flops)
        if earlier.max_batch_verified:
            notes = tuple(note for note in earlier.notes if note.figure.startswith("capacity.max_batch"))
            self.largest = Largest(earlier.max_batch, True, notes)
        return first_round, settled

    def point(self, n: int) -> BatchPoint:
        """One batch size."""
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

    def points(self) -> list[BatchPoint]:
        """All batch sizes, ascending."""
        wanted = set(self.explorer.looks if self.batches is None else self.batches)
        return [self.point(n) for n in sorted(wanted | set(self.kept))]

    def partial(self) -> Capacity:
        """The record without a fit: quickly made, for a caller who keeps it in case this process ends."""
        return Capacity(
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
            device=describe(self.session.device),
            ceilings=self.ceilings,
            workload=self.session.info,
            batches=tuple(self.points()),
            mode=self.mode,
        )

    def capacity(self) -> Capacity:
        """The record with its fit."""
        looks, points, device = self.explorer.looks, self.points(), self.session.device
        series = list(self.rounds.series.values()) if self.rounds is not None else []
        notes = [*self.notes, *self.largest.notes]
        if partial := unfinished(series):
            text = f"the time budget ended before these were steady: {', '.join(map(str, partial))}"
            notes.append(Note("batches.step_ms", text))
        late = {p.batch for p in points if p.reason == self.untimed or (p.batch in looks and looks[p.batch].late)}
        refused = summary.refused(points, late, given=self.batches is not None)
        if refused:
            sizes = ", ".join(map(str, refused))
            notes.append(Note("batches.status", f"the workload refuses batch {sizes}; each one's reason says how"))
        if self.explorer.step.changes:
            text = "the loss or the model changes its batch in place; each timed step puts the batch back first"
            notes.append(Note("batches.step_ms", text))
        notes += summary.counter_notes(self.region, points, self.ceilings, self.explorer)
        cache = last_level_cache_bytes(device)
        return summary.summarize(
            points,
            {s.batch: s.blocks for s in series if s.seconds} | {n: _blocks(p) for n, p in self.kept.items()},
            notes,
            device=describe(device),
            ceilings=self.ceilings,
            workload=self.session.info,
            largest=self.largest,
            drift=self.rounds.drift if self.rounds is not None else None,
            anchor=self.rounds.anchor if self.rounds is not None else None,
            complete=not late and not refused,
            seed=self.seed,
            disturbed=self.disturbed,
            place=Place("cuda" if device.type == "cuda" else "cpu", self.session.dtype, cache),
            mode=self.mode,
            pipeline=self.pipeline,
        )


def _blocks(point: BatchPoint) -> list[float]:
    """Seconds of a kept batch size that the fit resamples."""
    return [block / 1e3 for block in point.blocks_ms or (point.step_ms,) if block is not None]
