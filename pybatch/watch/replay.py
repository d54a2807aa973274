"""Capacity around a training's own batch: its last pass, forward, backward and update, at other batch sizes.

Nothing is known of its data or its loss: the arguments of the forward pass are cut or repeated along the batch, and so
is the gradient that came into the outputs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pybatch.base.errors import WorkloadError
from pybatch.capacity.bound import Place
from pybatch.capacity.exploration import Look, failed
from pybatch.capacity.flops import count_flops
from pybatch.capacity.largest import Largest, memory_limit
from pybatch.capacity.measurement import short_collections
from pybatch.capacity.stopping import StoppingRule
from pybatch.capacity.summary import point, summarize
from pybatch.capacity.timing import Rounds, Series
from pybatch.device.ceilings import measure_ceilings
from pybatch.device.clock import clock_for
from pybatch.device.counters import Region
from pybatch.device.disturbance import Disturbance
from pybatch.device.identity import DTYPES, describe, last_level_cache_bytes
from pybatch.device.memory import PeakMemory
from pybatch.fits.memory import fit_memory
from pybatch.records import Capacity, Ceilings, Device, Note, WorkloadInfo
from pybatch.watch.dimensions import agreed, settled
from pybatch.watch.passes import Loaded, Pass
from pybatch.watch.state import put_back
from pybatch.watch.together import CommonClock, RankFailed, Together
from pybatch.workloads.base import Progress
from pybatch.workloads.running.session import is_out_of_memory

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of the batch of a pass
_SETTLING = 0.2  # of the time budget, to find out which dimension is the batch
_LONGEST = 1 / 12  # of the time budget: a step that takes more leaves no room for the others
_LOOKS = 0.5  # of the time budget, after which no further batch size is looked at
_TIMED = 0.4  # of the time budget for timing, also where the first looks took longer than they should
_CEILINGS = 0.07  # of the time budget
_SIGNAL = 1 << 20  # bytes; a peak that grows by less is noise of the allocator
_MARGIN = 0.97  # of the memory limit, so that the prediction's own error does not decide
_ENDED = 3  # exit status of a process that fails where others wait for it
_LOOK = 2  # steps of a first look: the first one allocates
REPLAYED = "of the script's last pass, run again with its arguments cut or repeated along the batch"


@dataclass(frozen=True)
class Replay:
    """What is run again, and how it is called in the record."""

    kept: Pass
    optimizer: torch.optim.Optimizer
    optimizers: Sequence[torch.optim.Optimizer]  # all whose states a step may change
    device: torch.device
    info: WorkloadInfo
    time_budget: float
    flops: bool = True  # whether operators can be counted: not of compiled or sharded models
    progress: Progress = lambda text, share: None
    together: Together | None = None  # the processes that run it at the same time; batch sizes are those of all

    @property
    def world(self) -> int:
        """How many processes share a batch."""
        return self.together.world if self.together is not None else 1


class Step:
    """Forward, backward and update of the kept pass at the batch size loaded last."""

    def __init__(self, replay: Replay) -> None:
        self._replay, self._loaded = replay, None
        self._parameters = [p for group in replay.optimizer.param_groups for p in group["params"]]

    _loaded: Loaded | None

    def load(self, n: int) -> None:
        """Make the arguments of n examples over all processes; those before are let go first."""
        self.clear()
        self._loaded = Loaded(self._replay.kept, n // self._replay.world)

    def __call__(self) -> None:
        """One step. Raises WorkloadError for what the model makes of this batch size."""
        assert self._loaded is not None  # load() comes first
        try:
            self._loaded.run()
        except (WorkloadError, KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            if is_out_of_memory(error) and self._replay.together is not None:
                print(f"pybatch: this process ran out of memory in a replay: {error}", file=sys.stderr)
                raise RankFailed(_ENDED) from error
            if is_out_of_memory(error):
                raise
            text = " ".join(str(error).split())[:200]
            raise WorkloadError(f"{type(error).__name__}: {text}") from error
        type(self._replay.optimizer).step(self._replay.optimizer)  # no wrapper that a scheduler or trainer put around
        self._forget()

    def check(self) -> None:
        """Nothing: what a repeated step computes is of no use."""

    def clear(self) -> None:
        """Let go of arguments and gradients."""
        self._loaded = None
        self._forget()

    def _forget(self) -> None:
        for p in self._replay.kept.model.parameters():
            p.grad = None
        for p in self._parameters:
            p.grad = None

    def held_bytes(self) -> int:
        """Bytes of what stays between steps: parameters, buffers and the optimizer's states."""
        model = self._replay.kept.model
        states = [value for state in self._replay.optimizer.state.values() for value in state.values()]
        tensors = [*model.parameters(), *model.buffers(), *(v for v in states if isinstance(v, torch.Tensor))]
        return sum(t.numel() * t.element_size() for t in tensors)


def sizes_around(n: int, world: int = 1) -> list[int]:
    """A quarter to 16 times this batch size, the one itself first, then ascending; each a multiple of `world`."""
    sizes = {world * max(1, round(n / world * factor)) for factor in FACTORS}
    return list(dict.fromkeys([n, *sorted(sizes)]))


def replay(what: Replay) -> Capacity:
    """Time the kept pass at batch sizes around its own; all that a step changes is put back.

    Raises:
        WorkloadError: it does not run again at its own size.
        KeyboardInterrupt: after all was put back.
    """
    clock, device, budget, together = clock_for(what.device), what.device, what.time_budget, what.together
    step, limit, own = Step(what), memory_limit(what.device), what.kept.batching.size
    if together is not None:
        clock, own = CommonClock(clock, together), int(together.first(own)) * together.world
        limit = -int(together.largest([-float(limit)])[0])
    started = clock.now()
    looks: dict[int, Look] = {}
    notes = [Note("batches", f"steps {REPLAYED}, forward, backward and update; all was put back")]
    ceilings: Ceilings | None = None
    with short_collections(), put_back(what.kept.model, what.optimizers), what.kept.as_it_was():
        what.progress("replay: first look", 0.0)
        until = time.monotonic() + _SETTLING * budget  # each process by its own clock
        if together is None:
            what.kept.batching = settled(what.kept, lambda: time.monotonic() > until)
        else:
            what.kept.batching = agreed(what.kept, together, lambda: time.monotonic() > until)
        memory = PeakMemory(device)
        for n in sizes_around(own, what.world):
            known = [look for look in looks.values() if look.step_s is not None]
            predicted = max((n / look.batch * (look.step_s or 0.0) for look in known[-1:]), default=0.0)
            if n != own and (late := _late(predicted, clock.now() - started, budget)) is not None:
                looks[n] = Look(n, "skipped", late, late=True)
                continue
            looks[n] = _look(n, step, clock.time, memory, what, own, looks, limit)
            if n == own and looks[n].status != "ok":
                raise WorkloadError(looks[n].reason or "the pass could not be run again")
            if n == own:
                memory.rebase(step.held_bytes())
                looks[n] = _look(n, step, clock.time, memory, what, own, {}, limit)
        step.clear()
        what.progress("replay: ceilings of the device", 0.1)
        if what.info.dtype in DTYPES:
            ceilings = measure_ceilings(device, what.info.dtype, min(3.0, _CEILINGS * budget))
        working = {n: look.step_s for n, look in sorted(looks.items()) if look.step_s is not None}
        deadline = max(started + budget, clock.now() + _TIMED * budget)
        share = max(0.5, 1.5 * (deadline - clock.now()) / len(working))
        region, disturbance = Region(device), Disturbance()
        rounds = Rounds(step.load, step, step.check, clock, region, StoppingRule(max_seconds=share), 0)

        def visited(series: Series) -> None:
            done = sum(s.stopped is not None for s in rounds.series.values())
            share_done = (clock.now() - started) / budget
            what.progress(f"replay: batch {series.batch}, {done} of {len(working)} batch sizes steady", share_done)

        rounds.run(working, deadline, visited, first=own)
        step.clear()
    points = [point(look, n, rounds.series.get(n), ceilings) for n, look in sorted(looks.items())]
    timed = [p.batch for p in points if p.status == "ok" and p.step_ms is not None]
    if len(timed) < 2:
        notes.append(Note("batches.status", _alone(own, looks, budget)))
    samples = {s.batch: s.blocks for s in rounds.series.values() if s.seconds}
    if together is not None:
        text = f"a batch is over {together.world} processes, which count as one device here; memory is of one of them"
        notes.append(Note("batches.batch", text))
    return summarize(
        points,
        samples,
        notes,
        device=_several(describe(device), what.world),
        ceilings=ceilings,
        workload=what.info,
        largest=predicted_largest(looks, limit + step.held_bytes()),
        drift=rounds.drift,
        disturbed=disturbance.told() if device.type == "cpu" else (),
        complete=not any(look.late for look in looks.values()),
        seed=0,
        place=Place("cuda" if device.type == "cuda" else "cpu", what.info.dtype, last_level_cache_bytes(device)),
        anchor=rounds.anchor,
    )


def _late(step_s: float, spent: float, budget: float) -> str | None:
    """Why there is no time for a batch size whose step takes so long; None where there is."""
    if step_s > _LONGEST * budget:
        return f"a step would take about {step_s:.2g} s, too long for the time budget of {budget:g} s"
    return f"the time budget of {budget:g} s ended before it was looked at" if spent > _LOOKS * budget else None


def _alone(own: int, looks: dict[int, Look], budget: float) -> str:
    """Why no batch size but the script's own was timed, and what may help."""
    others = [look for n, look in sorted(looks.items()) if n != own]
    if all(look.status == "ok" or look.late for look in others):
        return (
            f"no other batch size than {own} was timed: the time budget of {budget:g} s ended before. Give more by "
            "--time-budget"
        )
    refused = next(look for look in others if look.status != "ok" and not look.late)
    return f"no other batch size than {own} runs: {refused.reason}"


def _several(device: Device, world: int) -> Device:
    return device if world == 1 else replace(device, name=f"{world} processes on {device.name}")


def _look(
    n: int,
    step: Step,
    timed: Callable[[Callable[[], object], int], list[float]],
    memory: PeakMemory,
    what: Replay,
    own: int,
    looks: dict[int, Look],
    limit: int,
) -> Look:
    """Whether a batch size runs, its time and its memory."""
    excess = _excess(n, looks, limit + step.held_bytes())
    if excess is not None:
        return Look(n, "predicted_oom", excess)
    try:
        memory.start()
        step.load(n)
        seconds = min(timed(step, _LOOK))
        peak = memory.peak()
        flops = count_flops(step)[0] if what.flops else None
    except Exception as error:
        step.clear()
        status, reason = failed(error)
        return Look(n, status, reason)
    if what.together is not None and peak is not None:
        peak = int(what.together.largest([float(peak)])[0])
    return Look(n, "ok", None, seconds, peak, flops)


def _excess(n: int, looks: dict[int, Look], limit: int) -> str | None:
    known = _peaks(looks)
    if known is None:
        return None
    peak = fit_memory(*known).peak(n)
    return f"predicted {peak / 2**30:.3g} GiB, limit {limit / 2**30:.3g} GiB" if peak > limit else None


def _peaks(looks: dict[int, Look]) -> tuple[list[int], list[int]] | None:
    """Batch sizes and peaks that show growth; None where they show none."""
    found = [(look.batch, look.memory_bytes) for look in looks.values() if look.memory_bytes is not None]
    found.sort()
    found = found[-4:]  # small ones reuse what the allocator kept
    if len(found) < 2 or found[-1][1] - found[0][1] < _SIGNAL:
        return None
    return [n for n, _ in found], [peak for _, peak in found]


def predicted_largest(looks: dict[int, Look], limit: int) -> Largest:
    """The largest batch of one pass, predicted from the peaks of the replays."""
    known = _peaks(looks)
    if known is None:
        return Largest(None, None, (Note("capacity.max_batch", "peak memory does not clearly grow over the replays"),))
    growth = fit_memory(*known)
    fits = max(look.batch for look in looks.values() if look.status == "ok")
    refused = [look.batch - 1 for look in looks.values() if look.status == "oom"]
    batch = min([max(fits, growth.largest(limit * _MARGIN)), *refused])
    text = f"predicted by a {growth.shape} of the replays' peak memory up to batch {fits}; it was not run"
    return Largest(batch, False, (Note("capacity.max_batch", text),))
