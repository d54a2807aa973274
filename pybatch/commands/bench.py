"""`pybatch bench`: the main job."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pybatch.answer.changes import parse_condition
from pybatch.answer.merge import check_sweep
from pybatch.base.arguments import check_seed
from pybatch.base.errors import UsageError
from pybatch.base.plain import visible
from pybatch.base.ranges import LARGEST, parse_batches
from pybatch.commands import flags
from pybatch.commands.assignments import parse_optimizer
from pybatch.commands.measuring import BUDGET, RATE, Delivery, Subject, check_between, check_budget, typed
from pybatch.commands.partial import partial_record
from pybatch.commands.printing import stdout_to_stderr
from pybatch.commands.saved import read_run, read_sweep, tell_changes
from pybatch.jobs.options import BenchOptions
from pybatch.records import Run, StepMode, WorkloadInfo
from pybatch.report.output import Output
from pybatch.workloads.running.choice import OptimizerChoice

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
        str | None,
        typer.Option(help="fp32, bf16 or fp16 (autocast over fp32 parameters). Default: bf16 for base on a GPU."),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="In place of the workload's: one of 'pybatch list', as 'adamw:lr=3e-4,betas=0.9/0.95'."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Rate at the reference batch. Default: the optimizer's.")] = None,
    reference_batch: Annotated[
        int | None, typer.Option(help="Examples of a step of the noise scale's training. Default: the workload's.")
    ] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds for all measurements together. Default: 70.")
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Take the critical batch from short branched runs, not from noise alone.")
    ] = False,
    sweep: Annotated[
        Path | None,
        typer.Option(help="A sweep of this workload, RUN.json or its store: the verdict stands on its steps."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="25 s and the start-up: fewer batch sizes.")] = False,
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
    verbose: flags.Verbose = False,
    price: flags.Price = None,
) -> None:
    """Capacity, noise and verdict: the batch size to use for this workload on this device."""
    if quick and thorough:
        raise UsageError("--quick and --thorough exclude each other. Give one of them.")
    if fail_on and compare is None:
        raise UsageError(f"--fail-on {fail_on[0]} needs a run to compare with. Add --compare RUN.json.")
    check_between("learning rate", lr, 0, RATE, above=True)
    check_between("reference batch", reference_batch, 1, LARGEST)
    name, chosen = parse_optimizer(optimizer, rated=True) if optimizer is not None else (None, {})
    own = chosen.pop("lr", None)
    budget = THOROUGH_BUDGET if thorough else QUICK_BUDGET if quick else BUDGET
    options = BenchOptions(
        time_budget=time_budget if time_budget is not None else budget,
        dtype=dtype or "fp32",
        batches=tuple(parse_batches(batch)) if batch is not None else None,
        coarse=quick,
        thorough=thorough,
        seed=seed,
        compile=compile_,
        graph=cuda_graph,
        optimizer=OptimizerChoice(name, chosen, lr if lr is not None else own),
        reference_batch=reference_batch,
        command=typed(),
    )
    check_budget(options.time_budget)
    check_seed(seed)
    subject = Subject(workload, model, data, option, gpu, cpu, size)
    conditions = [parse_condition(text) for text in fail_on or []]
    page = html.absolute() if html is not None else None  # a workload may change the working directory
    before = read_run(compare) if compare is not None else None
    steps = read_sweep(sweep) if sweep is not None else None
    partial = partial_record(output, format_, resume)
    earlier = partial.earlier() if partial is not None and resume else None
    # What can't be written is said now, not after measuring.
    with (
        Delivery(format_, output, quiet, verbose, price) as delivery,
        Output(html) if html is not None else nullcontext(),
    ):
        delivery.partial = partial.path if partial is not None else None
        found, device = subject.find(options.dtype)
        from pybatch.capacity.modes import Mode

        if dtype is None and size == "base" and device.type == "cuda":
            options = replace(options, dtype="bf16")
        mode = Mode(options.compile, options.graph)
        mode.check(device, options.dtype)
        if dry_run:
            print("\n".join(_dry_run(found, device, options, mode.name, earlier, steps)))
            return
        with delivery.measuring(options.time_budget) as progress:
            delivery.run = _run(found, device, options, progress, earlier, partial.write if partial else None, steps)
        delivery.kept = html
        status = delivery.deliver()
        run = delivery.run
        if run is not None and partial is not None and delivery.written:
            partial.discard()
        if run is not None and page is not None:
            from pybatch.report.formats.html import write_report

            write_report([run], page)
            print(visible(f"pybatch: wrote {html}"), file=sys.stderr)
        if run is not None and before is not None:
            changed = tell_changes(before, run, conditions)
            status = status or changed  # an incomplete run is told as such
    raise typer.Exit(status)


def _run(
    workload: Workload,
    device: torch.device,
    options: BenchOptions,
    progress: Progress,
    earlier: Run | None,
    on_partial: Callable[[Run], None] | None,
    sweep: Run | None,
) -> Run | None:
    """The job on this device, or on all that `torchrun` started a process for."""
    from pybatch.capacity.distributed import launched
    from pybatch.jobs.bench import run_bench
    from pybatch.jobs.distributed import run_bench_together

    job = run_bench_together if launched() else run_bench
    return job(workload, options, device=device, progress=progress, earlier=earlier, on_partial=on_partial, sweep=sweep)


def _info(workload: Workload, asked: BenchOptions) -> WorkloadInfo:
    import torch

    from pybatch.workloads.running.optimizers import adjusted
    from pybatch.workloads.running.session import Session

    with stdout_to_stderr():
        adjusted_ = adjusted(workload, asked.optimizer, asked.reference_batch)
        return Session(adjusted_, torch.device("cpu"), asked.dtype).info


def _optimizer(info: WorkloadInfo) -> str:
    """The optimizer in words."""
    options = "".join(f", {key} {value}" for key, value in info.optimizer_options.items())
    return f"{info.optimizer}, rate {info.learning_rate:g} at batch {info.reference_batch}{options}"


def _dry_run(
    workload: Workload,
    device: torch.device,
    options: BenchOptions,
    mode: StepMode,
    earlier: Run | None,
    sweep: Run | None,
) -> list[str]:
    """What a run would do, in words; raises UsageError where the sweep is of something else."""
    from pybatch.device.identity import describe

    info = _info(workload, options)
    if sweep is not None:
        check_sweep(sweep, info, describe(device))
    chosen = f"{'quadrupled' if options.coarse else 'doubled'} from 1 on until throughput no longer grows"
    sizes = ", ".join(map(str, options.batches)) if options.batches is not None else chosen
    branches = ", short branched runs" if options.thorough else ""
    model = f" ({workload.model_name})" if workload.model_name else ""
    return [
        f"workload  {workload.name}{model}, {options.dtype}",
        f"device    {describe(device).name} ({device})",
        f"batches   {sizes}",
        f"optimizer {_optimizer(info)}",
        f"steps     {mode}",
        f"stages    capacity, gradient noise scale{branches}, verdict",
        f"time      {options.time_budget:g} s at most, and the start-up",
        *([f"verdict   on the sweep of {sweep.created}"] if sweep is not None else []),
        *([f"continues the run begun {earlier.created}"] if earlier is not None else []),
    ]
