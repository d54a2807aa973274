"""`pybatch bench`: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pybatch.commands import flags
from pybatch.commands.measuring import BUDGET, Shared, check_budget, measure, typed
from pybatch.ranges import parse_batches
from pybatch.records import Run

if TYPE_CHECKING:  # these import torch
    import torch

    from pybatch.workloads.base import Progress, Workload

THOROUGH_BUDGET, QUICK_BUDGET = 180.0, 25.0  # seconds


def bench(
    workload: flags.Workload = "digits",
    model: flags.Model = None,
    data: flags.Data = None,
    option: flags.Dials = None,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes: '1,2,8', '16-4096*2', '16-64+16'. Default: chosen by measuring.")
    ] = None,
    gpu: flags.Gpu = None,
    cpu: flags.Cpu = False,
    dtype: flags.Dtype = "fp32",
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds for all measurements together. Default: 70; with --thorough 180.")
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Take the critical batch from short branched runs, not from noise alone.")
    ] = False,
    seed: flags.Seed = 0,
    format_: flags.Format = None,
    output: flags.Output = None,
    quiet: flags.Quiet = False,
) -> None:
    """Capacity, noise and verdict: the batch size to use for this workload on this device."""
    batches = parse_batches(batch) if batch is not None else None
    budget = time_budget if time_budget is not None else THOROUGH_BUDGET if thorough else BUDGET
    check_budget(budget)

    def job(chosen: Workload, device: torch.device, progress: Progress) -> Run | None:
        from pybatch.bench import run_bench
        from pybatch.capacity.distributed import launched
        from pybatch.together import run_bench_together

        return (run_bench_together if launched() else run_bench)(
            chosen,
            device=device,
            dtype=dtype,
            batches=batches,
            time_budget=budget,
            thorough=thorough,
            seed=seed,
            command=typed(),
            progress=progress,
        )

    measure(job, Shared(workload, model, data, option, gpu, cpu, dtype, seed, format_, output, quiet))
