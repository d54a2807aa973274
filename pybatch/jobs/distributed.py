"""The main job in every process that `torchrun` started: process 0 measures one device, then all measure together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from pybatch.answer.verdict import advise
from pybatch.capacity.distributed import measure_distributed, process_group
from pybatch.capacity.exploration import OUT_OF_TIME
from pybatch.jobs.bench import run_bench
from pybatch.jobs.options import BenchOptions
from pybatch.records import Run
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.running.optimizers import adjusted

_ALONE = 0.7  # of the time budget, for one device; several get the rest
_AROUND = (0.25, 0.5, 1.0, 2.0)  # of the best batch, per device: where the answer is looked for


def run_bench_together(
    workload: Workload,
    options: BenchOptions,
    *,
    device: torch.device,
    progress: Progress | None = None,
    earlier: Run | None = None,
    on_partial: Callable[[Run], None] | None = None,
    sweep: Run | None = None,
) -> Run | None:
    """As `run_bench`, with its arguments, and then steps on 2, 4, ..., all devices.

    Every process calls it; process 0 gets the run.

    Raises:
        PybatchError: in process 0, what `run_bench` raises; the others then end without a result.
    """
    workload = adjusted(workload, options.optimizer, options.reference_batch)
    alone = replace(options, time_budget=_ALONE * options.time_budget)
    with process_group(device) as rank:
        run: Run | None = None
        error: BaseException | None = None
        if rank == 0:
            try:
                run = run_bench(
                    workload,
                    alone,
                    device=device,
                    progress=progress,
                    earlier=earlier,
                    on_partial=on_partial,
                    sweep=sweep,
                )
            except BaseException as caught:  # also Ctrl-C: the others wait for an answer
                error = caught
        told: list[Any] = [None]
        if run is not None and not _stands(run):
            told = [_per_device(run, options.batches or ()) or [workload.reference_batch]]
        dist.broadcast_object_list(told, 0)
        if error is not None:
            raise error
        if told[0] is None:
            return run
        together = measure_distributed(
            workload,
            device=device,
            dtype=options.dtype,
            batches=told[0],
            time_budget=options.time_budget - alone.time_budget,
            seed=options.seed,
            progress=progress,
        )
        if run is None:
            return None
        return replace(run, distributed=together, verdict=advise(run.capacity, run.noise, run.convergence, together))


def _stands(run: Run) -> bool:
    """Whether steps on as many devices were measured by the run that this one continues."""
    found = run.distributed
    return found is not None and (found.devices, found.backend) == (dist.get_world_size(), dist.get_backend())


def _per_device(run: Run, asked: Sequence[int]) -> list[int]:
    """Batches per device around the best one, within what ran; smallest, middle and largest where none is known.

    Where time ran out before two did, these and of those asked for, that it left out, the smallest.
    """
    known = {p.batch: p for p in run.capacity.batches} if run.capacity else {}
    ran = [batch for batch, point in known.items() if point.status == "ok"]
    if len(ran) < 2:
        late = sorted(n for n in asked if n not in known or known[n].reason == OUT_OF_TIME)
        return sorted({*ran, *late[: 2 - len(ran)]})
    spread = {ran[0], ran[len(ran) // 2], ran[-1]}
    best = run.verdict.best_batch if run.verdict is not None else None
    if best is None:
        return sorted(spread)
    near = {max(1, min(round(best * factor), max(ran))) for factor in _AROUND}
    return sorted(near if len(near) > 1 else spread)  # one batch can't tell computing from communicating
