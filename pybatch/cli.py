"""The command line: flags in, calls out. Results go to stdout, progress and errors to stderr.

Exit status: 0 done; 1 a condition of --fail-on does not hold; 2 bad arguments, a missing device, or a workload that
fails at once; 3 ran but incomplete, with what was measured written all the same; 130 interrupted before anything was
measured.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pybatch import flags
from pybatch.assignments import parse_optimizer, parse_targets
from pybatch.commands import saved
from pybatch.errors import Interrupted, PybatchError, UsageError
from pybatch.ranges import parse_batches
from pybatch.records import Convergence, Run
from pybatch.report.formats import FORMATS, format_of, print_run, render
from pybatch.report.output import Output
from pybatch.report.progress import ProgressLine

if TYPE_CHECKING:  # these import torch
    import torch

    from pybatch.workloads.base import Progress, Workload

BUDGET, THOROUGH_BUDGET = 70.0, 180.0  # seconds
DONE, BAD_INPUT, INCOMPLETE, INTERRUPTED = 0, 2, 3, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="What batch size, on how many devices, and what does going further cost? Measured on your model and device.",
)


app.command()(saved.report)
app.command()(saved.compare)


@app.command()
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
    _check_budget(budget)

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
            command=_typed(),
            progress=progress,
        )

    _measure(job, _Flags(workload, model, data, option, gpu, cpu, dtype, seed, format_, output, quiet))


@app.command()
def branch(
    workload: flags.Workload = "digits",
    model: flags.Model = None,
    data: flags.Data = None,
    option: flags.Dials = None,
    batch: Annotated[int | None, typer.Option(help="The base run's batch size. Default: the workload's.")] = None,
    factors: Annotated[
        str | None, typer.Option(help="Branches' batch sizes in base batches: '0.5,1,2,4'. Default: 0.25 to 32.")
    ] = None,
    checkpoints: Annotated[
        str, typer.Option(help="Steps of the base run at which to branch: '50,200,800'.")
    ] = "50,200,800",
    optimizer: Annotated[str, typer.Option(help="An optimizer of 'pybatch list'.")] = "adamw",
    lr: Annotated[float | None, typer.Option(help="Rate at the base batch. Default: the workload's.")] = None,
    rule: Annotated[
        str | None, typer.Option(help="How the rate follows the batch. Default: sqrt, for SGD linear.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Repeats of every branch.")] = 3,
    tolerance: Annotated[float, typer.Option(help="Share of the base branch's last loss a batch may lose.")] = 0.02,
    gpu: flags.Gpu = None,
    cpu: flags.Cpu = False,
    dtype: flags.Dtype = "fp32",
    time_budget: Annotated[float, typer.Option(help="Seconds after which no further branch is begun.")] = 600.0,
    keep: Annotated[
        Path | None, typer.Option(help="Folder to keep the checkpoints in; they are found there again.")
    ] = None,
    seed: flags.Seed = 0,
    format_: flags.Format = None,
    output: flags.Output = None,
    quiet: flags.Quiet = False,
) -> None:
    """The critical batch along training, by branching from checkpoints with other batch sizes."""
    steps = [int(step) for step in _numbers("checkpoints", checkpoints, r"[0-9]+", "50,200,800")]
    ks = _numbers("factors", factors, r"[0-9]*\.?[0-9]+", "0.5,1,2,4") if factors is not None else None
    _check_budget(time_budget)

    def job(chosen: Workload, device: torch.device, progress: Progress) -> Run:
        from pybatch.bench import record_convergence
        from pybatch.convergence.branch import FACTORS, measure_branches

        def measure() -> Convergence:
            return measure_branches(
                chosen,
                device=device,
                dtype=dtype,
                checkpoints=steps,
                factors=ks if ks is not None else FACTORS,
                base_batch=batch,
                optimizer=optimizer,
                lr=lr,
                rule=rule,
                seeds=seeds,
                tolerance=tolerance,
                seed=seed,
                time_budget=time_budget,
                folder=keep,
                progress=progress,
            )

        return record_convergence(measure, seed=seed, command=_typed())

    _measure(job, _Flags(workload, model, data, option, gpu, cpu, dtype, seed, format_, output, quiet))


@app.command()
def sweep(
    workload: flags.Workload = "digits",
    model: flags.Model = None,
    data: flags.Data = None,
    option: flags.Dials = None,
    batch: Annotated[str, typer.Option(help="Batch sizes: '1,2,8', '16-2048*2', '16-64+16'.")] = "16-2048*2",
    rule: Annotated[
        str, typer.Option(help="Learning-rate rules of 'pybatch list': 'tuned', or several: 'constant,sqrt,tuned'.")
    ] = "tuned",
    seeds: Annotated[int, typer.Option(help="Trainings of each batch size and rate.")] = 3,
    target: Annotated[
        str | None, typer.Option(help="Losses to reach: 'train=0.1,test=0.2'. Default: the workload's.")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="An optimizer of 'pybatch list', with arguments: 'sgd:momentum=0.9'.")
    ] = "sgd",
    rates: Annotated[
        str | None, typer.Option(help="First learning rates: '0.01,0.1,1'. Default: 12, a factor of 2 apart.")
    ] = None,
    search: Annotated[str, typer.Option(help="grid, or an Optuna sampler: tpe, qmc, random, cmaes.")] = "grid",
    base_batch: Annotated[
        int | None, typer.Option(help="Where rules other than 'tuned' start. Default: the smallest batch.")
    ] = None,
    max_steps: Annotated[int, typer.Option(help="Steps after which a training is given up.")] = 5000,
    store: Annotated[Path | None, typer.Option(help="SQLite file that keeps every training.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a store: only what is missing runs.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes that train at the same time.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Train on a Ray cluster: auto, or HOST:PORT.")] = None,
    noise_budget: Annotated[
        float, typer.Option(help="Seconds for the noise scale, to compare with; 0 leaves it out.")
    ] = 10.0,
    gpu: flags.Gpu = None,
    cpu: flags.Cpu = False,
    dtype: flags.Dtype = "fp32",
    seed: flags.Seed = 0,
    format_: flags.Format = None,
    output: flags.Output = None,
    quiet: flags.Quiet = False,
) -> None:
    """Steps to a loss target against batch size, for each learning-rate rule, and the critical batch."""
    batches = parse_batches(batch)
    targets = parse_targets(target) if target is not None else None
    name, options = parse_optimizer(optimizer)
    grid = _numbers("rates", rates, r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", "0.01,0.1,1") if rates is not None else None
    if not 0 <= noise_budget < float("inf"):
        raise UsageError(f"noise budget {noise_budget:g} s is out of range. Give seconds, or 0 to leave it out.")
    if resume and store is None:
        raise UsageError("--resume goes on with a store, and none is given. Add --store FILE.")

    def job(chosen: Workload, device: torch.device, progress: ProgressLine) -> Run:
        from pybatch.sweep import run_sweep

        return run_sweep(
            chosen,
            device=device,
            dtype=dtype,
            noise_budget=noise_budget,
            seed=seed,
            command=_typed(),
            progress=progress,
            found=progress.line,
            batches=batches,
            rules=[part.strip() for part in rule.split(",")],
            seeds=seeds,
            target=targets,
            optimizer=name,
            options=options,
            rates=grid,
            search=search,
            base_batch=base_batch,
            max_steps=max_steps,
            store=store,
            resume=resume,
            jobs=jobs,
            ray=ray,
        )

    _measure(job, _Flags(workload, model, data, option, gpu, cpu, dtype, seed, format_, output, quiet))


def _numbers(name: str, text: str, pattern: str, example: str) -> list[float]:
    """A list of numbers as typed, each of this form."""
    parts = [part.strip() for part in text.split(",")]
    bad = next((part for part in parts if not re.fullmatch(pattern, part, re.ASCII)), None)
    if bad is not None:
        raise UsageError(f"{name} {text!r}: {bad!r} is no such number. Write '{example}'.")
    return [float(part) for part in parts]


def _check_budget(seconds: float) -> None:
    if not 1 <= seconds < float("inf"):
        raise UsageError(
            f"time budget {seconds:g} s is out of range. Give at least 1 second; the default is {BUDGET:g}."
        )


def _typed() -> str:
    """What the user typed, for the record."""
    return shlex.join(["pybatch", *sys.argv[1:]])


@dataclass(frozen=True)
class _Flags:
    """What every command that measures takes."""

    workload: str
    model: str | None
    data: str | None
    option: list[str] | None
    gpu: int | None
    cpu: bool
    dtype: str
    seed: int
    format: str | None
    output: Path | None
    quiet: bool


def _measure(job: Callable[[Workload, torch.device, ProgressLine], Run | None], given: _Flags) -> NoReturn:
    """Check the flags, run the job with progress, deliver its record, and leave with the exit status."""
    format_ = _checked_format(given.format, given.output)
    if given.gpu is not None and given.cpu:
        raise UsageError("--gpu and --cpu exclude each other. Give one of them.")
    if not 0 <= given.seed < 2**63:
        raise UsageError(f"seed {given.seed} is out of range. Give a whole number from 0 to 2**63 - 1.")
    target = Output(given.output) if given.output is not None else None
    try:
        # Torch takes seconds to import: what can be refused without it has been by now.
        import torch

        from pybatch.capacity.distributed import launched, local_rank
        from pybatch.device.identity import resolve
        from pybatch.workloads.finding import find
        from pybatch.workloads.session import checked_dtype

        checked_dtype(given.dtype)
        gpu = given.gpu
        if launched() and not given.cpu and gpu is None and torch.cuda.is_available():
            gpu = local_rank()
        device = resolve("cpu" if given.cpu else f"cuda:{gpu}" if gpu is not None else None)
        chosen = find(given.workload, model=given.model, data=given.data, options=given.option or ())
        try:
            with ProgressLine(Console(stderr=True), given.quiet or local_rank() > 0) as progress:
                measured = job(chosen, device, progress)
            if measured is None:  # one of torchrun's processes: the first one has the result
                raise typer.Exit(DONE)
            run = measured
        except Interrupted as stop:
            run = stop.partial
        delivered = _deliver(run, format_, target)
    except KeyboardInterrupt:
        print("pybatch: interrupted before anything was measured; nothing was written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if target is not None:
            target.discard()
    raise typer.Exit(DONE if run.complete and delivered else INCOMPLETE)


def _checked_format(format_: str | None, output: Path | None) -> str:
    if format_ is None:
        return format_of(output) if output is not None else "table"
    if format_ not in FORMATS:
        raise UsageError(f"format {format_!r} is not known. Use one of: {', '.join(FORMATS)}.")
    return format_


def _deliver(run: Run, format_: str, target: Output | None) -> bool:
    """Write and print; False where the file could not be written, whose text then goes to stdout."""
    text, written = render(run, format_), target is None
    if target is not None:
        try:
            target.write(text)
            written = True
        except OSError as error:
            what = f"output {str(target.path)!r} cannot be written: {error.strerror}"
            print(f"pybatch: {what}. The result follows on stdout.", file=sys.stderr)
    try:
        if format_ == "table" or (target is not None and written):
            print_run(run, Console())
        else:
            sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if target is not None and written:
        print(f"pybatch: wrote {target.path}", file=sys.stderr)
    return written


@app.command()
def doctor() -> None:
    """What is compiled, which devices are there, which counters can be read, and why one can't."""
    from pybatch.doctor import examine

    _print_findings(examine())


@app.command("list")
def list_() -> None:
    """The workloads and optimizers that ship."""
    from pybatch.doctor import catalogue

    _print_findings(catalogue())


def _print_findings(findings: list[tuple[str, list[tuple[str, str]]]]) -> None:
    console = Console()
    width = max(len(name) for _, rows in findings for name, _ in rows)
    for heading, rows in findings:
        console.print(Text(heading, style="bold"))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(min_width=width, no_wrap=True)
        for name, text in rows:
            grid.add_row(Text(name), Text(text))
        console.print(Padding(grid, (0, 0, 0, 2)))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"pybatch {installed('pybatch')}")
        raise typer.Exit


def _shorten_spinning() -> None:
    """Waiting OpenMP threads shall spin for some 20 us, then sleep. libgomp reads this when torch is imported.

    It spins for milliseconds by default: on a machine with anything else to do, threads wait for each other's time
    slices, and a step of 0.4 ms takes 90 ms. On an idle one this changes little. A user's own setting is kept;
    the record's environment names whichever holds.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def main() -> None:
    """The `pybatch` command."""
    _shorten_spinning()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign must not lose the result
    try:
        app()
    except PybatchError as error:
        print(f"pybatch: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
