"""The main job: capacity, then noise, branches where asked for, then the verdict, as one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import torch

from pybatch.answer.verdict import advise
from pybatch.base.errors import Interrupted, PybatchError
from pybatch.branch.measurement import measure_branches
from pybatch.capacity.exploration import first_line
from pybatch.capacity.measurement import measure_capacity
from pybatch.capacity.modes import Mode
from pybatch.device.environment import capture
from pybatch.device.identity import describe, resolve
from pybatch.fits.noise import MIN_BLOCKS
from pybatch.jobs import resume as continuation
from pybatch.noise.measurement import measure_noise
from pybatch.records import Capacity, Convergence, NoiseScale, Note, Run
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.running.session import Session, is_out_of_memory

_SHARES = (0.75, 0.25)  # of the time budget: capacity, noise
_THOROUGH_SHARES = (0.4, 0.15)  # the branches get what is left
_STEPS = 2  # of the noise scale, at least: a step of its training before, and a micro-batch
_INTERRUPTED = "interrupted by Ctrl-C: what was measured until then is kept"


def run_bench(
    workload: Workload,
    *,
    device: str | torch.device | None = None,
    dtype: str = "fp32",
    batches: Sequence[int] | None = None,
    time_budget: float,
    thorough: bool = False,
    seed: int = 0,
    compile: bool = False,
    graph: bool = False,
    command: str = "",
    progress: Progress | None = None,
    earlier: Run | None = None,
    on_partial: Callable[[Run], None] | None = None,
) -> Run:
    """Measure capacity and noise of a workload on a device and compare them.

    Args:
        workload: what to measure.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        dtype: "fp32" or "bf16" (autocast over fp32 parameters).
        batches: batch sizes to time, in examples; None chooses them.
        time_budget: seconds for all measurements together.
        thorough: take the critical batch from short branched runs, not from the noise scale alone.
        seed: of the model, the data order and the resampling.
        compile, graph: time compiled steps, or CUDA-graph replays; see `measure_capacity`. Noise is taken eagerly.
        command: what the user typed, for the record.
        progress: called with (what is being done, share done).
        earlier: a record of the same run that was cut: what stands of it is not measured again. Its steps on several
            devices are kept as they are.
        on_partial: called with the record so far whenever it has grown, for a caller who keeps it.

    Returns:
        The whole record. `complete` is False where a part is missing; a note says why.

    Raises:
        UsageError: `earlier` is of another workload, device, dtype, seed or version.
        Interrupted: on Ctrl-C, with the run so far in `.partial`; KeyboardInterrupt where nothing is measured yet.
        WorkloadError: where the workload fails before anything was measured.
    """
    start = time.monotonic()
    place = resolve(device)
    environment = capture(seed=seed, command=command)
    created = now = datetime.now(UTC).isoformat(timespec="seconds")
    source: str | None = None
    if earlier is not None:
        info = Session(workload, place, dtype, seed).info
        continuation.check_same(earlier, info, describe(place), environment, Mode(compile, graph).name)
        created, source = earlier.created, info.source
    past = continuation.notes(earlier, now, source)
    together = earlier.distributed if earlier is not None else None

    # What a cut run had of the parts that are measured again: it is kept until there is something better.
    old_noise, old_steps = (earlier.noise, earlier.convergence) if earlier is not None else (None, None)

    def save(capacity: Capacity | None, noise: NoiseScale | None, steps: Convergence | None) -> None:
        if on_partial is not None:
            noise, steps = noise or old_noise, steps or old_steps
            cut = Note("run", "cut: this is what was saved while it ran")
            on_partial(Run(created, environment, capacity, noise, steps, None, False, (*past, cut), together))

    def finish(
        capacity: Capacity | None, noise: NoiseScale | None, steps: Convergence | None, notes: tuple[Note, ...] = ()
    ) -> Run:
        lacking = _lacking(capacity, noise, time_budget, given=batches is not None) if not notes else ()
        noise, steps = noise or old_noise, steps or old_steps
        if not notes and thorough and not (steps is not None and steps.complete):
            lacking += (Note("branches", f"cut short by the time budget of {time_budget:g} s; raise --time-budget"),)
        notes = notes + lacking
        verdict = advise(capacity, noise, steps, together) if capacity is not None else None
        return Run(created, environment, capacity, noise, steps, verdict, not notes, past + notes, together)

    shares = _THOROUGH_SHARES if thorough else _SHARES
    interrupted = (Note("run", _INTERRUPTED),)
    capacity = None
    noise, steps = continuation.standing_noise(earlier), continuation.standing_branches(earlier)
    try:
        capacity = measure_capacity(
            workload,
            device=place,
            dtype=dtype,
            batches=batches,
            time_budget=shares[0] * time_budget,
            seed=seed,
            compile=compile,
            graph=graph,
            progress=_staged(progress, "capacity", 0.0, shares[0]),
            earlier=earlier.capacity if earlier is not None else None,
            on_partial=lambda partial: save(partial, noise, steps),
        )
        save(capacity, noise, steps)
        left = time_budget - (time.monotonic() - start)
        if left <= 0:
            return finish(capacity, noise, steps)
        if noise is None:
            if (why := _beyond(capacity, workload.reference_batch, left)) is not None:
                return finish(capacity, noise, steps, (Note("noise", why),))
            noise = measure_noise(
                workload,
                device=place,
                dtype=dtype,
                seed=seed,
                time_budget=left * shares[1] / (1 - shares[0]),
                layers=True,
                progress=_staged(progress, "noise", shares[0], shares[0] + shares[1]),
            )
            save(capacity, noise, steps)
        left = time_budget - (time.monotonic() - start)
        if thorough and steps is None and left > 0:
            steps = measure_branches(
                workload,
                device=place,
                dtype=dtype,
                checkpoints=[noise.warmup_steps or 1],
                seed=seed,
                time_budget=left,
                progress=_staged(progress, "branches", shares[0] + shares[1], 1.0),
            )
    except Interrupted as stop:
        if isinstance(stop.partial, Capacity):
            capacity = stop.partial
            if capacity.ceilings is None:  # the first figures: a record without any must not replace an earlier one
                raise KeyboardInterrupt from None
        elif isinstance(stop.partial, Convergence):
            steps = stop.partial
        else:
            noise = stop.partial
        raise Interrupted(finish(capacity, noise, steps, interrupted)) from None
    except KeyboardInterrupt:
        if capacity is None:
            raise
        raise Interrupted(finish(capacity, noise, steps, interrupted)) from None
    except PybatchError as error:
        if capacity is None:
            raise
        return finish(capacity, noise, steps, (Note("noise" if noise is None else "branches", str(error)),))
    except (RuntimeError, MemoryError) as error:
        if capacity is None or not is_out_of_memory(error):
            raise
        if noise is not None:
            return finish(capacity, noise, steps, (Note("branches", f"memory ran out: {first_line(error)}"),))
        text = (
            f"memory ran out in steps of batch {workload.reference_batch}, the workload's reference_batch: make that "
        )
        return finish(capacity, noise, steps, (Note("noise", f"{text}or the model smaller"),))
    return finish(capacity, noise, steps)


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


def record_convergence(measure: Callable[[], Convergence], *, seed: int, command: str) -> Run:
    """The record of a measurement of steps alone, with its environment.

    Raises:
        Interrupted: on Ctrl-C, with the run so far in `.partial`.
    """
    environment = capture(seed=seed, command=command)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        steps = measure()
    except Interrupted as stop:
        notes = (Note("run", _INTERRUPTED),)
        raise Interrupted(Run(created, environment, None, None, stop.partial, None, False, notes)) from None
    return Run(created, environment, None, None, steps, None, steps.complete)


def _lacking(capacity: Capacity | None, noise: NoiseScale | None, budget: float, given: bool) -> tuple[Note, ...]:
    """A note for each part that is missing, with what may help."""
    found = []
    remedy = f"the time budget of {budget:g} s did not suffice; raise --time-budget"
    maybe = f"within the time budget of {budget:g} s; raise --time-budget, unless a note above gives another cause"
    refused = next((note for note in capacity.notes if note.figure == "batches.status"), None) if capacity else None
    if refused is not None:
        found.append(Note("batches", refused.text))
    elif capacity is None or not capacity.complete:
        found.append(Note("batches", remedy))
    elif capacity.model is None and not given:
        found.append(Note("capacity.model", f"too few batch sizes ran for a fit {maybe}"))
    if not continuation.enough(noise):
        found.append(Note("noise", f"under {MIN_BLOCKS} pairs of gradient norms were measured {maybe}"))
    return tuple(found)


def _staged(progress: Progress | None, stage: str, begin: float, end: float) -> Progress | None:
    """Progress of one stage as progress of the whole."""
    if progress is None:
        return None
    return lambda text, share: progress(f"{stage}: {text}", begin + (end - begin) * share)
