"""`pybatch bench`: the main job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pybatch.answer.changes import parse_condition
from pybatch.base.errors import UsageError
from pybatch.base.ranges import parse_batches
from pybatch.commands import flags
from pybatch.commands.measuring import BUDGET, DONE, Shared, check_budget, measure, typed
from pybatch.commands.partial import partial_record
from pybatch.commands.saved import read_run, tell_changes
from pybatch.records import Run
from pybatch.report.output import Output

if TYPE_CHECKING:  # these import torch
    import torch

    from pybatch.workloads.base import Progress, Workload

THOROUGH_BUDGET, QUICK_BUDGET = 180.0, 25.0  # seconds


def bench(
    workload: flags.Workload = "digits",
    model: flags.Model = None,
    data: flags.Data = None,
    option: flags.Dials = None,
    size: flags.Size = None,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes: '1,2,8', '16-4096*2', '16-64+16'. Default: chosen by measuring.")
    ] = None,
    gpu: flags.Gpu = None,
    cpu: flags.Cpu = False,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, or bf16 (autocast over fp32 parameters). Default: bf16 for base on a GPU.")
    ] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds for all measurements together. Default: 70.")
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Take the critical batch from short branched runs, not from noise alone.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A time budget of 25 s: wide intervals.")] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Time the model under torch.compile; compiling is told apart.")
    ] = False,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Time CUDA-graph replays, and tell what launching costs. GPU only.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in -o RUN.json that was cut: only what is missing runs."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured, and stop.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report here as well: one HTML page.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Then compare with this saved run.")] = None,
    fail_on: Annotated[
        list[str] | None, typer.Option(help="With --compare: exit with 1 past a change, 'throughput:-3%'; any number.")
    ] = None,
    seed: flags.Seed = 0,
    format_: flags.Format = None,
    output: flags.Output = None,
    quiet: flags.Quiet = False,
) -> None:
    """Capacity, noise and verdict: the batch size to use for this workload on this device."""
    batches = parse_batches(batch) if batch is not None else None
    if quick and thorough:
        raise UsageError("--quick and --thorough exclude each other. Give one of them.")
    if fail_on and compare is None:
        raise UsageError(f"--fail-on {fail_on[0]} needs a run to compare with. Add --compare RUN.json.")
    conditions = [parse_condition(text) for text in fail_on or []]
    before = read_run(compare) if compare is not None else None
    budget = THOROUGH_BUDGET if thorough else QUICK_BUDGET if quick else BUDGET
    budget = time_budget if time_budget is not None else budget
    check_budget(budget)
    partial = partial_record(output, format_, resume)
    earlier = partial.earlier() if partial is not None and resume else None
    stdout = sys.stdout  # while measuring it is stderr, for what a workload prints
    page = Output(html) if html is not None else None  # not writable: said now, not after measuring

    def job(chosen: Workload, device: torch.device, progress: Progress) -> Run | None:
        from pybatch.capacity.distributed import launched
        from pybatch.capacity.modes import Mode
        from pybatch.jobs.bench import run_bench
        from pybatch.jobs.distributed import run_bench_together

        mode = Mode(compile_, cuda_graph)
        mode.check(device)
        used = dtype or ("bf16" if size == "base" and device.type == "cuda" else "fp32")
        if dry_run:
            print(_plan(chosen, device, used, batches, budget, thorough, mode.name), file=stdout)
            if earlier is not None:
                print(f"continues {output}, begun {earlier.created}", file=stdout)
            raise typer.Exit(DONE)
        return (run_bench_together if launched() else run_bench)(
            chosen,
            device=device,
            dtype=used,
            batches=batches,
            time_budget=budget,
            thorough=thorough,
            seed=seed,
            compile=compile_,
            graph=cuda_graph,
            command=typed(),
            progress=progress,
            earlier=earlier,
            on_partial=partial.write if partial is not None else None,
        )

    def then(run: Run, delivered: bool) -> int:
        if partial is not None and delivered:
            partial.discard()
        if html is not None:
            from pybatch.report.formats.html import write_report

            write_report([run], html)
            print(f"pybatch: wrote {html}", file=sys.stderr)
        return tell_changes(before, run, conditions) if before is not None else DONE

    try:
        given = Shared(workload, model, data, option, gpu, cpu, dtype or "fp32", seed, format_, output, quiet, size)
        measure(job, given, then)
    finally:
        if page is not None:
            page.discard()


def _plan(
    workload: Workload,
    device: torch.device,
    dtype: str,
    batches: list[int] | None,
    budget: float,
    thorough: bool,
    mode: str,
) -> str:
    """What a run would do, in words."""
    from pybatch.device.identity import describe

    place = describe(device)
    sizes = ", ".join(map(str, batches)) if batches else "doubled from 1 on until throughput no longer grows"
    stages = "capacity, gradient noise scale" + (", short branched runs" if thorough else "") + ", verdict"
    model = f" ({workload.model_name})" if workload.model_name else ""
    return "\n".join(
        [
            f"workload  {workload.name}{model}, {dtype}",
            f"device    {place.name} ({device})",
            f"batches   {sizes}",
            f"steps     {mode}",
            f"stages    {stages}",
            f"time      {budget:g} s at most, and the start-up",
        ]
    )
