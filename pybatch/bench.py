"""The main job: capacity, then noise, then the verdict, as one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import torch

from pybatch.capacity.measurement import measure_capacity
from pybatch.device.environment import capture
from pybatch.device.identity import resolve
from pybatch.errors import Interrupted, PybatchError
from pybatch.noise.estimator import MIN_BLOCKS
from pybatch.noise.micro_batch import measure_noise
from pybatch.records import Capacity, NoiseScale, Note, Run
from pybatch.verdict import compare
from pybatch.workloads.base import Progress, Workload

_CAPACITY_SHARE = 0.75  # of the time budget; the noise scale gets what is left


def run_bench(
    workload: Workload,
    *,
    device: str | torch.device | None = None,
    dtype: str = "fp32",
    batches: Sequence[int] | None = None,
    time_budget: float,
    seed: int = 0,
    command: str = "",
    progress: Progress | None = None,
) -> Run:
    """Measure capacity and noise of a workload on a device and compare them.

    Args:
        workload: what to measure.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        dtype: "fp32" or "bf16" (autocast over fp32 parameters).
        batches: batch sizes to time, in examples; None chooses them.
        time_budget: seconds for all measurements together.
        seed: of the model, the data order and the resampling.
        command: what the user typed, for the record.
        progress: called with (what is being done, share done).

    Returns:
        The whole record. `complete` is False where a part is missing; a note says why.

    Raises:
        Interrupted: on Ctrl-C, with the run so far in `.partial`.
        WorkloadError: where the workload fails before anything was measured.
    """
    start = time.monotonic()
    place = resolve(device)
    environment = capture(seed=seed, command=command)
    created = datetime.now(UTC).isoformat(timespec="seconds")

    def finish(capacity: Capacity | None, noise: NoiseScale | None, notes: tuple[Note, ...] = ()) -> Run:
        lacking = _lacking(capacity, noise, time_budget, given=batches is not None) if not notes else ()
        notes = notes + lacking
        verdict = compare(capacity, noise) if capacity is not None else None
        return Run(created, environment, capacity, noise, None, verdict, not notes, notes)

    interrupted = (Note("run", "interrupted by Ctrl-C: what was measured until then is kept"),)
    capacity = noise = None
    try:
        capacity = measure_capacity(
            workload,
            device=place,
            dtype=dtype,
            batches=batches,
            time_budget=_CAPACITY_SHARE * time_budget,
            seed=seed,
            progress=_staged(progress, "capacity", 0.0, _CAPACITY_SHARE),
        )
        left = time_budget - (time.monotonic() - start)
        if left <= 0:
            return finish(capacity, None)
        noise = measure_noise(
            workload,
            device=place,
            dtype=dtype,
            seed=seed,
            time_budget=left,
            progress=_staged(progress, "noise", _CAPACITY_SHARE, 1.0),
        )
    except Interrupted as stop:
        if isinstance(stop.partial, Capacity):
            capacity = stop.partial
        else:
            noise = stop.partial
        raise Interrupted(finish(capacity, noise, interrupted)) from None
    except KeyboardInterrupt:
        raise Interrupted(finish(capacity, noise, interrupted)) from None
    except PybatchError as error:
        if capacity is None:
            raise
        return finish(capacity, None, (Note("noise", str(error)),))
    return finish(capacity, noise)


def _lacking(capacity: Capacity | None, noise: NoiseScale | None, budget: float, given: bool) -> tuple[Note, ...]:
    """A note for each part that is missing, with what may help."""
    found = []
    remedy = f"the time budget of {budget:g} s did not suffice; raise --time-budget"
    maybe = f"within the time budget of {budget:g} s; raise --time-budget, unless a note above gives another cause"
    if capacity is None or not capacity.complete:
        found.append(Note("batches", remedy))
    elif capacity.model is None and not given:
        found.append(Note("capacity.model", f"too few batch sizes ran for a fit {maybe}"))
    if noise is None or noise.steps < MIN_BLOCKS:
        found.append(Note("noise", f"under {MIN_BLOCKS} pairs of gradient norms were measured {maybe}"))
    return tuple(found)


def _staged(progress: Progress | None, stage: str, begin: float, end: float) -> Progress | None:
    """Progress of one stage as progress of the whole."""
    if progress is None:
        return None
    return lambda text, share: progress(f"{stage}: {text}", begin + (end - begin) * share)
