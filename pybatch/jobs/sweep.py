"""The sweep as one run: the noise scale, then steps to target, and the record of both."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import torch

from pybatch.base.errors import Interrupted, PybatchError
from pybatch.device.environment import capture
from pybatch.noise.measurement import measure_noise
from pybatch.records import Convergence, NoiseScale, Note, Run
from pybatch.sweep.measurement import measure_convergence
from pybatch.workloads.base import Progress, Workload


def run_sweep(
    workload: Workload,
    *,
    device: str | torch.device | None = None,
    dtype: str = "fp32",
    noise_budget: float,
    seed: int = 0,
    command: str = "",
    progress: Progress | None = None,
    **arguments: Any,
) -> Run:
    """Measure the noise scale and the steps to target of a workload.

    Args:
        workload: what to train.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        dtype: "fp32" or "bf16" (autocast over fp32 parameters).
        noise_budget: seconds for the noise scale, for its ratio to the critical batches; 0 leaves it out.
        seed: of the noise measurement and the first training run; the others count up from it.
        command: what the user typed, for the record.
        progress: called with (what is being done, share done).
        arguments: those of `measure_convergence`.

    Raises:
        Interrupted: on Ctrl-C, with the run so far in `.partial`.
    """
    environment = capture(seed=seed, command=command)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    notes: list[Note] = []
    noise: NoiseScale | None = None

    def finish(steps: Convergence) -> Run:
        return Run(created, environment, None, noise, steps, None, steps.complete and not notes, tuple(notes))

    def measured() -> NoiseScale | None:
        nonlocal noise
        say = (lambda text, share: progress(f"noise: {text}", share)) if progress is not None else None
        try:
            noise = measure_noise(
                workload, device=device, dtype=dtype, seed=seed, time_budget=noise_budget, progress=say
            )
        except Interrupted:
            raise KeyboardInterrupt from None  # no trial has run: there is nothing to keep
        except PybatchError as error:  # steps can be measured without it
            notes.append(Note("noise", str(error)))
        return noise

    try:
        steps = measure_convergence(
            workload,
            device=device,
            dtype=dtype,
            seed=seed,
            noise=measured if noise_budget > 0 else None,
            progress=progress,
            environment=environment,
            **arguments,
        )
    except Interrupted as stop:
        kept = "finished trials in the store: go on with --resume" if arguments.get("store") else "no trial was stored"
        notes.append(Note("run", f"interrupted: finished batch sizes are in the record, {kept}"))
        raise Interrupted(finish(stop.partial)) from None
    return finish(steps)
