"""The sweep as one run: the noise scale, then steps to target, and the record of both."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from pybatch.base.errors import Interrupted, carried, carry
from pybatch.device.environment import capture
from pybatch.noise.measurement import measure_noise
from pybatch.records import NoiseScale, Note, Run
from pybatch.sweep.driver import Found
from pybatch.sweep.measurement import measure_sweep
from pybatch.sweep.options import SweepOptions
from pybatch.workloads.base import Progress, Workload


def run_sweep(
    workload: Workload,
    options: SweepOptions,
    *,
    noise_budget: float,
    device: str | torch.device | None = None,
    store: Path | None = None,
    resume: bool = False,
    jobs: int = 1,
    ray: str | None = None,
    command: str = "",
    progress: Progress | None = None,
    found: Found | None = None,
) -> Run:
    """Measure the noise scale and the steps to target of a workload.

    Args:
        workload: what to train.
        options: what is asked for; its seed is the noise measurement's too.
        noise_budget: seconds for the noise scale, for its ratio to the critical batches; 0 leaves it out.
        device, store, resume, jobs, ray, found: as in `measure_convergence`.
        command: what the user typed, for the record.
        progress: called with (what is being done, share done).

    Raises:
        Interrupted: on Ctrl-C, with the run so far in `.partial`.
    """
    environment = capture(seed=options.seed, command=command)
    created = datetime.now(UTC).isoformat(timespec="seconds")

    def measured() -> NoiseScale:
        say = (lambda text, share: progress(f"noise: {text}", share)) if progress is not None else None
        return measure_noise(
            workload,
            device=device,
            dtype=options.dtype,
            seed=options.seed,
            time_budget=noise_budget,
            progress=say,
        )

    try:
        run = measure_sweep(
            workload,
            options,
            device=device,
            store=store,
            resume=resume,
            jobs=jobs,
            ray=ray,
            noise=measured if noise_budget > 0 else None,
            progress=progress,
            found=found,
            environment=environment,
        )
    except Interrupted as stop:
        kept = "finished trials in the store: go on with --resume" if store is not None else "no trial was stored"
        note = Note("run", f"interrupted: what was measured until then is in the record, {kept}")
        cut = replace(stop.partial, created=created, environment=environment, complete=False, notes=(note,))
        raise Interrupted(cut) from None
    except Exception as error:
        if (partial := carried(error)) is not None:
            note = Note("run", f"cut by a fault of pybatch: {type(error).__name__}")
            carry(error, replace(partial, created=created, environment=environment, complete=False, notes=(note,)))
        raise
    if not run.complete:
        again = "the same command with --resume runs no more than what is missing"
        rest = again if store is not None else "no trial was stored: with --store FILE, --resume runs what is missing"
        run = replace(run, notes=(*run.notes, Note("run", f"incomplete, see the notes above for why; {rest}")))
    return replace(run, created=created, environment=environment)
